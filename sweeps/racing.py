"""Racing: which blocks of a point's raced suites are still to be measured, given what they have shown so far.

Invariant: the answer is a function of the point's own blocks and of the results of earlier points that a proposal may have seen
(`Search.window`), so a study that was killed and continued stops every point at the same block.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.store import Artifact
from sweeps.points import Point, Result, StageName
from sweeps.study import Study
from sweeps.suites import MultipleChoiceSuite, Race
from tasks.metrics import METRICS, Metric, joined, pooled, read_metrics
from tasks.specs import GenerateSpec
from tasks.stage import Stage


class Known(Protocol):
    """Whatever can say which artifact a stage has: the runner while it drives, the resolver afterwards."""

    def artifact(self, stage: Stage) -> Artifact | None: ...


@dataclass(frozen=True)
class Standing:
    """How far a point is measured: its metrics so far, pooled over replicates and blocks, and the stages it still needs."""

    metrics: Mapping[str, Metric]
    missing: tuple[Stage, ...]


def standing(study: Study, stages: Mapping[str, Stage], known: Known, rivals: Sequence[Result] = ()) -> Standing:
    """What a point's stages have measured, and which of those with metrics are needed next. Nothing missing means done.

    Suites that are not raced are needed whole and first; then block by block, all raced suites side by side.
    """
    named = {StageName.parse(name): stage for name, stage in stages.items()}
    found: dict[str, dict[int, Metric]] = defaultdict(dict)  # by suite.metric, then by seed
    missing = _take(named, None, study, known, found, {name for name in study.suites if races(study).get(name) is None})
    if missing:
        return Standing(_pooled(found), tuple(missing))
    racing = {name: race for name, race in races(study).items() if race is not None}
    blocks = 1 + max((name.block for name in named if name.block is not None), default=-1)
    ended: set[str] = set()
    for block in range(blocks):
        still = {suite for suite, race in racing.items() if block == 0 or not _tight(suite, race, _pooled(found))} - ended
        if not still or (block > 0 and _dominated(study, racing, _pooled(found), rivals)):
            break
        missing = _take(named, block, study, known, found, still)
        if missing:
            return Standing(_pooled(found), tuple(missing))
        ended |= {name.part for name, stage in named.items() if name.block == block and name.part in still and _ends(stage, block, known)}
    return Standing(_pooled(found), ())


def races(study: Study) -> dict[str, Race | None]:
    return {name: None if isinstance(entry.measure, MultipleChoiceSuite) else entry.measure.race for name, entry in study.suites.items()}


def rivals_of(number: int, point: Point, results: Sequence[Result], window: int) -> list[Result]:
    """The finished results that point `number` may be compared with: of its own model, and such as its proposal may have seen."""
    return [each for each in results if each.number <= number - window and each.status == "done" and each.point.model == point.model]


def _take(
    named: Mapping[StageName, Stage], block: int | None, study: Study, known: Known, found: dict[str, dict[int, Metric]], suites: set[str]
) -> list[Stage]:
    """Add one block's metrics to `found`; returns the stages that have none yet."""
    own = sorted(
        ((name, stage) for name, stage in named.items() if name.part in suites and name.block == block), key=lambda item: str(item[0])
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
    if not isinstance(generation, Stage) or not isinstance(generation.spec, GenerateSpec) or generation.spec.block is None:
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


def _dominated(study: Study, racing: Mapping[str, Race], metrics: Mapping[str, Metric], rivals: Sequence[Result]) -> bool:
    if not all(race.dominated for race in racing.values()) or any(name not in metrics for name in study.objectives):
        return False
    confidence = max(race.confidence for race in racing.values())

    def worse(name: str, rival: Result) -> bool:
        (low, high), (rival_low, rival_high) = metrics[name].interval_at(confidence), rival.metrics[name].interval_at(confidence)
        return high < rival_low if metrics[name].direction == "maximise" else low > rival_high

    return any(all(worse(name, rival) for name in study.objectives) for rival in rivals if rival.metrics.keys() >= set(study.objectives))
