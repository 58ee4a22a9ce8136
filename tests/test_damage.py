"""Damage in a driven study.

Whatever file of the store changes, reading it is an error that names it. After `store verify
--mend` the numbers are those from before.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ebbline.analysis.results.collect import collect
from ebbline.cli import app
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.store import retention
from ebbline.cluster.store.artifacts import RECORD, Artifact
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import Damaged, PinError
from ebbline.tasks.inputs import InputCheck
from ebbline.tasks.specs import ApplySpec, DataSpec, TrainSpec
from tests.sweeps.made import study as made_study
from tests.test_store_command import (  # noqa: F401  # fixtures
    changes,
    data,
    driven_in,
    home,
    once,
    store,
    study,
)


def flip(path: Path) -> None:
    """Change one bit in the middle, and keep the size and the time of modification."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def payload(artifact: Artifact) -> Path:
    return artifact.folder / "payload"


def wider(folder: Path, changes: dict[str, Any]) -> Study:  # noqa: F811
    """The study with one more threshold, so that it reads what it has made."""
    return made_study(folder, changes | {"axes": {"apply.threshold": [None, 0.0, 1.0]}})


def extend(found: Study, home: Home) -> list[Any]:  # noqa: F811
    drive(StudyView(found, Home(home.root), extend=True), InlineExecutor)
    return [
        (result.point, result.status, result.metrics, result.changed_share)
        for result in collect(StudyView(found, Home(home.root)))
    ]


@pytest.fixture
def by_project(home: Home) -> dict[str, Path]:  # noqa: F811
    """KIND/NAME -> the path of each file of the artifacts that a new threshold reads."""
    return {
        f"{kind}/{name}": payload(artifact) / name
        for kind in ("train", "project")
        for artifact in home.store.all(kind)
        for name in artifact.files
    }


@pytest.mark.parametrize("which", ["train/adapter/adapter_model.safetensors", "project/"])
def test_an_extension_of_a_study_over_a_damaged_artifact_is_an_error_that_names_it(
    home: Home,  # noqa: F811
    changes: dict[str, Any],  # noqa: F811
    by_project: dict[str, Path],
    tmp_path: Path,
    which: str,
) -> None:
    found = wider(tmp_path, changes)
    for name in [each for each in by_project if each.startswith(which)]:
        flip(by_project[name])
        kinds = {kind: home.store.place.below(kind) for kind in ("apply", "generate", "score")}
        with pytest.raises(Damaged, match="verify --mend") as caught:
            extend(found, home)
        assert str(by_project[name]) in str(caught.value)
        assert kinds["score"] == home.store.place.below("score")
        flip(by_project[name])
    assert {status for _, status, *_ in extend(found, home)} == {"done"}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("score", "metrics.json"), ("score", "samples.jsonl"), ("apply", ApplySpec.CHOSEN)],
)
def test_results_are_an_error_when_a_small_file_that_they_print_is_damaged(
    study: Study,  # noqa: F811
    home: Home,  # noqa: F811
    kind: str,
    name: str,
) -> None:
    from ebbline.analysis.results.collect import StoredEvidence

    view = StudyView(study, home)
    results = collect(view)
    keys = {key for result in results for key in result.keys.values()}
    artifact = next(each for each in home.store.all(kind) if each.key in keys)
    (path,) = [payload(artifact) / each for each in artifact.files if each == name]
    flip(path)
    with pytest.raises(Damaged, match=name):
        for result in collect(StudyView(study, Home(home.root))):
            for suite in study.suites:
                StoredEvidence(view).samples(result, suite)


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("kind", ["train", "score"])
def test_a_changed_digit_or_letter_in_a_record_is_an_error(
    study: Study,  # noqa: F811
    home: Home,  # noqa: F811
    kind: str,
    place: float,
) -> None:
    (result, *_) = collect(StudyView(study, Home(home.root)))
    (artifact, *_) = (each for each in home.store.all(kind) if each.key in result.keys.values())
    path = artifact.folder.parent / RECORD
    text = path.read_text()
    at = next(index for index in range(int(place * len(text)), len(text)) if text[index].isalnum())
    path.write_text(f"{text[:at]}{'7' if text[at] != '7' else '8'}{text[at + 1 :]}")
    with pytest.raises(Damaged, match=RECORD):
        collect(StudyView(study, Home(home.root)))
    assert store(home, "verify", "--mend").exit_code == 0
    assert data(home, "verify")["damages"] == []


def test_a_rerun_over_a_damaged_input_is_an_error_that_names_it(
    once: tuple[Study, Home],  # noqa: F811  # a request holds the paths of its own home
) -> None:
    kept = once[1].store
    (project,), (train,) = kept.all("project"), kept.all("train")
    request = project.log / "request.json"
    assert CliRunner().invoke(app, ["rerun", str(request)]).exit_code == 0
    path = payload(train) / "adapter" / "adapter_model.safetensors"
    flip(path)
    try:
        found = CliRunner().invoke(app, ["rerun", str(request)])
    finally:
        flip(path)
        for made in project.log.glob("rerun-*"):
            shutil.rmtree(made)
    assert found.exit_code == 1 and str(path) in found.output and "verify --mend" in found.output


def test_mend_takes_away_what_was_made_from_damage_and_the_next_run_makes_it_right(
    home: Home,  # noqa: F811
    changes: dict[str, Any],  # noqa: F811
    by_project: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An earlier version read damaged inputs. Its whole lineage goes."""
    shutil.copytree(home.root, tmp_path / "beside")
    found = wider(tmp_path, changes)
    right = extend(found, Home(tmp_path / "beside"))
    flip(by_project["train/adapter/adapter_model.safetensors"])
    with monkeypatch.context() as unchecked:
        for method in ("compare", "check_unchanged"):
            unchecked.setattr(InputCheck, method, lambda self: None)
        assert len(extend(found, home)) == len(right)
    assert store(home, "verify").exit_code == 1
    told = data(home, "verify", "--mend")
    made = {row["kind"] for row in told["made from damages"]}
    assert {row["kind"] for row in told["damages"]} == {"train"}
    assert made >= {"project", "apply", "generate", "score"} and "data" not in made
    assert data(home, "verify")["damages"] == []
    assert extend(found, home) == right


def test_a_damaged_artifact_that_was_made_from_damage_spreads_all_its_files(
    home: Home,  # noqa: F811
) -> None:
    """The readers of its adapter go, although only its curve is damaged itself."""
    (train,) = home.store.all("train")
    for artifact in home.store.all("data"):
        flip(payload(artifact) / DataSpec.ROWS)
    flip(payload(train) / TrainSpec.CURVE)
    survey = retention.Survey(home.store)
    made = {kind for kind, _ in retention.made_from(survey, retention.damages(survey))}
    assert made >= {"project", "apply", "generate", "score"} and "train" not in made


def test_the_readers_of_an_artifact_whose_record_is_lost_are_found_by_their_requests(
    home: Home,  # noqa: F811
) -> None:
    (train,) = home.store.all("train")
    (train.folder.parent / RECORD).write_text("{")
    survey = retention.Survey(home.store)
    made = retention.made_from(survey, retention.damages(survey))
    assert {kind for kind, _ in made} >= {"project", "apply", "generate", "score"}


def test_a_source_that_changes_with_its_size_and_time_kept_is_an_error(
    home: Home,  # noqa: F811
    changes: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    path = Path(changes["data"]["pool"]["path"]["path"])
    found = made_study(tmp_path, changes)
    flip(path)
    try:
        with pytest.raises(PinError, match="differs from its pin"):
            drive(StudyView(found, Home(home.root)), InlineExecutor)
    finally:
        flip(path)
    (home.root / "digests.json").write_text("{")  # a damaged cache is made again
    assert StudyView(found, Home(home.root)).graph.baselines()


def test_a_damaged_file_of_a_cache_is_fetched_again_and_one_in_the_bucket_is_an_error(
    once: tuple[Study, Home],  # noqa: F811
    changes: dict[str, Any],  # noqa: F811
    bucket: str,
    tmp_path: Path,
) -> None:
    _, home = driven_in(tmp_path / "bucket", changes, {"store": bucket, "cache_gb": 0.5})  # noqa: F811
    more = wider(tmp_path, changes)
    (train,) = home.store.all("train")
    weights = "adapter/adapter_model.safetensors"
    local = train.file(weights)
    flip(local)
    assert {status for _, status, *_ in extend(more, home)} == {"done"}
    name = f"{train.folder.relative_to(home.store.root).as_posix()}/payload/{weights}"
    whole = home.store.place.read(name)
    assert whole is not None and local.read_bytes() == whole
    home.store.place.write(name, whole[:-1] + bytes([whole[-1] ^ 1]))
    shutil.rmtree(local.parent)
    again = made_study(tmp_path, changes | {"axes": {"apply.threshold": [None, 0.0, 0.5, 1.0]}})
    with pytest.raises(Exception, match="verify --mend"):
        extend(again, home)
    listed = next(
        entry.name for entry in home.store.place.entries("sources") if entry.name.endswith(".jsonl")
    )
    home.store.place.write(listed, b"{}")
    kinds = {row["kind"] for row in data(home, "verify", "--mend")["damages"]}
    assert kinds == {"train", "sources"} and data(home, "verify")["damages"] == []
    assert {status for _, status, *_ in extend(again, home)} == {"done"}
    assert json.loads((home.root / "digests.json").read_text())
