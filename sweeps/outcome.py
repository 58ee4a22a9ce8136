"""What became of a point, read from the store: its metrics pooled over seeds, or the reason that it has none."""

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol

from cluster.store import Artifact
from sweeps.points import Point, Result
from sweeps.study import Study
from tasks.metrics import Metric, pooled, read_metrics
from tasks.specs import ApplySpec, ProjectSpec
from tasks.stage import Stage


class Known(Protocol):
    """Whatever can say which artifact a stage has: the runner while it drives, the resolver afterwards."""

    def artifact(self, stage: Stage) -> Artifact | None: ...


def metrics_of(study: Study, stages: Mapping[str, Stage], known: Known) -> dict[str, Metric] | None:
    """Full metric name -> metric, pooled over the replicates; None while an evaluation is missing."""
    found: dict[str, list[Metric]] = defaultdict(list)
    for name, stage in stages.items():
        suite = name.partition("[")[0]
        if suite not in study.suites:
            continue
        artifact = known.artifact(stage)
        if artifact is None:
            return None
        for metric in read_metrics(artifact.path):
            found[f"{suite}.{metric.name}"].append(metric)
    return {name: pooled(replicates) for name, replicates in found.items()}


def result_of(study: Study, number: int, point: Point, stages: Mapping[str, Stage], known: Known, reason: str = "") -> Result:
    """The Result of a point whose stages are `stages`: done when every metric is there, failed when there is a reason."""
    artifacts = {name: artifact for name, stage in stages.items() if (artifact := known.artifact(stage)) is not None}
    keys = {name: artifact.key for name, artifact in artifacts.items()}
    seconds = sum(float(artifact.provenance["seconds"]) for artifact in artifacts.values())
    if reason:
        return Result(number, point, "failed", reason=reason, keys=keys, seconds=seconds)
    metrics = metrics_of(study, stages, known)
    if metrics is None:
        return Result(number, point, "running", keys=keys, seconds=seconds)
    return Result(number, point, "done", metrics, keys=keys, seconds=seconds, projected_share=_projected_share(artifacts))


def _projected_share(artifacts: Mapping[str, Artifact]) -> float:
    """The share of modules that took C.B, over all replicates."""
    taken = total = 0
    for name, artifact in artifacts.items():
        if name.startswith("apply["):
            taken += len(json.loads((artifact.path / ApplySpec.CHOSEN).read_text()))
            total += len(json.loads((artifacts[name.replace("apply", "project")].path / ProjectSpec.COSINES).read_text()))
    return taken / total
