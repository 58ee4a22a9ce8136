"""The space of a study's points: its size, its points in order where it can be listed, and the points that a file writes out."""

import itertools
import json
from collections.abc import Iterator, Mapping

from sweeps.axes import AxisValue, Range
from sweeps.points import Point
from sweeps.study import Study
from tasks.errors import StudyError


def limit(study: Study) -> int | None:
    """How many points the study is to have: what it asks for, or its whole space if that is smaller."""
    wanted = len(study.search.list) if study.sampler == "list" else study.search.points
    return min((n for n in (wanted, study.size) if n is not None), default=None)


def finite(study: Study) -> bool:
    return study.size is not None


def space(study: Study) -> Iterator[Point]:
    """Every point of a study whose axes are all lists, in the order of the file."""
    for name in study.models:
        choices = []
        for axis, values in study.axes_of(name).items():
            if isinstance(values, Range):
                raise StudyError(f"axes.{axis} is a range; it has no list of points")
            choices.append([(axis, value) for value in values])
        for combination in itertools.product(*choices):
            yield Point.of(name, dict(combination))


def check_written_points(study: Study) -> None:
    """Raise StudyError for a point of `search.first` or `search.list` that is not in the space, or stands twice."""
    for name in ("first", "list"):
        seen: set[str] = set()
        for k, row in enumerate(getattr(study.search, name)):
            point = listed(row, study, f"search.{name}[{k}]")
            if point.id in seen:
                raise StudyError(f"search.{name} gives the point {point} twice; each point runs once, seeds are its repeats")
            seen.add(point.id)


def listed(row: Mapping[str, AxisValue], study: Study, where: str) -> Point:
    """A point written out in the study file. Raises StudyError when it lacks the model or an axis, or leaves the space."""
    values = dict(row)
    model = str(values.pop("model", ""))
    if model not in study.models:
        raise StudyError(f"{where} must give `model` (one of {sorted(study.models)})")
    axes = study.axes_of(model)
    if set(values) != set(axes):
        raise StudyError(f"{where} must give `model` (one of {sorted(study.models)}) and each of {sorted(axes)}")
    for axis, value in values.items():
        if not within(value, axes[axis]):
            raise StudyError(f"{where}: {axis}={value!r} is not a value of that axis for {model}, which has {axes[axis]}")
    return Point.of(model, values)


def within(value: AxisValue, axis: tuple[AxisValue, ...] | Range) -> bool:
    if isinstance(axis, Range):
        return isinstance(value, int | float) and not isinstance(value, bool) and axis.low <= value <= axis.high
    return json.dumps(value) in [json.dumps(choice) for choice in axis]  # 1, 1.0 and true are three values
