"""What the search may know beside results: what the defence measured of adapters that exist, and
how much work a point is.

An *adapter* here is what all knobs of a point share: the point without them, whose training and
first stage of the defence are done once. Both answers are functions of the study and of what has
been measured, and of no machine's speed.
"""

from dataclasses import dataclass

from ebbline.cluster.executors.executor import Needs
from ebbline.cluster.schedule.counted_work import work_of
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.state.racing import ArtifactLookup
from ebbline.sweeps.study.points import Point, StageName, adapter_of
from ebbline.sweeps.study.stages import StageGraph, of_seeds, stages_or_reason
from ebbline.tasks.defences.defence import Reading
from ebbline.tasks.defences.in_use import DEFENCE
from ebbline.tasks.kinds import kind_named
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Owner

Readings = tuple[Reading, ...]
"""What was measured of each seed's adapter."""
REMEMBERED = 4096  # adapters whose work is kept at hand
CPU_SHARE = 0.05  # of a GPU, for the work that needs none


@dataclass(frozen=True)
class Work:
    """GPU-seconds of a point's training, of measuring its adapter, and of what each setting of its
    knobs takes: making the defended adapter and measuring that.
    """

    train: float
    project: float
    measure: float

    @property
    def whole(self) -> float:
        return self.train + self.project + self.measure


INVALID = Work(1.0, 1.0, 1.0)  # of a point with invalid settings, which is proposed all the same


class Knowledge:
    """Built from a study's stage graph and whoever knows its artifacts, which is the runner while
    it drives.
    """

    def __init__(self, graph: StageGraph, known: ArtifactLookup) -> None:
        self._graph, self._known = graph, known
        self._measured: dict[Point, Readings] = {}
        self._projections: dict[
            Point, list[Stage]
        ] = {}  # of adapters that have been looked for in vain: they are asked for at every turn
        self._work: dict[Point, Work] = {}

    def measured(self, point: Point) -> Readings | None:
        """What the defence measured of each seed's adapter; None while one is not measured."""
        adapter = adapter_of(point)
        if adapter not in self._measured:
            found = self._read(adapter, point)
            if found is None:
                return None
            self._measured[adapter] = found
            del self._projections[adapter]
        return self._measured[adapter]

    def work(self, point: Point) -> Work:
        """What the point takes when nothing of it is there yet; a raced suite counts with its first
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
                if owner in owners:  # a study's own stages run once for all points
                    owners[owner] += _work(stage, graph.needs_of(stage))
            if len(self._work) >= REMEMBERED:
                # It is worked out again; adapters that were only looked at would pile up
                self._work.clear()
            self._work[adapter] = (
                Work(owners["training"], owners["adapter"], owners["point"]) if stages else INVALID
            )
        return self._work[adapter]

    def _stages(self, point: Point, graph: StageGraph) -> dict[str, Stage]:
        """Those of the seeds that every point is run with; none for invalid settings."""
        study = self._graph.study
        return of_seeds(study, stages_or_reason(graph, point)[0], study.first_seeds)

    def _read(self, adapter: Point, point: Point) -> Readings | None:
        first = adapter not in self._projections
        if first:
            named = self._stages(point, self._graph).items()
            kind = DEFENCE.measures.KIND
            self._projections[adapter] = [
                stage for name, stage in named if StageName.parse(name).part == kind
            ]
        projections = self._projections[adapter]
        found = [self._known.artifact(stage) for stage in projections]
        if not found:
            return None
        if first and any(artifact is None for artifact in found):
            resolver = Resolver(
                self._graph.home.store
            )  # made in another run, and not asked for in this one
            found = [resolver.artifact(stage) for stage in projections]
        known = [artifact for artifact in found if artifact is not None]
        if len(known) < len(found):
            return None
        return tuple(DEFENCE.measured(artifact.file) for artifact in known)


def _work(stage: Stage, needs: Needs) -> float:
    return work_of(stage) * (1.0 if needs.gpus else CPU_SHARE)
