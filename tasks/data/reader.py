"""The one reader of rows: training data and prompt sets come through it.

It reads JSON, JSON lines (also in a .json file), CSV, TSV and Parquet, each also compressed by
gzip. A file gives its rows exactly as they are written, or a DataError that names file and line
(Parquet: the row) and quotes nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebbline.tasks.data.csv_rows import csv_rows
from ebbline.tasks.data.data_file import (
    ACCEPTED,
    EXPANSION,
    FileRow,
    InvalidValue,
    checked,
    ending_of,
    open_data,
)
from ebbline.tasks.data.json_rows import json_line_rows, json_rows
from ebbline.tasks.errors import DataError

MOST_ROWS = 10_000_000  # of a Parquet file, which can claim any number in a few bytes
MOST_BYTES = 1 << 30  # a Parquet file may always expand to this size, or to EXPANSION times its own
_BATCH = 1024
# What pyarrow raises for a value that Python cannot hold
_UNREADABLE = (ValueError, TypeError, OverflowError, LookupError, RecursionError)


def data_files(folder: Path) -> list[Path]:
    """The files of a folder whose ending is one of a data file."""
    return sorted(path for path in folder.iterdir() if ending_of(path) and path.is_file())


def read_rows(path: Path) -> Iterator[FileRow]:
    """The rows of a data file in their order."""
    if not path.is_file():
        raise DataError(f"there is no data file at {path}")
    ending = ending_of(path)
    if ending == ".parquet":
        return _parquet_rows(path)
    if ending == ".jsonl":
        return json_line_rows(path)
    if ending == ".json":
        return json_rows(path)
    if ending in (".csv", ".tsv"):
        return csv_rows(path)
    raise DataError(f"{path} has none of the endings {ACCEPTED}")


def _parquet_rows(path: Path) -> Iterator[FileRow]:
    import pyarrow  # only Parquet files need it
    from pyarrow import parquet

    with open_data(path) as source:
        limit = max(MOST_BYTES, EXPANSION * path.stat().st_size)
        try:
            file = parquet.ParquetFile(source)
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            claimed = _claimed_bytes(file.metadata)
            file = parquet.ParquetFile(source, read_dictionary=_texts_of(file.schema_arrow))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read as Parquet ({type(error).__name__}); is the download "
                "complete?"
            ) from None
        if len(set(names)) != len(names):
            raise DataError(f"{path} names a column twice; name each once")
        if rows > MOST_ROWS:
            raise DataError(f"{path} has {rows} rows, more than {MOST_ROWS}; divide it")
        _require_size(claimed, limit, path)
        number = decoded = 0
        try:
            for batch in file.iter_batches(_BATCH, use_threads=False):
                decoded += _decoded_bytes(batch)
                _require_size(decoded, limit, path)
                for values in _values(batch, path, number):
                    number += 1
                    yield _parquet_row(values, f"{path}: row {number}", number)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path} cannot be read as Parquet after row {number} ({type(error).__name__}); is "
                "the download complete?"
            ) from None


def _texts_of(schema: Any) -> list[str]:
    """The columns of text. Arrow reads them as dictionaries: a few bytes can repeat a long text in
    every row, and the repeats are counted before they take memory.
    """
    from pyarrow import types

    kinds = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return [field.name for field in schema if any(kind(field.type) for kind in kinds)]


def _claimed_bytes(metadata: Any) -> int:
    """The size of a file's pages without their compression, as its metadata has it."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return sum(int(group.total_byte_size) for group in groups)


def _decoded_bytes(batch: Any) -> int:
    """The size of a batch with each repeat of a text."""
    from pyarrow import compute, types

    size = 0
    for column in batch.columns:
        if types.is_dictionary(column.type):
            lengths = compute.binary_length(column.dictionary).take(column.indices)
            size += compute.sum(lengths).as_py() or 0
        else:
            size += column.nbytes
    return size


def _require_size(size: int, limit: int, path: Path) -> None:
    if size > limit:
        raise DataError(
            f"{path} expands to {size} bytes or more, and at most {limit} are read; divide it, or "
            "leave columns out that are not needed"
        )


def _values(batch: Any, path: Path, above: int) -> list[dict[str, Any]]:
    """The rows of a batch that follows `above` rows, as Python values."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except _UNREADABLE as error:
        if batch.num_rows == 1:
            raise DataError(
                f"{path}: row {above + 1} has a value that cannot be read "
                f"({type(error).__name__}): text that is not UTF-8, a date out of range, or a "
                "field named twice"
            ) from None
        rows = []
        for index in range(batch.num_rows):
            rows += _values(batch.slice(index, 1), path, above + index)
    return rows


def _parquet_row(values: dict[str, Any], where: str, number: int) -> FileRow:
    try:
        return FileRow(where, number, checked(values))
    except InvalidValue as error:
        raise DataError(f"{where} {error}") from None
