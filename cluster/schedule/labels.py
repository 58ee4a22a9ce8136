"""Label selectors as Ray writes and judges them: a value, `!value`, `in(a,b)`, `!in(a,b)`; several
must all hold.

A host without the label fails a value and an `in`, and holds for `!value` and `!in`: as Ray's own
scheduler judges it.
"""

import re
from collections.abc import Mapping
from functools import cache

from ebbline.tasks.errors import StudyError

_VALUE = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(
    rf"(?P<no>!?)(?:in\((?P<many>{_VALUE}(?:, ?{_VALUE})*)\)|(?P<one>{_VALUE}))|"
)  # an empty value is one, too


@cache
def parse(selector: str) -> tuple[bool, frozenset[str]]:
    """(wanted, values): whether the label must be one of the values, or must not. Raises StudyError
    on any other syntax.
    """
    found = _SELECTOR.fullmatch(selector)
    if found is None:
        raise StudyError(
            f"label selector {selector!r} is none that Ray knows; write a value, `!value`, "
            "`in(a,b)` or `!in(a,b)`"
        )
    many = found["many"]
    values = (
        frozenset(value.strip() for value in many.split(","))
        if many
        else frozenset({found["one"] or ""})
    )
    return not found["no"], values


def selected(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a host with `labels` is one that `wanted` selects."""
    for name, selector in wanted.items():
        inside, values = parse(selector)
        if (labels.get(name) in values) != inside:
            return False
    return True
