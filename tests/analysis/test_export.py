"""An export replaces an earlier one completely, or leaves the earlier one in place."""

import logging
from pathlib import Path

import pytest

from ebbline.analysis.paper.export import MARK, write_export
from ebbline.analysis.paper.export import _put_in_place as put_in_place
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError

NO_PROCESS = 2**22 + 1  # larger than any process id


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / MARK).write_text(text)
    return path


def test_the_earlier_export_is_restored_when_the_new_one_cannot_replace_it(tmp_path: Path) -> None:
    to = folder(tmp_path / "paper", "earlier")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / ".paper.1", to)
    assert (to / MARK).read_text() == "earlier" and [path.name for path in tmp_path.iterdir()] == [
        "paper"
    ]


def test_an_export_restores_the_earlier_one_after_a_kill_and_warns(
    study: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder(tmp_path / f".paper.{NO_PROCESS}.old", "earlier")
    with caplog.at_level(logging.WARNING), pytest.raises(StudyError):
        write_export(StudyView(study, Home(tmp_path / "home")), tmp_path / "paper", ["neurips"])
    assert (tmp_path / "paper" / MARK).read_text() == "earlier"
    assert "the earlier export was restored" in caplog.text


def test_an_old_export_is_removed_if_a_new_one_exists_and_kept_while_its_process_is_alive(
    study: Study, tmp_path: Path
) -> None:
    to = folder(tmp_path / "paper", "newer")
    stale, in_progress = (
        folder(tmp_path / f".paper.{NO_PROCESS}.old", "earlier"),
        folder(tmp_path / ".paper.1.old", "in progress"),
    )
    other = folder(tmp_path / ".paper.mine.old", "another folder")
    with pytest.raises(StudyError):
        write_export(StudyView(study, Home(tmp_path / "home")), to, ["neurips"])
    assert (
        not stale.exists()
        and in_progress.exists()
        and other.exists()
        and (to / MARK).read_text() == "newer"
    )
