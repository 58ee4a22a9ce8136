"""The values of an axis or a setting among the points of a study, in the words of a paper."""

from collections.abc import Sequence
from typing import Any

from ebbline.analysis.results.wording import natural, value_label
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study

SHOWN = 10  # most values of an axis that are listed


def value_of(study: Study, result: Result, axis: str) -> Any:
    """A point's value of an axis, or the study's own value for its size."""
    values = dict(result.point.values)
    return values[axis] if axis in values else study.fixed(result.point.model, axis)


def is_varied(results: Sequence[Result], axis: str) -> bool:
    return any(axis in dict(result.point.values) for result in results)


def used_values(results: Sequence[Result], axis: str, otherwise: object) -> str:
    """The values of an axis among the points, or the study's own value."""
    values = {
        dict(result.point.values)[axis] for result in results if axis in dict(result.point.values)
    }
    if not values:
        return value_label(
            otherwise
            if otherwise is None or isinstance(otherwise, bool | int | float | str)
            else str(otherwise)
        )
    ordered = sorted(
        (value_label(value) for value in values),
        key=lambda label: (label != "none", natural(label)),
    )
    if len(ordered) > SHOWN:
        return f"{len(ordered)} values from {ordered[0]} and {ordered[1]} to {ordered[-1]}"
    return listed(ordered, "or")


def listed(names: Sequence[str], last: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
