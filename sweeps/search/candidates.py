"""The candidates of a stage-aware search: new adapters, and further masks of proposed adapters."""

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ebbline.sweeps.search.knowledge import Knowledge, Readings
from ebbline.sweeps.search.masks import Mask, distinct_masks, is_off, mask_of, unmeasured
from ebbline.sweeps.state.trials import Entry
from ebbline.sweeps.study.adapters.branches import Branch
from ebbline.sweeps.study.axes import AxisValue, Range, count_of, values_of
from ebbline.sweeps.study.points import Point, Value, adapter_of, defence_of, is_of, training_of
from ebbline.sweeps.study.space import drawn
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.defences.in_use import is_knob
from ebbline.tasks.identity import digest

LISTED = 4096  # a space with more adapters is not listed; candidates are drawn from it
OPEN, OPTIONS = 16, 10  # adapters considered for further masks, and masks of each
NEW = 96  # new adapters considered
GUESSES = 6  # knob settings considered for an adapter that is not measured
Owner = tuple[str, str]
"""A model and the name of a defence."""
SIMILAR = 16  # measured adapters from which the share of an unmeasured one is guessed


@dataclass
class ProposedAdapter:
    """An adapter of at least one proposed point.

    `settings` are the knob settings of its points. Once it is `measured`, `left` has the masks that
    no point has. `running` counts its points in flight; `completed` is true after its first result.
    `promise` is the best product of objectives among its points.
    """

    point: Point
    settings: list[dict[str, Value]] = field(default_factory=list)
    running: int = 0
    completed: bool = False
    failed: bool = False
    promise: float = 0.0
    measured: Readings | None = None
    left: dict[Mask, dict[str, Value]] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A point that may be proposed. `cost` is the work that it adds, in GPU-seconds.

    `share` is the share of modules that its mask changes. For a new adapter, `evaluate` is the
    work of each further mask, in GPU-seconds.
    """

    point: Point
    share: float
    cost: float
    adapter: Point
    fresh: bool = False
    evaluate: float = 0.0


class Adapters:
    """The proposed adapters of a study, kept between proposals.

    With `search.order: in_turn`, the measurement of an adapter counts only after the first result
    of one of its points, so that proposals do not depend on timing.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self.by_point: dict[Point, ProposedAdapter] = {}
        self._trainings: set[Point] = set()
        self._unmeasured: dict[Point, ProposedAdapter] = {}
        self._open: dict[Point, ProposedAdapter] = {}
        self._readings: dict[Owner, list[Readings]] = {}
        # Knob settings -> guessed share, by model, until the next adapter is measured
        self._guessed_shares: dict[Owner, dict[tuple[tuple[str, Value], ...], float]] = {}
        self._guesses = {
            (model, defence.name): _evenly(unmeasured(study, defence, model, GUESSES), GUESSES)
            for model in study.models
            for defence in study.used_defences
        }
        # The branches, with the adapters that no proposed point has, where they can be listed
        self._space = [(branch, _listed(branch)) for branch in study.branches]

    def add(self, entry: Entry) -> None:
        """Record a proposed point."""
        point = adapter_of(entry.point)
        adapter = self.by_point.get(point)
        if adapter is None:
            adapter = self.by_point[point] = self._unmeasured[point] = ProposedAdapter(point)
            self._trainings.add(training_of(entry.point))
            for _, listed in self._space:
                if listed is not None:
                    listed.pop(point, None)
        values = _knob_values(entry.point)
        adapter.settings.append(values)
        adapter.running += 1
        if adapter.measured is not None:
            self._remove_mask(adapter, values)

    def complete(self, entry: Entry, promise: float, knowledge: Knowledge) -> None:
        """Record the result of a point, and the measurement of its adapter."""
        adapter = self.by_point[adapter_of(entry.point)]
        adapter.running -= 1
        adapter.completed = True
        adapter.failed = adapter.failed or entry.state == "failed"
        adapter.promise = max(adapter.promise, promise)
        if adapter.point in self._unmeasured:
            self._read(adapter, knowledge)

    def read_measured(self, knowledge: Knowledge) -> None:
        """Read the adapters measured since the last call; does nothing with `order: in_turn`."""
        if not self._study.search.in_turn:
            for adapter in list(self._unmeasured.values()):
                self._read(adapter, knowledge)

    def _read(self, adapter: ProposedAdapter, knowledge: Knowledge) -> None:
        adapter.measured = knowledge.readings(adapter.point)
        if adapter.measured is not None:
            del self._unmeasured[adapter.point]
            adapter.left = distinct_masks(
                self._study, defence_of(adapter.point), adapter.point.model, adapter.measured
            )
            for values in adapter.settings:
                self._remove_mask(adapter, values)
            if adapter.left:
                self._open[adapter.point] = adapter
            self._readings.setdefault(_owner(adapter.point), []).append(adapter.measured)
            self._guessed_shares.clear()
        elif adapter.completed and not adapter.running:
            del self._unmeasured[adapter.point]  # it failed before its measurement

    def is_measured(self, point: Point) -> bool:
        """Whether a point's adapter is measured, so that its share is exact."""
        adapter = self.by_point.get(adapter_of(point))
        return adapter is not None and adapter.measured is not None

    def share_of(self, point: Point) -> float:
        """The share of modules that a point changes, in [0, 1].

        While its adapter is unmeasured, this is the mean share over measured adapters.
        """
        adapter, values = self.by_point.get(adapter_of(point)), _knob_values(point)
        defence = defence_of(point)
        if adapter is not None and adapter.measured is not None:
            mask = mask_of(self._study, defence, values, adapter.measured)
            return 1.0 if mask is None else defence.share(mask, adapter.measured)
        return self._guessed(point.model, defence, values)

    def _guessed(self, model: str, defence: Defence, values: dict[str, Value]) -> float:
        known = self._guessed_shares.setdefault((model, defence.name), {})
        own = tuple(sorted(values.items()))
        if own not in known:
            known[own] = self._guess(model, defence, values)
        return known[own]

    def _guess(self, model: str, defence: Defence, values: dict[str, Value]) -> float:
        similar = self._readings.get((model, defence.name)) or [
            measured
            for (_, name), each in self._readings.items()
            if name == defence.name
            for measured in each
        ]
        masks = [
            (mask, measured)
            for measured in similar[-SIMILAR:]
            if (mask := mask_of(self._study, defence, values, measured)) is not None
        ]
        if masks:
            return float(np.mean([defence.share(mask, measured) for mask, measured in masks]))
        return _share_by_value(self._study, model, values)

    def further(self, knowledge: Knowledge, k: int) -> list[Candidate]:
        """Candidates for proposal `k` with a new mask of a proposed adapter."""
        found = []
        for adapter in self._considered(k):
            measured, defence = adapter.measured or (), defence_of(adapter.point)
            work = knowledge.work(adapter.point)
            left = sorted(adapter.left.items(), key=lambda item: item[0])
            for mask, values in _spread(left, OPTIONS, k):
                found.append(
                    Candidate(
                        _with(adapter.point, values),
                        defence.share(mask, measured),
                        work.evaluate,
                        adapter.point,
                    )
                )
        for adapter in self._unmeasured.values():
            # An unmeasured adapter gets one setting besides "off": two might give the same mask
            if adapter.failed:
                continue
            defence = defence_of(adapter.point)
            on = any(not is_off(self._study, defence, values) for values in adapter.settings)
            for values in self._guesses[_owner(adapter.point)]:
                off = is_off(self._study, defence, values)
                if values not in adapter.settings and (off or not on):
                    point = _with(adapter.point, values)
                    found.append(
                        Candidate(
                            point,
                            self.share_of(point),
                            knowledge.work(point).evaluate,
                            adapter.point,
                        )
                    )
        return found

    def fresh(self, knowledge: Knowledge, k: int, near: Sequence[Point]) -> list[Candidate]:
        """Candidates for proposal `k` with a new adapter, at several knob settings each.

        In a space that cannot be listed, half of the draws are neighbours of `near`, which are
        adapters.
        """
        found = []
        for branch, listed in self._space:
            model, count = branch.model, max(6, NEW // len(self._space))
            defence = branch.defence
            guesses = {
                round(self._guessed(model, defence, values), 6): values
                for values in reversed(self._guesses[model, defence.name])
            }
            close = [point for point in near if is_of(point, branch)]
            for adapter in self._new(branch, listed, k, count, close):
                work = knowledge.work(adapter)
                cost = (
                    (0.0 if training_of(adapter) in self._trainings else work.train)
                    + work.project
                    + work.evaluate
                )
                for portion, values in guesses.items():
                    found.append(
                        Candidate(
                            _with(adapter, values),
                            portion,
                            cost,
                            adapter,
                            fresh=True,
                            evaluate=work.evaluate,
                        )
                    )
        return found

    def _considered(self, k: int) -> list[ProposedAdapter]:
        if len(self._open) <= OPEN:
            return list(self._open.values())
        # As sorted by falling promise, without sorting all of them
        first = heapq.nlargest(OPEN // 2, self._open.values(), key=lambda each: each.promise)
        chosen = {id(adapter) for adapter in first}
        others = [adapter for adapter in self._open.values() if id(adapter) not in chosen]
        return first + [
            others[(k * OPEN + n) % len(others)] for n in range(min(OPEN - len(first), len(others)))
        ]

    def _new(
        self,
        branch: Branch,
        listed: Mapping[Point, None] | None,
        k: int,
        count: int,
        near: Sequence[Point],
    ) -> list[Point]:
        model = branch.model
        if listed is not None:
            new = list(listed)
            if len(new) <= count:
                return new
            rng = _rng(self._study, k, model)
            return [new[index] for index in sorted(rng.choice(len(new), count, replace=False))]
        rng = _rng(self._study, k, model)
        axes = adapter_axes(branch)
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

    def _remove_mask(self, adapter: ProposedAdapter, values: Mapping[str, Value]) -> None:
        mask = mask_of(self._study, defence_of(adapter.point), values, adapter.measured or ())
        if mask is not None:
            adapter.left.pop(mask, None)
        if not adapter.left:
            self._open.pop(adapter.point, None)


def adapter_axes(branch: Branch) -> dict[str, tuple[AxisValue, ...] | Range]:
    return {axis: values for axis, values in branch.axes.items() if not is_knob(axis)}


def _owner(point: Point) -> Owner:
    return point.model, defence_of(point).name


def _listed(branch: Branch) -> dict[Point, None] | None:
    """All adapters of a branch, in order; None when they are not countable, or more than LISTED."""
    axes = adapter_axes(branch)
    counts = [count_of(values) for values in axes.values()]
    if None in counts or math.prod(count or 0 for count in counts) > LISTED:
        return None
    choices = [[(axis, value) for value in values_of(values)] for axis, values in axes.items()]
    return {Point.of(branch.model, dict(each)): None for each in itertools.product(*choices)}


def _knob_values(point: Point) -> dict[str, Value]:
    return {axis: value for axis, value in point.values if is_knob(axis)}


def _with(adapter: Point, values: Mapping[str, Value]) -> Point:
    return Point.of(adapter.model, {**dict(adapter.values), **values})


def _share_by_value(study: Study, model: str, values: Mapping[str, Value]) -> float:
    """A guess before any adapter is measured: the relative position of a value on its axis."""
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
    """At most `count` evenly spaced items; the first one varies with `k`."""
    if len(items) <= count:
        return list(items)
    step = len(items) / count
    return [items[int((n + (k * 0.618) % 1.0) * step) % len(items)] for n in range(count)]


def _evenly(items: list[dict[str, Value]], count: int) -> list[dict[str, Value]]:
    """At most `count` evenly spaced items, including the first and the last."""
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
