"""An export takes the place of an earlier one whole, or leaves the earlier one where it was."""

import logging
from pathlib import Path

import pytest

from ebbline.analysis.paper.export import MARK, write_export
from ebbline.analysis.paper.export import _put_in_place as put_in_place
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError

GONE = 2**22 + 1  # no process has such a number


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / MARK).write_text(text)
    return path


def test_an_earlier_export_is_back_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    to = folder(tmp_path / "paper", "earlier")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / ".paper.1", to)
    assert (to / MARK).read_text() == "earlier" and [path.name for path in tmp_path.iterdir()] == [
        "paper"
    ]


def test_the_next_export_brings_back_what_a_killed_one_had_set_aside_and_says_so(
    study: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder(tmp_path / f".paper.{GONE}.old", "earlier")
    with caplog.at_level(logging.WARNING), pytest.raises(StudyError):
        write_export(StudyView(study, Home(tmp_path / "home")), tmp_path / "paper", ["neurips"])
    assert (tmp_path / "paper" / MARK).read_text() == "earlier"
    assert "the earlier one, which it had set aside, is back there" in caplog.text


def test_what_was_set_aside_is_removed_where_there_is_an_export_and_left_while_its_process_lives(
    study: Study, tmp_path: Path
) -> None:
    to = folder(tmp_path / "paper", "newer")
    stale, held = (
        folder(tmp_path / f".paper.{GONE}.old", "earlier"),
        folder(tmp_path / ".paper.1.old", "under way"),
    )
    other = folder(tmp_path / ".paper.mine.old", "somebody's own")
    with pytest.raises(StudyError):
        write_export(StudyView(study, Home(tmp_path / "home")), to, ["neurips"])
    assert (
        not stale.exists()
        and held.exists()
        and other.exists()
        and (to / MARK).read_text() == "newer"
    )
