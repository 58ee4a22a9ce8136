"""Whether a point without a result should be tried again, in words."""

import re
from collections.abc import Sequence

from ebbline.sweeps.study.points import INVALID, Result

PASSING = re.compile(
    r"OutOfMemory|EndpointDown|StoreError|DiskFull|Damaged|Differs|Incomplete|OSError"
    r"|ConnectionError|Timeout|^lost \d+ times"
)  # failures of a machine, a network or a file, which may be gone at the next try
SAME = "the same settings would fail again; retry it only after you changed the cause"
INPUT = "correct the data, the model or the setting that it names, then retry it"
MACHINE = "the machine or a file may be at fault, so a retry may pass"
AGAIN = "the next run measures it again by itself"
BUDGET = "the next run continues it when the budget is raised"


def advice(result: Result) -> str:
    """Whether to retry a point without a result. Empty for a point that has one or may get one."""
    if result.status == "outdated":
        return AGAIN
    if result.status == "skipped":
        return BUDGET
    if result.status not in ("failed", "invalid"):
        return ""
    if result.reason.startswith(INVALID):
        return INPUT
    return MACHINE if PASSING.search(result.reason) else SAME


def retry_hint(results: Sequence[Result], name: str) -> str:
    """The command that retries the failed points; empty when none failed."""
    numbers = sorted(each.number for each in results if each.status in ("failed", "invalid"))
    if not numbers:
        return ""
    some = " ".join(map(str, numbers[:MOST]))
    return f"to try failed points again: ebbline run {name} --retry" + (
        f", or only some of them: --retry {some}" if len(numbers) > 1 else ""
    )


MOST = 3  # numbers of points that the hint gives as an example
