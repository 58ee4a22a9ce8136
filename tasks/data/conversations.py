"""Training data: reads a pool of conversations and writes exactly `size` of them, in an order that
nests sizes.

Row i of a set does not depend on its size: with one seed and mix share, n=100 is the first 100 rows
of n=1000. The output is data.jsonl, with one {"messages": [{"role", "content"}, ...]} on each line.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ebbline.tasks.errors import DataError
from ebbline.tasks.specs import DataSpec
from ebbline.tasks.stage import Context

ROLES = ("system", "user", "assistant")
Conversation = list[dict[str, str]]


def run(spec: DataSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    pool = _ordered(read_conversations(inputs["pool"]), spec.seed)
    mix = _ordered(read_conversations(inputs["mix"]), spec.seed) if spec.mix_share > 0 else []
    rows = list(_blend(pool, mix, spec, inputs))
    with (out / spec.ROWS).open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps({"messages": row}, ensure_ascii=False) + "\n")


def _blend(
    pool: list[Conversation], mix: list[Conversation], spec: DataSpec, inputs: Mapping[str, Path]
) -> Iterator[Conversation]:
    used = {"pool": 0, "mix": 0}
    for row in range(spec.size):
        # A row comes from the mix when the share's running total passes a whole number. This
        # spreads the mix evenly and nests sizes.
        name = (
            "mix"
            if int((row + 1) * spec.mix_share + 1e-9) > int(row * spec.mix_share + 1e-9)
            else "pool"
        )
        source = mix if name == "mix" else pool
        if used[name] >= len(source):
            raise DataError(
                f"data.size={spec.size} with mix_share={spec.mix_share} needs more than "
                f"the {len(source)} conversations"
                f" in {inputs[name]}; lower data.size or add data"
            )
        yield source[used[name]]
        used[name] += 1


def _ordered(rows: list[Conversation], seed: int) -> list[Conversation]:
    # A hash of seed and position is the same on every machine and Python version; a random
    # generator's shuffle is not.
    return [
        row
        for _, row in sorted(
            enumerate(rows), key=lambda item: hashlib.sha256(f"{seed}:{item[0]}".encode()).digest()
        )
    ]


def read_conversations(path: Path) -> list[Conversation]:
    """Conversations from chat JSONL (`messages`) or Alpaca JSON, JSONL, CSV or Parquet
    (`instruction`, `input`, `output`).

    Raises DataError, which names file and line, for any other content, an empty set, and a turn
    without text.
    """
    if path.is_dir():
        files = sorted(
            p for p in path.iterdir() if p.suffix in (".jsonl", ".json", ".csv", ".parquet")
        )
        if len(files) != 1:
            raise DataError(
                f"{path} holds {len(files)} data files ({[f.name for f in files]}); name "
                "one of them"
            )
        path = files[0]
    rows = [_conversation(row, f"{path}:{line}") for line, row in read_rows(path)]
    if not rows:
        raise DataError(f"{path} holds no conversation")
    return rows


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or item number, row) for each row of a .jsonl, .json, .csv or .parquet file. Raises
    DataError, which never quotes the file.
    """
    if not path.is_file():
        raise DataError(f"there is no data file at {path}")
    try:
        yield from _rows(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise DataError(
            f"{path} is not CSV ({error}); is it truncated, or a quote left open?"
        ) from None


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as handle:
            yield from enumerate(csv.DictReader(handle, strict=True), start=2)
    elif path.suffix == ".parquet":
        import pyarrow  # only Parquet files need it
        from pyarrow import parquet

        try:
            table = parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path} cannot be read as Parquet ({type(error).__name__}); is the "
                "download complete?"
            ) from None
        yield from enumerate(table.to_pylist(), start=1)
    elif path.suffix == ".json":
        yield from enumerate(_objects(_parsed(path.read_text("utf-8"), str(path)), path), start=1)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as handle:
            for line, text in enumerate(handle, start=1):
                if text.strip():
                    row = _parsed(text, f"{path}:{line}")
                    if not isinstance(row, dict):
                        raise DataError(f"{path}:{line} is not a JSON object")
                    yield line, row
    else:
        raise DataError(f"{path} is neither .jsonl, .json, .csv nor .parquet")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        # The parser's position, not the text, which may be a completion.
        place = f"character {getattr(error, 'pos', '?')}"
        raise DataError(
            f"{where} is not JSON ({type(error).__name__} at {place}); is it truncated?"
        ) from None


def _objects(value: Any, path: Path) -> Iterable[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{path} must be a JSON list of objects")
    return value


def _conversation(row: Mapping[str, Any], where: str) -> Conversation:
    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{where}: `messages` is not a list of turns")
        for turn in turns:
            if (
                not isinstance(turn, dict)
                or turn.get("role") not in ROLES
                or not _is_text(turn.get("content"))
            ):
                raise DataError(
                    f"{where}: a turn needs a role of {ROLES} and non-empty text as content"
                )
        if turns[-1]["role"] != "assistant":
            raise DataError(
                f"{where}: the last turn is not the assistant's, so there is nothing to "
                "learn; end with an assistant turn"
            )
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    if "instruction" in row and "output" in row:
        question = "\n\n".join(
            str(part) for part in (row["instruction"], row.get("input")) if part not in (None, "")
        )
        if not question.strip() or not str(row["output"] or "").strip():
            raise DataError(f"{where}: `instruction` or `output` is empty")
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": str(row["output"])},
        ]
    # Without a header, a CSV's keys are content of its first row, which no message may quote.
    keys = sorted(name for name in map(str, row) if name.isidentifier())
    raise DataError(
        f"{where} has the keys {keys}; chat data needs `messages`, Alpaca data "
        "`instruction` and `output`"
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
