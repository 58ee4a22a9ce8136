"""What the terminal shows for an exception: one message; a traceback only when it is asked for."""

import csv
import errno
import json
import lzma
import os
import runpy
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from ebbline.boundary import answers
from ebbline.boundary.answers import MORE, PACKAGE, answer_to
from ebbline.options import JsonOption, explained
from ebbline.tasks.data.csv_rows import spreadsheet_cell
from ebbline.tasks.errors import DatabaseLost, DataError, StudyHeld


class _Row(BaseModel):
    number: int


def raised(act: Any) -> BaseException:
    try:
        act()
    except Exception as error:  # noqa: BLE001  # any
        return error
    raise AssertionError("nothing was raised")


def command(act: Any) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @explained
    def look(as_json: JsonOption = False) -> None:
        act()

    return app


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tables/results.csv")


@pytest.mark.parametrize(
    ("number", "phrase"),
    [
        (errno.ENOSPC, "the disk is full. Free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "this user may not use it"),
        (errno.EROFS, "its disk is read-only"),
        (errno.ENOENT, "it does not exist"),
        (errno.EISDIR, "it is a folder"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EMFILE, "too many open files"),
        (errno.EIO, "the disk reports a fault"),
        (errno.EXDEV, os.strerror(errno.EXDEV)),
    ],
)
def test_an_error_of_the_system_names_the_file_the_reason_and_the_remedy(
    number: int, phrase: str
) -> None:
    answer = answer_to(OSError(number, os.strerror(number), "tables/results.csv"))
    assert answer.text.startswith("tables/results.csv cannot be used: ") and phrase in answer.text
    assert answer.code == 1 and MORE in answer.text


def test_text_that_is_not_utf8_names_its_file_and_line(tmp_path: Path) -> None:
    error = UnicodeDecodeError("utf-8", b"a\nb\xff", 3, 4, "invalid start byte")
    assert "is not UTF-8 text (byte 3" in answer_to(error).text


def test_a_database_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "optuna.db"
    file.write_text("no database" * 100)
    error = raised(lambda: sqlite3.connect(file).execute("select * from a"))
    assert "file is not a database" in answer_to(error).text


def test_the_input_of_a_validation_is_not_repeated() -> None:
    """It may be a completion."""
    answer = answer_to(raised(lambda: _Row(number="secret words")))  # type: ignore[arg-type]
    assert "number: Input should be a valid integer" in answer.text
    assert "secret" not in answer.text


def test_a_library_is_named_and_its_long_message_is_cut() -> None:
    class LibraryError(Exception):
        pass

    LibraryError.__module__ = "some_library.errors"
    answer = answer_to(LibraryError("x" * 10_000 + "\nmore"))
    assert answer.text.startswith("some_library reports: LibraryError: xxx")
    assert len(answer.text) < 1000


@pytest.mark.parametrize("error", [RecursionError(), MemoryError(), EOFError()])
def test_the_interpreters_limits_are_sentences(error: Exception) -> None:
    assert "fault" not in answer_to(error).text and answer_to(error).text[-1] == ")"


def test_a_mistake_of_ebbline_says_so_and_where() -> None:
    answer = answer_to(raised(lambda: spreadsheet_cell(None)))  # type: ignore[arg-type]
    assert answer.text.startswith("ebbline has a fault at tasks/data/csv_rows.py:")


def test_a_mistake_of_an_installed_ebbline_says_so_too(tmp_path: Path) -> None:
    """Its folder is in site-packages, as those of other libraries are."""
    installed = tmp_path / "site-packages" / "ebbline"
    for path in ("boundary/answers.py", "tasks/data/csv_rows.py"):
        (installed / path).parent.mkdir(parents=True)
        shutil.copy(PACKAGE / path, installed / path)
    copied = runpy.run_path(str(installed / "boundary" / "answers.py"), run_name="installed")
    rows = runpy.run_path(str(installed / "tasks" / "data" / "csv_rows.py"))
    answer = copied["answer_to"](raised(lambda: rows["spreadsheet_cell"](None)))
    assert answer.text.startswith("ebbline has a fault at ebbline/tasks/data/csv_rows.py:")


def endless() -> None:
    endless()


@pytest.mark.parametrize(
    "misuse",
    [
        lambda: torch.nn.functional.linear(torch.ones(4), torch.ones(2, 3)),
        lambda: pd.DataFrame({"a": [1]})["b"],
        lambda: pd.DataFrame({"a": [1]}).rename(7),
        lambda: np.broadcast_to(np.ones(3), 4),
    ],
)
def test_a_library_that_is_called_wrongly_is_a_fault_and_no_damaged_file(
    misuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "OWN", (Path(__file__).resolve().parent,))
    text = answer_to(raised(misuse)).text
    assert text.startswith("ebbline has a fault at hostile/test_boundary.py:"), text
    assert "damaged" not in text


def test_a_recursion_without_an_end_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "OWN", (Path(__file__).resolve().parent,))
    assert "ebbline has a fault at hostile/test_boundary.py" in answer_to(raised(endless)).text
    deep = answer_to(raised(lambda: json.loads("[" * 100_000))).text
    assert "nested too deeply" in deep and "fault" not in deep


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("take", [no_memory, lambda: torch.empty(10**15)])
def test_memory_that_torch_does_not_get_is_no_damaged_file(take: Any) -> None:
    text = answer_to(raised(take)).text
    assert "too little memory" in text and "damaged" not in text


@pytest.mark.parametrize(
    "read", [lambda: list(csv.reader(["a" * 200_000])), lambda: lzma.decompress(b"no archive")]
)
def test_a_damaged_table_or_archive_is_no_fault(read: Any) -> None:
    text = answer_to(raised(read)).text
    assert "cannot be read" in text and "fault" not in text


def test_errors_on_purpose_keep_their_message_and_their_code() -> None:
    assert answer_to(DataError("a.csv:3 is empty")).text == "a.csv:3 is empty"
    assert (answer_to(StudyHeld("")).code, answer_to(DatabaseLost("")).code) == (4, 75)


def test_a_message_cannot_move_the_cursor() -> None:
    assert answer_to(DataError("a\x1b[2Jb\u202ec")).text == r"a\x1b[2Jb\u202ec"


def test_a_traceback_is_shown_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    app = command(full_disk)
    monkeypatch.delenv("EBBLINE_DEBUG", raising=False)
    plain = CliRunner().invoke(app, [])
    assert plain.exit_code == 1 and "Traceback" not in plain.output
    assert plain.stderr.startswith("error: tables/results.csv cannot be used: the disk is full")
    asked = CliRunner().invoke(app, ["--traceback"])
    assert (
        asked.exit_code == 1 and "Traceback" in asked.stderr and "the disk is full" in asked.stderr
    )
    monkeypatch.setenv("EBBLINE_DEBUG", "1")
    assert "Traceback" in CliRunner().invoke(app, []).stderr


def test_with_json_the_message_is_json_too() -> None:
    printed = json.loads(CliRunner().invoke(command(full_disk), ["--json"]).stdout)
    assert printed["kind"] == "OSError" and printed["exit_code"] == 1
    assert "the disk is full" in printed["error"]


def test_ctrl_c_is_a_sentence_and_its_own_code() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    done = CliRunner().invoke(command(interrupted), [])
    assert (done.exit_code, done.stderr) == (130, "stopped by Ctrl-C\n")
