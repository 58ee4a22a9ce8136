"""The outcome of a point, read from the store: its metrics pooled over seeds, or the reason why it
has none.

ebbline.sweeps.study.stages decides which stages a point has.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ebbline.cluster.schedule.costs import Cost, cost_of, origin_of, stage_cost
from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.state.races.racing import ArtifactLookup, Rivals, races, standing
from ebbline.sweeps.state.replicates import seeds_needed, seeds_of
from ebbline.sweeps.state.trials import Entry
from ebbline.sweeps.study.points import OUTDATED, Point, Result, StageName, defence_of, ended
from ebbline.sweeps.study.stages import StageGraph, of_seeds, stages_or_reason
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import METRICS, Metric, pooled, read_metrics
from ebbline.tasks.stage import Stage, closure


def metrics_of(
    study: Study, suites: Mapping[str, Stage], lookup: ArtifactLookup
) -> dict[str, Metric] | None:
    """Full metric name -> metric of an aligned model before fine-tuning; None while a suite has no
    artifact.
    """
    found: dict[str, Metric] = {}
    for suite in study.suites:
        artifact = lookup.artifact(suites[suite])
        if artifact is None:
            return None
        found |= {
            f"{suite}.{metric.name}": pooled([metric])
            for metric in read_metrics(artifact.file(METRICS).parent)
        }
    return found


def fingerprint(study: Study, result: Result) -> frozenset[tuple[str, str]]:
    """The keys of the measuring stages of a finished point. Points with equal adapters have equal
    fingerprints.

    It covers the seeds that every point has, and the first block of raced suites.
    """
    seeds = set(study.seeds[: study.first_seeds])
    named = {StageName.parse(text): key for text, key in result.keys.items()}
    return frozenset(
        (str(name), key)
        for name, key in named.items()
        if name.part in study.suites and name.seed in seeds and not name.block
    )


class Duplicates:
    """Finds finished points that equal a point with a smaller number, in any order of results. Only
    this class sets `same_as`.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._found: dict[int, bytes] = {}  # digests of fingerprints
        self._first: dict[bytes, int] = {}

    def add(self, result: Result) -> None:
        if result.status == "done":
            stages = sorted(fingerprint(self._study, result))
            found = hashlib.sha256(json.dumps(stages).encode()).digest()
            self._found[result.number] = found
            self._first[found] = min(result.number, self._first.get(found, result.number))

    def marked(self, result: Result) -> Result:
        """An added result with `same_as`: the first point that it equals."""
        found = self._found.get(result.number)
        first = result.number if found is None else self._first[found]
        return result if first == result.number else replace(result, same_as=first)


def results_of(
    study: Study,
    entries: Sequence[Entry],
    graph: StageGraph,
    lookup: ArtifactLookup,
    kept: Mapping[int, Result] = MappingProxyType({}),
) -> list[Result]:
    """The Results of the proposed points in order, each over as many seeds as it needs.

    `kept` are earlier Results by number that cannot change (see `lasting_results`).
    """
    rivals, duplicates = Rivals(study), Duplicates(study)
    found: dict[int, Result] = {}
    stages: dict[int, dict[str, Stage]] = {}

    def over(number: int, seeds: int, reason: str = "") -> Result:
        own = of_seeds(study, stages[number], seeds)
        return result_of(study, number, entries[number].point, own, lookup, reason, rivals)

    for number, entry in enumerate(entries):
        if number in kept and _lasts(entry, kept[number]):
            found[number] = kept[number]
        else:
            stages[number], invalid = stages_or_reason(graph, entry.point)
            failed = (entry.reason or "no reason was recorded") if entry.state == "failed" else ""
            found[number] = over(number, study.first_seeds, failed or invalid)
            if entry.state == "done" and found[number].status == "running":
                found[number] = (
                    over(number, study.first_seeds, entry.lost)
                    if entry.lost
                    else replace(found[number], status="outdated", reason=OUTDATED)
                )
        rivals.add(found[number])
        duplicates.add(found[number])
    for number, result in list(found.items()):
        for seeds in range(study.first_seeds + 1, len(study.seeds) + 1):
            more = over(number, seeds) if result.status == "done" else result
            if more.status != "done":
                break
            found[number] = more
    most = {
        number: entry.max_seeds
        for number, entry in enumerate(entries)
        if entry.max_seeds is not None
    }
    for number, seeds in seeds_needed(
        study, [duplicates.marked(result) for result in found.values()], most
    ).items():
        if seeds < seeds_of(found[number]):  # a seed that was needed at first and is not now
            found[number] = over(number, seeds)
        lacking = entries[number].reason if seeds == most.get(number) else ""
        found[number] = replace(duplicates.marked(found[number]), reason=lacking)
    return list(found.values())


def _lasts(entry: Entry, result: Result) -> bool:
    """Whether a result of an earlier reading still stands: its point was not retried since."""
    if result.status == "done":
        return entry.state == "done"
    return entry.state == "failed" and result.reason == (entry.reason or result.reason)


def lasting_results(study: Study, results: Sequence[Result]) -> dict[int, Result]:
    """The results that no other point can change, by number; empty where a policy adds seeds or
    rivals end races.
    """
    if study.replicates.policy != "all" or any(races(study).values()):
        return {}
    return {
        result.number: result
        for result in results
        if result.status in ("done", "failed", "invalid")
    }


def result_of(
    study: Study,
    number: int,
    point: Point,
    stages: Mapping[str, Stage],
    lookup: ArtifactLookup,
    reason: str = "",
    rivals: Rivals | None = None,
) -> Result:
    """The Result of a point with these stages: done when no stage is missing, failed or invalid
    when there is a reason.

    A raced point is compared with `rivals`.
    """
    artifacts = {
        name: artifact
        for name, stage in stages.items()
        if (artifact := lookup.artifact(stage)) is not None
    }
    keys = {name: artifact.key for name, artifact in artifacts.items()}
    seconds = sum(float(artifact.provenance["seconds"]) for artifact in artifacts.values())
    costs = costs_of(stages.values(), lookup)
    if reason:
        return Result(
            number, point, ended(reason), reason=reason, keys=keys, seconds=seconds, costs=costs
        )
    stands = standing(study, stages, lookup, (rivals or Rivals(study)).before(number, point))
    if stands.missing:
        return Result(number, point, "running", keys=keys, seconds=seconds, costs=costs)
    share = changed_share(point, artifacts)
    return Result(
        number,
        point,
        "done",
        stands.metrics,
        keys=keys,
        seconds=seconds,
        changed_share=share,
        costs=costs,
    )


def costs_of(stages: Iterable[Stage], lookup: ArtifactLookup) -> dict[str, Cost]:
    """Key -> cost of the finished stages and of all stages above them."""
    found = (lookup.artifact(stage) for stage in closure(stages))
    return {
        each.key: stage_cost(
            origin_of(each.kind, int(each.hashed["version"]), each.provenance),
            tuple(cost_of(each.provenance).gpu_s.items()),
        )
        for each in found
        if each is not None
    }


def changed_share(point: Point, artifacts: Mapping[str, Artifact]) -> float:
    """The share of modules that the defence changed, over all replicates of a point. `artifacts`
    are by stage name.
    """
    defence, changed, total = defence_of(point), 0, 0
    named = {StageName.parse(name): artifact for name, artifact in artifacts.items()}
    for name, artifact in named.items():
        if name.part == defence.makes.KIND:
            measured = named[replace(name, part=defence.measures.KIND)]
            some, every = defence.changed(measured.file, artifact.file)
            changed, total = changed + some, total + every
    return changed / total
