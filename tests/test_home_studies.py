"""The studies of a home: `ebbline ls`, and `ebbline study rename`, `copy` and `rm`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from ebbline.analysis.results.collect import collect
from ebbline.cli import app
from ebbline.commands.studies.listing import rows_of
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.state import home_studies
from ebbline.sweeps.state.home_studies import remove, rename
from ebbline.sweeps.study.home import MIRROR_LOCK, Home
from ebbline.sweeps.study.study_file import parse, with_absolute_paths, with_name
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError, StudyHeld
from tests.sweeps.made import study, written
from tests.sweeps.pretended import Pretended


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a home that has run `tiny`, and with its study file."""
    folder = tmp_path_factory.mktemp("driven")
    home = Home(folder / "home")
    found = study(folder, {"axes": {"train.rank": [2], "apply.threshold": [None, 0.3]}})
    drive(StudyView(found, home), lambda: Pretended(home.store))
    home.keep_file("tiny", folder / "study.yaml")
    return folder


@pytest.fixture
def home(driven: Path, tmp_path: Path) -> Home:
    shutil.copytree(driven, tmp_path, dirs_exist_ok=True)
    found = Home(tmp_path / "home")
    found.keep_file("tiny", tmp_path / "study.yaml")
    return found


def ebbline(home: Home, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--home", str(home.root)])


def points(home: Home, name: str) -> list[tuple[int, str, str]]:
    results = collect(StudyView.open(home.root, name))
    return [(each.number, str(each.point), each.status) for each in results]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_renamed_study_keeps_its_points_and_leaves_its_old_name_free(
    home: Home, tmp_path: Path
) -> None:
    before = points(home, "tiny")
    done = ebbline(home, "study", "rename", "tiny", "new", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "study": "new",
        "was": "tiny",
        "file_with_another_name": str(tmp_path / "study.yaml"),
    }
    assert points(home, "new") == before and len(before) == 2
    assert json.loads((home.path("new") / "study.json").read_text())["study"] == "new"
    assert not home.path("tiny").exists()
    view = StudyView.open(home.root, "new")
    assert (view.study.study, view.changed(), view.argument) == ("new", [], "new")
    fresh = StudyView.open(home.root, str(tmp_path / "study.yaml"))
    assert fresh.study.study == "tiny" and collect(fresh) == []
    rename(home, "new", "tiny")
    assert points(home, "tiny") == before


def test_a_renamed_study_continues_under_its_new_name(home: Home, tmp_path: Path) -> None:
    rename(home, "tiny", "new")
    axes = {"train.rank": [2], "apply.threshold": [None, 0.3, 0.5]}
    wider = study(tmp_path, {"study": "new", "axes": axes})
    executor = Pretended(home.store)
    drive(StudyView(wider, home, extend=True), lambda: executor)
    assert [number for number, _, _ in points(home, "new")] == [0, 1, 2]
    assert "train" not in {request.kind for request in executor.requests.values()}


@pytest.mark.parametrize("step", ["write_whole", "rename", "keep"])
def test_a_kill_within_a_rename_leaves_one_of_the_two_names(
    home: Home, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = points(home, "tiny")

    def killed(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if step == "write_whole":
            patched.setattr(home_studies, step, killed)
        elif step == "rename":
            patched.setattr(Path, step, killed)
        else:
            patched.setattr(Home, step, killed)
        with pytest.raises(KeyboardInterrupt):
            rename(home, "tiny", "new")
    (name,) = home.studies()
    assert name == ("new" if step == "keep" else "tiny") and points(home, name) == before
    if name == "tiny":
        rename(home, "tiny", "new")
    assert points(home, "new") == before


@pytest.mark.parametrize("change", [lambda home: rename(home, "tiny", "new"), None])
def test_no_study_is_renamed_or_removed_while_a_run_or_a_mirror_has_it(
    home: Home, change: Callable[[Home], None] | None
) -> None:
    change = change or (lambda home: remove(home, "tiny"))
    with home.driving("tiny"), pytest.raises(StudyHeld, match="another driver holds"):
        change(home)
    from ebbline.analysis.wandb.mirror import alone

    with alone(home.path("tiny")) as free, pytest.raises(StudyHeld, match="mirror of 'tiny'"):
        assert free and (home.path("tiny") / MIRROR_LOCK).exists()
        change(home)
    assert len(points(home, "tiny")) == 2
    change(home)
    assert "tiny" not in home.studies()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tiny", "tiny", "has a study 'tiny'; give another name"),
        ("tiny", "a b", "cannot be the name of a study"),
        ("tiny", "../up", "cannot be the name of a study"),
        ("other", "new", "no study 'other' in .*ebbline ls"),
        ("..", "new", "no study '..' in"),
    ],
)
def test_a_rename_that_is_not_possible_changes_nothing(
    home: Home, old: str, new: str, message: str
) -> None:
    before = files(home.root)
    with pytest.raises(StudyError, match=message):
        rename(home, old, new)
    assert files(home.root) == before


def test_a_study_that_another_one_learns_from_keeps_its_name(home: Home, tmp_path: Path) -> None:
    other = study(tmp_path, {"study": "warm", "search": {"warm_start": ["tiny"], "points": 2}})
    StudyView(other, home).freeze()
    for change in (lambda: rename(home, "tiny", "new"), lambda: remove(home, "tiny")):
        with pytest.raises(StudyError, match="`search.warm_start` of 'warm' names 'tiny'"):
            change()


def test_points_in_a_shared_database_keep_their_name(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EBBLINE_STORAGE", "postgresql://user@nowhere/points")
    with pytest.raises(StudyError, match="shared database.*`ebbline study copy tiny new`"):
        rename(home, "tiny", "new")


def test_a_removal_says_what_gc_then_frees(home: Home) -> None:
    done = ebbline(home, "study", "rm", "tiny")
    assert done.exit_code == 1 and "add --yes" in done.output and home.studies() == ["tiny"]
    done = ebbline(home, "study", "rm", "tiny", "--yes", "--json")
    assert done.exit_code == 0 and home.studies() == []
    assert [path.name for path in home.root.iterdir() if path.name == "removed"] == []
    found = json.loads(done.stdout)
    listed = ebbline(home, "store", "gc", "--older-than-h", "0", "--json")
    assert found["removed"] == "tiny"
    assert found["gc_frees_bytes"] == json.loads(listed.stdout)["bytes"] > 0


def test_what_another_study_needs_is_not_freed(home: Home, tmp_path: Path) -> None:
    axes = {"train.rank": [2], "apply.threshold": [None, 0.3]}
    twin = study(tmp_path, {"study": "twin", "axes": axes})
    drive(StudyView(twin, home), lambda: Pretended(home.store))
    done = ebbline(home, "study", "rm", "tiny", "--yes", "--json")
    assert json.loads(done.stdout)["gc_frees_bytes"] == 0
    assert home.studies() == ["twin"]


def test_a_removal_that_was_killed_is_completed_by_the_next(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(home_studies.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(home, "tiny")
    assert home.studies() == [] and (home.root / "removed").is_dir()
    assert ebbline(home, "ls").output.startswith("no studies in ")
    with home.driving("another"):
        home.keep("another", "{}")
    remove(home, "another")
    assert not (home.root / "removed").exists()


def test_a_study_that_cannot_be_read_does_not_hold_the_names_of_others(home: Home) -> None:
    (home.folder("folder") / "study.json").mkdir()
    (home.folder("bytes") / "study.json").write_bytes(b"\xff\xfe")
    rename(home, "bytes", "other")
    rename(home, "tiny", "new")
    remove(home, "other")
    assert home.studies() == ["folder", "new"]


def test_a_list_has_a_row_for_each_study_and_for_those_that_cannot_be_read(home: Home) -> None:
    for name, text in [("broken", "{"), ("empty", "{}"), ("binary", "\x00")]:
        home.keep(name, text)
    (home.folder("bytes") / "study.json").write_bytes(b"\xff\xfe")
    rows = {row.study: row for row in rows_of(home)}
    assert sorted(rows) == ["binary", "broken", "bytes", "empty", "tiny"]
    tiny = rows.pop("tiny")
    assert (tiny.state, tiny.done, tiny.total, tiny.failed) == ("finished", 2, 2, 0)
    assert tiny.last_run is not None and tiny.bytes is not None and tiny.bytes > 1000
    assert {row.state for row in rows.values()} == {"cannot be read"}
    assert all("study.json" in row.problem for row in rows.values())
    done = ebbline(home, "ls")
    assert done.exit_code == 0 and "tiny" in done.output and "2/2" in done.output
    assert [row["study"] for row in json.loads(ebbline(home, "ls", "--json").stdout)] == [
        "binary",
        "broken",
        "bytes",
        "empty",
        "tiny",
    ]
    with home.driving("tiny"):
        (row,) = (row for row in rows_of(home) if row.study == "tiny")
    assert row.state == "running"


READING = [
    ["status", "STUDY"],
    ["status", "STUDY", "--watch"],
    ["report", "STUDY"],
    ["pick", "STUDY"],
    ["papers", "STUDY"],
    ["sync", "STUDY"],
    ["compare", "STUDY", "STUDY"],
    ["ls"],
    ["store", "du"],
    ["study", "rm", "tiny", "--yes"],
    ["study", "rename", "tiny", "new"],
]


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_a_command_on_a_study_that_was_not_begun_creates_nothing(
    words: list[str], tmp_path: Path
) -> None:
    file = str(written(tmp_path))
    home = Home(tmp_path / "home")
    ebbline(home, *(file if word == "STUDY" else word for word in words))
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]
    home.root.mkdir()
    ebbline(home, *(file if word == "STUDY" else word for word in words))
    assert not list(home.root.iterdir())


def test_a_copy_keeps_the_comments_and_differs_in_its_name(home: Home, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(f"# mine\n{file.read_text()}", "utf-8")
    done = ebbline(home, "study", "copy", "tiny", "next")
    assert done.exit_code == 0, done.output
    copied = tmp_path / "next.yaml"
    assert copied.read_text() == file.read_text().replace("study: tiny", "study: next")
    assert parse(copied) == parse(file).model_copy(update={"study": "next"})
    again = ebbline(home, "study", "copy", "tiny", "next")
    assert again.exit_code == 1 and f"{copied} exists" in again.output.replace("\n", "")
    taken = ebbline(home, "study", "copy", "tiny", "tiny", "--to", str(tmp_path / "x.yaml"))
    assert taken.exit_code == 1 and "give another name" in taken.output


def test_a_copy_in_another_folder_names_the_same_files(home: Home, tmp_path: Path) -> None:
    pool = {"path": {"path": "rows.jsonl", "sha256": "a" * 64}}
    source, to = written(tmp_path, {"data/pool": pool}), tmp_path / "deep" / "next.yaml"
    begun = parse(source)
    done = ebbline(home, "study", "copy", str(source), "next", "--to", str(to), "--json")
    assert json.loads(done.stdout) == {"wrote": str(to), "study": "next", "comments": False}
    found = parse(to)
    assert found.data.pool.path is not None
    assert found.data.pool.path.path == str(tmp_path / "rows.jsonl")
    expected = with_absolute_paths(begun, source).model_copy(update={"study": "next"})
    assert found.model_dump() == expected.model_dump()


def test_a_frozen_copy_is_what_the_home_runs_with(home: Home, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").unlink()
    to = tmp_path / "next.yaml"
    gone = ebbline(home, "study", "copy", "tiny", "next", "--to", str(to))
    assert gone.exit_code == 1 and "no study file" in gone.output
    done = ebbline(home, "study", "copy", "tiny", "next", "--to", str(to), "--frozen")
    assert done.exit_code == 0, done.output
    found, begun = parse(to), json.loads(home.kept("tiny"))
    assert found.model_dump(mode="json") == {**begun, "study": "next"}


NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,8}[A-Za-z0-9_-])?", fullmatch=True)


@given(NAMES, st.sampled_from(["study: tiny\n", "'study': 'tiny' # its name\n", '"study": tiny\n']))
def test_a_text_under_a_new_name_differs_in_nothing_else(name: str, line: str) -> None:
    import yaml

    text = f"# a: study\n{line}question: 'study: tiny'\naxes: {{study: tiny}}\n"
    found = yaml.safe_load(with_name(text, name))
    assert found == {**yaml.safe_load(text), "study": name}


def test_only_yaml_is_written_as_a_study_file(home: Home, tmp_path: Path) -> None:
    done = ebbline(home, "study", "copy", "tiny", "next", "--to", str(tmp_path / "next.txt"))
    assert done.exit_code == 1 and "ends in .yaml" in done.output
    shipped = ebbline(home, "study", "copy", "smollm2", "mine", "--to", str(tmp_path / "m.yaml"))
    assert shipped.exit_code == 0, shipped.output
    assert parse(tmp_path / "m.yaml").study == "mine"
