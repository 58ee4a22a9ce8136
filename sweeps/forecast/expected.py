"""The points that a study would run: those that are known, and for those that its search has yet to
choose, points that it might.

What a search will choose depends on what it measures. In place of its choices stand random points
of the space, seeded by the study, each once, after those that the file writes out. A search that
returns to an adapter for another setting of its defence trains less than they say.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from ebbline.sweeps.state.trials import read
from ebbline.sweeps.study.axes import AxisValue, Range
from ebbline.sweeps.study.points import Point, Value
from ebbline.sweeps.study.space import LISTED, limit, listed, space
from ebbline.sweeps.study.storage import Storage
from ebbline.sweeps.study.study import Study


@dataclass(frozen=True)
class Points:
    """`told` have been measured, `open` are under way, so many have `failed` and stay so.

    `chosen` will be asked for whatever is measured, `drawn` stand for those that depend on it.
    There is neither once the study has `ended` before it had all its points, which says why.
    """

    told: tuple[Point, ...]
    open: tuple[Point, ...]
    failed: int
    chosen: tuple[Point, ...]
    drawn: tuple[Point, ...]
    ended: str = ""

    @property
    def to_come(self) -> tuple[Point, ...]:
        """All that have not been told, in the order in which they would be run."""
        return (*self.open, *self.chosen, *self.drawn)


def points_of(study: Study, storage: Storage, stopped: str = "") -> Points:
    """What is known of a study's points before it runs, and what may be expected of the others.

    `stopped` says why its driver asks for nothing more, where an earlier run of it found so (see
    ebbline.sweeps.state.stopping.still_met).
    """
    known, exhausted = read(study, storage)
    seen = {entry.point.id for entry in known}
    most = min((n for n in (limit(study), study.budget.points) if n is not None), default=0)
    ended = (
        (stopped or ("the search has nothing more to propose" if exhausted else ""))
        if len(known) < most
        else ""
    )
    left = 0 if ended else max(0, most - len(known))
    chosen = [
        point
        for point in itertools.islice(_written(study), len(known) + left)
        if point.id not in seen
    ][:left]
    seen |= {point.id for point in chosen}
    drawn = list(
        itertools.islice(
            (point for point in _random(study) if point.id not in seen), left - len(chosen)
        )
    )
    by_state = {
        state: tuple(entry.point for entry in known if entry.state == state)
        for state in ("done", "running")
    }
    failed = len(known) - sum(map(len, by_state.values()))
    return Points(by_state["done"], by_state["running"], failed, tuple(chosen), tuple(drawn), ended)


def _written(study: Study) -> Iterator[Point]:
    """The points that do not depend on any result: a grid's, a list's, and those to begin with."""
    if study.sampler == "grid":
        yield from space(study)
    rows = study.search.list if study.sampler == "list" else study.search.first
    yield from (listed(row, study, "search") for row in rows)


def _random(study: Study) -> Iterator[Point]:
    """Points of the space in a random order, each once; without an end when an axis is a range
    without a step.
    """
    rng = random.Random(study.search.seed)
    size = study.size
    if size is not None and size <= LISTED:
        every = list(space(study))
        for place in rng.sample(range(size), size):
            yield every[place]
        return
    seen: set[str] = set()
    while True:
        name = rng.choice(sorted(study.models))
        point = Point.of(
            name, {axis: _value(rng, values) for axis, values in study.axes_of(name).items()}
        )
        if point.id not in seen:
            seen.add(point.id)
            yield point


def _value(rng: random.Random, values: tuple[AxisValue, ...] | Range) -> Value:
    if not isinstance(values, Range):
        return rng.choice(values)
    if values.count is not None:
        return values.at(rng.randrange(values.count))
    low, high = values.edges
    drawn = (
        math.exp(rng.uniform(math.log(low), math.log(high)))
        if values.log
        else rng.uniform(low, high)
    )
    return min(max(drawn, low), high)
