"""What became of a point, read from the store: its metrics pooled over seeds, or the reason that it has none."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from cluster.costs import Cost, cost_of
from cluster.store import Artifact
from sweeps.points import Point, Result, StageName
from sweeps.racing import Known, rivals_of, standing
from sweeps.study import Study
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
        return Result(number, point, "failed", reason=reason, keys=keys, seconds=seconds, costs=costs)
    stands = standing(study, stages, known, rivals_of(number, point, earlier, study.search.window))
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
