"""The live page's data: the points as `collect` returns them, only changes, in bounded parts."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ebbline.analysis.dashboard import live_page
from ebbline.analysis.dashboard.curves import MOST_STEPS
from ebbline.analysis.dashboard.live_page import MOST, Changes, LivePage
from ebbline.analysis.results.collect import Follower, collect
from ebbline.sweeps.drive.live import TIMELINE, Ended, read_live
from ebbline.sweeps.drive.loop import Progress, drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.progress import ProgressFile, TrainedStep
from ebbline.tasks.stage import Request
from tests.sweeps.made import study
from tests.sweeps.pretended import Pretended, changes

FAILS = ("the loss became nan", "TrainingError")
AXES = {"train.rank": [2, 4], "apply.threshold": [None, 0.2, 0.4]}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def small(tmp_path: Path, **others: Any) -> Study:
    plain = changes(tmp_path, **{"axes": AXES, "search": {"sampler": "grid"}, **others})
    plain["models"].pop("70b")
    return study(tmp_path, plain)


def everything(page: LivePage) -> dict[str, Any]:
    """All sections, as a new browser assembles them."""
    found: dict[str, dict[str, Any]] = {}
    cursor, more = "", True
    while more:
        answer = json.loads(json.dumps(page.since(cursor), allow_nan=False))
        cursor, more = answer["cursor"], answer["more"]
        for section, rows in answer["changed"].items():
            found.setdefault(section, {}).update(rows)
    return {**found, "drive": answer["drive"], "cursor": cursor, "error": answer["error"]}


def looked(page: LivePage) -> dict[str, Any]:
    """All sections, once the points have been read."""
    deadline = time.monotonic() + 120
    while (
        "counts" not in (found := everything(page))
        and not found["error"]
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "others", [{}, {"seeds": [0, 1, 2], "replicates": {"policy": "near_frontier"}}]
)
def test_repeated_looks_return_what_collect_returns(
    tmp_path: Path, home: Home, others: dict[str, Any]
) -> None:
    found = small(tmp_path, **others)
    follower = Follower(StudyView(found, home))
    assert follower.look() == []
    seen = []

    def watch(progress: Progress) -> None:
        if progress.completed != len(seen):
            assert follower.look() == collect(StudyView(found, home))
            seen.append(progress.completed)

    def fault(request: Request) -> tuple[str, str] | None:
        return FAILS if request.kind == "train" and request.spec["rank"] == 4 else None

    drive(StudyView(found, home), lambda: Pretended(home.store, fails=fault), watch)
    results = follower.look()
    assert len(seen) > 1 and results == collect(StudyView(found, home))
    assert {result.status for result in results} == {"done", "failed"}


@pytest.mark.slow
def test_a_second_look_at_a_finished_study_reads_no_point(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = small(tmp_path)
    drive(StudyView(found, home), lambda: Pretended(home.store))
    follower = Follower(StudyView(found, home))
    first = follower.look()
    monkeypatch.setattr(
        "ebbline.sweeps.state.outcome.result_of",
        lambda *arguments: pytest.fail("a point was computed twice"),
    )
    assert follower.look() == first and len(first) == 6


def test_only_changes_are_sent_in_bounded_parts() -> None:
    kept = Changes()
    kept.replace("points", {str(number): {"number": number} for number in range(2 * MOST + 5)})
    revision, received, more = 0, 0, True
    while more:
        revision, more, found = kept.since(revision)
        assert len(found["points"]) <= MOST
        received += len(found["points"])
    assert received == 2 * MOST + 5 and kept.since(revision) == (revision, False, {})
    kept.replace(
        "points",
        {
            str(number): {"number": number, "status": "done" if number == 7 else ""}
            for number in range(5, 8)
        },
    )
    assert set(kept.since(revision)[2]["points"]) == {"5", "6", "7"}
    kept.replace(
        "points", {str(number): {"number": number, "status": ""} for number in range(5, 8)}
    )
    assert kept.since(kept.revision - 1)[2] == {"points": {"7": {"number": 7, "status": ""}}}


def test_the_page_has_the_points_the_frontier_the_trainings_and_the_stages_of_a_study(
    tmp_path: Path, home: Home
) -> None:
    found = small(tmp_path)
    drive(StudyView(found, home), lambda: Pretended(home.store))
    page = LivePage(StudyView(found, home))
    page_data, results = looked(page), collect(StudyView(found, home))
    assert {int(number) for number in page_data["points"]} == set(range(6)) and page_data[
        "error"
    ] == ""
    for result in results:
        row = page_data["points"][str(result.number)]
        metric = result.metrics["refusal.refusal_rate"]
        assert row["metrics"]["refusal.refusal_rate"][:3] == pytest.approx(
            (metric.value, *metric.interval), abs=1e-6
        )
        assert row["metrics"]["refusal.refusal_rate"][3:] == [metric.n, None, 0]
        assert (
            row["keys"]["train"] == result.keys["train[seed=0]"]
            and row["seeds"] == ["0"]
            and "GPU-hours" in row["cost"]
        )
        assert page.point(result.number)["all_keys"] == result.keys
    assert set(page_data["trainings"]) == {result.keys["train[seed=0]"] for result in results}
    assert (
        page_data["frontier"][""]["by_model"]["7b"]
        and 0 < page_data["frontier"][""]["hypervolume"] < 1
    )
    assert (
        page_data["timeline"][""]["total"] == len(page_data["spans"]) > 10
        and page_data["before"]["7b"]["task.task_accuracy"]
    )
    assert page_data["drive"]["driver"] is None and page_data["drive"]["live"]["ended"] == "done"
    assert page.since(page_data["cursor"])["changed"] == {}
    assert page.point(6) is None


def test_failed_points_have_the_command_that_reruns_them(tmp_path: Path, home: Home) -> None:
    found = small(tmp_path)
    drive(
        StudyView(found, home),
        lambda: Pretended(
            home.store, fails=lambda request: FAILS if request.kind == "train" else None
        ),
    )
    failed = looked(LivePage(StudyView(found, home)))["failed"][""]["latest"]
    assert len(failed) == 6 and all(row["reason"] == "train: the loss became nan" for row in failed)
    assert all(
        row["command"].startswith("ebbline rerun ") and row["command"].endswith("request.json")
        for row in failed
    )


def test_a_study_without_a_run_and_one_without_a_timeline_have_a_page(
    tmp_path: Path, home: Home
) -> None:
    found = small(tmp_path)
    page_data = looked(LivePage(StudyView(found, home)))
    assert (
        page_data["drive"] == {"driver": None, "live": None, "now": page_data["drive"]["now"]}
        and "points" not in page_data
    )
    assert not list(home.root.rglob("optuna.db"))
    drive(StudyView(found, home), lambda: Pretended(home.store))
    for name in (TIMELINE, "live.json"):
        (home.folder("tiny") / name).unlink()
    page_data = looked(LivePage(StudyView(found, home)))
    assert (
        len(page_data["points"]) == 6
        and page_data["timeline"][""] == {"total": 0, "first": 0, "running": []}
        and "spans" not in page_data
    )


def test_stages_have_rows_of_gpus_and_only_the_latest_stages_are_sent(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_page, "SPANS", 3)
    found = small(tmp_path)
    page = LivePage(StudyView(found, home))
    common = {"kind": "train", "key": "0" * 64, "outcome": "done"}
    stages = [
        ("a", "h1", 1, 0, 10),
        ("b", "h1", 1, 0, 5),
        ("c", "h1", 1, 5, 9),
        ("gang", "h1, h2", 4, 10, 20),
    ]
    lines = [
        Ended(label=label, host=host, gpus=gpus, started=s, ended=e, **common)
        for label, host, gpus, s, e in stages
    ]
    path = home.folder("tiny") / TIMELINE
    path.write_text("".join(f"{line.model_dump_json()}\n" for line in lines) + '{"kind": "cut o')
    page_data = everything(page)
    assert page_data["timeline"][""] == {"total": 4, "first": 1, "running": []}
    lanes = {row["label"]: row["lanes"] for row in page_data["spans"].values()}
    assert lanes == {
        "b": ["h1 GPU 0"],
        "c": ["h1 GPU 0"],
        "gang": ["h1 GPU 0", "h1 GPU 1", "h2 GPU 0", "h2 GPU 1"],
    }


def test_losses_of_a_training_that_runs_are_followed_and_then_its_whole_curve(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = small(tmp_path)
    drive(StudyView(found, home), lambda: Pretended(home.store))
    page, folder = LivePage(StudyView(found, home)), home.folder("tiny")
    key = collect(StudyView(found, home))[0].keys["train[seed=0]"]
    live = read_live(folder)
    assert live is not None
    attempt = home.store.begin("train", "f" * 64)
    at_work = {
        "kind": "train",
        "label": "train 7b rank=2",
        "key": "f" * 64,
        "attempt": attempt.relative_to(home.store.root).as_posix(),
        "host": "here",
        "gpus": 1,
        "started": 0.0,
        "expected_s": 9.0,
    }
    with home.driving("tiny"):
        for step, loss in ((3, 4.125), (9, 1.5)):
            step_now = {"done": step, "total": 40, "note": "", "loss": loss, "learning_rate": 1e-4}
            running = [{**at_work, "progress": step_now}]
            written = TrainedStep(step, 40, loss, 1e-4, 512, seconds=2.0, gradient_norm=0.5)
            ProgressFile(attempt / "log" / "progress.json").step_done(written)
            (folder / "live.json").write_text(
                json.dumps({**live.model_dump(mode="json"), "ended": None, "running": running})
            )
            page._read_at = 0.0
            page_data = everything(page)
        assert page_data["at_work"][""] == {"f" * 64: "train 7b rank=2"} and page_data["drive"][
            "driver"
        ].startswith("process ")
        assert page_data["drive"]["live"]["running"][0]["progress_text"] == "loss 1.500 (9/40)"
        curve = page.curve("f" * 64)
        assert (curve["steps"], curve["ended"]) == ([3, 9], False)
        assert curve["values"]["loss"] == [4.125, 1.5]
        assert curve["values"]["tokens_per_s"] == [256.0, 256.0]
        assert curve["values"]["peak_memory_gb"] == [None, None]
        assert curve["note"] == "runs; 2 of 40 steps"
    page._read_at = 0.0
    assert (
        everything(page)["drive"]["live"]["running"] == []
    )  # without a driver, the snapshot is out of date
    payload = home.store.open("train", key).path
    (payload / "curve.csv").write_text(
        "step,loss,learning_rate,tokens\n" + "".join(f"{n},{5 / n},0.1,9\n" for n in range(1, 2501))
    )
    curve = page.curve(key)
    assert (
        curve["ended"]
        and curve["steps"][0] == 1
        and curve["steps"][-1] == 2500
        and len(curve["steps"]) <= MOST_STEPS + 1
    )
    (payload / "curve.csv").unlink()
    assert "cannot be read" in page.curve(key)["note"] and page.curve("../../etc")["steps"] == []
