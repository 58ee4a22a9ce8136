"""The importance of each axis for each objective: functional ANOVA over the finished points.

A random forest predicts an objective from the axes. The importance of an axis is the share of the
forest's variance that the axis explains alone, over the whole space (Hutter, Hoos and Leyton-Brown
2014). Interactions and noise explain the rest. Importance has no sign, and it covers only the part
of the space where points were run.

Invariants: there is no number for an axis with one value, for a constant objective, or from fewer
than FEWEST points. Of more than MOST points, a random sample of MOST is used, with a fixed seed.
The intervals are those of a study with as many points as are used.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ebbline.sweeps.search.forest_shares import Column, forest_shares
from ebbline.sweeps.study.axes import Range
from ebbline.sweeps.study.points import Result, Value, brought, defence_of
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.in_use import owner

MODEL = "model"
FEWEST, FEW, MOST = 10, 50, 500
TREES = 32
RESAMPLES, TREES_EACH = 25, 8  # Efron and Tibshirani (1993): 25 resamples for a standard error
METHOD = "fANOVA (Hutter et al. 2014)"


@dataclass(frozen=True)
class AxisShare:
    """The share of an objective's variance that an axis explains, in [0, 1].

    `interval` is a normal 95% interval from a bootstrap over points (Efron 1979).
    """

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Importance:
    """The shares of an objective by axis, from this number of `points`; the axis `model` is the
    size. The points are a sample of `finished`, where there are more.

    `of_defence` has the shares of the knobs of each defence, among that defence's points alone.
    `without` has the reason for each axis without a number, `reason` the reason why there is no
    number at all. For `uneven` axes, one model was run with fewer values than another. So part of
    their share may belong to the model, and part of the model's share to them.
    """

    points: int
    shares: Mapping[str, AxisShare] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    of_defence: Mapping[str, AxisShare] = field(default_factory=dict)
    uneven: tuple[str, ...] = ()
    reason: str = ""
    finished: int | None = None

    @property
    def few(self) -> bool:
        return bool(self.shares) and self.points < FEW


def importances(study: Study, results: Sequence[Result]) -> dict[str, Importance]:
    """The importance of every axis by objective, from the finished points of all models."""
    done = sorted(
        (result for result in results if result.status == "done"), key=lambda result: result.number
    )
    used = done
    if len(done) > MOST:
        kept = np.random.default_rng(0).choice(len(done), MOST, replace=False)
        used = [done[place] for place in sorted(kept.tolist())]
    columns, without = _columns(study, used)
    if study.defences:
        without = {axis: reason for axis, reason in without.items() if owner(axis) is None}
    uneven = tuple(axis for axis in columns if axis != MODEL and _is_uneven(axis, done))
    found = {
        name: _importance(columns, without, [result.metrics[name].value for result in used])
        for name in study.objectives
    }
    knobs = {name: _of_defences(study, used, name) for name in study.objectives}
    return {
        name: replace(
            each,
            uneven=uneven if each.shares else (),
            of_defence=knobs[name][0],
            without={**each.without, **knobs[name][1]},
            finished=len(done) if len(done) > MOST else None,
        )
        for name, each in found.items()
    }


def _of_defences(
    study: Study, done: Sequence[Result], objective: str
) -> tuple[dict[str, AxisShare], dict[str, str]]:
    """The shares of each defence's knobs among its own points, and the reasons for none."""
    shares, without = dict[str, AxisShare](), dict[str, str]()
    for defence in study.used_defences if study.defences else ():
        own = [result for result in done if defence_of(result.point) is defence]
        axes = list(dict.fromkeys(axis for each in own for axis, _ in each.point.values))
        knobs = [axis for axis in axes if defence.owns(axis)]
        columns, lacking = _columns(study, own)
        found = _importance(columns, lacking, [each.metrics[objective].value for each in own])
        for axis in knobs:
            if axis in found.shares:
                shares[axis] = found.shares[axis]
            else:
                without[axis] = lacking.get(axis) or found.reason
    return shares, without


def _is_uneven(axis: str, done: Sequence[Result]) -> bool:
    values: dict[str, set[str]] = defaultdict(set)
    for result in done:
        values[result.point.model].add(json.dumps(dict(result.point.values)[axis]))
    return len({frozenset(each) for each in values.values()}) > 1 and min(
        map(len, values.values())
    ) < max(map(len, values.values()))


def _importance(
    columns: Mapping[str, Column], without: Mapping[str, str], values: Sequence[float]
) -> Importance:
    count = len(values)
    if count < FEWEST:
        return Importance(
            count,
            without=without,
            reason=f"{count} finished points are too few; at least {FEWEST} are needed",
        )
    if not columns:
        return Importance(
            count, without=without, reason="no axis that all models have was run with two values"
        )
    if max(values) - min(values) == 0:
        return Importance(count, without=without, reason=f"all {count} points have the same value")
    whole, rng = forest_shares(columns, values, range(count), TREES), np.random.default_rng(0)
    if whole is None:
        return Importance(count, without=without, reason="the axes explain none of its variance")
    drawn = (rng.integers(count, size=count).tolist() for _ in range(RESAMPLES))
    resampled = [
        shares
        for rows in drawn
        if (shares := forest_shares(columns, values, rows, TREES_EACH)) is not None
    ]
    found = {}
    for axis, value in whole.items():
        reach = (
            1.96 * statistics.stdev([shares[axis] for shares in resampled])
            if len(resampled) > 1
            else 1.0
        )
        found[axis] = AxisShare(value, (max(0.0, value - reach), min(1.0, value + reach)))
    return Importance(count, dict(sorted(found.items(), key=lambda item: -item[1].value)), without)


def _columns(study: Study, done: Sequence[Result]) -> tuple[dict[str, Column], dict[str, str]]:
    """The axes with two values or more, and the reason for each other axis."""
    trained = all(brought(result.point) is None for result in done)
    rows = [{MODEL: result.point.model, **dict(result.point.values)} for result in done]
    axes = [MODEL, *dict.fromkeys(axis for model in study.models for axis in study.axes_of(model))]
    columns, without = dict[str, Column](), dict[str, str]()
    for axis in axes:
        if axis == MODEL and len(study.models) == 1:
            continue
        if not all(axis in row for row in rows):
            without[axis] = "not every model has it" if trained else "not every point has it"
        elif len({json.dumps(row[axis]) for row in rows}) < 2:
            without[axis] = "one value"
        else:
            columns[axis] = _column([row[axis] for row in rows], study.axes.get(axis))
    return columns, without


def _column(values: Sequence[Value], axis: object) -> Column:
    """Encode the values of an axis for the forest.

    Numbers of a list become their rank, so that all values weigh the same; null ranks first. Names
    are categories. Numbers of a range stay as they are.
    """
    numbers = [
        value for value in values if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if isinstance(axis, Range) and len(numbers) == len(values):
        return Column(numbers, min(axis.low, *numbers), max(axis.high, *numbers))
    ranked: list[Value] = [*([None] if None in values else []), *sorted(set(numbers))]
    if len(numbers) + sum(value is None for value in values) == len(values):
        place = {value: index for index, value in enumerate(ranked)}
        return Column([place[value] for value in values], 0, len(ranked) - 1)
    names = sorted({json.dumps(value) for value in values})
    return Column([names.index(json.dumps(value)) for value in values], 0, 1, len(names))
