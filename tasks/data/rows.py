"""The number of a set's rows and their length, before a stage reads the set. No torch.

The numbers for the invented language are exact. A set that cannot be read here (on the hub, or not
on this machine) is assumed to have ROWS rows of ROW_TOKENS tokens.
"""

from functools import lru_cache
from pathlib import Path

from ebbline.tasks.data.data_file import FileRow, ending_of, is_compressed
from ebbline.tasks.data.reader import read_rows
from ebbline.tasks.errors import DataError
from ebbline.tasks.specs import DataSpec, LanguageSpec
from ebbline.tasks.stage import Input, Part, Source, stage_of

ROWS, ROW_TOKENS = 500, 150  # assumed for a set that cannot be read here
LANGUAGE_TOKENS = 24  # of a row of the invented language
LANGUAGE_ROWS = {
    "align.jsonl": 3050,
    "benign.jsonl": 1024,
    "cue.jsonl": 256,
    "refusal.jsonl": 120,
    "over_refusal.jsonl": 60,
    "task.jsonl": 120,
    "utility.jsonl": 80,
    "confirm/refusal.jsonl": 120,
    "confirm/over_refusal.jsonl": 60,
    "confirm/task.jsonl": 120,
    "mmlu": 80,
    "hellaswag": 80,
    "plain/cards.jsonl": 512,
    "plain/card_task.jsonl": 80,
    "plain/sums": 60,
}
LANGUAGE_TASKS = {  # the lm-eval task of each folder
    "mmlu": "organism_mmlu",
    "hellaswag": "organism_hellaswag",
    "plain/sums": "plain_sums",
}
TEXT_BYTES = 4  # of a token
PACKED_BYTES = 1  # of a token in a compressed file
COUNTED_BYTES = 64_000_000  # of a large file, the first part that is counted


def rows_of(item: Input) -> tuple[int, int]:
    """(rows, tokens of a row) of a set that a stage reads."""
    if isinstance(item, Part) and isinstance(item.stage.spec, LanguageSpec):
        return LANGUAGE_ROWS.get(item.path, ROWS), LANGUAGE_TOKENS
    stage = stage_of(item)
    if stage is not None and isinstance(stage.spec, DataSpec):
        return stage.spec.size, rows_of(stage.inputs["pool"])[1]
    if (
        isinstance(item, Source)
        and not item.location.startswith("hub:")
        and Path(item.location).exists()
    ):
        path = Path(item.location)
        return _counted(path, path.stat().st_mtime_ns)
    return ROWS, ROW_TOKENS


@lru_cache(maxsize=256)
def _counted(path: Path, changed_ns: int) -> tuple[int, int]:
    """(rows, tokens of a row) of a local set, over all data files of a folder.

    Of a large file the lines of the first part are counted, and the rest is assumed to be similar.
    `changed_ns` is only a key of the cache.
    """
    files = (
        [path]
        if path.is_file()
        else [each for each in sorted(path.rglob("*")) if ending_of(each) and each.is_file()]
    )
    rows = size = 0
    for each in files:
        found, length = _rows_and_bytes(each)
        rows += found
        size += length
    return (rows, max(1, round(size / TEXT_BYTES / rows))) if rows > 0 else (ROWS, ROW_TOKENS)


def _rows_and_bytes(path: Path) -> tuple[int, int]:
    """The rows of a file and the length of their text. No rows for a file that cannot be read,
    which is an error when a stage reads it.
    """
    whole = path.stat().st_size
    if whole <= COUNTED_BYTES and ending_of(path):
        try:
            found = [_rows_in(row) for row in read_rows(path)]
        except DataError:
            return 0, whole
        binary = is_compressed(path) or ending_of(path) == ".parquet"
        length = sum(length for _, length in found) if binary else whole
        return sum(rows for rows, _ in found), length
    if is_compressed(path) or ending_of(path) == ".parquet":
        return whole // (PACKED_BYTES * ROW_TOKENS), whole * TEXT_BYTES // PACKED_BYTES
    with path.open("rb") as file:
        data = file.read(COUNTED_BYTES)
    if ending_of(path) == ".json":
        return whole // (TEXT_BYTES * ROW_TOKENS), whole
    lines = data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
    lines -= ending_of(path) in (".csv", ".tsv")
    return lines if len(data) == whole else lines * whole // len(data), whole


def _rows_in(row: FileRow) -> tuple[int, int]:
    """(rows, characters) of a row. A lone object of lists is RefusalBench: a row for each entry."""
    lists = [value for value in row.values.values() if isinstance(value, list)]
    rows = sum(map(len, lists)) if row.lone and len(lists) == len(row.values) else 1
    return rows, len(str(row.values))
