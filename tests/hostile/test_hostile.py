"""The corpus: every case gets one sentence, loses nothing, and runs nothing.

`python -m pytest tests/hostile` runs it in one process, through the command line's own entry.
"""

import hashlib
import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.view import StudyView
from tests.hostile import homes, models, options, rows, study_files
from tests.hostile.cases import Case
from tests.sweeps.made import study
from tests.sweeps.pretended import Pretended

CASES = [*study_files.CASES, *rows.CASES, *options.CASES, *models.CASES, *homes.CASES]
LEAST = 300


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Import what the commands import when they run, so that no case's time includes it."""
    for name in ("project", "evaluate", "defended.defend", "pick", "store", "wandb", "compare"):
        importlib.import_module(f"ebbline.commands.{name}")


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a home that has run the study `tiny`, and with its file."""
    folder = tmp_path_factory.mktemp("driven")
    home = Home(folder / homes.HOME)
    found = study(folder, {"axes": {"train.rank": [2], "apply.threshold": [None, 0.3]}})
    drive(StudyView(found, home), lambda: Pretended(home.store))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Relative name -> digest of every file below a folder, and of every link's target."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(parent, name)
            key = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[key] = f"link to {path.readlink()}"
            elif path.is_file():
                found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[key] = "other"
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_gets_one_sentence(
    case: Case, driven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("EBBLINE_HOME", "EBBLINE_DEBUG", "EBBLINE_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EBBLINE_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    if case.has_home:
        shutil.copytree(driven, tmp_path, dirs_exist_ok=True)
        Home(tmp_path / homes.HOME).keep_file("tiny", tmp_path / "study.yaml")
    case.make(tmp_path)
    before = contents(tmp_path)
    done = CliRunner().invoke(app, shlex.split(case.command))
    said = " ".join(done.output.replace("│", " ").split())
    if os.environ.get("SHOW"):
        print(f"\n##{case.name}## {done.exit_code} {said[:600]}")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in said and "ebbline has a fault" not in said, said
    assert homes.SECRET not in said
    assert done.exit_code == case.code and case.phrase in said, said
    after = contents(tmp_path)
    for name in (*before.keys(), *after.keys()):
        allowed = any(Path(name).match(pattern) for pattern in case.writes)
        assert allowed or before.get(name) == after.get(name), f"{name} changed"


def test_every_case_has_a_name_of_its_own_and_there_are_hundreds() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= LEAST


def test_each_promise_of_the_threat_model_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "security.md").read_text("utf-8")
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)`", page)
    assert len(named) >= 12
    assert not [name for name in named if not (root / "tests" / name).is_file()]
