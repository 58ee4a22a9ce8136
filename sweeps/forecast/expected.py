"""The points that a study would run.

Future choices of a search depend on its results. Random points of the space replace them here: they
are seeded by the study, distinct, and follow the points that the study file lists. A search that
tries further settings of the defence for one adapter trains less than these points suggest.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from ebbline.sweeps.state.trials import read
from ebbline.sweeps.study.axes import AxisValue, Range
from ebbline.sweeps.study.database import PointDatabase
from ebbline.sweeps.study.points import Point, Value
from ebbline.sweeps.study.space import LISTED, limit, listed, space
from ebbline.sweeps.study.study import Study


@dataclass(frozen=True)
class Points:
    """`completed` points have results, `open` ones are in flight; `failed` is a count.

    `chosen` points will be proposed whatever the results are. `drawn` points are random; they
    replace proposals that depend on results. Both are empty when the study ended early; `ended` is
    then the reason.
    """

    completed: tuple[Point, ...]
    open: tuple[Point, ...]
    failed: int
    chosen: tuple[Point, ...]
    drawn: tuple[Point, ...]
    ended: str = ""

    @property
    def to_come(self) -> tuple[Point, ...]:
        """All points without a result, in the order in which they would run."""
        return (*self.open, *self.chosen, *self.drawn)


def expected_points(study: Study, database: PointDatabase, stopped: str = "") -> Points:
    """The points of a study: those in its database, and those to expect.

    `stopped` is the reason why an earlier run stopped asking for points (see
    ebbline.sweeps.state.stopping.still_met), else empty.
    """
    entries, exhausted = read(study, database)
    seen = {entry.point.id for entry in entries}
    most = min((n for n in (limit(study), study.budget.points) if n is not None), default=0)
    ended = (
        (stopped or ("the search has nothing more to propose" if exhausted else ""))
        if len(entries) < most
        else ""
    )
    left = 0 if ended else max(0, most - len(entries))
    chosen = [
        point
        for point in itertools.islice(_written(study), len(entries) + left)
        if point.id not in seen
    ][:left]
    seen |= {point.id for point in chosen}
    drawn = list(
        itertools.islice(
            (point for point in _random(study) if point.id not in seen), left - len(chosen)
        )
    )
    by_state = {
        state: tuple(entry.point for entry in entries if entry.state == state)
        for state in ("done", "running")
    }
    failed = len(entries) - sum(map(len, by_state.values()))
    return Points(by_state["done"], by_state["running"], failed, tuple(chosen), tuple(drawn), ended)


def _written(study: Study) -> Iterator[Point]:
    """The points that depend on no result: those of a grid, a list, and `search.first`."""
    if study.sampler == "grid":
        yield from space(study)
    rows = study.search.list if study.sampler == "list" else study.search.first
    yield from (listed(row, study, "search") for row in rows)


def _random(study: Study) -> Iterator[Point]:
    """Distinct points of the space in a random order; endless when a range has no step."""
    rng = random.Random(study.search.seed)
    size = study.size
    if size is not None and size <= LISTED:
        points = list(space(study))
        for index in rng.sample(range(size), size):
            yield points[index]
        return
    seen: set[str] = set()
    branches = sorted(study.branches, key=lambda branch: branch.model)
    while True:
        branch = rng.choice(branches)
        point = Point.of(
            branch.model, {axis: _value(rng, values) for axis, values in branch.axes.items()}
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
