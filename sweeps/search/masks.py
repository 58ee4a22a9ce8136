"""Masks: what a defence's knobs come to for the adapters of a point, one for each seed. Many
settings give the same one, and then the same results.

Which settings do is the defence's to say (see ebbline.tasks.defences.defence.Defence.outcome); for
Safe LoRA a mask is how many modules of each adapter take their projection.

Two settings with one outcome give one adapter, which is measured once. Where an adapter is
measured, its duplicates are known. Elsewhere the store's defended adapters say how many are to be
expected.
"""

import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.search.knowledge import Readings
from ebbline.sweeps.state.todo import Todo
from ebbline.sweeps.study.axes import AxisValue, Range
from ebbline.sweeps.study.points import Value
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.defence import Outcome as Mask
from ebbline.tasks.defences.in_use import DEFENCE
from ebbline.tasks.stage import stage_of

__all__ = ["Mask", "distinct_masks", "is_off", "mask_of", "share", "twins", "unmeasured"]

__all__ = ["Mask", "distinct_masks", "is_off", "mask_of", "share", "unmeasured"]


def mask_of(study: Study, values: Mapping[str, Value], adapters: Readings) -> Mask | None:
    """The mask that a point's knobs choose; None when they ask for what cannot be."""
    return DEFENCE.outcome(_knobs(study, values), adapters)


def is_off(study: Study, values: Mapping[str, Value]) -> bool:
    """Whether a point's knobs leave every adapter as it was trained."""
    return DEFENCE.is_off(_knobs(study, values))


def share(mask: Mask, adapters: Readings) -> float:
    """The share of modules that a mask takes, over all seeds."""
    return DEFENCE.share(mask, adapters)


def distinct_masks(study: Study, model: str, adapters: Readings) -> dict[Mask, dict[str, Value]]:
    """Every mask that a size's axes allow for its adapters, with knobs that choose it: the first in
    the file's order.

    A range has one representative between each two neighbouring edges, with as few decimals as
    that takes.
    """
    found: dict[Mask, dict[str, Value]] = {}
    listed = [
        [(axis, value) for value in _representatives(axis, values, adapters)]
        for axis, values in _axes(study, model).items()
    ]
    for combination in itertools.product(*listed):
        values = dict(combination)
        mask = mask_of(study, values, adapters)
        if mask is not None:
            found.setdefault(mask, values)
    return found


def unmeasured(study: Study, model: str, count: int) -> list[dict[str, Value]]:
    """Knobs for an adapter that is not measured: all values of a list, `count` evenly spaced ones
    of a range.
    """
    listed = [
        [
            (axis, value)
            for value in (_spaced(values, count) if isinstance(values, Range) else values)
        ]
        for axis, values in _axes(study, model).items()
    ]
    every = (dict(each) for each in itertools.product(*listed))
    return [values for values in every if DEFENCE.is_possible(_knobs(study, values))]


def _knobs(study: Study, values: Mapping[str, Value]) -> dict[str, Value]:
    return DEFENCE.knobs(study.settings[DEFENCE.makes.KIND], values)


def _axes(study: Study, model: str) -> dict[str, tuple[AxisValue, ...] | Range]:
    return {axis: v for axis, v in study.axes_of(model).items() if DEFENCE.is_knob(axis)}


def _representatives(
    axis: str, values: tuple[AxisValue, ...] | Range, adapters: Readings
) -> Iterator[Value]:
    if not isinstance(values, Range):
        yield from values
        return
    edges = DEFENCE.edges(axis, adapters)
    if edges is None:
        yield from range(int(values.low), int(values.high) + 1, int(values.step or 1))
        return
    inside = [edge for edge in edges if values.low < edge <= values.high]
    for low, high in itertools.pairwise([values.low, *inside, np.nextafter(values.high, 2.0)]):
        found = _between(float(low), float(high), values)
        if found is not None:
            yield found


def _between(low: float, high: float, axis: Range) -> float | None:
    """A value of the axis in [low, high), with as few decimals as that takes; None when its step
    leaves none there.
    """
    if axis.step is not None:
        steps = range(
            max(0, int((low - axis.low) / axis.step)), int((high - axis.low) / axis.step) + 2
        )
        return next(
            (value for n in steps if low <= (value := axis.at(n)) < high and value <= axis.high),
            None,
        )
    short = (round((low + min(high, axis.high)) / 2, decimals) for decimals in range(1, 17))
    return next(
        (value for value in short if low <= value < high and axis.low <= value <= axis.high), low
    )


def _spaced(axis: Range, count: int) -> list[Value]:
    if axis.count is not None:
        return [
            axis.at(n) for n in sorted({round(x) for x in np.linspace(0, axis.count - 1, count)})
        ]
    return [round(float(x), 6) for x in np.linspace(axis.low, axis.high, count)]


def twins(found: Todo, store: Store, distinct: float) -> frozenset[str]:
    """The ids of stages that read from an adapter that is expected to equal an earlier one, and so
    are expected not to run.

    `distinct` is the share of defended adapters that equal no earlier one, for those that are not
    measured.
    """
    resolver = Resolver(store)
    masks: set[tuple[str, Mask]] = set()
    unknown, same, behind = 0, set[str](), set[str]()
    for missing in found.missing.values():
        spec = missing.stage.spec
        if spec.KIND != DEFENCE.makes.KIND:
            if any(above in same or above in behind for above in missing.above):
                behind.add(missing.id)
            continue
        projection = stage_of(missing.stage.inputs["projection"])
        artifact = None if projection is None else resolver.artifact(projection)
        if artifact is None:
            unknown += 1
            twin = math.floor(unknown * (1 - distinct)) > math.floor((unknown - 1) * (1 - distinct))
        else:
            outcome = DEFENCE.outcome(DEFENCE.knobs(spec, {}), [DEFENCE.measured(artifact.file)])
            if outcome is None:  # more modules than it has: this stage will fail and say so
                continue
            mask = artifact.key, outcome
            twin = mask in masks
            masks.add(mask)
        if twin:
            same.add(missing.id)
    return frozenset(behind)
