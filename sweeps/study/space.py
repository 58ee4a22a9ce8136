"""The space of a study's points: its size, its points in order, random points, and the points
written in the study file.
"""

import itertools
import json
from collections.abc import Iterator, Mapping

import numpy as np

from ebbline.sweeps.study.axes import AxisValue, Range, count_of, values_of
from ebbline.sweeps.study.points import Point, Value
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.in_use import AXIS
from ebbline.tasks.errors import StudyError

LISTED = 100_000  # points of the largest space that is listed whole


def limit(study: Study) -> int | None:
    """How many points the study is to have: the number in its file, at most its whole space."""
    requested = len(study.search.list) if study.sampler == "list" else study.search.points
    return min((n for n in (requested, study.size) if n is not None), default=None)


def space(study: Study) -> Iterator[Point]:
    """Every point of the study in the order of the file.

    Raises StudyError for a range without a step.
    """
    for branch in study.branches:
        choices = []
        for axis, values in branch.axes.items():
            if count_of(values) is None:
                raise StudyError(
                    f"axes.{axis} is a range without a step, so its points cannot be listed"
                )
            choices.append([(axis, value) for value in values_of(values)])
        for combination in itertools.product(*choices):
            yield Point.of(branch.model, dict(combination))


def drawn(rng: np.random.Generator, axis: tuple[AxisValue, ...] | Range) -> Value:
    """A uniformly drawn value of an axis; on a log range uniform in the logarithm."""
    if not isinstance(axis, Range):
        return axis[int(rng.integers(len(axis)))]
    if axis.count is not None:
        return axis.at(int(rng.integers(axis.count)))
    if axis.log:
        return min(
            max(float(np.exp(rng.uniform(np.log(axis.low), np.log(axis.high)))), axis.low),
            axis.high,
        )
    return float(rng.uniform(axis.low, axis.high))


def drawn_point(rng: np.random.Generator, study: Study) -> Point:
    """A random point: a uniformly drawn branch, then a value of each of its axes."""
    branch = study.branches[int(rng.integers(len(study.branches)))]
    return Point.of(branch.model, {axis: drawn(rng, own) for axis, own in branch.axes.items()})


def check_written_points(study: Study) -> None:
    """Raise StudyError for a point of `search.first` or `search.list` that is outside the space or
    a duplicate.
    """
    for name in ("first", "list"):
        seen: set[str] = set()
        for k, row in enumerate(getattr(study.search, name)):
            point = listed(row, study, f"search.{name}[{k}]")
            if point.id in seen:
                raise StudyError(
                    f"search.{name}[{k}]: duplicate point {point}; each point runs once, and "
                    "`seeds` repeats it"
                )
            seen.add(point.id)


def listed(row: Mapping[str, AxisValue], study: Study, where: str) -> Point:
    """A point written in the study file. Raises StudyError when the model or an axis is missing,
    or a value is outside the space.
    """
    values = dict(row)
    model = str(values.pop("model", ""))
    if model not in study.models:
        raise StudyError(f"{where} must give `model` (one of {sorted(study.models)})")
    branches = study.branches_of(model)
    fitting = [branch.axes for branch in branches if set(branch.axes) == set(values)]
    of_defence = [axes for axes in fitting if (values.get(AXIS),) == axes.get(AXIS, (None,))]
    axes = next(iter(of_defence or fitting), None)
    if axes is None:
        wanted = " or ".join(str(sorted(branch.axes)) for branch in branches)
        raise StudyError(
            f"{where} must give `model` (one of {sorted(study.models)}) and each of "
            f"{wanted or 'no axis: this size has no points'}"
        )
    for axis, value in values.items():
        if not within(value, axes[axis]):
            raise StudyError(
                f"{where}: {axis}={value!r} is not a value of that axis for {model}, which "
                f"has {_described(axes[axis])}."
                " Give one of these, or widen the axis"
            )
    return Point.of(model, {axis: written(value, axes[axis]) for axis, value in values.items()})


def within(value: AxisValue, axis: tuple[AxisValue, ...] | Range) -> bool:
    """Whether `value` is on the axis; a range with a step has only the values on its steps."""
    if isinstance(axis, Range):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not axis.low <= value <= axis.high
        ):
            return False
        return axis.step is None or abs(axis.nearest(value) - value) < 1e-9 * axis.step
    return json.dumps(value) in [
        json.dumps(choice) for choice in axis
    ]  # 1, 1.0 and true are three values


def written(value: AxisValue, axis: tuple[AxisValue, ...] | Range) -> AxisValue:
    """A value in the axis's own form, so that equal points have one id: 4 for 4.0 on a range over
    whole numbers.
    """
    return (
        axis.nearest(value) if isinstance(axis, Range) and isinstance(value, int | float) else value
    )


def _described(axis: tuple[AxisValue, ...] | Range) -> str:
    if not isinstance(axis, Range):
        return json.dumps(list(axis))
    low, high = axis.edges
    return f"{low} to {high}" + ("" if axis.step is None else f" in steps of {axis.step:g}")
