"""Rows of CSV and TSV, read strictly: every row has as many fields as the header. And the texts of
tables that are written.

Fields stay as they are written: 007, 1e3, NULL and True are texts. A comma separates the fields of
.csv and a tab those of .tsv. A header without one may be separated by another of NAMES, as Excel
writes it in many countries. A first line `sep=;`, which Excel understands, names the separator.
"""

import csv
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ebbline.tasks.data.data_file import FileRow, ending_of, text_lines
from ebbline.tasks.errors import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
LONGEST_CELL = 32_767  # characters; Excel cuts longer texts there without a message
NAMES = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_SEPARATOR_LINE = re.compile(r'"?sep=([,;|\t])"?\n?', re.IGNORECASE)


def spreadsheet_cell(text: str) -> str:
    """A text for a cell of a table that ebbline writes. A spreadsheet would compute a text that
    begins like a formula, so such a text begins with an apostrophe. Numbers stay as they are.
    """
    if not text.startswith(FORMULA_STARTS) or _NUMBER.fullmatch(text):
        return text
    return f"'{text}"


def csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each record; blank lines are left out."""
    return _records(path)[-1]


def csv_rows(path: Path) -> Iterator[FileRow]:
    """The rows below a header. A column without a name must be empty, but for the first, which is
    the index that pandas writes.
    """
    separator, records = _records(path, headed=True)
    top, header = next(records, (1, []))
    names = [name.strip() for name in header]
    for name in names:
        _require_separator(name, separator, f"{path}:{top}")
    given = [name for name in names if name]
    if len(set(given)) != len(given):
        raise DataError(f"{path}:{top} names a column twice; name each once")
    for line, fields in records:
        where = f"{path}:{line}"
        if len(fields) != len(names):
            raise DataError(
                f"{where} has {len(fields)} {'field' if len(fields) == 1 else 'fields'} and the "
                f"header {len(names)}; put text with {NAMES[separator]} in it in quotes, and write "
                "every field"
            )
        if any(
            field.strip() and not name for name, field in zip(names[1:], fields[1:], strict=True)
        ):
            raise DataError(
                f"{where} has text in a column without a name; name the column, or put text with "
                f"{NAMES[separator]} in it in quotes"
            )
        if [field.lstrip("\ufeff").strip() for field in fields] == names:
            raise DataError(
                f"{where} is the header again; were two files joined? Keep the first header only"
            )
        if any(len(field) == LONGEST_CELL for field in fields):
            raise DataError(
                f"{where} has a text of exactly {LONGEST_CELL} characters, where Excel cuts a "
                "cell; write the whole text as JSON lines"
            )
        yield FileRow(where, line, dict(zip(names, fields, strict=True)))


def separator_of(path: Path) -> str:
    """What separates the columns of a table with a header."""
    return _records(path, headed=True)[0]


def _records(path: Path, headed: bool = False) -> tuple[str, Iterator[tuple[int, list[str]]]]:
    """The separator, and (line, fields) of each record. If the file is `headed`, its first line
    tells the separator.
    """
    lines = text_lines(path)
    first, line = next(lines, ""), 1
    separator = SEPARATORS.get(ending_of(path), ",")
    if (named := _SEPARATOR_LINE.fullmatch(first)) is not None:
        separator, first, line = named[1], next(lines, ""), 2
    elif headed:
        separator = _separator_in(first, separator)
    whole = chain([first] if first else [], lines)
    return separator, _parsed(path, whole, separator, line)


def _separator_in(header: str, usual: str) -> str:
    """The separator that divides a header: the usual one, unless only another one divides it."""
    fields = {mark: _fields(header, mark) for mark in (usual, ";", "\t", ",")}
    return usual if fields[usual] > 1 else max(fields, key=lambda mark: fields[mark])


def _fields(header: str, separator: str) -> int:
    try:
        return len(next(csv.reader([header], delimiter=separator, strict=True), []))
    except csv.Error:
        return 0


def _parsed(
    path: Path, lines: Iterator[str], separator: str, top: int
) -> Iterator[tuple[int, list[str]]]:
    line = top
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + top
    except csv.Error as error:
        raise DataError(
            f"{path}:{line} is not CSV ({error}); is it truncated, or a quote left open? Write a "
            "quote inside a quoted text twice, and a text of over "
            f"{csv.field_size_limit()} characters as JSON lines"
        ) from None


def _require_separator(header: str, separator: str, where: str) -> None:
    """Raise DataError for a header that another separator divides."""
    for other in (";", "\t"):
        if other in header and separator not in header:
            raise DataError(
                f"{where}: {NAMES[other]} is in the header, but {NAMES[separator]} separates "
                f"its columns; save the table with one separator, or write a line sep={other} "
                "above the header"
            )
