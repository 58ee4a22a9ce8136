"""Racing: which blocks of a point's raced suites are still to be measured, given what they have
shown so far.

Invariant: the answer is a function of the point's own blocks and of the results of earlier points
that a proposal may have seen (`Search.window`), so a study that was killed and continued stops
every point at the same block.
"""

import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.study.points import Point, Result, StageName
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import MultipleChoiceSuite, Race
from ebbline.tasks.measuring.metrics import METRICS, Metric, joined, pooled, read_metrics
from ebbline.tasks.specs import GenerateSpec
from ebbline.tasks.stage import Stage

Beaten = Callable[
    [Mapping[str, Metric]], bool
]  # whether metrics as these are surely worse than a rival's


class Known(Protocol):
    """Whatever can say which artifact a stage has: the runner while it drives, the resolver
    afterwards.
    """

    def artifact(self, stage: Stage) -> Artifact | None: ...


@dataclass(frozen=True)
class Standing:
    """How far a point is measured: its metrics so far, pooled over replicates and blocks, and the
    stages it still needs.
    """

    metrics: Mapping[str, Metric]
    missing: tuple[Stage, ...]


class Rivals:
    """The finished points that raced ones are compared with, each one's intervals worked out once.
    It takes nothing in for a study whose races no other point may end.

    Arrays: `least_NM` has N points in the order of their numbers and M objectives, all pointing up:
    how low each may lie.
    """

    def __init__(self, study: Study) -> None:
        own = [race for race in races(study).values() if race is not None]
        self.compares = bool(own) and all(race.dominated for race in own)
        self._objectives, self._reach = study.objectives, study.search.reach
        self._confidence = max((race.confidence for race in own), default=0.0)
        self._numbers: dict[str, list[int]] = defaultdict(list)
        self._least: dict[str, NDArray[np.float64]] = defaultdict(
            lambda: np.empty((0, len(study.objectives)))
        )

    def add(self, result: Result) -> None:
        """Take in what became of a point, over the seeds that every point has."""
        if self.compares and result.status == "done":
            model = result.point.model
            place = bisect_left(self._numbers[model], result.number)
            self._numbers[model].insert(place, result.number)
            least_M = [low for low, _ in self._reaches(result.metrics)]
            self._least[model] = np.insert(self._least[model], place, least_M, axis=0)

    def before(self, number: int, point: Point) -> Beaten:
        """Whether metrics of point `number` are beaten, in every objective: by points of its own
        model, and such as its proposal may have seen.
        """
        return partial(self._beat, number, point.model)

    def _beat(self, number: int, model: str, metrics: Mapping[str, Metric]) -> bool:
        seen = bisect_right(self._numbers[model], number - self._reach)
        if not seen or any(name not in metrics for name in self._objectives):
            return False
        most_M = np.array([high for _, high in self._reaches(metrics)])
        return bool((most_M < self._least[model][:seen]).all(axis=1).any())

    def _reaches(self, metrics: Mapping[str, Metric]) -> list[tuple[float, float]]:
        """Each objective's interval, pointing up."""
        found = []
        for name in self._objectives:
            low, high = metrics[name].interval_at(self._confidence)
            found.append((low, high) if metrics[name].direction == "maximise" else (-high, -low))
        return found


def standing(
    study: Study, stages: Mapping[str, Stage], known: Known, beaten: Beaten = lambda metrics: False
) -> Standing:
    """What a point's stages have measured, and which of those with metrics are needed next. Nothing
    missing means done.

    `beaten` says of the metrics so far whether a rival ends the point's races (see Rivals.before).
    Suites that are not raced are needed whole and first; then block by block, all raced suites side
    by side.
    """
    named = {StageName.parse(name): stage for name, stage in stages.items()}
    found: dict[str, dict[int, Metric]] = defaultdict(dict)  # by suite.metric, then by seed
    missing = _take(
        named,
        None,
        study,
        known,
        found,
        {name for name in study.suites if races(study).get(name) is None},
    )
    if missing:
        return Standing(_pooled(found), tuple(missing))
    racing = {name: race for name, race in races(study).items() if race is not None}
    blocks = 1 + max((name.block for name in named if name.block is not None), default=-1)
    ended: set[str] = set()
    for block in range(blocks):
        metrics = _pooled(found)
        still = {
            suite
            for suite, race in racing.items()
            if block == 0 or not _tight(suite, race, metrics)
        } - ended
        if not still or (block > 0 and beaten(metrics)):
            break
        missing = _take(named, block, study, known, found, still)
        if missing:
            return Standing(_pooled(found), tuple(missing))
        ended |= {
            name.part
            for name, stage in named.items()
            if name.block == block and name.part in still and _ends(stage, block, known)
        }
    return Standing(_pooled(found), ())


def races(study: Study) -> dict[str, Race | None]:
    return {
        name: None if isinstance(entry.measure, MultipleChoiceSuite) else entry.measure.race
        for name, entry in study.suites.items()
    }


def _take(
    named: Mapping[StageName, Stage],
    block: int | None,
    study: Study,
    known: Known,
    found: dict[str, dict[int, Metric]],
    suites: set[str],
) -> list[Stage]:
    """Add one block's metrics to `found`; returns the stages that have none yet."""
    own = sorted(
        (
            (name, stage)
            for name, stage in named.items()
            if name.part in suites and name.block == block
        ),
        key=lambda item: str(item[0]),
    )
    missing = [stage for _, stage in own if known.artifact(stage) is None]
    if missing:
        return missing
    for name, stage in own:
        artifact = known.artifact(stage)
        for metric in [] if artifact is None else read_metrics(artifact.file(METRICS).parent):
            seeds = found[f"{name.part}.{metric.name}"]
            seeds[name.seed] = joined([seeds[name.seed], metric]) if name.seed in seeds else metric
    return []


def _ends(stage: Stage, block: int, known: Known) -> bool:
    """Whether the prompt set has no further block."""
    generation = stage.inputs["generation"]
    if (
        not isinstance(generation, Stage)
        or not isinstance(generation.spec, GenerateSpec)
        or generation.spec.block is None
    ):
        return False
    artifact = known.artifact(generation)
    if artifact is None:
        return False
    said = json.loads(artifact.file(GenerateSpec.PROMPTS).read_text())
    return bool((block + 1) * generation.spec.block.size >= said["of"])


def _pooled(found: Mapping[str, Mapping[int, Metric]]) -> dict[str, Metric]:
    return {name: pooled([seeds[seed] for seed in sorted(seeds)]) for name, seeds in found.items()}


def _tight(suite: str, race: Race, metrics: Mapping[str, Metric]) -> bool:
    own = [metric for name, metric in metrics.items() if name.rpartition(".")[0] == suite]
    if race.width is None or not own:
        return False
    reaches = [(metric.value, *metric.interval_at(race.confidence)) for metric in own]
    return all(max(value - low, high - value) <= race.width for value, low, high in reaches)
