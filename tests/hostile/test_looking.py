"""Commands that only look make no home where none is, and what is private has a private mode."""

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.tasks.files import open_private
from ebbline.tasks.measuring.completions import Completion, read_completions, write_completions
from tests.hostile.cases import STUDY, study

LOOKS = (
    *("status", "report", "pick", "papers", "plan", "sync"),
    *("export --to out", "rescore --scorer keywords", "dashboard --no-open"),
)
UPKEEP = ("ls", "store du", "store gc", "store gc --yes", "store verify", "study rm mine --yes")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("place", ["missing", "foreign"])
@pytest.mark.parametrize("words", [*LOOKS, *UPKEEP])
def test_looking_makes_no_home(
    words: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign folder is somebody's own, with files that are not ebbline's."""
    if words.startswith("dashboard"):
        monkeypatch.setattr("ebbline.analysis.dashboard.server.show", lambda *given: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBBLINE_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    (tmp_path / "study.yaml").write_text(STUDY)
    if place == "foreign":
        (tmp_path / "foreign").mkdir()
        (tmp_path / "foreign" / "mine.txt").write_text("my own")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    name, *rest = words.split()
    given = [name, *([] if words in UPKEEP else ["study.yaml"]), *rest, "--home", place]
    done = CliRunner().invoke(app, given)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert before == {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}


def completion() -> Completion:
    return Completion("a", "c", "", "", "Name a zorp.", "", "It is a zorp.", 3, True)


def test_completions_are_files_of_their_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "payload"
    folder.mkdir(mode=0o755)
    write_completions(folder, [completion()])
    (file,) = folder.iterdir()
    assert (mode(file), mode(folder)) == (0o600, 0o700)
    assert read_completions(folder) == [completion()]


def test_a_private_file_takes_back_what_others_could_read(tmp_path: Path) -> None:
    file = tmp_path / "error.txt"
    file.write_text("")
    file.chmod(0o644)
    with open_private(file) as handle:
        handle.write("a prompt may be quoted here")
    assert mode(file) == 0o600


@pytest.mark.parametrize(
    "url",
    ["https://me:hunter2@x.org/v1", "https://x.org/v1?api_key=hunter2", "https://hunter2@x.org/v1"],
)
def test_a_study_with_a_secret_in_an_endpoint_is_refused_and_the_secret_not_printed(
    url: str, tmp_path: Path
) -> None:
    settings = {"settings": {"template": "yes-no", "endpoint": url, "model": "m"}}
    file = tmp_path / "study.yaml"
    file.write_text(study(judges=json.dumps({"j": settings})))
    done = CliRunner().invoke(app, ["validate", str(file)])
    assert done.exit_code == 1 and "EBBLINE_JUDGE_KEY" in done.output
    assert "hunter2" not in done.output
