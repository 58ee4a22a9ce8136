"""The number of a set's rows and their length, before a stage reads the set. No torch.

The numbers for the invented language are exact. A set that cannot be read here (on the hub, or not
on this machine) is assumed to have ROWS rows of ROW_TOKENS tokens.
"""

import json
from functools import lru_cache
from pathlib import Path

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
    "mmlu": 80,
    "hellaswag": 80,
    "plain/cards.jsonl": 512,
    "plain/card_task.jsonl": 80,
    "plain/sums": 60,
}
TEXT_BYTES = 4  # of a token
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
    """(rows, tokens of a row) of a local set: the lines of a JSONL, CSV or text file, the entries
    of a JSON file, over all files of a folder.

    Of a large file the first part is counted, and the rest is assumed to be similar. `changed_ns`
    is only a key of the cache.
    """
    files = (
        [path]
        if path.is_file()
        else [
            each for each in sorted(path.rglob("*")) if each.suffix in (".jsonl", ".json", ".csv")
        ]
    )
    rows = size = 0
    for each in files:
        whole = each.stat().st_size
        with each.open("rb") as file:
            data = file.read(COUNTED_BYTES)
        size += whole
        if each.suffix == ".json":
            rows += _entries(data) if len(data) == whole else whole // (TEXT_BYTES * ROW_TOKENS)
        else:
            lines = (
                data.count(b"\n")
                + (not data.endswith(b"\n") and bool(data))
                - (each.suffix == ".csv")
            )
            rows += lines if len(data) == whole else lines * whole // len(data)
    return (rows, max(1, round(size / TEXT_BYTES / rows))) if rows > 0 else (ROWS, ROW_TOKENS)


def _entries(data: bytes) -> int:
    """The number of entries of a JSON list, or of all lists in an object. 0 for any other content,
    which is an error when a training reads it.
    """
    try:
        value = json.loads(data)
    except ValueError:
        return 0
    if isinstance(value, list):
        return len(value)
    parts = value.values() if isinstance(value, dict) else ()
    return sum(len(part) for part in parts if isinstance(part, list))
