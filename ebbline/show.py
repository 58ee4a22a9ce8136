"""What people see in a terminal: live progress, plans and status. Plain lines when the output is not a terminal."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from analysis.compare import Baselines, Evidence
from analysis.costs import as_json as cost_json
from analysis.costs import cost_summary, study_cost, told
from analysis.frontier import frontier_hypervolume
from analysis.report import summary
from analysis.tables import frontier_text, results_frame
from analysis.wording import NO_RESULT, status_label
from cluster.costs import Cost
from cluster.profile import Profile
from sweeps.drive import Progress
from sweeps.home import Home
from sweeps.plan import Plan
from sweeps.points import Result
from sweeps.search import limit
from sweeps.spending import read_spent
from sweeps.study import Study

ORDER = ("language", "convert", "organism", "data", "train", "subspace", "project", "apply", "generate", "judge", "score", "evaluate")
PLAIN_EVERY_S = 5.0


class Screen:
    """Watches a drive. `with Screen() as screen: drive(..., watch=screen)`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._live = Live(console=self.console, refresh_per_second=2, transient=True) if self.console.is_terminal else None
        self._said_at = 0.0
        self._last = ""

    def __enter__(self) -> "Screen":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if self._live:
            self._live.update(_picture(progress))
        elif time.monotonic() - self._said_at >= PLAIN_EVERY_S:
            line = _line(progress)
            if line != self._last:
                self.console.print(line, highlight=False, soft_wrap=True)
            self._said_at, self._last = time.monotonic(), line


def _counts(progress: Progress) -> dict[str, Counter[str]]:
    """Kind -> how many of its stages are in each state; `reused` are those done before this run."""
    counts: dict[str, Counter[str]] = {}
    for node in progress.runner.nodes.values():
        state = "reused" if node.state == "done" and node.reused else node.state
        counts.setdefault(node.stage.kind, Counter())[state] += 1
    return counts


def _line(progress: Progress) -> str:
    total = sum(_counts(progress).values(), Counter[str]())
    elapsed = time.monotonic() - progress.started
    at_work = [progress.planner.label(node.stage) for node in progress.runner.nodes.values() if node.state == "running"]
    head = f"[{_clock(elapsed)}] stages {total['done']} done, {total['reused']} reused, {total['running']} running"
    points = f"points {_points(progress)}, about {_clock(progress.runner.remaining_s())} left for those in flight"
    return f"{head}; {points}; {_spent(progress)}" + (f"; now: {at_work[0]}" if at_work else "")


def _spent(progress: Progress) -> str:
    return f"{told(progress.spending.spent().cost, progress.spending.profile)} spent"


def _points(progress: Progress) -> str:
    return f"{progress.told}" + (f"/{progress.limit}" if progress.limit else "")


def _picture(progress: Progress) -> Group:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "", "done", "reused", "running", "waiting", "failed"):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    counts = _counts(progress)
    for kind in sorted(counts, key=ORDER.index):
        count = counts[kind]
        finished, total = count["done"] + count["reused"], sum(count.values())
        waiting = count["waiting"] + count["ready"]
        numbers = [str(number or "") for number in (count["done"], count["reused"], count["running"], waiting, count["failed"])]
        table.add_row(kind, ProgressBar(total=total, completed=finished, width=24), *numbers)
    elapsed = time.monotonic() - progress.started
    left = _clock(progress.runner.remaining_s())
    said = f"{_clock(elapsed)} so far, about {left} left for those in flight, {_spent(progress)}"
    head = Text(f"{progress.study.study}: {_points(progress)} points, {said}")
    lines: list[Text] = []
    for node in progress.runner.nodes.values():
        if node.state == "running" and (said := progress.runner.progress_of(node)):
            lines.append(Text(f"  {progress.planner.label(node.stage)}  {said}", style="dim", no_wrap=True, overflow="ellipsis"))
    reasons = [
        f"  {status_label(result.status)}: {result.point}: {result.reason.splitlines()[0]}" for result in progress.results if result.reason
    ]
    failed = [Text(reason, style="red") for reason in reasons[-3:]]
    reached = frontier_hypervolume(progress.results, progress.study.objectives)
    return Group(head, table, *lines[:8], *failed, Text(f"hypervolume so far {reached:.3f}" if progress.results else ""))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def print_plan(found: Plan, most: Plan | None, why: int, as_json: bool, profile: Profile) -> None:
    """A plan as a table, or as JSON. `most` is the plan of the whole space, an upper bound while points are unchosen."""
    if as_json:
        kinds = {"new": dict(found.new), "there": dict(found.there), "at_most_new": dict(most.new) if most else None}
        known = {"points": found.points, "unchosen": found.unchosen, "complete": found.complete}
        cost = {"expected": cost_json(found.expected, profile), "at_most_expected": cost_json(most.expected, profile) if most else None}
        print(json.dumps({**known, **kinds, **cost, "misses": [list(miss) for miss in found.misses]}, indent=1))
        return
    console = Console()
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "to run", "there", "at most to run"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for kind in sorted({*found.new, *found.there, *(most.new if most else ())}, key=ORDER.index):
        table.add_row(kind, str(found.new[kind]), str(found.there[kind]), str(most.new[kind]) if most else str(found.new[kind]))
    console.print(table)
    console.print(f"{found.points} points are known, {found.unchosen} are for the search to choose.")
    bound = f"; for the whole space at most {told(most.expected, profile)}" if most else ""
    if found.new or most:
        console.print(f"What is to run is expected to take {told(found.expected, profile)}{bound}.", highlight=False, soft_wrap=True)
    console.print(f"{sum(found.new.values())} misses" + (":" if found.misses else "; a run would find all of them in the store."))
    for name, reason in found.misses[:why]:
        console.print(f"  {name}: {reason}", highlight=False, soft_wrap=True)
    if len(found.misses) > why:
        console.print(f"  and {len(found.misses) - why} more (--why {len(found.misses)} shows all)")


def print_status(
    study: Study, home: Home, results: Sequence[Result], before: Baselines, costs: Mapping[str, Cost], evidence: Evidence, as_json: bool
) -> None:
    """`costs` is what measuring the models before fine-tuning cost, by key."""
    counts = Counter(result.status for result in results)
    holder, spent = home.holder(study.study), read_spent(home.folder(study.study))
    limits = study.budget.model_dump(exclude_none=True)
    if as_json:
        cost = cost_summary(study_cost(results, costs, spent), spent, home.profile)
        print(json.dumps({"driver": holder, "cost": cost, "budget": limits, **summary(study, results, before, evidence)}, indent=1))
        return
    without = "".join(f", {counts[status]} {status_label(status)}" for status in NO_RESULT if counts[status] or status == "failed")
    print(f"{study.study}: {counts['done']} points done, {counts['running']} in flight{without}")
    ended = not counts["running"] and len(results) >= (limit(study) or math.inf)
    print(f"driver: {holder or ('none; all its points are there' if ended else 'none; `ebbline run` continues it')}")
    words = {"hours": "{:g} hours of driving", "gpu_hours": "{:g} GPU-hours", "usd": "${:,.2f}", "points": "{:g} points"}
    budget = ", ".join(words[name].format(value) for name, value in limits.items())
    driven = f"{told(spent.cost, home.profile)} in {spent.driving_s / 3600:.3g} hours of driving"
    print(f"spent: {driven}{f'; the budget: {budget}' if budget else ''}\n")
    print(frontier_text(results_frame(results, study.objectives)))
    for result in results:
        if result.status in NO_RESULT:
            print(f"{status_label(result.status)}: {result.point}: {result.reason}", file=sys.stderr)
