"""Decides whether the rest of a study's budget affords another point.

A point adds its stages that are neither in the store nor already in the runner. A raced suite
counts with its first block. Stage times are estimates, and the runner rechecks the budget
before each start. So a started point may stay unfinished; it continues when the budget is raised.
"""

from collections.abc import Iterable, Mapping

from ebbline.cluster.running.runner import Runner
from ebbline.cluster.schedule.costs import Cost, expected_cost, named_type, total
from ebbline.cluster.schedule.needs import resident
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.state.spending import Spending
from ebbline.sweeps.study.points import StageName
from ebbline.sweeps.study.stages import StageGraph
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Stage, closure


class BudgetGate:
    """Looks in the store again only after a stage has settled."""

    def __init__(self, graph: StageGraph, runner: Runner, spending: Spending) -> None:
        self._graph, self._runner, self._spending = graph, runner, spending
        self._open_when_skipped: tuple[int, frozenset[str]] | None = None

    def affords(self, stages: Mapping[str, Stage]) -> bool:
        """Whether the budget affords a point with these stages, on top of all unsettled stages."""
        if not self._spending.limited:
            return True
        moment = (self._runner.settlements, frozenset(stages))
        if moment == self._open_when_skipped:
            return False
        more, seconds = self._of_point(stages)
        if self._spending.crossed(self._under_way() + more, seconds):
            self._open_when_skipped = moment
            return False
        return True

    def point_message(self, what: str, stages: Mapping[str, Stage]) -> str:
        """The reason to stop: the budget does not afford this point, called `what`."""
        return self._spending.over_budget(what, *self._of_point(stages))

    def stage_message(self) -> str:
        """The reason to stop: the budget affords no stage that is ready. Names the shortest."""
        skipped = [
            node for node in self._runner.unsettled() if node.key in self._runner.unaffordable
        ]
        node = min(
            skipped, key=lambda node: (self._runner.open_seconds(node.stage) or 0.0, node.key)
        )
        seconds = self._runner.open_seconds(node.stage) or 0.0
        return self._spending.over_budget(
            self._graph.label(node.stage),
            self._cost(node.stage, seconds) + self._starts([node.stage]),
            seconds,
        )

    def _of_point(self, stages: Mapping[str, Stage]) -> tuple[Cost, float]:
        """The cost that a point adds, and the seconds of its longest chain of stages."""
        resolver = Resolver(self._graph.home.store)
        requested = [
            stage for name, stage in stages.items() if (StageName.parse(name).block or 0) == 0
        ]
        left = {stage.lineage: self._left_s(stage, resolver) for stage in closure(requested)}
        new = [stage for stage in closure(requested) if not self._runner.knows(stage)]
        starts = self._starts(stage for stage in new if left[stage.lineage] > 0.0)
        return total(self._cost(stage, left[stage.lineage]) for stage in new) + starts, _longest(
            requested, left
        )

    def _left_s(self, stage: Stage, resolver: Resolver) -> float:
        if self._runner.knows(stage):
            return self._runner.open_seconds(stage) or 0.0
        return (
            0.0
            if resolver.artifact(stage) is not None
            else self._runner.estimates.budgeted(stage, self._graph.needs_of(stage))
        )

    def _under_way(self) -> Cost:
        """The cost of the rest of all unsettled stages, running or waiting."""
        keys: dict[str, Cost] = {}
        nodes = self._runner.unsettled()
        for node in nodes:
            keys[node.key or node.stage.lineage] = self._cost(
                node.stage, self._runner.open_seconds(node.stage) or 0.0
            )
        return total(keys.values()) + self._starts(
            node.stage for node in nodes if node.state in ("waiting", "ready")
        )

    def _starts(self, stages: Iterable[Stage]) -> Cost:
        """The cost of starting the jobs of these stages: one job for each base model, and one
        more for its trainings.
        """
        jobs: dict[tuple[int, str, bool], Cost] = {}
        if self._runner.executor.own_processes:
            estimates = self._runner.estimates
            for stage in stages:
                needs = self._graph.needs_of(stage)
                seconds = estimates.starts.seconds(
                    named_type(needs) or estimates.gpu_type, needs.gpus
                )
                jobs[needs.gpus, resident(stage), isinstance(stage.spec, TrainSpec)] = self._cost(
                    stage, seconds
                )
        return total(jobs.values())

    def _cost(self, stage: Stage, seconds: float) -> Cost:
        return expected_cost(self._graph.needs_of(stage), seconds, self._spending.profile)


def _longest(stages: Iterable[Stage], seconds: Mapping[str, float]) -> float:
    """Seconds of the longest chain that ends in one of `stages`."""
    ends: dict[str, float] = {}
    for stage in closure(stages):
        ends[stage.lineage] = seconds[stage.lineage] + max(
            (ends[above.lineage] for above in stage.upstream()), default=0.0
        )
    return max(ends.values(), default=0.0)
