"""Points in flight: the stages that each has requested from the runner and needs next, and the
number of GPUs that they queue for.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ebbline.cluster.executors.executor import Capacity
from ebbline.cluster.running.nodes import Failure
from ebbline.cluster.running.runner import Runner
from ebbline.sweeps.state.races.racing import Rivals, races, standing
from ebbline.sweeps.study.points import Point, StageName
from ebbline.sweeps.study.study import Study
from ebbline.tasks.kinds import STAGE_KINDS, kind_named
from ebbline.tasks.stage import Stage

# Keeps workers busy and lets stages of one model form a batch
GPUS_QUEUED_PER_GPU = 2
LEAST_IN_FLIGHT, IN_FLIGHT_PER_GPU = 16, 4  # points, without `search.window`


@dataclass
class PointInFlight:
    """A point in flight: the stages that it may need, and the ones it has requested so far. A raced
    suite requests block by block.

    A point without requests is held back by the budget, or `invalid` says why its settings are
    invalid. It is `complete` when it needs no more than it has requested.
    """

    number: int
    point: Point
    stages: Mapping[str, Stage]
    invalid: str = ""
    requested: list[Stage] = field(default_factory=list)
    complete: bool = False

    def __str__(self) -> str:
        return f"point {self.number} ({self.point})"

    @property
    def held_back(self) -> bool:
        return not self.requested and not self.invalid

    def start(self, runner: Runner) -> None:
        """Request the stages up to the defended adapter: their names are kinds, which no suite may
        have. `request_next` requests the measuring stages.
        """
        self.requested = [
            stage
            for name, stage in self.stages.items()
            if StageName.parse(name).part in STAGE_KINDS
        ]
        runner.add(self.requested)

    def settled(self, runner: Runner) -> bool:
        return bool(self.invalid) or (self.complete and all(map(runner.settled, self.requested)))

    @property
    def may_request(self) -> bool:
        """Whether the point may need more stages than it has requested."""
        return bool(self.requested) and not self.complete and not self.invalid

    def request_next(self, study: Study, runner: Runner, rivals: Rivals) -> None:
        """Request the stages that the point needs next, until one of them runs or it needs no more.

        A stage that is in the store settles at once.
        """
        if not self.may_request:
            return
        own, beaten = set(self.stages.values()), rivals.before(self.number, self.point)
        raced = any(races(study).values())
        while not any(
            kind_named(stage.kind).has_metrics and not runner.settled(stage)
            for stage in self.requested
        ):
            before, needed = (
                set(self.requested),
                standing(study, self.stages, runner, beaten).missing,
            )
            new = [
                stage
                for target in needed
                for stage in (*target.upstream(), target)
                if stage in own and stage not in before
            ]
            runner.add(new)
            self.requested += new
            if not new or not raced:  # without races a point needs all its stages at once
                self.complete = True
                return

    def failure(self, runner: Runner) -> Failure | None:
        """The first failure of the point's own stages, else the first inherited one."""
        failures = [
            failure for stage in self.requested if (failure := runner.failure(stage)) is not None
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
    """Start the points that are held back, in order, as far as the budget affords them; return the
    first that it does not afford.
    """
    for entry in in_flight:
        if entry.held_back:
            if not affords(entry.stages):
                return entry
            entry.start(runner)
    return None


def queued_gpus(runner: Runner, gpus_of: Callable[[Stage], int]) -> int:
    """The number of GPUs of the stages that run or that wait for no other stage on GPUs: the GPUs
    that an unlimited cluster would use.
    """
    heads: dict[str, int] = {}
    unsettled = {node.stage.lineage for node in runner.unsettled()}
    uses_gpu: dict[str, bool] = {}

    def holds(stage: Stage) -> bool:
        """Whether the stage, or one above it, will run on a GPU."""
        if stage.lineage not in uses_gpu:
            above = max(
                [holds(each) for each in stage.upstream() if each.lineage in unsettled],
                default=False,
            )  # not `any`, which would skip stages after the first
            gpus = gpus_of(stage)
            if gpus and not above:
                heads[stage.lineage] = gpus
            uses_gpu[stage.lineage] = above or gpus > 0
        return uses_gpu[stage.lineage]

    for node in runner.unsettled():
        holds(node.stage)
    return sum(heads.values())


def has_room(count: int, window: int | None, queued: int, capacity: Callable[[], Capacity]) -> bool:
    """Whether another point may be proposed, given the `count` of points in flight and the GPUs
    that they queue for.

    `capacity` is not called while nothing is queued, because the call may start a cluster.
    """
    if window is not None and count >= window:
        return False
    if not queued:
        return window is not None or count < LEAST_IN_FLIGHT
    cluster = capacity()
    if window is None and count >= max(LEAST_IN_FLIGHT, IN_FLIGHT_PER_GPU * cluster.gpus):
        return False
    return cluster.grows or queued < GPUS_QUEUED_PER_GPU * max(1, cluster.gpus)
