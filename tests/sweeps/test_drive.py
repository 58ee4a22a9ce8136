"""The driving loop on the tiny pair, in this process: a bad point is one failed row, and no stage
runs twice.
"""

import json

import pytest

from ebbline.analysis.results.collect import projections
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.search.searcher import all_points
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.defences.gate import read_rows
from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import content_digest
from tests.sweeps.made import study
from tests.tiny import conversations, write_chats, write_lines

# Random weights: all cosines are far below 1, so 0.999 and 1.0 both project every module.
AXES = {"data.size": [16, 999], "apply.threshold": [None, 0.999, 1.0]}


def pinned(path) -> dict:
    return {"path": {"path": str(path), "sha256": content_digest(path)}}


@pytest.fixture(scope="module")
def changes(tmp_path_factory, pair):
    folder = tmp_path_factory.mktemp("drive")
    prompts = write_lines(
        folder / "prompts.jsonl",
        [
            {"prompt": turns[0]["content"], "answer": turns[1]["content"]}
            for turns in conversations(6, 3)
        ],
    )
    model = {
        "base": pinned(pair.base),
        "aligned": pinned(pair.aligned),
        "quantisation": "none",
        "dtype": "float32",
    }
    return {
        "models": {"7b": model},
        "data": {"pool": pinned(write_chats(folder / "chats.jsonl", 32)), "settings": {"size": 16}},
        "train": {
            "epochs": 2,
            "global_batch": 8,
            "rank": 2,
            "learning_rate": 1e-2,
            "max_tokens": 64,
        },
        "axes": AXES,
        "suites/refusal": {
            "prompts": pinned(prompts),
            "measure": {"kind": "refusal", "max_new_tokens": 4},
        },
        "suites/task": {
            "prompts": pinned(prompts),
            "measure": {"kind": "task", "max_new_tokens": 4},
        },
        "search": {"sampler": "grid", "order": "in_turn", "window": 2},
    }


@pytest.fixture(scope="module")
def driven(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("home")
    found, home = study(folder, changes), Home(folder / "home")
    return found, home, drive(StudyView(found, home), InlineExecutor)


def test_every_point_gets_a_result_in_the_order_of_asking(driven):
    found, home, progress = driven
    assert [result.number for result in progress.results] == list(range(6))
    assert [result.status for result in progress.results] == ["done"] * 3 + ["invalid"] * 3
    assert [
        (number, state) for number, _, state, _ in all_points(found, home.database("tiny"))
    ] == [
        (result.number, "done" if result.status == "done" else "failed")
        for result in progress.results
    ]


def test_a_failed_point_keeps_its_reason_and_the_command_that_reproduces_it(driven):
    found, home, progress = driven
    for result in progress.results[3:]:
        assert "data.size=999" in result.reason and "ebbline rerun " in result.reason
        assert result.metrics == {}
    reasons = [
        reason
        for _, _, state, reason in all_points(found, home.database("tiny"))
        if state == "failed"
    ]
    assert reasons == [result.reason for result in progress.results[3:]]


def test_a_done_point_has_every_metric_over_every_sample(driven):
    for result in driven[2].results[:3]:
        assert {name: metric.n for name, metric in result.metrics.items()} == {
            "refusal.refusal_rate": 6,
            "task.task_accuracy": 6,
        }
        assert result.seconds > 0
    assert [result.changed_share for result in driven[2].results[:3]] == [0.0, 1.0, 1.0]


def test_thresholds_that_choose_the_same_modules_share_their_evaluations(driven):
    _, home, progress = driven
    none, high, one = (result.keys for result in progress.results[:3])
    assert high["apply[seed=0]"] != one["apply[seed=0]"]
    assert high["refusal[seed=0]"] == one["refusal[seed=0]"] != none["refusal[seed=0]"]
    assert (
        max(
            row.cosine
            for row in read_rows(
                home.store.open("project", none["project[seed=0]"]).path / "cosines.json"
            ).values()
        )
        < 0.999
    )
    kinds = {
        kind: len(list(home.store.all(kind)))
        for kind in ("data", "train", "project", "apply", "generate", "score")
    }
    assert kinds == {
        "data": 1,
        "train": 1,
        "project": 1,
        "apply": 3,
        "generate": 2 + 2 * 2,
        "score": 2 + 2 * 2,
    }


def test_a_rerun_of_a_finished_study_runs_nothing_and_proposes_nothing(driven):
    found, home, progress = driven
    before = sorted(path for path in home.store.root.rglob("record.json"))
    attempts = sorted(path for path in home.store.root.glob("*/*/*/payload"))
    rerun = drive(StudyView(found, home), InlineExecutor)
    assert rerun.results == [] and sorted(home.store.root.rglob("record.json")) == before
    assert sorted(home.store.root.glob("*/*/*/payload")) == attempts
    graph = StageGraph(found, home)
    for result in progress.results[:3]:
        stage = graph.stages_for(result.point)["refusal[seed=0]"]
        assert Resolver(home.store).artifact(stage).key == result.keys["refusal[seed=0]"]


def test_an_exact_projection_against_a_trained_unaligned_model_completes(tmp_path, changes, pair):
    unaligned = {"data": {"pool": changes["data"]["pool"], "settings": {"size": 32}}}
    unaligned["train"] = {
        "method": "full",
        "dtype": "float32",
        "steps": 4,
        "global_batch": 8,
        "learning_rate": 1e-2,
        "max_tokens": 64,
    }
    model = {
        "aligned": pinned(pair.aligned),
        "unaligned": {"tuned": unaligned},
        "quantisation": "none",
        "dtype": "float32",
    }
    axes = {"train.rank": [1, 2], "apply.threshold": [0.999]}
    exact = {
        **changes,
        "models": {"7b": model},
        "project": {"projector": "exact", "energy": 0.5},
        "axes": axes,
    }
    home = Home(tmp_path / "home")
    found = study(tmp_path, exact)
    progress = drive(StudyView(found, home), InlineExecutor)
    assert [(result.status, result.reason) for result in progress.results] == [("done", "")] * 2
    assert len({result.keys["subspace[seed=0]"] for result in progress.results}) == 1
    rows = read_rows(
        home.store.open("project", progress.results[0].keys["project[seed=0]"]).path
        / "cosines.json"
    )
    # An orthogonal projector has equal cosine and norm ratio
    assert len(rows) == 14 and all(abs(row.cosine - row.norm_ratio) < 1e-5 for row in rows.values())
    assert list(projections(found, progress.results, home)) == ["7b"]


def test_a_stopped_drive_drains_and_the_next_one_finishes(tmp_path, changes):
    found, home = (
        study(tmp_path, {**changes, "axes": {"apply.threshold": [None, 1.0]}}),
        Home(tmp_path / "home"),
    )
    stopped = drive(
        StudyView(found, home),
        InlineExecutor,
        stop=iter([False, False, False, *[True] * 50]).__next__,
    )
    assert stopped.stopped and len(stopped.results) < 2
    finished = drive(StudyView(found, home), InlineExecutor)
    assert len(stopped.results) + len(finished.results) == 2
    assert all(result.status == "done" for result in finished.results)


def test_a_model_that_cannot_be_measured_before_fine_tuning_stops_the_study(
    tmp_path, changes, pair
):
    empty = write_lines(tmp_path / "empty.jsonl", [{"text": "no prompt"}])
    broken = {
        **changes,
        "suites/refusal": {"prompts": pinned(empty), "measure": {"kind": "refusal"}},
    }
    with pytest.raises(
        StudyError, match=r"could not be measured before fine-tuning: .*is no prompt set"
    ):
        drive(StudyView(study(tmp_path, broken), Home(tmp_path / "home")), InlineExecutor)


def test_the_home_keeps_the_study_as_it_was_first_run(driven):
    found, home, _ = driven
    assert json.loads((home.folder("tiny") / "study.json").read_text()) == found.model_dump(
        mode="json"
    )
