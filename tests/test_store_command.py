"""`ebbline store` on a small real study, in a folder and in a bucket: what it counts, what it
finds, and what it never removes.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.frontier import frontier_by_model
from ebbline.cli import app
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.store.artifacts import RECORD
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.identity import content_digest, digest
from ebbline.tasks.specs import DataSpec, TrainSpec
from ebbline.tasks.stage import key_payload
from tests.sweeps.made import study as made_study
from tests.tiny import Pair, conversations, write_chats, write_lines

OLD = time.time() - 100 * 3600
HASHED = key_payload(DataSpec(size=3), {"pool": "nobody's"})


def pinned(path: Path) -> dict[str, Any]:
    return {"path": {"path": str(path), "sha256": content_digest(path)}}


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    asked = [
        {"prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for turns in conversations(6, 3)
    ]
    prompts = write_lines(folder / "prompts.jsonl", asked)
    return {
        "models": {
            "7b": {
                "base": pinned(pair.base),
                "aligned": pinned(pair.aligned),
                "quantisation": "none",
                "dtype": "float32",
            }
        },
        "data": {"pool": pinned(write_chats(folder / "chats.jsonl", 32)), "settings": {"size": 16}},
        "train": {
            "steps": 2,
            "global_batch": 8,
            "rank": 2,
            "learning_rate": 1e-2,
            "max_tokens": 64,
        },
        "axes": {"apply.threshold": [None, 1.0]},
        "suites/refusal": {
            "prompts": pinned(prompts),
            "measure": {"kind": "refusal", "max_new_tokens": 4},
        },
        "suites/task": {
            "prompts": pinned(prompts),
            "measure": {"kind": "task", "max_new_tokens": 4},
        },
        "search": {"sampler": "grid", "window": 2},
    }


def driven_in(
    folder: Path, changes: dict[str, Any], profile: dict[str, Any] | None = None
) -> tuple[Study, Home]:
    (folder / "home").mkdir(parents=True, exist_ok=True)
    if profile:
        (folder / "home" / "cluster.yaml").write_text(yaml.safe_dump(profile))
    found, home = made_study(folder, changes), Home(folder / "home")
    progress = drive(StudyView(found, home), InlineExecutor)
    assert {result.status for result in progress.results} == {"done"}
    return found, home


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> tuple[Study, Home]:
    return driven_in(tmp_path_factory.mktemp("once"), changes)


@pytest.fixture
def study(once: tuple[Study, Home]) -> Study:
    return once[0]


@pytest.fixture
def home(once: tuple[Study, Home], tmp_path: Path) -> Home:
    """A copy of a driven home, in which everything was written long ago."""
    shutil.copytree(once[1].root, tmp_path / "home")
    for path in (tmp_path / "home" / "store").rglob("*"):
        os.utime(path, (OLD, OLD))
    return Home(tmp_path / "home")


def store(home: Home, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["store", *arguments, "--home", str(home.root)])


def data(home: Home, *arguments: str) -> Any:
    done = store(home, *arguments, "--json")
    assert done.exit_code in (0, 1), done.output
    return json.loads(done.stdout)


def files(home: Home) -> dict[str, int]:
    return {
        entry.name: entry.size
        for entry in home.store.place.entries()
        if not entry.name.startswith("homes/")
    }


def orphan(home: Home) -> Path:
    """An artifact that no study refers to."""
    attempt = home.store.begin("data", digest(HASHED))
    (attempt / "payload" / DataSpec.ROWS).write_text("rows")
    home.store.commit(attempt, HASHED, {"seconds": 1.0})
    return attempt


def aged(home: Home) -> None:
    for path in home.store.root.rglob("*"):
        os.utime(path, (OLD, OLD))


def test_du_counts_by_kind_and_by_study(home: Home) -> None:
    orphan(home)
    found = data(home, "du")
    assert found["bytes"] == sum(files(home).values()) + 2  # and {} for the home
    assert (
        found["kinds"]["train"]["count"] == 1
        and found["kinds"]["apply"]["count"] == 2
        and found["kinds"]["data"]["count"] == 2
    )
    assert sum(kind["bytes"] for kind in found["kinds"].values()) == found["bytes"] - 2
    unneeded = sum(
        size for name, size in files(home).items() if name.startswith(f"data/{digest(HASHED)}/")
    )
    assert found["studies"]["tiny"] == {
        "bytes": found["bytes"] - 2 - unneeded,
        "bytes of its own": found["bytes"] - 2 - unneeded,
    }
    assert "tiny" in store(home, "du").stdout


def test_verify_names_each_damage_with_its_remedy_and_mend_has_it_made_again(
    study: Study, home: Home
) -> None:
    assert store(home, "verify").exit_code == 0
    before = [(result.metrics, result.keys) for result in collect(StudyView(study, home))]
    train, score, generate = (
        next(iter(home.store.all(kind))) for kind in ("train", "score", "generate")
    )
    (train.file(TrainSpec.CURVE)).write_text("step,loss\n")
    next(train.path.rglob("*.safetensors")).unlink()
    (score.folder.parent / RECORD).write_text("{")
    done = store(home, "verify")
    assert (
        done.exit_code == 1
        and "its sha256 is" in done.stdout
        and "it is missing" in done.stdout
        and "is damaged" in done.stdout
    )
    assert done.stdout.count("--mend") >= 3 and "2 damaged" in done.stdout
    assert store(home, "verify", "--mend").exit_code == 0
    assert (
        home.store.find("train", train.key) is None
        and home.store.find("generate", generate.key) is not None
    )
    assert len(list((home.store.root / "aside").glob("*/*"))) == 2
    assert data(home, "verify")["damages"] == []
    drive(StudyView(study, home), InlineExecutor)
    assert [(result.metrics, result.keys) for result in collect(StudyView(study, home))] == before


def test_gc_removes_nothing_without_the_option(home: Home) -> None:
    orphan(home)
    aged(home)
    before = files(home)
    done = store(home, "gc", "--keep-adapters", "none")
    assert (
        done.exit_code == 0
        and "nothing was removed" in done.stdout
        and "--yes" in done.stdout
        and "artifact" in done.stdout
    )
    assert files(home) == before


def test_gc_removes_what_nobody_needs_and_keeps_every_result(study: Study, home: Home) -> None:
    before, kept = collect(StudyView(study, home)), files(home)
    lost = orphan(home)
    cut = home.store.begin("train", "a" * 64)
    (cut / "payload" / "half").write_bytes(b"0" * 1000)
    done = next(iter(home.store.all("train")))
    for key in (done.key, "b" * 64):
        home.store.scratch(key).mkdir(parents=True)
        (home.store.scratch(key) / "checkpoint.pt").write_bytes(b"0" * 500)
    aged(home)
    young = home.store.begin("train", "c" * 64)
    (young / "payload" / "half").write_text("at work")
    found = data(home, "gc", "--yes")
    assert sorted(each["what"] for each in found["what"]) == [
        "artifact",
        "checkpoint",
        "checkpoint",
        "cut-off attempt",
    ]
    assert found["removed"] and found["bytes"] >= 2000
    assert not lost.exists() and not cut.exists() and (young / "payload" / "half").exists()
    assert {name: size for name, size in files(home).items() if "c" * 64 not in name} == kept
    assert collect(StudyView(study, home)) == before
    assert (
        "nothing to remove; files written in the last 24 hours always stay"
        in store(home, "gc", "--yes").stdout
    )


def test_gc_knows_what_a_study_needs_when_its_own_files_are_gone(home: Home, study: Study) -> None:
    path = home.root / "studies" / "tiny" / "study.json"
    text = path.read_text()
    assert study.data.pool.path is not None
    path.write_text(text.replace(study.data.pool.path.path, "/moved/away.jsonl"))
    assert data(home, "gc", "--keep-adapters", "frontier", "--older-than-h", "1000")["what"] == []
    before = files(home)
    assert store(home, "gc", "--yes").exit_code == 0 and files(home) == before


def test_gc_waits_for_a_study_that_is_being_driven(home: Home) -> None:
    orphan(home)
    aged(home)
    before = files(home)
    with home.driving("tiny"):
        for command in (("gc", "--yes"), ("verify", "--mend")):
            done = store(home, *command)
            assert done.exit_code == 4 and "another driver holds study" in done.stderr
        assert store(home, "gc").exit_code == 0
    assert files(home) == before


def test_gc_keeps_what_another_home_may_need(home: Home, tmp_path: Path) -> None:
    orphan(home)
    aged(home)
    before = files(home)
    other = tmp_path / "other"
    other.mkdir()
    (other / "cluster.yaml").write_text(f"store: {home.store.root}\n")
    with Home(other).driving("anything"):
        pass
    done = store(home, "gc", "--yes", "--keep-adapters", "none")
    assert done.exit_code == 0 and "other homes use this store" in done.stdout
    assert files(home) == before


def test_while_a_study_cannot_be_read_gc_removes_nothing_that_it_may_need(home: Home) -> None:
    orphan(home)
    aged(home)
    before = files(home)
    other = home.root / "studies" / "other"
    other.mkdir()
    (other / "study.json").write_text("{")
    for keep in ("all", "none"):
        done = store(home, "gc", "--yes", "--keep-adapters", keep)
        assert done.exit_code == 0 and files(home) == before
        assert "other/study.json cannot be read" in done.stderr and "stay" in done.stderr
    usage = data(home, "du")
    assert list(usage["studies"]) == ["tiny"] and list(usage["unknown"]) == ["other"]


def test_while_the_points_of_a_study_are_lost_gc_removes_nothing_that_it_may_need(
    home: Home,
) -> None:
    (home.root / "studies" / "tiny" / "results.parquet").write_text("a table that was written")
    (home.root / "studies" / "tiny" / "optuna.db").unlink()
    before = files(home)
    done = store(home, "gc", "--yes")
    assert done.exit_code == 0 and "has no points" in done.stderr and files(home) == before


def test_dropped_adapters_leave_every_result_and_are_made_again_when_a_new_point_needs_one(
    study: Study, home: Home, changes: dict[str, Any], tmp_path: Path
) -> None:
    before = collect(StudyView(study, home))
    front = [
        result for each in frontier_by_model(before, study.objectives).values() for result in each
    ]
    kept = store(home, "gc", "--yes", "--keep-adapters", "frontier")
    assert kept.exit_code == 0 and front
    for result in front:
        for name, key in result.keys.items():
            assert not home.store.dropped(
                home.store.open(study.kind_of(name.partition("[")[0]), key)
            ), name
    done = store(home, "gc", "--yes", "--keep-adapters", "none")
    assert done.exit_code == 0 and "adapter" in done.stdout and "freed" in done.stdout
    (train,) = home.store.all("train")
    assert [path.name for path in train.path.rglob("*.safetensors")] == [] and home.store.dropped(
        train
    )
    assert collect(StudyView(study, home)) == before and data(home, "verify")["damages"] == []
    again = drive(StudyView(study, home), InlineExecutor)
    assert again.results == [] and not sum(
        counts["done"] for counts in again.runner.counts.values()
    )
    assert home.store.dropped(train), "a finished study reads no adapter"
    more = made_study(
        tmp_path, changes | {"study": "more", "axes": {"apply.threshold": [None, 0.0]}}
    )
    progress = drive(StudyView(more, home), InlineExecutor)
    assert [result.status for result in progress.results] == ["done", "done"]
    assert not home.store.dropped(train) and content_digest(train.path) == train.content


def test_forget_moves_one_artifact_aside(home: Home) -> None:
    (train,) = home.store.all("train")
    assert store(home, "forget", "train", "f" * 64).exit_code == 1
    done = store(home, "forget", "train", train.key)
    assert (
        done.exit_code == 0
        and "aside/train/" in done.stdout
        and home.store.find("train", train.key) is None
    )


def test_a_study_in_a_bucket_comes_out_as_in_a_folder_and_is_looked_after_alike(
    study: Study, once: tuple[Study, Home], changes: dict[str, Any], bucket: str, tmp_path: Path
) -> None:
    found, home = driven_in(tmp_path / "bucket", changes, {"store": bucket, "cache_gb": 0.5})
    assert not (home.root / "store").exists()
    beside = [
        (result.metrics, result.keys, result.changed_share)
        for result in collect(StudyView(study, once[1]))
    ]
    assert [
        (result.metrics, result.keys, result.changed_share)
        for result in collect(StudyView(found, home))
    ] == beside
    usage = data(home, "du")
    assert (
        usage["store"] == bucket
        and usage["kinds"]["train"]["count"] == 1
        and usage["kinds"]["sources"]["count"] > 2
    )
    attempt = orphan(home)
    store_before = files(home)
    assert data(home, "gc", "--yes")["what"] == []  # all of it is young
    assert files(home) == store_before
    gone = data(home, "gc", "--yes", "--older-than-h", "0")
    assert [each["what"] for each in gone["what"]] == ["artifact"]
    assert not any(
        digest(HASHED) in name for name in files(home)
    ) and attempt.parent.name == digest(HASHED)
    assert data(home, "verify")["damages"] == []
    (train,) = home.store.all("train")
    home.store.place.delete(
        [
            name
            for name in files(home)
            if name.startswith("train/") and name.endswith(".safetensors")
        ]
    )
    done = store(home, "verify")
    assert done.exit_code == 1 and "it is missing" in done.stdout
    assert store(home, "verify", "--mend").exit_code == 0
    fresh = Home(home.root)
    assert fresh.store.find("train", train.key) is None
    drive(StudyView(found, fresh), InlineExecutor)
    assert [
        (result.metrics, result.keys, result.changed_share)
        for result in collect(StudyView(found, fresh))
    ] == beside
