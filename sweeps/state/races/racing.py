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
from ebbline.sweeps.state.races.whole_set import best_whole
from ebbline.sweeps.study.points import Point, Result, StageName
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import MultipleChoiceSuite, Race
from ebbline.tasks.measuring.metrics import METRICS, Metric, joined, pooled, read_metrics
from ebbline.tasks.specs import GenerateSpec
from ebbline.tasks.stage import Stage

Beaten = Callable[[Mapping[str, Metric], Mapping[str, int]], bool]
"""Whether a rival is surely better than these metrics, given the prompts that each raced suite
has."""


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
    """The finished points that raced points are compared with. Their bounds are computed once. It
    stays empty for a study in which no other point may end a race.

    With `race.error`, only rivals that were measured whole count, by their values. Whoever is
    beaten would also be dominated if it were measured whole, up to that error
    (ebbline.sweeps.state.races.whole_set). Otherwise intervals are compared.

    Arrays: `least_NM` has the lower bounds of N points, in the order of their numbers, for M
    objectives that are all maximised. `asked_NM` has the prompts that these were asked.
    """

    def __init__(self, study: Study) -> None:
        own = [race for race in races(study).values() if race is not None]
        self.compares = bool(own) and all(race.dominated for race in own)
        self._objectives, self._window = study.objectives, study.search.effective_window
        self._confidence = max((race.confidence for race in own), default=0.0)
        errors = [race.error for race in own if race.error is not None]
        self._error = min(errors) if errors and len(errors) == len(own) else None
        self._blocks = {name: race.block for name, race in races(study).items() if race is not None}
        self._numbers: dict[str, list[int]] = defaultdict(list)
        self._least: dict[str, NDArray[np.float64]] = defaultdict(
            lambda: np.empty((0, len(study.objectives)))
        )
        self._asked: dict[str, NDArray[np.float64]] = defaultdict(
            lambda: np.empty((0, len(study.objectives)))
        )

    def add(self, result: Result) -> None:
        """Add the result of a point, over the seeds that every point has."""
        if self.compares and result.status == "done":
            model = result.point.model
            place = bisect_left(self._numbers[model], result.number)
            self._numbers[model].insert(place, result.number)
            own = [result.metrics[name] for name in self._objectives]
            asked_M = [metric.items for metric in own]
            if self._error is None:
                least_M = [low for low, _ in self._intervals(result.metrics)]
            else:
                least_M = [_maximised(metric, metric.value) for metric in own]
            self._least[model] = np.insert(self._least[model], place, least_M, axis=0)
            self._asked[model] = np.insert(self._asked[model], place, asked_M, axis=0)

    def before(self, number: int, point: Point) -> Beaten:
        """A test of whether metrics of point `number` are beaten in every objective, by a point of
        its own model in reach of its proposal.
        """
        return partial(self._beat, number, point.model)

    def _beat(
        self, number: int, model: str, metrics: Mapping[str, Metric], sizes: Mapping[str, int]
    ) -> bool:
        seen = bisect_right(self._numbers[model], number - self._window)
        if not seen or any(name not in metrics for name in self._objectives):
            return False
        least_NM = self._least[model][:seen]
        if self._error is None:
            most_M = np.array([high for _, high in self._intervals(metrics)])
        else:
            of_M = [sizes.get(_suite(name), 0) for name in self._objectives]
            least_NM = least_NM[(self._asked[model][:seen] >= np.array(of_M)).all(axis=1)]
            most_M = np.array(self._best_whole(metrics, sizes))
        return bool((most_M < least_NM).all(axis=1).any())

    def _best_whole(self, metrics: Mapping[str, Metric], sizes: Mapping[str, int]) -> list[float]:
        """The best value of each objective over its whole suite, up to `race.error` for all
        objectives and all looks together.
        """
        raced = [name for name in self._objectives if _suite(name) in sizes]
        looks = sum(-(-sizes[name] // self._blocks[name]) - 1 for name in map(_suite, raced))
        error = (self._error or 0.0) / max(1, looks)
        return [
            _maximised(
                metrics[name],
                best_whole(metrics[name], sizes[_suite(name)], error)
                if name in raced
                else metrics[name].value,
            )
            for name in self._objectives
        ]

    def _intervals(self, metrics: Mapping[str, Metric]) -> list[tuple[float, float]]:
        """The interval of each objective, negated when the objective is minimised."""
        found = []
        for name in self._objectives:
            low, high = metrics[name].interval_at(self._confidence)
            found.append((low, high) if metrics[name].direction == "maximise" else (-high, -low))
        return found


def _suite(objective: str) -> str:
    return objective.rpartition(".")[0]


def _maximised(metric: Metric, value: float) -> float:
    return value if metric.direction == "maximise" else -value


def standing(
    study: Study,
    stages: Mapping[str, Stage],
    lookup: ArtifactLookup,
    beaten: Beaten = lambda metrics, sizes: False,
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
        return Standing(_pooled(study, found), tuple(missing))
    racing = {name: race for name, race in races(study).items() if race is not None}
    blocks = 1 + max((name.block for name in named if name.block is not None), default=-1)
    ended: set[str] = set()
    sizes = {suite: _limit(study, suite) for suite in racing}
    for block in range(blocks):
        metrics = _pooled(study, found)
        still = {
            suite
            for suite, race in racing.items()
            if block == 0 or not _tight(suite, race, metrics)
        } - ended
        if not still or (block > 0 and beaten(metrics, sizes)):
            break
        missing = _add_block(named, block, study, lookup, found, still)
        if missing:
            return Standing(_pooled(study, found), tuple(missing))
        for name, stage in named.items():
            if name.block == block and name.part in still:
                size = _set_size(stage, lookup)
                sizes[name.part] = sizes[name.part] if size is None else size
                if size is not None and (block + 1) * racing[name.part].block >= size:
                    ended.add(name.part)
    return Standing(_pooled(study, found), ())


def races(study: Study) -> dict[str, Race | None]:
    return {
        name: None if isinstance(entry.measure, MultipleChoiceSuite) else entry.measure.race
        for name, entry in study.suites.items()
    }


def _limit(study: Study, suite: str) -> int:
    """The most prompts that a raced suite can have."""
    return getattr(study.suites[suite].measure, "limit", None) or 0


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


def _set_size(stage: Stage, lookup: ArtifactLookup) -> int | None:
    """The number of prompts in the whole suite of a measured block; None while it is unknown."""
    generation = stage.inputs["generation"]
    artifact = lookup.artifact(generation) if isinstance(generation, Stage) else None
    if artifact is None:
        return None
    return int(json.loads(artifact.file(GenerateSpec.PROMPTS).read_text())["of"])


def _pooled(study: Study, found: Mapping[str, Mapping[int, Metric]]) -> dict[str, Metric]:
    """The metrics over their seeds, in the order of `study.seeds`: whoever reads `Metric.seeds` by
    place takes it for that order.
    """
    return {
        name: pooled([seeds[seed] for seed in sorted(seeds, key=study.seeds.index)])
        for name, seeds in found.items()
    }


def _tight(suite: str, race: Race, metrics: Mapping[str, Metric]) -> bool:
    own = [metric for name, metric in metrics.items() if name.rpartition(".")[0] == suite]
    if race.width is None or not own:
        return False
    intervals = [(metric.value, *metric.interval_at(race.confidence)) for metric in own]
    return all(max(value - low, high - value) <= race.width for value, low, high in intervals)
