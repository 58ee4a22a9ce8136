"""Points in flight: what each has asked of the runner, what it needs next, and how much work for
GPUs they make.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ebbline.cluster.executors.executor import Capacity
from ebbline.cluster.running.nodes import Failure
from ebbline.cluster.running.runner import Runner
from ebbline.sweeps.state.racing import Rivals, races, standing
from ebbline.sweeps.study.points import Point, StageName
from ebbline.sweeps.study.study import Study
from ebbline.tasks.kinds import STAGE_KINDS, kind_named
from ebbline.tasks.stage import Stage

# For each GPU that works, work for one waits: who ends finds the next at once, and stages that
# share a model meet
AHEAD = 2
LEAST_IN_FLIGHT, IN_FLIGHT_PER_GPU = 16, 4  # when no window is given


@dataclass
class PointInFlight:
    """A point on its way: all that it may need, and of that what it has asked for so far (a raced
    suite asks block by block).

    One that has asked for nothing is held back, as the budget does not afford it; or its settings
    were `refused`. It is `complete` when it needs nothing more than what it has asked for.
    """

    number: int
    point: Point
    stages: Mapping[str, Stage]
    refused: str = ""
    asked: list[Stage] = field(default_factory=list)
    complete: bool = False

    def __str__(self) -> str:
        return f"point {self.number} ({self.point})"

    @property
    def held_back(self) -> bool:
        return not self.asked and not self.refused

    def start(self, runner: Runner) -> None:
        self.asked = [
            stage
            for name, stage in self.stages.items()
            if StageName.parse(name).part in STAGE_KINDS
        ]
        runner.add(self.asked)

    def settled(self, runner: Runner) -> bool:
        return bool(self.refused) or (self.complete and all(map(runner.settled, self.asked)))

    @property
    def asks(self) -> bool:
        """Whether it may need more than it has asked for."""
        return bool(self.asked) and not self.complete and not self.refused

    def ask_more(self, study: Study, runner: Runner, rivals: Rivals) -> None:
        """Ask for what the point needs next, until something is under way or it needs nothing more.

        What it asks for may be in the store already, and is then there at once.
        """
        if not self.asks:
            return
        own, beaten = set(self.stages.values()), rivals.before(self.number, self.point)
        raced = any(races(study).values())
        while not any(
            kind_named(stage.kind).has_metrics and not runner.settled(stage) for stage in self.asked
        ):
            asked, needed = set(self.asked), standing(study, self.stages, runner, beaten).missing
            new = [
                stage
                for target in needed
                for stage in (*target.upstream(), target)
                if stage in own and stage not in asked
            ]
            runner.add(new)
            self.asked += new
            if not new or not raced:  # without races all is needed at once
                self.complete = True
                return

    def failure(self, runner: Runner) -> Failure | None:
        """The first failure of its own, or else the first that it inherited."""
        failures = [
            failure for stage in self.asked if (failure := runner.failure(stage)) is not None
        ]
        return next(
            (failure for failure in failures if not failure.inherited),
            failures[0] if failures else None,
        )


def start_affordable(
    in_flight: Iterable[PointInFlight],
    runner: Runner,
    affords: Callable[[Mapping[str, Stage]], bool],
) -> PointInFlight | None:
    """Start the points that are held back, in order; returns the first that the budget does not
    afford.
    """
    for entry in in_flight:
        if entry.held_back:
            if not affords(entry.stages):
                return entry
            entry.start(runner)
    return None


def queued_gpus(stages: Iterable[Stage], runner: Runner, gpus_of: Callable[[Stage], int]) -> int:
    """GPUs of the wanted stages that run, or wait for no other stage on GPUs: what could be at work
    on a cluster without end.
    """
    heads: dict[str, int] = {}
    known: dict[str, bool] = {}

    def holds(stage: Stage) -> bool:
        """Whether the stage, or one above it, is to run on a GPU."""
        if stage.lineage not in known:
            if runner.settled(stage):
                known[stage.lineage] = False
            else:
                above = max(
                    [holds(each) for each in stage.upstream()], default=False
                )  # not `any`: each may be a head
                gpus = gpus_of(stage)
                if gpus and not above:
                    heads[stage.lineage] = gpus
                known[stage.lineage] = above or gpus > 0
        return known[stage.lineage]

    for stage in stages:
        holds(stage)
    return sum(heads.values())


def has_room(count: int, window: int | None, queued: int, capacity: Callable[[], Capacity]) -> bool:
    """Whether another point may be asked for, given the `count` of those in flight and the GPUs
    that they queue for.

    `capacity` is not asked while nothing is queued: looking at a cluster may start one.
    """
    if window is not None and count >= window:
        return False
    if not queued:
        return window is not None or count < LEAST_IN_FLIGHT
    there = capacity()
    if window is None and count >= max(LEAST_IN_FLIGHT, IN_FLIGHT_PER_GPU * there.gpus):
        return False
    return there.grows or queued < AHEAD * max(1, there.gpus)
