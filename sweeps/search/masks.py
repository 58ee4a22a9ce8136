"""Masks: which modules of an adapter take their projection. Many thresholds give the same one, and
then the same results.

Both rules of `apply` take the lowest cosines first, so of one adapter a mask is known by how many
modules it takes: a *mask* here is that number for each seed's adapter (see
ebbline.tasks.defences.gate.chosen).

Two thresholds with the same modules below them give one adapter, which is measured once. Where an
adapter's cosines are known, so are its twins. Elsewhere the store's applied adapters say how many
are to be expected.
"""

import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.search.knowledge import Cosines
from ebbline.sweeps.state.todo import Todo
from ebbline.sweeps.study.axes import AxisValue, Range
from ebbline.sweeps.study.points import Value
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.gate import chosen, read_rows
from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.specs import ApplySpec, ProjectSpec
from ebbline.tasks.stage import stage_of

Mask = tuple[int, ...]
THRESHOLD, MODULES = "apply.threshold", "apply.modules"


def mask_of(study: Study, values: Mapping[str, Value], cosines: Cosines) -> Mask | None:
    """The mask that a point's `apply.*` values choose; None when they ask for what cannot be."""
    threshold = values.get(THRESHOLD, study.apply.threshold)
    modules = values.get(MODULES, study.apply.modules)
    if threshold is not None and modules is not None:
        return None
    if threshold is not None:
        return tuple(int(np.searchsorted(each, float(threshold), side="right")) for each in cosines)
    if modules is not None:
        return (
            None
            if any(int(modules) > len(each) for each in cosines)
            else tuple(int(modules) for _ in cosines)
        )
    return tuple(0 for _ in cosines)


def share(mask: Mask, cosines: Cosines) -> float:
    """The share of modules that a mask takes, over all seeds."""
    return sum(mask) / max(1, sum(len(each) for each in cosines))


def distinct_masks(study: Study, model: str, cosines: Cosines) -> dict[Mask, dict[str, Value]]:
    """Every mask that a size's axes allow for an adapter, with `apply.*` values that choose it: the
    first in the file's order.

    A range has one representative between each two neighbouring cosines, with as few decimals as
    that takes.
    """
    axes = {
        axis: values for axis, values in study.axes_of(model).items() if axis.startswith("apply.")
    }
    found: dict[Mask, dict[str, Value]] = {}
    listed = [
        [(axis, value) for value in _representatives(axis, values, cosines)]
        for axis, values in axes.items()
    ]
    for combination in itertools.product(*listed):
        values = dict(combination)
        mask = mask_of(study, values, cosines)
        if mask is not None:
            found.setdefault(mask, values)
    return found


def unmeasured(study: Study, model: str, count: int) -> list[dict[str, Value]]:
    """`apply.*` values for an adapter whose cosines are unknown: all of a list, `count` evenly
    spaced ones of a range.
    """
    axes = {
        axis: values for axis, values in study.axes_of(model).items() if axis.startswith("apply.")
    }
    listed = [
        [
            (axis, value)
            for value in (_spaced(values, count) if isinstance(values, Range) else values)
        ]
        for axis, values in axes.items()
    ]
    either = {THRESHOLD: study.apply.threshold, MODULES: study.apply.modules}
    return [
        values
        for each in itertools.product(*listed)
        if None in {**either, **(values := dict(each))}.values()
    ]


def _representatives(
    axis: str, values: tuple[AxisValue, ...] | Range, cosines: Cosines
) -> Iterator[Value]:
    if not isinstance(values, Range):
        yield from values
    elif axis == THRESHOLD:
        edges = np.unique(np.concatenate(cosines)) if cosines else np.array([])
        inside = [float(edge) for edge in edges if values.low < edge <= values.high]
        for low, high in itertools.pairwise([values.low, *inside, np.nextafter(values.high, 2.0)]):
            found = _between(float(low), float(high), values)
            if found is not None:
                yield found
    else:
        yield from range(int(values.low), int(values.high) + 1, int(values.step or 1))


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

    `distinct` is the share of applied adapters that equal no earlier one, for those whose cosines
    are not known.
    """
    resolver = Resolver(store)
    masks: set[tuple[str, frozenset[str]]] = set()
    unknown, same, behind = 0, set[str](), set[str]()
    for missing in found.missing.values():
        spec = missing.stage.spec
        if not isinstance(spec, ApplySpec):
            if any(above in same or above in behind for above in missing.above):
                behind.add(missing.id)
            continue
        projection = stage_of(missing.stage.inputs["projection"])
        artifact = None if projection is None else resolver.artifact(projection)
        if artifact is None:
            unknown += 1
            twin = math.floor(unknown * (1 - distinct)) > math.floor((unknown - 1) * (1 - distinct))
        else:
            try:
                rows = read_rows(artifact.file(ProjectSpec.COSINES))
                mask = artifact.key, chosen(rows, spec.threshold, spec.modules)
            except ProjectionError:  # more modules than it has: this stage will fail and say so
                continue
            twin = mask in masks
            masks.add(mask)
        if twin:
            same.add(missing.id)
    return frozenset(behind)
