"""Ray's label selectors: a value, `!value`, `in(a,b)` or `!in(a,b)`. A host must match all of them.

As in Ray's scheduler, a host without the label matches `!value` and `!in`, but no value and no
`in`.
"""

import re
from collections.abc import Mapping
from functools import cache

from ebbline.tasks.errors import StudyError

_VALUE = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(
    rf"(?P<no>!?)(?:in\((?P<many>{_VALUE}(?:, ?{_VALUE})*)\)|(?P<one>{_VALUE}))|"
)  # the empty alternative at the end: an empty value is allowed


@cache
def parse(selector: str) -> tuple[bool, frozenset[str]]:
    """(included, values): whether the label must be one of the values, or must be none of them.
    Raises StudyError for any other syntax.
    """
    found = _SELECTOR.fullmatch(selector)
    if found is None:
        raise StudyError(
            f"label selector {selector!r} is invalid; write a value, `!value`, `in(a,b)` or "
            "`!in(a,b)`"
        )
    many = found["many"]
    values = (
        frozenset(value.strip() for value in many.split(","))
        if many
        else frozenset({found["one"] or ""})
    )
    return not found["no"], values


def selected(selectors: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a host with `labels` matches all selectors (label -> selector)."""
    for name, selector in selectors.items():
        included, values = parse(selector)
        if (labels.get(name) in values) != included:
            return False
    return True
