"""The keys of a reproduction bundle: written from one home, compared with what another home has
come to.

Invariant: keys are compared by what they stand for, the stages that study.yaml leads to, inputs
first; so the first that differs is where the other run went another way. Comparing runs nothing and
needs none of the content from outside.
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
    """A stage as the bundle knows it: `inputs` are the digests that its key hashes, `metrics` that
    of what it measured.
    """

    label: str
    kind: str
    lineage: str
    key: str
    inputs: Mapping[str, str]
    metrics: str | None = None


@dataclass(frozen=True)
class Checked:
    """What became of a bundle's stages in another home. `first` tells of the first that is not the
    same, and why; empty if all are.

    Of its `points`, `points_same` have all their keys.
    """

    same: int
    absent: int
    differ: int
    first: str = ""
    points_same: int = 0
    points: int = 0


def keys_of(study: Study, home: Home, results: Sequence[Result], build: Build) -> dict[str, Any]:
    """What keys.json holds: the points with their stages' keys, and every stage behind them, inputs
    first.
    """
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
    """Whether the stages of a bundle have the same keys in a home where its study was run; nothing
    is run for it.

    Raises StudyError when the folder holds no bundle that can be read.
    """
    kept, points = _read(folder / KEYS)
    study = parse(folder / STUDY)
    graph, resolver = StageGraph(study, home, located=False), Resolver(home.store)
    stages = _named(graph, points)
    by_lineage = {stage.lineage: stage for _, stage in stages}
    states = [(known, *_state(known, by_lineage.get(known.lineage), resolver)) for known in kept]
    counts = Counter(state for _, state, _ in states)
    first = next(
        (f"{known.label} ({known.kind}): {why}" for known, state, why in states if state != "same"),
        "",
    )
    wrong = {known.key for known, state, _ in states if state != "same"}
    points = [point for point in points if point["keys"]]
    whole = sum(not wrong & set(point["keys"].values()) for point in points)
    return Checked(counts["same"], counts["absent"], counts["differ"], first, whole, len(points))


def _state(known: KeptStage, stage: Stage | None, resolver: Resolver) -> tuple[State, str]:
    """Whether a stage came out as the bundle says, and if not, in what."""
    if stage is None:
        return (
            "differ",
            "study.yaml asks for another stage now: the file was changed, or this ebbline "
            "means another thing by this kind",
        )
    now = contents_of(stage, resolver.artifact)
    if now is None:
        return (
            "absent",
            "what it is made from is not in this home yet; run the bundle's study to its end",
        )
    artifact, key = resolver.artifact(stage), resolver.key(stage)
    if key != known.key:
        names = [name for name, content in sorted(known.inputs.items()) if now.get(name) != content]
        return "differ", (
            f"its key is {str(key)[:12]} here and {known.key[:12]} in the bundle, as its "
            f"input {' and '.join(names)} has other content: the"
            " stage that makes it had the same key and came out otherwise. Other hardware "
            "or other versions compute otherwise;"
            " compare with constraints.txt"
        )
    if artifact is None:
        return "absent", "it is not in this home yet; run the bundle's study to its end"
    if known.metrics is not None and artifact.files.get(METRICS) != known.metrics:
        return (
            "differ",
            f"its key {known.key[:12]} is the same, but it measured something else from "
            "the same inputs",
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
    """(label, stage) of all behind the aligned models' measurements and the points' own stages,
    each once, inputs first.
    """
    wanted = [stage for suites in graph.baselines().values() for stage in suites.values()]
    for point in points:
        stages = (
            graph.stages_for(Point.of(point["model"], point["values"])) if point["keys"] else {}
        )
        wanted += [stage for name, stage in stages.items() if name in point["keys"]]
    return [(graph.label(stage), stage) for stage in closure(wanted)]


def _read(path: Path) -> tuple[list[KeptStage], list[dict[str, Any]]]:
    try:
        said = json.loads(path.read_text("utf-8"))
        return [KeptStage(**row) for row in said["stages"]], list(said["points"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StudyError(
            f"{path} cannot be read as the keys of a bundle ({type(error).__name__}). Name "
            "the folder `bundle` that"
            " `ebbline export STUDY --to DIR` wrote"
        ) from error
