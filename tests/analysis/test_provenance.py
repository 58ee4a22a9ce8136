"""Provenance: every pin is listed, unknown values are reported, and no path or machine is named."""

import subprocess
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

from ebbline.analysis.report.provenance import (
    Build,
    ProvenanceRow,
    build,
    generated_content,
    hardware,
    pins,
    provenance,
)
from ebbline.cluster.schedule.costs import Cost, cost_of, origin_of
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import load
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.identity import content_digest

SHA, COMMIT = "a" * 64, "b" * 40


def stage(kind: str, **record: object) -> Cost:
    provenance = {
        "seconds": 3600.0,
        "gpus": 1,
        "gpu_type": None,
        "device": "cpu",
        "host": "node-17",
        "python": "3.11.7",
        **record,
    }
    return replace(cost_of(provenance), origin=origin_of(kind, 1, provenance))


def of(rows: Iterable[ProvenanceRow], group: str) -> dict[str, str]:
    return {row.label: row.value for row in rows if row.group == group}


def outside(study: Study, weights: Path) -> Study:
    reference = {"id": "org/name", "commit": COMMIT, "sha256": SHA}
    changed = study.model_dump()
    changed["models"]["small"]["aligned"] = {"hub": reference}
    changed["models"]["medium"]["aligned"] = {
        "path": {"path": str(weights), "sha256": content_digest(weights)}
    }
    changed["suites"]["refusal"]["prompts"] = {
        "hub": {**reference, "id": "org/prompts", "file": "test.csv"}
    }
    return Study.model_validate(changed)


@pytest.mark.process
def test_every_pin_is_named_with_its_commit_and_digest_and_no_path(
    study: Study, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"0")
    pinned = outside(study, weights)
    found = {pin.where: pin for pin in pins(pinned)}
    assert list(found) == [
        "models.small.aligned.hub",
        "models.medium.aligned.path",
        "suites.refusal.prompts.hub",
    ]
    assert str(found["models.small.aligned.hub"]) == f"org/name@{COMMIT}, sha256 {SHA}"
    assert str(found["models.medium.aligned.path"]) == f"weights, sha256 {content_digest(weights)}"
    assert (
        str(found["suites.refusal.prompts.hub"]) == f"org/prompts@{COMMIT}, test.csv, sha256 {SHA}"
    )
    assert [pin.is_model for pin in found.values()] == [True, True, False]
    rows = provenance(StudyView(pinned, Home(tmp_path / "home")), []).rows()
    assert not [row for row in rows if str(tmp_path) in row.value]
    assert of(rows, "Models and data")["models.small.aligned"].startswith("org/name@")


def test_a_missing_pin_is_reported() -> None:
    assert str(next(pins(load("llama2")))) == "meta-llama/Llama-2-7b-hf@(no commit), sha256 (none)"


def test_content_that_ebbline_makes_is_listed_with_its_origin() -> None:
    found = dict(generated_content(load("quickstart")))
    assert found["models.7b.base"] == "small organism, pretrained here from seed 0"
    assert (
        found["models.70b.aligned"] == "fully fine-tuned here from base, 3050 rows of align.jsonl"
    )
    assert found["data.pool"] == "benign.jsonl of the invented language"
    assert found["language"] == "the invented language, made here from seed 0"


@pytest.mark.process
def test_a_study_that_has_not_run_is_reported_as_such(study: Study, tmp_path: Path) -> None:
    rows = provenance(StudyView(study, Home(tmp_path)), []).rows()
    assert of(rows, "Hardware") == {"ran on": "nothing has run yet"}
    assert of(rows, "Software")["versions of the stage kinds"] == "nothing has run yet"
    assert [group for group, _ in groupby(rows, key=lambda row: row.group)] == [
        "Study",
        "Models and data",
        "Software",
        "Hardware",
    ]


def test_hardware_is_listed_by_kind_and_type_without_names_of_machines() -> None:
    stages = [
        stage("train", gpu_type="A100", device="cuda", gpus=4, host="node-1"),
        stage("train", gpu_type="A100", device="cuda", host="node-2"),
        stage("generate"),
        stage("score", gpus=0),
    ]
    found = hardware(stages)
    assert [str(each) for each in found] == [
        "CPU, 1 machine, 1 stage",
        "A100, up to 4 at once, 2 machines, 2 stages",
    ]
    assert found[1].hosts == ("node-1", "node-2") and found[1].gpu_s == 5 * 3600.0


@pytest.mark.process
def test_the_number_of_seeds_used_is_reported_when_points_have_fewer(
    study: Study, results: list[Result], tmp_path: Path
) -> None:
    wide = study.model_copy(update={"seeds": (3, 5, 7)})
    assert (
        of(provenance(StudyView(wide, Home(tmp_path)), results).rows(), "Study")["seeds"]
        == "3, 5, 7 (at most 1 used by a point so far)"
    )


@pytest.mark.process
def test_the_commit_is_that_of_the_checkout_and_changes_are_reported(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        settings = (
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@example.org",
            "-c",
            "commit.gpgsign=false",
        )
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *settings, *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    commit = git("rev-parse", "HEAD")
    clean = build(tmp_path)
    assert (clean.commit, clean.changed) == (commit, False)
    (tmp_path / "file").write_text("two")
    assert str(build(tmp_path)) == f"{clean.version}, commit {commit}, with uncommitted changes"
    (tmp_path / "inside").mkdir()
    assert build(tmp_path / "inside").commit != commit


@pytest.mark.parametrize(
    ("commit", "expected"), [(None, "commit unknown"), (COMMIT, f"commit {COMMIT}")]
)
def test_an_unknown_commit_is_reported_as_unknown(commit: str | None, expected: str) -> None:
    assert expected in str(Build("0.1.0", commit))
