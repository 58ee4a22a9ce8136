"""The keys of a reproduction bundle: written from one home, compared with those of another.

Invariant: keys are compared stage by stage, inputs first, so the first that differs is where the
runs diverged. The comparison runs nothing and needs no external content.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ebbline.analysis.report.provenance import Build
from ebbline.cluster.store.artifacts import Artifact
from ebbline.cluster.store.resolver import Resolver, contents_of
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import parse
from ebbline.tasks.errors import StudyError
from ebbline.tasks.measuring.metrics import METRICS
from ebbline.tasks.stage import Stage, closure

KEYS = "keys.json"
STUDY = "study.yaml"
State = Literal["same", "absent", "differ"]


@dataclass(frozen=True)
class KeptStage:
    """A stage of the bundle: `inputs` are the digests in its key, `metrics` its metrics' digest."""

    label: str
    kind: str
    lineage: str
    key: str
    inputs: Mapping[str, str]
    metrics: str | None = None


@dataclass(frozen=True)
class Checked:
    """The comparison of a bundle's stages with another home.

    `first` describes the first stage that is not the same and why; it is empty if all are the same.
    `points_same` counts the points whose keys all match.
    """

    same: int
    absent: int
    differ: int
    first: str = ""
    points_same: int = 0
    points: int = 0


def keys_of(study: Study, home: Home, results: Sequence[Result], build: Build) -> dict[str, Any]:
    """The content of keys.json: the points with their keys, and all stages, inputs first."""
    graph, resolver = StageGraph(study, home, located=False), Resolver(home.store)
    points = [
        {
            "number": r.number,
            "point": r.point.id,
            "model": r.point.model,
            "values": dict(r.point.values),
            "status": r.status,
            "keys": dict(r.keys),
        }
        for r in results
    ]
    found = [
        (label, stage, artifact)
        for label, stage in _named(graph, points)
        if (artifact := resolver.artifact(stage)) is not None
    ]
    return {
        "study": study.study,
        "ebbline": {"version": build.version, "commit": build.commit},
        "points": points,
        "stages": [asdict(_kept(label, stage, artifact)) for label, stage, artifact in found],
    }


def check_bundle(folder: Path, home: Home) -> Checked:
    """Compares the keys of a bundle with those of a home where its study was run; runs nothing.

    Raises StudyError when the folder holds no readable bundle.
    """
    kept, points = _read(folder / KEYS)
    study = parse(folder / STUDY)
    graph, resolver = StageGraph(study, home, located=False), Resolver(home.store)
    stages = _named(graph, points)
    by_lineage = {stage.lineage: stage for _, stage in stages}
    states = [(each, *_state(each, by_lineage.get(each.lineage), resolver)) for each in kept]
    counts = Counter(state for _, state, _ in states)
    first = next(
        (f"{each.label} ({each.kind}): {why}" for each, state, why in states if state != "same"),
        "",
    )
    wrong = {each.key for each, state, _ in states if state != "same"}
    points = [point for point in points if point["keys"]]
    whole = sum(not wrong & set(point["keys"].values()) for point in points)
    return Checked(counts["same"], counts["absent"], counts["differ"], first, whole, len(points))


def _state(kept: KeptStage, stage: Stage | None, resolver: Resolver) -> tuple[State, str]:
    """Whether a stage is the same as in the bundle, and if not, why."""
    if stage is None:
        return (
            "differ",
            "study.yaml leads to another stage now: the file was changed, or this version of "
            "ebbline defines this kind differently",
        )
    now = contents_of(stage, resolver.artifact)
    if now is None:
        return (
            "absent",
            "its inputs are not in this home yet; run the bundle's study to its end",
        )
    artifact, key = resolver.artifact(stage), resolver.key(stage)
    if key != kept.key:
        names = [name for name, content in sorted(kept.inputs.items()) if now.get(name) != content]
        return "differ", (
            f"its key is {str(key)[:12]} here and {kept.key[:12]} in the bundle, because "
            f"its input {' and '.join(names)} has other content. The"
            " stage that makes that input had the same key but gave another result. Other "
            "hardware or versions can cause this;"
            " compare with constraints.txt"
        )
    if artifact is None:
        return "absent", "it is not in this home yet; run the bundle's study to its end"
    if kept.metrics is not None and artifact.files.get(METRICS) != kept.metrics:
        return (
            "differ",
            f"its key {kept.key[:12]} is the same, but its metrics from the same inputs differ",
        )
    return "same", ""


def _kept(label: str, stage: Stage, artifact: Artifact) -> KeptStage:
    return KeptStage(
        label,
        artifact.kind,
        stage.lineage,
        artifact.key,
        dict(artifact.hashed["inputs"]),
        artifact.files.get(METRICS),
    )


def _named(graph: StageGraph, points: Sequence[Mapping[str, Any]]) -> list[tuple[str, Stage]]:
    """(label, stage) of the aligned models' measurements, the points' stages and all their inputs.

    Each stage appears once, inputs first.
    """
    targets = [stage for suites in graph.baselines().values() for stage in suites.values()]
    for point in points:
        stages = (
            graph.stages_for(Point.of(point["model"], point["values"])) if point["keys"] else {}
        )
        targets += [stage for name, stage in stages.items() if name in point["keys"]]
    return [(graph.label(stage), stage) for stage in closure(targets)]


def _read(path: Path) -> tuple[list[KeptStage], list[dict[str, Any]]]:
    try:
        record = json.loads(path.read_text("utf-8"))
        return [KeptStage(**row) for row in record["stages"]], list(record["points"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StudyError(
            f"{path} cannot be read as the keys of a bundle ({type(error).__name__}). Name "
            "the folder `bundle` that"
            " `ebbline export STUDY --to DIR` wrote"
        ) from error
