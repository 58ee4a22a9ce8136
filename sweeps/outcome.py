"""What became of a point, read from the store: its metrics pooled over seeds, or the reason that it has none."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from cluster.costs import Cost, cost_of
from cluster.store import Artifact
from sweeps.plan import Planner
from sweeps.points import REFUSED, Point, Result, StageName, ended
from sweeps.racing import Known, rivals_of, standing
from sweeps.replicates import seeds_needed, seeds_of
from sweeps.study import Study
from tasks.errors import StudyError
from tasks.gate import read_rows
from tasks.metrics import METRICS, Metric, pooled, read_metrics
from tasks.specs import ApplySpec, ProjectSpec
from tasks.stage import Stage, closure


def metrics_of(study: Study, suites: Mapping[str, Stage], known: Known) -> dict[str, Metric] | None:
    """Full metric name -> metric of an aligned model before fine-tuning; None while a suite is missing."""
    found: dict[str, Metric] = {}
    for suite in study.suites:
        artifact = known.artifact(suites[suite])
        if artifact is None:
            return None
        found |= {f"{suite}.{metric.name}": pooled([metric]) for metric in read_metrics(artifact.file(METRICS).parent)}
    return found


def stages_or_refusal(planner: Planner, point: Point) -> tuple[dict[str, Stage], str]:
    """A point's stages by name, or why its settings cannot be."""
    try:
        return planner.stages_for(point), ""
    except StudyError as error:
        return {}, f"{REFUSED}{error}"


def of_seeds(study: Study, stages: Mapping[str, Stage], seeds: int) -> dict[str, Stage]:
    """Those of the study's first so many seeds."""
    taken = set(study.seeds[:seeds])
    return {name: stage for name, stage in stages.items() if StageName.parse(name).seed in taken}


def fingerprint(study: Study, result: Result) -> frozenset[tuple[str, str]]:
    """What two finished points have in common whose adapters came out the same: they are measured by the same stages.

    Looked at are the seeds that every point is run with, and of raced suites the first block.
    """
    seeds = set(study.seeds[: study.first_seeds])
    named = {StageName.parse(text): key for text, key in result.keys.items()}
    return frozenset((str(name), key) for name, key in named.items() if name.part in study.suites and name.seed in seeds and not name.block)


def results_of(study: Study, asked: Iterable[tuple[int, Point, str]], planner: Planner, known: Known) -> list[Result]:
    """The Results of points that were asked for, `(number, point, reason)` each in order, over as many seeds as each needs."""
    first: list[Result] = []
    found: dict[int, Result] = {}
    stages: dict[int, dict[str, Stage]] = {}
    seen: dict[frozenset[tuple[str, str]], int] = {}

    def over(number: int, point: Point, seeds: int, reason: str = "") -> Result:
        own = of_seeds(study, stages[number], seeds)
        return replace(
            result_of(study, number, point, own, known, reason, first), same_as=found[number].same_as if number in found else None
        )

    for number, point, reason in asked:
        stages[number], refused = stages_or_refusal(planner, point)
        result = over(number, point, study.first_seeds, reason or refused)
        if result.status == "done":
            same_as = seen.setdefault(fingerprint(study, result), number)
            result = replace(result, same_as=None if same_as == number else same_as)
        found[number] = result
        first.append(result)
    for number, result in list(found.items()):
        for seeds in range(study.first_seeds + 1, len(study.seeds) + 1):
            more = over(number, result.point, seeds) if result.status == "done" else result
            if more.status != "done" or more is result:
                break
            found[number] = more
    for number, seeds in seeds_needed(study, list(found.values())).items():
        if seeds < seeds_of(found[number]):  # measured when it looked as if it were needed
            found[number] = over(number, found[number].point, seeds)
    return list(found.values())


def result_of(
    study: Study, number: int, point: Point, stages: Mapping[str, Stage], known: Known, reason: str = "", earlier: Sequence[Result] = ()
) -> Result:
    """The Result of a point whose stages are `stages`: done when nothing is missing, failed when there is a reason.

    `earlier` are the results that a raced point is compared with.
    """
    artifacts = {name: artifact for name, stage in stages.items() if (artifact := known.artifact(stage)) is not None}
    keys = {name: artifact.key for name, artifact in artifacts.items()}
    seconds = sum(float(artifact.provenance["seconds"]) for artifact in artifacts.values())
    costs = costs_of(stages.values(), known)
    if reason:
        return Result(number, point, ended(reason), reason=reason, keys=keys, seconds=seconds, costs=costs)
    stands = standing(study, stages, known, rivals_of(number, point, earlier, study.search.reach))
    if stands.missing:
        return Result(number, point, "running", keys=keys, seconds=seconds, costs=costs)
    share = _projected_share(artifacts)
    return Result(number, point, "done", stands.metrics, keys=keys, seconds=seconds, projected_share=share, costs=costs)


def costs_of(stages: Iterable[Stage], known: Known) -> dict[str, Cost]:
    """Key -> cost of the stages that are done, and of all that they are made from."""
    found = (known.artifact(stage) for stage in closure(stages))
    return {artifact.key: cost_of(artifact.provenance) for artifact in found if artifact is not None}


def _projected_share(artifacts: Mapping[str, Artifact]) -> float:
    """The share of modules that took C.B, over all replicates."""
    taken = total = 0
    named = {StageName.parse(name): artifact for name, artifact in artifacts.items()}
    for name, artifact in named.items():
        if name.part == "apply":
            taken += len(json.loads(artifact.file(ApplySpec.CHOSEN).read_text()))
            total += len(read_rows(named[replace(name, part="project")].file(ProjectSpec.COSINES)))
    return taken / total
