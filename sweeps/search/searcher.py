"""Choosing points: stage-aware search, Optuna's samplers, a grid and a fixed list behind one
ask/tell protocol.

The Optuna storage is the one truth about points and their state (ebbline.sweeps.state.trials). A
proposal is a function of the study file, its number k, and what the points before it have come to:
samplers are seeded by k and keep nothing that those do not say. So a driver that was killed asks,
on restart, for what it would have asked; when it tells in the order of asking, proposal k has seen
exactly the results that were told before it, and all proposals are a function of the study file
alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ebbline.sweeps.search.knowledge import Knowledge
from ebbline.sweeps.search.samplers import Drawn, OptunaSampler
from ebbline.sweeps.state.replicates import error_of
from ebbline.sweeps.state.trials import (
    GPU_HOURS,
    NOT_A_POINT,
    REFUSAL_FLOOR,
    Entry,
    Trials,
    reaching,
    read,
)
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.space import (
    LISTED,
    check_written_points,
    drawn_point,
    limit,
    listed,
    space,
)
from ebbline.sweeps.study.storage import Storage
from ebbline.sweeps.study.study import Constraints, Study
from ebbline.tasks.errors import StudyError

if TYPE_CHECKING:
    from ebbline.sweeps.search.stage_aware import StageAware

__all__ = [
    "NOT_A_POINT",
    "WAIT",
    "OptunaSearcher",
    "Searcher",
    "asked",
    "check_written_points",
    "limit",
    "reaching",
    "space",
]


class Wait(Enum):
    WAIT = "nothing is worth asking for until something lands"


WAIT = Wait.WAIT


class Searcher(Protocol):
    """Proposes distinct points and is told what became of them."""

    def in_flight(self) -> Sequence[tuple[int, Point]]:
        """Points that were asked for and not told, oldest first: what a restarted driver continues
        with.
        """

    def told(self) -> int:
        """How many points have been told."""

    def measured(self) -> Sequence[tuple[int, Point]]:
        """The points that were told with their objectives: their artifacts should be in the store,
        and are made again if not.
        """

    def ask(self, known: Knowledge) -> tuple[int, Point] | Wait | None:
        """The next point and its number; WAIT when there is none before something lands, None when
        there is none left at all.
        """

    def tell(self, number: int, result: Result) -> None:
        """Record what became of a point: its objectives with their standard errors, or the reason
        it failed.
        """

    @property
    def constrained(self) -> bool:
        """Whether there are constraints, or were. They may have changed since points were told:
        these are to be amended before there is another point.
        """

    def estimate(self, known: Knowledge) -> None:
        """Work out what points take that were asked for when there was no ceiling."""

    def amend(self, number: int, result: Result) -> None:
        """What a point that was told before is found to have measured, over more seeds or against
        other constraints: the search goes by it; the storage keeps what was told.
        """

    def gave_up(self) -> Mapping[int, int]:
        """Number -> how many seeds a point can have, of points of which a further one failed."""

    def give_up(self, number: int, most: int, reason: str) -> None:
        """Record that a point can have no more than `most` seeds, as a further one failed. It stays
        so, as a failed point does.
        """


class OptunaSearcher:
    """Every sampler of a study file, over Optuna's storage. Make one driver's worth at a time: see
    Home.driving.

    With `search.order: in_turn`, results are told in the order of asking, and what was measured
    counts from then on, so that proposals depend on no timing.
    """

    def __init__(self, study: Study, storage: Storage, begun_as: str = "") -> None:
        """`begun_as` is a digest of the settings that the study had before it was widened."""
        self.study = study
        self.trials = Trials(study, storage, begun_as)
        self.constrained = study.search.constraints != Constraints() or any(
            entry.misses for entry in self.trials.entries
        )
        self._limit = limit(study)
        self._known = {entry.point for entry in self.trials.entries}
        self._told = sum(entry.state != "running" for entry in self.trials.entries)
        self._grid = space(study) if study.sampler == "grid" else None
        self._optuna = OptunaSampler(study)
        self._stage_aware = _stage_aware(study) if study.sampler in ("stage_aware", "gp") else None

    def in_flight(self) -> Sequence[tuple[int, Point]]:
        return [
            (k, entry.point)
            for k, entry in enumerate(self.trials.entries)
            if entry.state == "running"
        ]

    def told(self) -> int:
        return self._told

    def measured(self) -> Sequence[tuple[int, Point]]:
        return [
            (k, entry.point) for k, entry in enumerate(self.trials.entries) if entry.state == "done"
        ]

    def teach(self, study: str, found: Sequence[Entry]) -> None:
        """Take in what another study measured (see ebbline.sweeps.search.warm_start); of a study
        that taught before, nothing more.
        """
        self.trials.teach(study, found)

    def ask(self, known: Knowledge) -> tuple[int, Point] | Wait | None:
        k = len(self.trials.entries)
        if self._limit is not None and k >= self._limit:
            return None
        found = self._next(known, k)
        if found is WAIT:
            return WAIT
        if found is None:
            self.trials.exhaust()
            return None
        point, drawn = found
        if point in self._known:
            raise StudyError(
                f"the study file gives the point {point} twice; each point runs once, "
                "seeds are its repeats"
            )
        self._known.add(point)
        if self.study.search.constraints.gpu_hours is not None:
            drawn = {**drawn, GPU_HOURS: known.work(point).whole / 3600}
        return self.trials.add(point, drawn), point

    def tell(self, number: int, result: Result) -> None:
        self._told += 1
        if result.status != "done":
            self.trials.fail(number, result.reason)
            return
        metrics = [result.metrics[name] for name in self.study.objectives]
        misses = self._misses(self.trials.entries[number], result)
        self.trials.finish(
            number,
            [metric.value for metric in metrics],
            [error_of(metric) for metric in metrics],
            misses,
        )

    def amend(self, number: int, result: Result) -> None:
        metrics = [result.metrics[name] for name in self.study.objectives]
        misses = self._misses(self.trials.entries[number], result)
        amended = self.trials.amend(
            number,
            [metric.value for metric in metrics],
            [error_of(metric) for metric in metrics],
            misses,
        )
        self._optuna.amend()
        if self._stage_aware is not None:
            self._stage_aware.amend(amended)

    def estimate(self, known: Knowledge) -> None:
        if self.study.search.constraints.gpu_hours is not None:
            for number, entry in enumerate(self.trials.entries):
                if entry.state != "failed" and GPU_HOURS not in entry.drawn:
                    drawn = {**entry.drawn, GPU_HOURS: known.work(entry.point).whole / 3600}
                    self.trials.entries[number] = replace(entry, drawn=drawn)

    def gave_up(self) -> Mapping[int, int]:
        return {
            k: entry.max_seeds
            for k, entry in enumerate(self.trials.entries)
            if entry.max_seeds is not None
        }

    def give_up(self, number: int, most: int, reason: str) -> None:
        self.trials.give_up(number, most, reason)

    def _misses(self, entry: Entry, result: Result) -> dict[str, float]:
        """By how much a result misses each constraint; at most 0 when it holds."""
        wanted, found = self.study.search.constraints, {}
        refusal = self.study.refusal_metric
        if wanted.refusal_floor and refusal is not None:
            found[REFUSAL_FLOOR] = self.study.refusal_floor - result.metrics[refusal].value
        if wanted.gpu_hours is not None:
            found[GPU_HOURS] = entry.drawn[GPU_HOURS] - wanted.gpu_hours
        return found

    def _next(self, known: Knowledge, k: int) -> Drawn | Wait | None:
        fixed = self._fixed(k)
        if fixed is not None:
            return fixed, {}
        if self._stage_aware is not None:
            point, later = self._stage_aware.propose(
                self.trials.entries, self.trials.taught, known, k
            )
            return (point, {}) if point is not None else WAIT if later else None
        found = self._optuna.propose(self.trials.entries, self.trials.taught, self._known, k)
        # A sampler that keeps proposing what is known: any point of the space that is not, by the
        # seed.
        return found or (self._unvisited(k), {})

    def _fixed(self, k: int) -> Point | None:
        if self._grid is not None:
            return next((point for point in self._grid if point not in self._known), None)
        if self.study.sampler == "list":
            return listed(self.study.search.list[k], self.study, f"search.list[{k}]")
        first = self.study.search.first
        return listed(first[k], self.study, f"search.first[{k}]") if k < len(first) else None

    def _unvisited(self, k: int) -> Point:
        """A point of the space that is not known. There is one: no more are asked for than there
        are (see ebbline.sweeps.study.space.limit).
        """
        if self.study.size is not None and self.study.size <= LISTED:
            left = sorted(
                (point for point in space(self.study) if point not in self._known),
                key=lambda point: point.id,
            )
            return left[k % len(left)]
        rng = np.random.default_rng((self.study.search.seed, k))
        while (point := drawn_point(rng, self.study)) in self._known:
            pass
        return point


def _stage_aware(study: Study) -> "StageAware":
    from ebbline.sweeps.search.stage_aware import (
        StageAware,  # scikit-learn takes a second, which only those who search pay
    )

    return StageAware(study)


def asked(study: Study, storage: Storage) -> list[tuple[int, Point, str, str]]:
    """(number, point, state, reason) of every point asked so far, for readers; state is running,
    done or failed.
    """
    return [
        (k, entry.point, entry.state, entry.reason)
        for k, entry in enumerate(read(study, storage)[0])
    ]
