"""The knowledge of a search besides results: measurements of adapters, and estimates of work.

An *adapter* here is a point without the defence's knobs. All settings of the knobs share its
training and the defence's first stage.

Invariant: both answers depend on the study and the stored artifacts, never on a machine's speed.
"""

from dataclasses import dataclass

from ebbline.cluster.executors.executor import Needs
from ebbline.cluster.schedule.counted_work import work_of
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.state.races.racing import ArtifactLookup
from ebbline.sweeps.study.points import Point, StageName, adapter_of, defence_of
from ebbline.sweeps.study.stages import StageGraph, of_seeds, stages_or_reason
from ebbline.tasks.defences.gate import Reading
from ebbline.tasks.kinds import kind_named
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Owner

Readings = tuple[Reading, ...]
"""The defence's measurement of each seed's adapter."""
CACHED = 4096  # adapters whose work is cached
CPU_SHARE = 0.05  # of a GPU; the weight of work that needs no GPU


@dataclass(frozen=True)
class WorkEstimate:
    """Estimated GPU-seconds of a point: its training, the defence's first stage (`project`), and
    for each setting of the knobs, making and evaluating the defended adapter (`evaluate`).
    """

    train: float
    project: float
    evaluate: float

    @property
    def whole(self) -> float:
        return self.train + self.project + self.evaluate


# Of a point with invalid settings. It may be proposed; its result then gives the reason.
INVALID = WorkEstimate(1.0, 1.0, 1.0)


class Knowledge:
    """Reads artifacts from `artifacts`, which is the runner during a drive, else a resolver."""

    def __init__(self, graph: StageGraph, artifacts: ArtifactLookup) -> None:
        self._graph, self._artifacts = graph, artifacts
        self._readings: dict[Point, Readings] = {}
        # Stages of unmeasured adapters, cached since every proposal looks them up
        self._projections: dict[Point, list[Stage]] = {}
        self._work: dict[Point, WorkEstimate] = {}

    def readings(self, point: Point) -> Readings | None:
        """The defence's measurement of each seed's adapter; None while one is missing."""
        adapter = adapter_of(point)
        if adapter not in self._readings:
            found = self._read(adapter, point)
            if found is None:
                return None
            self._readings[adapter] = found
            del self._projections[adapter]
        return self._readings[adapter]

    def work(self, point: Point) -> WorkEstimate:
        """The work of a point with nothing in the store; a raced suite counts with its first
        block.
        """
        adapter = adapter_of(point)
        if adapter not in self._work:
            graph = self._graph.fresh_copy()
            stages = [
                stage
                for name, stage in self._stages(point, graph).items()
                if not StageName.parse(name).block
            ]
            owners: dict[Owner, float] = {"training": 0.0, "adapter": 0.0, "point": 0.0}
            for stage in stages:
                owner = kind_named(stage.kind).belongs_to
                if owner in owners:  # the study's own stages run once for all points
                    owners[owner] += _work(stage, graph.needs_of(stage))
            if len(self._work) >= CACHED:
                # Else adapters that are never proposed would fill the memory
                self._work.clear()
            self._work[adapter] = (
                WorkEstimate(owners["training"], owners["adapter"], owners["point"])
                if stages
                else INVALID
            )
        return self._work[adapter]

    def _stages(self, point: Point, graph: StageGraph) -> dict[str, Stage]:
        """The stages of the seeds that every point runs with; empty for invalid settings."""
        study = self._graph.study
        return of_seeds(study, stages_or_reason(graph, point)[0], study.first_seeds)

    def _read(self, adapter: Point, point: Point) -> Readings | None:
        first = adapter not in self._projections
        if first:
            named = self._stages(point, self._graph).items()
            kind = defence_of(point).measures.KIND
            self._projections[adapter] = [
                stage for name, stage in named if StageName.parse(name).part == kind
            ]
        projections = self._projections[adapter]
        found = [self._artifacts.artifact(stage) for stage in projections]
        if not found:
            return None
        if first and any(artifact is None for artifact in found):
            # An earlier run may have made them; this runner does not know its artifacts
            resolver = Resolver(self._graph.home.store)
            found = [resolver.artifact(stage) for stage in projections]
        artifacts = [artifact for artifact in found if artifact is not None]
        if len(artifacts) < len(found):
            return None
        return tuple(defence_of(point).reading(artifact.file) for artifact in artifacts)


def _work(stage: Stage, needs: Needs) -> float:
    return work_of(stage) * (1.0 if needs.gpus else CPU_SHARE)
