"""The home folder: one driver per study, frozen studies, and errors that name what differs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ebbline.sweeps.state.trials import opened
from ebbline.sweeps.study.changes import differences
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.references import Hub
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import _tuples as tuples
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError, StudyHeld
from tests.sweeps.made import changed, study

HOLD = """
import sys, time
from pathlib import Path
from ebbline.sweeps.study.home import Home
with Home(Path(sys.argv[1])).driving("tiny"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture
def holder(home):
    """Another process that drives the study."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home.root)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.process
def test_a_second_driver_gets_an_error_that_names_the_holding_process(home, holder):
    with (
        pytest.raises(
            StudyHeld, match=rf"another driver holds study 'tiny': process {holder.pid} on "
        ),
        home.driving("tiny"),
    ):
        raise AssertionError("two drivers")
    assert f"process {holder.pid} " in home.holder("tiny")
    with home.driving("another"):
        assert f"process {os.getpid()} " in home.holder("another")
    assert home.holder("another") is None


@pytest.mark.process
def test_a_killed_driver_releases_its_study(home, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert home.holder("tiny") is None
    with home.driving("tiny"):
        pass


def test_a_driver_that_raises_releases_its_study(home):
    with pytest.raises(ValueError, match="x"), home.driving("tiny"):
        raise ValueError("x")
    with home.driving("tiny"):
        pass


def test_nobody_holds_a_study_that_was_never_driven(home):
    assert home.holder("tiny") is None


def test_a_changed_study_is_an_error_that_names_each_change(tmp_path, home):
    StudyView(study(tmp_path), home).freeze()
    StudyView(study(tmp_path), home).freeze()
    with pytest.raises(StudyError) as caught:
        StudyView(study(tmp_path, {"train": {"epochs": 2}, "seeds": [0, 1]}), home).freeze()
    message = str(caught.value)
    assert "train.epochs: 1.0 -> 2.0" in message and "seeds: [0] -> [0, 1]" in message
    assert "models" not in message and str(home.root) in message
    StudyView(study(tmp_path, {"study": "another", "train": {"epochs": 2}}), home).freeze()


def test_a_moved_pinned_file_is_no_change_and_other_content_is_one(tmp_path, home):
    def with_pool(path, sha):
        return study(tmp_path, {"data/pool": {"path": {"path": path, "sha256": sha * 64}}})

    StudyView(with_pool("a.jsonl", "a"), home).freeze()
    StudyView(with_pool("elsewhere/a.jsonl", "a"), home).freeze()
    with pytest.raises(StudyError, match=r"data\.pool\.path\.sha256"):
        StudyView(with_pool("a.jsonl", "b"), home).freeze()


def test_differences_are_one_line_for_each_leaf():
    before = {"a": {"b": 1, "c": [1, 2]}, "gone": 1, "same": {"x": None}}
    after = {"a": {"b": 2, "c": [1, 3]}, "new": 1, "same": {"x": None}}
    assert list(differences(before, after)) == [
        "a.b: 1 -> 2",
        "a.c: [1, 2] -> [1, 3]",
        "gone: removed",
        "new: added",
    ]
    assert list(differences(before, before)) == []
    assert max(len(line) for line in differences({"a": "x" * 500}, {"a": "y" * 500})) < 140


def test_a_budget_may_be_raised_and_a_size_moved_to_other_gpus(tmp_path, home):
    StudyView(study(tmp_path, {"budget": {"usd": 10.0}}), home).freeze()
    placed = {
        "models/7b/gpus": 2,
        "models/7b/labels": {"ray.io/accelerator-type": "H100"},
        "models/7b/spread": True,
    }
    latest = study(tmp_path, {"budget": {"usd": 20.0, "hours": 3.0}, **placed})
    StudyView(latest, home).freeze()
    assert json.loads((home.folder("tiny") / "study.json").read_text()) == latest.model_dump(
        mode="json"
    )
    with pytest.raises(StudyError, match=r"models\.7b\.dtype"):
        StudyView(study(tmp_path, {"models/7b/dtype": "float32", **placed}), home).freeze()


LISTS = {"axes": {"train.rank": [2, 4], "apply.threshold": [None, 0.3]}}
BUDGET = {"budget": {"hours": 1.0}}


@pytest.mark.parametrize(
    ("first", "then", "sampler"),
    [
        ({"search": {"points": 4}}, {"search": {"points": 4}, **BUDGET}, "grid"),
        ({"search": {"points": 4}, **BUDGET}, {"search": {"points": 4}}, "stage_aware"),
        ({"search": {"sampler": "tpe", "points": 4}}, {"search": {"points": 4}}, "tpe"),
        ({"search": {"points": 4}}, {"search": {"sampler": "grid", "points": 4}}, "grid"),
    ],
)
def test_a_study_keeps_the_sampler_that_it_was_begun_with(tmp_path, home, first, then, sampler):
    begun, later = study(tmp_path, {**LISTS, **first}), study(tmp_path, {**LISTS, **then})
    StudyView(begun, home).freeze()
    for _ in range(2):
        assert StudyView(later, home).study.sampler == sampler
        StudyView(later, home).freeze()
    assert (
        json.loads((home.folder("tiny") / "study.json").read_text())["search"]["sampler"] == sampler
    )
    StudyView(begun, home).freeze()
    other = study(tmp_path, {**LISTS, "search": {"sampler": "gp", "points": 4}})
    with pytest.raises(StudyError, match=rf'search\.sampler: "{sampler}" -> "gp"'):
        StudyView(other, home).freeze()
    StudyView(other, home, extend=True).freeze()
    assert StudyView(later, home).study.sampler == (
        "gp" if then["search"].get("sampler") is None else sampler
    )


def test_a_study_stored_without_a_sampler_continues_with_its_default_of_then(tmp_path, home):
    begun = study(tmp_path, {**LISTS, "search": {}})
    (home.folder("tiny") / "study.json").write_text(begun.model_dump_json())
    later = study(tmp_path, {**LISTS, **BUDGET, "search": {}})
    assert later.sampler == "stage_aware"
    StudyView(later, home).freeze()
    assert StudyView(later, home).study.sampler == "grid"


def test_extending_a_grid_by_a_range_needs_another_sampler(tmp_path, home):
    StudyView(study(tmp_path, {**LISTS, "search": {}}), home).freeze()
    sizes = study(tmp_path).model_dump(mode="json", exclude_none=True)["models"]
    large = {**sizes["7b"], "axes": {"train.rank": {"low": 2, "high": 8, "step": 2}}}
    wider = study(tmp_path, {**LISTS, "models/70b": large, "search": {}})
    with pytest.raises(
        StudyError,
        match=r"'tiny' was begun with the grid sampler, .* Name another `search\.sampler` "
        r"and continue with `--extend`",
    ):
        StudyView(wider, home, extend=True).freeze()
    StudyView(
        study(
            tmp_path, {**LISTS, "models/70b": large, "search": {"sampler": "random", "points": 5}}
        ),
        home,
        extend=True,
    ).freeze()


@pytest.mark.parametrize(
    ("named", "lies"), [("", "store"), ("artifacts", "artifacts"), ("../shared", "../shared")]
)
def test_the_profile_says_where_the_store_lies(tmp_path, named, lies):
    root = tmp_path / "home"
    root.mkdir()
    if named:
        (root / "cluster.yaml").write_text(f"store: {named}\n")
    assert Home(root).store.place.at == str((root / lies).resolve())


def test_a_store_in_a_bucket_is_named_by_its_url_and_asks_for_nothing_before_it_is_used(tmp_path):
    (tmp_path / "cluster.yaml").write_text("store: s3://bucket/prefix\ncache_gb: 2\n")
    store = Home(tmp_path).store
    assert (store.place.at, store.cache_gb) == ("s3://bucket/prefix", 2.0)


def test_a_home_keeps_its_name_and_no_two_have_the_same(tmp_path):
    assert Home(tmp_path / "a").id == Home(tmp_path / "a").id != Home(tmp_path / "b").id


@pytest.mark.parametrize(
    "name", ["hq?1", "a b", "50%", "%3F", "a#b", "schön", "-x", "a{b}", "x?mode=memory", "a&b=c"]
)
def test_a_home_keeps_its_points_in_its_own_folder_whatever_its_name(tmp_path, name):
    storage = Home(tmp_path / name).database("tiny")
    optuna.create_study(storage=opened(storage), study_name="tiny")
    assert storage.exists and (tmp_path / name / "studies" / "tiny" / "optuna.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert optuna.load_study(storage=opened(storage.to_read()), study_name="tiny").trials == []


@given(st.text(max_size=20) | st.text("aA.-_/\n\0 ", max_size=8))
def test_a_studys_name_is_a_plain_file_name_or_an_error(name):
    try:
        Study.model_validate(tuples(changed({"study": name})))
    except ValidationError as error:
        assert "study" in str(error)
    else:
        assert name == Path(name).name and name.isascii() and name.isprintable()
        assert not name.startswith((".", "-")) and not name.endswith(".") and " " not in name


def test_names_that_differ_only_in_case_are_an_error(tmp_path):
    one = {"prompts": {"language": "task.jsonl"}, "measure": {"kind": "task"}}
    with pytest.raises(StudyError, match="'Task' and 'task' differ only in case"):
        study(tmp_path, {"suites/Task": one})


def test_a_file_of_a_hub_repository_is_named_inside_it():
    for file in ("../x", "/etc/hosts", "a/../../x"):
        with pytest.raises(ValidationError, match="a file in the repository"):
            Hub(id="org/data", file=file)
    assert Hub(id="org/data", file="a/b.jsonl").file == "a/b.jsonl"
