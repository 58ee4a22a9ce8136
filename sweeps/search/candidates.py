"""The adapters that a search has asked for, and what may be asked for next: new ones, and further
masks of those that there are.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ebbline.sweeps.search.knowledge import Knowledge, Readings
from ebbline.sweeps.search.masks import Mask, distinct_masks, is_off, mask_of, share, unmeasured
from ebbline.sweeps.state.trials import Entry
from ebbline.sweeps.study.axes import AxisValue, Range, count_of, values_of
from ebbline.sweeps.study.points import Point, Value, adapter_of, training_of
from ebbline.sweeps.study.space import drawn
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.in_use import DEFENCE
from ebbline.tasks.identity import digest

LISTED = 4096  # adapters of a space that is written out; of a larger one, some are drawn
OPEN, OPTIONS = 16, 10  # adapters considered for further masks, and masks of each
FRESH = 24  # new adapters considered
GUESSES = 6  # settings of the knobs considered for an adapter that is not measured
LIKE = 16  # measured adapters that stand in for one that is not made


@dataclass
class Adapter:
    """`left` are the masks that were not asked for, once it is `measured`; `asked` are all knobs
    that were.
    """

    point: Point
    asked: list[dict[str, Value]] = field(default_factory=list)
    running: int = 0
    told: bool = False
    failed: bool = False
    promise: float = 0.0
    measured: Readings | None = None
    left: dict[Mask, dict[str, Value]] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A point that may be proposed. `cost` is what it adds; `opens` what further masks of its
    adapter take each, if it is new.
    """

    point: Point
    share: float
    cost: float
    adapter: Point
    fresh: bool = False
    measure: float = 0.0


class Adapters:
    """Kept from ask to ask. With `search.order: in_turn`, what was measured of an adapter counts
    once a point of it was told, and not as soon as it is there.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self.by_point: dict[Point, Adapter] = {}
        self._trainings: set[Point] = set()
        self._unknown: dict[Point, Adapter] = {}
        self._open: dict[Point, Adapter] = {}
        self._like: dict[str, list[Readings]] = {}
        self._guesses = {
            model: _even(unmeasured(study, model, GUESSES), GUESSES) for model in study.models
        }
        self._space: dict[str, list[Point] | None] = {
            model: _listed(study, model) for model in study.models
        }

    def asked(self, entry: Entry) -> None:
        point = adapter_of(entry.point)
        adapter = self.by_point.get(point)
        if adapter is None:
            adapter = self.by_point[point] = self._unknown[point] = Adapter(point)
            self._trainings.add(training_of(entry.point))
        values = _applied(entry.point)
        adapter.asked.append(values)
        adapter.running += 1
        if adapter.measured is not None:
            self._take(adapter, values)

    def told(self, entry: Entry, promise: float, known: Knowledge) -> None:
        """Take in what became of a point, and what was measured of its adapter."""
        adapter = self.by_point[adapter_of(entry.point)]
        adapter.running -= 1
        adapter.told = True
        adapter.failed = adapter.failed or entry.state == "failed"
        adapter.promise = max(adapter.promise, promise)
        if adapter.point in self._unknown:
            self._look_at(adapter, known)

    def look(self, known: Knowledge) -> None:
        """Take in the adapters that were measured since the last time; in turn, each waits until a
        point of it is told.
        """
        if not self._study.search.in_turn:
            for adapter in list(self._unknown.values()):
                self._look_at(adapter, known)

    def _look_at(self, adapter: Adapter, known: Knowledge) -> None:
        adapter.measured = known.measured(adapter.point)
        if adapter.measured is not None:
            del self._unknown[adapter.point]
            adapter.left = distinct_masks(self._study, adapter.point.model, adapter.measured)
            for values in adapter.asked:
                self._take(adapter, values)
            if adapter.left:
                self._open[adapter.point] = adapter
            self._like.setdefault(adapter.point.model, []).append(adapter.measured)
        elif adapter.told and not adapter.running:
            del self._unknown[adapter.point]  # it failed before it had any

    def knows(self, point: Point) -> bool:
        """Whether a point's adapter is measured, so that its share is no guess."""
        adapter = self.by_point.get(adapter_of(point))
        return adapter is not None and adapter.measured is not None

    def share_of(self, point: Point) -> float:
        """The share of modules that a point projects: of its adapter, or of adapters like it while
        that one is not known.
        """
        adapter, values = self.by_point.get(adapter_of(point)), _applied(point)
        if adapter is not None and adapter.measured is not None:
            mask = mask_of(self._study, values, adapter.measured)
            return 1.0 if mask is None else share(mask, adapter.measured)
        return self._guessed(point.model, values)

    def _guessed(self, model: str, values: dict[str, Value]) -> float:
        like = self._like.get(model) or [
            measured for each in self._like.values() for measured in each
        ]
        masks = [
            (mask, measured)
            for measured in like[-LIKE:]
            if (mask := mask_of(self._study, values, measured)) is not None
        ]
        if masks:
            return float(np.mean([share(mask, measured) for mask, measured in masks]))
        return _share_of_nothing(self._study, model, values)

    def further(self, known: Knowledge, k: int) -> list[Candidate]:
        """Masks that were not asked for, of adapters that exist."""
        found = []
        for adapter in self._considered(k):
            measured = adapter.measured or ()
            work = known.work(adapter.point)
            left = sorted(adapter.left.items(), key=lambda item: item[0])
            for mask, values in _spread(left, OPTIONS, k):
                found.append(
                    Candidate(
                        _with(adapter.point, values),
                        share(mask, measured),
                        work.measure,
                        adapter.point,
                    )
                )
        for adapter in self._unknown.values():
            # One setting of an adapter that is not measured, and none beside: two might choose the
            # same mask.
            if adapter.failed:
                continue
            on = any(not is_off(self._study, values) for values in adapter.asked)
            for values in self._guesses[adapter.point.model]:
                if values not in adapter.asked and not (on and not is_off(self._study, values)):
                    point = _with(adapter.point, values)
                    found.append(
                        Candidate(
                            point, self.share_of(point), known.work(point).measure, adapter.point
                        )
                    )
        return found

    def fresh(self, known: Knowledge, k: int, near: Sequence[Point]) -> list[Candidate]:
        """New adapters at some settings each; `near` are adapters whose neighbours are worth a
        look where a space cannot be listed.
        """
        found = []
        for model in self._study.models:
            count = max(6, FRESH // len(self._study.models))
            guesses = {
                round(self._guessed(model, values), 6): values
                for values in reversed(self._guesses[model])
            }
            for adapter in self._new(
                model, k, count, [point for point in near if point.model == model]
            ):
                work = known.work(adapter)
                cost = (
                    (0.0 if training_of(adapter) in self._trainings else work.train)
                    + work.project
                    + work.measure
                )
                for portion, values in guesses.items():
                    found.append(
                        Candidate(
                            _with(adapter, values),
                            portion,
                            cost,
                            adapter,
                            fresh=True,
                            measure=work.measure,
                        )
                    )
        return found

    def _considered(self, k: int) -> list[Adapter]:
        if len(self._open) <= OPEN:
            return list(self._open.values())
        first = sorted(self._open.values(), key=lambda adapter: -adapter.promise)[: OPEN // 2]
        names = {adapter.point for adapter in first}
        others = [adapter for adapter in self._open.values() if adapter.point not in names]
        return first + [
            others[(k * OPEN + n) % len(others)] for n in range(min(OPEN - len(first), len(others)))
        ]

    def _new(self, model: str, k: int, count: int, near: Sequence[Point]) -> list[Point]:
        listed = self._space[model]
        if listed is not None:
            new = [point for point in listed if point not in self.by_point]
            if len(new) <= count:
                return new
            rng = _rng(self._study, k, model)
            return [new[index] for index in sorted(rng.choice(len(new), count, replace=False))]
        rng = _rng(self._study, k, model)
        axes = adapter_axes(self._study, model)
        found: dict[Point, None] = {}
        for n in range(4 * count):
            values = {axis: drawn(rng, choices) for axis, choices in axes.items()}
            if near and n % 2:
                values = {**values, **dict(near[n % len(near)].values)}
                axis = list(axes)[int(rng.integers(len(axes)))]
                values[axis] = drawn(rng, axes[axis])
            point = Point.of(model, values)
            if point not in self.by_point:
                found.setdefault(point)
        return list(found)[:count]

    def _take(self, adapter: Adapter, values: Mapping[str, Value]) -> None:
        mask = mask_of(self._study, values, adapter.measured or ())
        if mask is not None:
            adapter.left.pop(mask, None)
        if not adapter.left:
            self._open.pop(adapter.point, None)


def adapter_axes(study: Study, model: str) -> dict[str, tuple[AxisValue, ...] | Range]:
    return {
        axis: values for axis, values in study.axes_of(model).items() if not DEFENCE.is_knob(axis)
    }


def _listed(study: Study, model: str) -> list[Point] | None:
    """All adapters of a size, or None when they cannot be listed or are too many to."""
    axes = adapter_axes(study, model)
    counts = [count_of(values) for values in axes.values()]
    if None in counts or math.prod(count or 0 for count in counts) > LISTED:
        return None
    choices = [[(axis, value) for value in values_of(values)] for axis, values in axes.items()]
    return [Point.of(model, dict(each)) for each in itertools.product(*choices)]


def _applied(point: Point) -> dict[str, Value]:
    return {axis: value for axis, value in point.values if DEFENCE.is_knob(axis)}


def _with(adapter: Point, values: Mapping[str, Value]) -> Point:
    return Point.of(adapter.model, {**dict(adapter.values), **values})


def _share_of_nothing(study: Study, model: str, values: Mapping[str, Value]) -> float:
    """Before any adapter is measured: how far along its axis a value lies."""
    for axis, value in values.items():
        if isinstance(value, int | float):
            own = study.axes_of(model)[axis]
            numbers = (
                list(own.edges)
                if isinstance(own, Range)
                else [float(x) for x in own if isinstance(x, int | float)]
            )
            low, high = min(numbers), max(numbers)
            return (value - low) / (high - low) if high > low else 0.5
    return 0.0


def _spread(
    items: Sequence[tuple[Mask, dict[str, Value]]], count: int, k: int
) -> list[tuple[Mask, dict[str, Value]]]:
    """At most `count` items, evenly spaced, others each time."""
    if len(items) <= count:
        return list(items)
    step = len(items) / count
    return [items[int((n + (k * 0.618) % 1.0) * step) % len(items)] for n in range(count)]


def _even(items: list[dict[str, Value]], count: int) -> list[dict[str, Value]]:
    """At most `count` items, evenly spaced, the first and the last among them."""
    return (
        items
        if len(items) <= count
        else [
            items[index]
            for index in sorted({round(x) for x in np.linspace(0, len(items) - 1, count)})
        ]
    )


def _rng(study: Study, k: int, what: str) -> np.random.Generator:
    return np.random.default_rng(
        int(digest({"seed": study.search.seed, "k": k, "what": what})[:12], 16)
    )
