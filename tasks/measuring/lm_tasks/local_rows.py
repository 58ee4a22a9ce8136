"""The rows of a local lm-eval task, by ebbline's reader of rows.

The library `datasets` would turn text that looks like a date into a time, and NaN into text.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]

from ebbline.tasks.data.data_file import text_lines
from ebbline.tasks.data.reader import read_rows
from ebbline.tasks.errors import EvaluationError


def read_splits(splits: Mapping[str, Path]) -> DatasetDict:
    """The rows of each split as they are written. A field that a row lacks is null there.

    Raises DataError that names the file and the line, and EvaluationError for a field whose values
    have different types.
    """
    return DatasetDict({name: Dataset(_table(path)) for name, path in splits.items()})


def _table(path: Path) -> pyarrow.Table:
    for _ in read_rows(path):  # raises errors; it has numbers as text, and labels are numbers
        pass
    rows = [json.loads(line) for line in text_lines(path) if line.strip()]
    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.table(
        {name: _column([row.get(name) for row in rows], name, path) for name in names}
    )


def _column(values: list[Any], name: str, path: Path) -> pyarrow.Array:
    try:
        return pyarrow.array(values)
    except (ValueError, TypeError, OverflowError):  # their messages quote values
        raise EvaluationError(
            f"{path}: the values of {name!r} have different types; write all of them as text, or "
            "all as numbers"
        ) from None
