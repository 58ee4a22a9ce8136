"""Masks: the effects of a defence's knobs on the adapters of a point, one adapter for each seed.

Settings with the same mask give the same adapters, which are evaluated once. The defence decides
which settings these are (ebbline.tasks.defences.defence.Defence.mask). For Safe LoRA, a mask is
the number of projected modules of each adapter.

For measured adapters, duplicates are exact. For others, their number is estimated from the
defended adapters in the store.
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
from ebbline.tasks.defences.defence import Defence, Mask
from ebbline.tasks.defences.in_use import DEFENCES, NONE
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.specs import ApplySpec, DefendSpec, Spec
from ebbline.tasks.stage import stage_of

__all__ = ["Mask", "distinct_masks", "duplicates", "is_off", "mask_of", "unmeasured"]

CONTINUOUS = 21  # values considered of a range whose every value gives another adapter


def mask_of(
    study: Study, defence: Defence, values: Mapping[str, Value], adapters: Readings
) -> Mask | None:
    """The mask of a point's knobs; None when they are impossible for one of the adapters."""
    return defence.mask(study.knobs(defence, values), adapters)


def is_off(study: Study, defence: Defence, values: Mapping[str, Value]) -> bool:
    """Whether a point's knobs leave every adapter as it was trained."""
    return defence.is_off(study.knobs(defence, values))


def distinct_masks(
    study: Study, defence: Defence, model: str, adapters: Readings
) -> dict[Mask, dict[str, Value]]:
    """All masks that a model's axes allow for these adapters, each with the first knobs that give
    it, in the file's order.

    A range has one value between each two neighbouring edges, with as few decimals as possible. A
    mask that changes no module is left out where the study has points with no defence.
    """
    found: dict[Mask, dict[str, Value]] = {}
    listed = [
        [(axis, value) for value in _representatives(defence, axis, values, adapters)]
        for axis, values in _axes(study, defence, model).items()
    ]
    unchanged_once = bool(study.defences) and defence.name != NONE
    for combination in itertools.product(*listed):
        values = dict(combination)
        mask = mask_of(study, defence, values, adapters)
        if mask is not None and (any(mask) or not unchanged_once):
            found.setdefault(mask, values)
    return found


def unmeasured(study: Study, defence: Defence, model: str, count: int) -> list[dict[str, Value]]:
    """Knob settings for an unmeasured adapter: all values of lists, `count` evenly spaced values of
    ranges.
    """
    listed = [
        [
            (axis, value)
            for value in (_spaced(values, count) if isinstance(values, Range) else values)
        ]
        for axis, values in _axes(study, defence, model).items()
    ]
    combinations = (dict(each) for each in itertools.product(*listed))
    return [values for values in combinations if defence.is_possible(study.knobs(defence, values))]


def _axes(study: Study, defence: Defence, model: str) -> dict[str, tuple[AxisValue, ...] | Range]:
    return {axis: v for axis, v in study.axes_of(model).items() if defence.is_knob(axis)}


def _representatives(
    defence: Defence, axis: str, values: tuple[AxisValue, ...] | Range, adapters: Readings
) -> Iterator[Value]:
    if not isinstance(values, Range):
        yield from values
        return
    if defence.is_continuous(axis):
        yield from _spaced(values, CONTINUOUS)
        return
    edges = defence.edges(axis, adapters)
    if edges is None:
        yield from range(int(values.low), int(values.high) + 1, int(values.step or 1))
        return
    inside = [edge for edge in edges if values.low < edge <= values.high]
    for low, high in itertools.pairwise([values.low, *inside, np.nextafter(values.high, 2.0)]):
        found = _between(float(low), float(high), values)
        if found is not None:
            yield found


def _between(low: float, high: float, axis: Range) -> float | None:
    """A value of the axis in [low, high), with as few decimals as possible.

    None when no multiple of its step lies there.
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


def duplicates(found: Todo, store: Store, distinct: float) -> frozenset[str]:
    """The ids of stages that are expected not to run, as they read a duplicate adapter.

    For unmeasured adapters, `distinct` is the share of defended adapters that are no duplicates.
    """
    resolver = Resolver(store)
    masks: set[tuple[str, str, Mask]] = set()
    unmeasured_count, same, skipped = 0, set[str](), set[str]()
    for missing in found.missing.values():
        spec = missing.stage.spec
        defence = _maker(spec)
        if defence is None:
            if any(above in same or above in skipped for above in missing.above):
                skipped.add(missing.id)
            continue
        measuring = stage_of(missing.stage.inputs[defence.measured_input])
        artifact = None if measuring is None else resolver.artifact(measuring)
        if artifact is None:
            # Spread the expected number of duplicates evenly
            before = math.floor(unmeasured_count * (1 - distinct))
            unmeasured_count += 1
            is_duplicate = math.floor(unmeasured_count * (1 - distinct)) > before
        else:
            mask = defence.mask(defence.knobs(spec, {}), [defence.reading(artifact.file)])
            if mask is None:  # more modules than the adapter has: the stage will fail
                continue
            own = artifact.key, defence.name, mask
            is_duplicate = own in masks
            masks.add(own)
        if is_duplicate:
            same.add(missing.id)
    return frozenset(skipped)


def _maker(spec: Spec) -> Defence | None:
    """The defence whose second stage has this Spec; None for any other stage, and for a control."""
    if isinstance(spec, DefendSpec):
        return DEFENCES[spec.method] if spec.control is None else None
    return SAFE_LORA if isinstance(spec, ApplySpec) else None
