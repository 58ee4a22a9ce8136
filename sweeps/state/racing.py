"""The progress of a point: its metrics so far, and the stages that it needs next. For a raced suite
these are its next blocks, until a race ends.

Invariant: the answer is a function of the point's own blocks and of the results of earlier points
in reach of its proposal (`Search.window`). So a study that is killed and continued stops every
point at the same block.
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
]  # whether a rival is surely better than these metrics


class ArtifactLookup(Protocol):
    """Finds the artifact of a stage: the runner during a run, the resolver afterwards."""

    def artifact(self, stage: Stage) -> Artifact | None: ...


@dataclass(frozen=True)
class Standing:
    """The progress of a point: its metrics so far, pooled over replicates and blocks, and the
    stages that it still needs.
    """

    metrics: Mapping[str, Metric]
    missing: tuple[Stage, ...]


class Rivals:
    """The finished points that raced points are compared with. Their intervals are computed once.
    It stays empty for a study in which no other point may end a race.

    Arrays: `least_NM` has the lower interval bounds of N points, in the order of their numbers, for
    M objectives that are all maximised.
    """

    def __init__(self, study: Study) -> None:
        own = [race for race in races(study).values() if race is not None]
        self.compares = bool(own) and all(race.dominated for race in own)
        self._objectives, self._window = study.objectives, study.search.effective_window
        self._confidence = max((race.confidence for race in own), default=0.0)
        self._numbers: dict[str, list[int]] = defaultdict(list)
        self._least: dict[str, NDArray[np.float64]] = defaultdict(
            lambda: np.empty((0, len(study.objectives)))
        )

    def add(self, result: Result) -> None:
        """Add the result of a point, over the seeds that every point has."""
        if self.compares and result.status == "done":
            model = result.point.model
            place = bisect_left(self._numbers[model], result.number)
            self._numbers[model].insert(place, result.number)
            least_M = [low for low, _ in self._intervals(result.metrics)]
            self._least[model] = np.insert(self._least[model], place, least_M, axis=0)

    def before(self, number: int, point: Point) -> Beaten:
        """A test of whether metrics of point `number` are beaten in every objective, by a point of
        its own model in reach of its proposal.
        """
        return partial(self._beat, number, point.model)

    def _beat(self, number: int, model: str, metrics: Mapping[str, Metric]) -> bool:
        seen = bisect_right(self._numbers[model], number - self._window)
        if not seen or any(name not in metrics for name in self._objectives):
            return False
        most_M = np.array([high for _, high in self._intervals(metrics)])
        return bool((most_M < self._least[model][:seen]).all(axis=1).any())

    def _intervals(self, metrics: Mapping[str, Metric]) -> list[tuple[float, float]]:
        """The interval of each objective, negated when the objective is minimised."""
        found = []
        for name in self._objectives:
            low, high = metrics[name].interval_at(self._confidence)
            found.append((low, high) if metrics[name].direction == "maximise" else (-high, -low))
        return found


def standing(
    study: Study,
    stages: Mapping[str, Stage],
    lookup: ArtifactLookup,
    beaten: Beaten = lambda metrics: False,
) -> Standing:
    """The metrics of a point so far, and the stages with metrics that it needs next. A point with
    no missing stage is done.

    `beaten` says from the metrics so far whether a rival ends the point's races (see
    Rivals.before). Suites without a race come first and whole. Then all raced suites are measured
    block by block, side by side.
    """
    named = {StageName.parse(name): stage for name, stage in stages.items()}
    found: dict[str, dict[int, Metric]] = defaultdict(dict)  # by suite.metric, then by seed
    missing = _add_block(
        named,
        None,
        study,
        lookup,
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
        missing = _add_block(named, block, study, lookup, found, still)
        if missing:
            return Standing(_pooled(found), tuple(missing))
        ended |= {
            name.part
            for name, stage in named.items()
            if name.block == block and name.part in still and _ends(stage, block, lookup)
        }
    return Standing(_pooled(found), ())


def races(study: Study) -> dict[str, Race | None]:
    return {
        name: None if isinstance(entry.measure, MultipleChoiceSuite) else entry.measure.race
        for name, entry in study.suites.items()
    }


def _add_block(
    named: Mapping[StageName, Stage],
    block: int | None,
    study: Study,
    lookup: ArtifactLookup,
    found: dict[str, dict[int, Metric]],
    suites: set[str],
) -> list[Stage]:
    """Add the metrics of a block to `found`, or return the block's stages without an artifact."""
    own = sorted(
        (
            (name, stage)
            for name, stage in named.items()
            if name.part in suites and name.block == block
        ),
        key=lambda item: str(item[0]),
    )
    missing = [stage for _, stage in own if lookup.artifact(stage) is None]
    if missing:
        return missing
    for name, stage in own:
        artifact = lookup.artifact(stage)
        for metric in [] if artifact is None else read_metrics(artifact.file(METRICS).parent):
            seeds = found[f"{name.part}.{metric.name}"]
            seeds[name.seed] = joined([seeds[name.seed], metric]) if name.seed in seeds else metric
    return []


def _ends(stage: Stage, block: int, lookup: ArtifactLookup) -> bool:
    """Whether this is the last block of the prompt set."""
    generation = stage.inputs["generation"]
    if (
        not isinstance(generation, Stage)
        or not isinstance(generation.spec, GenerateSpec)
        or generation.spec.block is None
    ):
        return False
    artifact = lookup.artifact(generation)
    if artifact is None:
        return False
    prompts = json.loads(artifact.file(GenerateSpec.PROMPTS).read_text())
    return bool((block + 1) * generation.spec.block.size >= prompts["of"])


def _pooled(found: Mapping[str, Mapping[int, Metric]]) -> dict[str, Metric]:
    return {name: pooled([seeds[seed] for seed in sorted(seeds)]) for name, seeds in found.items()}


def _tight(suite: str, race: Race, metrics: Mapping[str, Metric]) -> bool:
    own = [metric for name, metric in metrics.items() if name.rpartition(".")[0] == suite]
    if race.width is None or not own:
        return False
    intervals = [(metric.value, *metric.interval_at(race.confidence)) for metric in own]
    return all(max(value - low, high - value) <= race.width for value, low, high in intervals)
