"""Results read from a store with synthetic artifacts, each under the key of its stage."""

import json
from pathlib import Path
from typing import Any

import pytest

from ebbline.analysis.results.collect import StoredEvidence, baselines
from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.state.outcome import result_of
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, Result, StageName
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import Damaged
from ebbline.tasks.identity import digest
from ebbline.tasks.measuring.metrics import Metric, write_metrics, write_samples
from ebbline.tasks.measuring.scorers import agreement
from ebbline.tasks.specs import GenerateSpec, ScoreSpec
from ebbline.tasks.stage import Part, Stage
from tests.analysis.conftest import share
from tests.sweeps import made

CHANGES: dict[str, Any] = {
    "seeds": [0, 1],
    "suites/refusal/measure": {"kind": "refusal", "scorer": "organism", "also": ["prefix"]},
}
PARTS = (
    "adapter/x",
    "data.jsonl",
    "model/x",
    "align.jsonl",
    "benign.jsonl",
    "refusal.jsonl",
    "task.jsonl",
    "projected_modules.json",
)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return made.study(tmp_path, CHANGES)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def make(stage: Stage, store: Store, successes: int) -> Artifact:
    """Write the artifacts of a stage and its inputs.

    A score has `successes` of ten; its second scorer has one fewer.
    """
    for item in stage.inputs.values():
        above = item.stage if isinstance(item, Part) else item
        if isinstance(above, Stage):
            make(above, store, successes)
    hashed = Resolver(store).hashed(stage)
    assert hashed is not None
    found = store.find(stage.kind, digest(hashed))
    if found is not None:
        return found
    folder = store.begin(stage.kind, digest(hashed)) / "payload"
    for part in PARTS:
        (folder / part).parent.mkdir(exist_ok=True)
        (folder / part).write_text(f"[] {digest(hashed)}")
    (folder / "cosines.json").write_text('{"m": {"cosine": 0.5, "norm_ratio": 1.0}}')
    (folder / "projected_modules.json").write_text('["m"]')
    (folder / GenerateSpec.PROMPTS).write_text('{"of": 30}')
    if isinstance(stage.spec, ScoreSpec):
        name = "refusal_rate" if stage.spec.measure == "refusal" else "task_accuracy"
        write_metrics(folder, [Metric(name, successes, 10)])
        write_samples(folder, share(successes, 10, ("fire", "frost")))
        one, other = (["refused"] * n + ["complied"] * (10 - n) for n in (successes, successes - 1))
        pair = {"one": "organism", "other": "prefix", **agreement(one, other)}
        counts = {
            "organism": {"refused": successes, "n": 10},
            "prefix": {"refused": successes - 1, "n": 10},
        }
        (folder / ScoreSpec.AGREEMENT).write_text(json.dumps({"scorers": counts, "pairs": [pair]}))
    return store.commit(folder.parent, hashed, {"seconds": 1.0})


def measured_point(study: Study, home: Home) -> Result:
    """Seed 0 refuses 6 of 10, seed 1 refuses 8."""
    point = Point.of("7b", {"train.rank": 2, "apply.threshold": 0.5})
    stages = StageGraph(study, home).stages_for(point)
    for name, stage in stages.items():
        make(stage, home.store, 6 if name.endswith("[seed=0]") else 8)
    return result_of(study, 0, point, stages, Resolver(home.store))


def test_samples_of_a_point_are_by_seed_and_add_up_to_its_metric(study: Study, home: Home) -> None:
    result, evidence = measured_point(study, home), StoredEvidence(StudyView(study, home))
    found = evidence.samples(result, "refusal")
    assert {seed: sum(sample.success for sample in samples) for seed, samples in found.items()} == {
        0: 6,
        1: 8,
    }
    metric = result.metrics["refusal.refusal_rate"]
    assert (metric.successes, metric.n, metric.seeds) == (14, 20, (0.6, 0.8))


def test_the_agreement_of_a_point_is_added_up_over_its_seeds(study: Study, home: Home) -> None:
    result, evidence = measured_point(study, home), StoredEvidence(StudyView(study, home))
    found = evidence.agreement(result, "refusal")
    assert found is not None
    assert found.counts == {
        "organism": {"refused": 14, "n": 20},
        "prefix": {"refused": 12, "n": 20},
    }
    assert (found.pairs[0].n, found.pairs[0].agree) == (20, 0.9)
    assert evidence.agreement(result, "task") is None  # one scorer has no agreement


def test_the_aligned_model_has_samples_after_its_measurement(study: Study, home: Home) -> None:
    assert StoredEvidence(StudyView(study, home)).samples("7b", "refusal") == {}
    assert StoredEvidence(StudyView(study, home)).agreement("7b", "refusal") is None
    for stage in StageGraph(study, home).baselines()["7b"].values():
        make(stage, home.store, 9)
    evidence = StoredEvidence(StudyView(study, home))
    assert [
        sum(sample.success for sample in samples)
        for samples in evidence.samples("7b", "refusal").values()
    ] == [9]
    assert baselines(StudyView(study, home))["7b"]["refusal.refusal_rate"].successes == 9
    assert evidence.samples("70b", "refusal") == {}


def test_a_point_of_which_a_seed_is_missing_has_no_samples_yet(study: Study, home: Home) -> None:
    result = measured_point(study, home)
    half = Result(
        0,
        result.point,
        "running",
        keys={name: key for name, key in result.keys.items() if name.endswith("[seed=0]")},
    )
    assert StoredEvidence(StudyView(study, home)).samples(half, "refusal") == {}


def test_only_the_blocks_that_a_raced_points_metrics_count_are_read(
    tmp_path: Path, home: Home
) -> None:
    raced = {
        "kind": "refusal",
        "scorer": "organism",
        "limit": 30,
        "race": {"block": 10, "width": 0.4},
    }
    study = made.study(tmp_path, {"suites/refusal/measure": raced})
    point = Point.of("7b", {"train.rank": 2, "apply.threshold": 0.5})
    stages = StageGraph(study, home).stages_for(point)
    for number, (name, stage) in enumerate(stages.items()):
        if StageName.parse(name).block != 2:
            make(stage, home.store, 5 + number % 2)
    result = result_of(study, 0, point, stages, Resolver(home.store))
    assert (result.status, result.metrics["refusal.refusal_rate"].n) == ("done", 10)
    assert sorted(name for name in result.keys if name.startswith("refusal#")) == [
        "refusal#0[seed=0]",
        "refusal#1[seed=0]",
    ]
    assert [
        len(samples)
        for samples in StoredEvidence(StudyView(study, home)).samples(result, "refusal").values()
    ] == [10]


def test_a_damaged_agreement_is_named(study: Study, home: Home) -> None:
    result = measured_point(study, home)
    path = home.store.open("score", result.keys["refusal[seed=1]"]).path / ScoreSpec.AGREEMENT
    for content in ("{", "{}", "[]"):
        path.write_text(content)
        with pytest.raises(Damaged, match="agreement.json is damaged"):
            StoredEvidence(StudyView(study, home)).agreement(result, "refusal")
