"""Proposes points: stage-aware search, Optuna's samplers, a grid and a fixed list behind one
ask/tell protocol.

The study's database is the only source of points and their states (ebbline.sweeps.state.trials).

Invariant: proposal k is a function of the study file, of k, and of the results recorded before it.
Samplers are seeded by k and keep no other state. So a restarted driver gets the proposals that the
killed one would have got. When results are recorded in the order of asking, all proposals are a
function of the study file alone.
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
from ebbline.sweeps.study.database import PointDatabase
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.policies import Constraints
from ebbline.sweeps.study.space import (
    LISTED,
    check_written_points,
    drawn_point,
    limit,
    listed,
    space,
)
from ebbline.sweeps.study.study import Study
from ebbline.tasks.errors import StudyError

if TYPE_CHECKING:
    from ebbline.sweeps.search.stage_aware import StageAware

__all__ = [
    "NOT_A_POINT",
    "WAIT",
    "Searcher",
    "StudySearcher",
    "all_points",
    "check_written_points",
    "limit",
    "reaching",
    "space",
]


class Wait(Enum):
    WAIT = "no proposal before another result"


WAIT = Wait.WAIT


class Searcher(Protocol):
    """Proposes distinct points and records their results."""

    def in_flight(self) -> Sequence[tuple[int, Point]]:
        """Proposed points without a result, oldest first. A restarted driver continues them."""

    def completed(self) -> int:
        """The number of completed points, including failed ones."""

    def done(self) -> Sequence[tuple[int, Point]]:
        """The points with recorded objectives. The driver reruns their missing stages."""

    def ask(self, knowledge: Knowledge) -> tuple[int, Point] | Wait | None:
        """The number and the point of the next proposal.

        WAIT when there is none before another result, None when there is none left.
        """

    def tell(self, number: int, result: Result) -> None:
        """Record the result of a point: its objectives with standard errors, or why it failed."""

    @property
    def constrained(self) -> bool:
        """Whether the study has constraints, or had them, or was revised.

        Its results may have changed, so all are amended before another proposal.
        """

    def estimate(self, knowledge: Knowledge) -> None:
        """Estimate the work of points that were proposed before the study had a ceiling."""

    def amend(self, number: int, result: Result) -> None:
        """Replace the result of a completed point, after more seeds or under other constraints.

        The search uses the new result; the database keeps the first one.
        """

    def gave_up(self) -> Mapping[int, int]:
        """The maximum number of seeds of each point with a failed further seed, by number."""

    def give_up(self, number: int, most: int, reason: str) -> None:
        """Record that a point gets at most `most` seeds, since a further seed failed.

        This is final, as the state of a failed point is, until someone retries it.
        """

    def lose(self, number: int, reason: str) -> None:
        """Record why a completed point could not be measured again, or with "" that it was."""


class StudySearcher:
    """The searcher for every sampler of a study file. Only the driver of a study makes one (see
    Home.driving).

    With `search.order: in_turn`, results are recorded in the order of asking. The measurement of an
    adapter counts after that, so proposals do not depend on timing.
    """

    def __init__(self, study: Study, database: PointDatabase, begun_as: str = "") -> None:
        """`begun_as` is the digest of the study's settings before it was widened."""
        self.study = study
        self.trials = Trials(study, database, begun_as)
        self.constrained = (
            study.search.constraints != Constraints()
            or any(entry.misses for entry in self.trials.entries)
            or self.trials.revised
        )
        self._limit = limit(study)
        self._proposed = {entry.point for entry in self.trials.entries}
        self._completed = sum(entry.state != "running" for entry in self.trials.entries)
        self._grid = space(study) if study.sampler == "grid" else None
        self._sampler = OptunaSampler(study)
        self._stage_aware: StageAware | None = None  # from the first proposal

    def in_flight(self) -> Sequence[tuple[int, Point]]:
        return [
            (k, entry.point)
            for k, entry in enumerate(self.trials.entries)
            if entry.state == "running"
        ]

    def completed(self) -> int:
        return self._completed

    def done(self) -> Sequence[tuple[int, Point]]:
        return [
            (k, entry.point) for k, entry in enumerate(self.trials.entries) if entry.state == "done"
        ]

    def teach(self, study: str, found: Sequence[Entry]) -> None:
        """Copy the results of another study (see ebbline.sweeps.search.warm_start), once only."""
        self.trials.teach(study, found)

    def ask(self, knowledge: Knowledge) -> tuple[int, Point] | Wait | None:
        k = len(self.trials.entries)
        if self._limit is not None and k >= self._limit:
            return None
        found = self._next(knowledge, k)
        if found is WAIT:
            return WAIT
        if found is None:
            self.trials.exhaust()
            return None
        point, drawn = found
        if point in self._proposed:
            raise StudyError(
                f"the study file gives the point {point} twice; each point runs once, "
                "seeds are its repeats"
            )
        self._proposed.add(point)
        if self.study.search.constraints.gpu_hours is not None:
            drawn = {**drawn, GPU_HOURS: knowledge.work(point).whole / 3600}
        return self.trials.add(point, drawn), point

    def tell(self, number: int, result: Result) -> None:
        self._completed += 1
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
        self._sampler.amend()
        if self._stage_aware is not None:
            self._stage_aware.amend(amended)

    def estimate(self, knowledge: Knowledge) -> None:
        if self.study.search.constraints.gpu_hours is not None:
            for number, entry in enumerate(self.trials.entries):
                if entry.state != "failed" and GPU_HOURS not in entry.drawn:
                    drawn = {**entry.drawn, GPU_HOURS: knowledge.work(entry.point).whole / 3600}
                    self.trials.entries[number] = replace(entry, drawn=drawn)

    def gave_up(self) -> Mapping[int, int]:
        return {
            k: entry.max_seeds
            for k, entry in enumerate(self.trials.entries)
            if entry.max_seeds is not None
        }

    def give_up(self, number: int, most: int, reason: str) -> None:
        self.trials.give_up(number, most, reason)

    def revise(self) -> None:
        """Record new measurements of existing points."""
        self.trials.revise()
        self.constrained = True

    def lose(self, number: int, reason: str) -> None:
        self.trials.lose(number, reason)

    def retry(self, numbers: Sequence[int] | None) -> list[int]:
        """Try points again: all that failed, or those of `numbers`. Returns their numbers.

        Raises StudyError, before anything changes, for a number whose point did not fail.
        """
        found = [
            number
            for number, entry in enumerate(self.trials.entries)
            if entry.state == "failed" or entry.lost or entry.max_seeds is not None
        ]
        wrong = sorted(set(numbers or ()) - set(found))
        if wrong:
            raise StudyError(
                f"--retry {' '.join(map(str, wrong))}: only a point that failed can be tried "
                f"again; of this study that are {', '.join(map(str, found)) or 'none'}"
            )
        chosen = found if numbers is None else sorted(set(numbers))
        for number in chosen:
            self.trials.retry(number)
        self._completed = sum(entry.state != "running" for entry in self.trials.entries)
        return chosen

    def _misses(self, entry: Entry, result: Result) -> dict[str, float]:
        """By how much a result misses each constraint; at most 0 when it holds."""
        constraints, found = self.study.search.constraints, {}
        refusal = self.study.refusal_metric
        if constraints.refusal_floor and refusal is not None:
            found[REFUSAL_FLOOR] = self.study.refusal_floor - result.metrics[refusal].value
        if constraints.gpu_hours is not None:
            found[GPU_HOURS] = entry.drawn[GPU_HOURS] - constraints.gpu_hours
        return found

    def _next(self, knowledge: Knowledge, k: int) -> Drawn | Wait | None:
        fixed = self._fixed(k)
        if fixed is not None:
            return fixed, {}
        if self.study.sampler in ("stage_aware", "gp"):
            if self._stage_aware is None:
                self._stage_aware = _stage_aware(self.study)
            point, later = self._stage_aware.propose(
                self.trials.entries, self.trials.taught, knowledge, k
            )
            return (point, {}) if point is not None else WAIT if later else None
        found = self._sampler.propose(self.trials.entries, self.trials.taught, self._proposed, k)
        # A sampler that keeps drawing proposed points is replaced by a seeded draw from the others
        return found or (self._unvisited(k), {})

    def _fixed(self, k: int) -> Point | None:
        if self._grid is not None:
            return next((point for point in self._grid if point not in self._proposed), None)
        if self.study.sampler == "list":
            return listed(self.study.search.list[k], self.study, f"search.list[{k}]")
        first = self.study.search.first
        return listed(first[k], self.study, f"search.first[{k}]") if k < len(first) else None

    def _unvisited(self, k: int) -> Point:
        """A point of the space that was not proposed.

        There always is one, since ebbline.sweeps.study.space.limit bounds the number of proposals.
        """
        if self.study.size is not None and self.study.size <= LISTED:
            left = sorted(
                (point for point in space(self.study) if point not in self._proposed),
                key=lambda point: point.id,
            )
            return left[k % len(left)]
        rng = np.random.default_rng((self.study.search.seed, k))
        while (point := drawn_point(rng, self.study)) in self._proposed:
            pass
        return point


def _stage_aware(study: Study) -> "StageAware":
    # A lazy import, since scikit-learn takes a second to load
    from ebbline.sweeps.search.stage_aware import StageAware

    return StageAware(study)


def all_points(study: Study, database: PointDatabase) -> list[tuple[int, Point, str, str]]:
    """(number, point, state, reason) of every proposed point; state is running, done or failed."""
    return [
        (k, entry.point, entry.state, entry.reason)
        for k, entry in enumerate(read(study, database)[0])
    ]
