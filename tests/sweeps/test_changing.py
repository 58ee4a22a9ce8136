"""`run --change`: another suite, limit or content of a file under the same name. Existing points
keep their numbers, and only what the change concerns runs again.
"""

import json

import pytest

from ebbline.analysis.results.collect import collect
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.forecast.reused import reuse_of_changes
from ebbline.sweeps.search.searcher import StudySearcher
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import content_digest
from tests.sweeps.made import study
from tests.sweeps.pretended import ROWS, Pretended, changes, small

SPACE = {
    "axes": {"train.rank": [2, 4]},
    "search": {"sampler": "tpe", "points": 2},
    "objectives": ["refusal.refusal_rate", "task.task_accuracy"],
}


def suites(folder, **limits):
    own = changes(folder)["suites"]
    for name, limit in limits.items():
        own[name]["measure"]["limit"] = limit
    return own


@pytest.mark.slow
def test_a_suite_a_limit_and_a_corrected_file_run_again_only_what_they_concern(tmp_path):
    home, ran = Home(tmp_path / "home"), []

    def run(change, **more):
        ran.clear()
        view = StudyView(small(tmp_path, **{**SPACE, **more}), home, change=change)
        said = list(reuse_of_changes(view))
        drive(view, lambda: Pretended(home.store, fails=lambda r: ran.append(r.kind)))
        return said, collect(StudyView(small(tmp_path, **{**SPACE, **more}), home))

    said, first = run(False)
    assert said == [] and [each.status for each in first] == ["done", "done"]
    lower = suites(tmp_path, task=5)
    lower["more"] = {**lower["task"], "measure": {"kind": "task"}}
    with pytest.raises(StudyError, match=r"(?s)limit: null -> 5.*`--change` continues"):
        run(False, suites=lower)
    said, second = run(True, suites=lower)
    assert "  suites.more: added" in said and "  suites.task.measure.limit: null -> 5" in said
    assert "of the 2 finished points:" in said and "  train: 2 of 2 reused" in said
    assert (
        "  refusal: 2 of 2 reused" in said and "  task: 0 of 2 reused, at most 2 run again" in said
    )
    assert [(each.number, each.point, each.status) for each in second] == [
        (each.number, each.point, "done") for each in first
    ]
    assert "more.task_accuracy" in second[0].metrics and "train" not in ran and "generate" in ran
    ran.clear()
    again, third = run(False, suites=lower)
    assert again == [] and ran == [] and third == second

    pool = tmp_path / "pool.jsonl"
    corrected = small(tmp_path, **{**SPACE, "suites": lower}).model_dump(mode="json")
    pool.write_text(json.dumps({**ROWS["pool.jsonl"], "output": "Calm and blue."}))
    pinned = {"path": {"path": str(pool), "sha256": content_digest(pool)}}
    plain = changes(tmp_path, **{**SPACE, "suites": lower})
    plain["models"].pop("70b")
    pool.write_text(json.dumps({**ROWS["pool.jsonl"], "output": "Calm and blue."}))
    plain["data"]["pool"] = pinned
    view = StudyView(study(tmp_path, plain), home, change=True)
    assert corrected["data"]["pool"]["path"]["sha256"] != pinned["path"]["sha256"]
    assert "  train: 0 of 2 reused, at most 2 run again" in list(reuse_of_changes(view))
    stale = StudyView(view.study, home, change=True, located=False)
    assert {each.status for each in collect(stale)} == {"outdated"}
    drive(view, lambda: Pretended(home.store))
    assert [each.status for each in collect(view)] == ["done", "done"]
    assert StudySearcher(view.study, view.database).constrained


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"train": {"epochs": 2}}, "train.epochs: 1.0 -> 2.0"),
        ({}, {"objectives": ["refusal_rate"]}, "objectives: "),
        ({}, {"refusal_floor": 0.5}, "refusal_floor: 0.9 -> 0.5"),
        ({}, {"suites/refusal/measure": {"kind": "refusal", "scorer": "xstest"}}, "scorer"),
        ({}, {"suites/refusal/prompts": {"language": "task.jsonl"}}, "prompts.language"),
        ({}, {"models/7b/quantisation": "none"}, "models.7b.quantisation"),
        (
            {},
            {"axes": {"train.rank": [2, 4, 8]}},
            "axes.apply.threshold: an axis cannot be removed",
        ),
    ],
)
def test_a_change_of_what_points_mean_stays_an_error(tmp_path, before, after, message):
    home = Home(tmp_path / "home")
    StudyView(study(tmp_path, before), home).freeze()
    with pytest.raises(StudyError, match=message):
        StudyView(study(tmp_path, {**before, **after}), home, change=True).freeze()


def test_fewer_points_and_an_addition_are_accepted_with_a_change(tmp_path):
    home = Home(tmp_path / "home")
    nine = {"search": {"sampler": "random", "points": 9}}
    StudyView(study(tmp_path, nine), home).freeze()
    fewer = study(tmp_path, {"search": {"sampler": "random", "points": 4}, "seeds": [0, 1]})
    with pytest.raises(StudyError, match="4 is fewer than 9"):
        StudyView(fewer, home, extend=True).freeze()
    view = StudyView(fewer, home, change=True)
    assert view.revisions() == ["search.points: 9 -> 4"]
    view.freeze()
    assert StudyView(fewer, home).changed() == []
