"""How many rows a set has and how long they are, before a stage reads it. No torch.

The invented language's sets are exact, as they are made here. A set that cannot be looked into (on
the hub, or not on this machine) is taken to have ROWS rows of ROW_TOKENS tokens.
"""

import json
from functools import lru_cache
from pathlib import Path

from ebbline.tasks.specs import DataSpec, LanguageSpec
from ebbline.tasks.stage import Input, Part, Source, stage_of

ROWS, ROW_TOKENS = 500, 150  # of a set that cannot be looked into: one on the hub, or not here
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
COUNTED_BYTES = 64_000_000  # of a file of rows


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
    """(rows, tokens of a row) of a local set: a JSONL's, CSV's or plain text's lines, a JSON's
    entries, all files of a folder.

    Of a large file the first part is counted, and the rest is taken to be like it.
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
    """The entries of a JSON list, or of an object's lists; a file that is neither is an error when
    it is read for a training.
    """
    try:
        said = json.loads(data)
    except ValueError:
        return 0
    parts = [said] if isinstance(said, list) else said.values() if isinstance(said, dict) else []
    return sum(len(part) for part in parts if isinstance(part, list))
