"""Training data: reads a pool of conversations and writes exactly `size` of them, in an order that
nests sizes.

Row i of a set does not depend on its size: with one seed and mix share, n=100 is the first 100 rows
of n=1000. The output is data.jsonl, with one {"messages": [{"role", "content"}, ...]} on each line.
An answer that is not to be learnt also has "weight": "0".
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ebbline.tasks.data.formats.chats import Conversation, chat_format, conversation_of
from ebbline.tasks.data.formats.folders import read_set
from ebbline.tasks.errors import DataError
from ebbline.tasks.specs import DataSpec
from ebbline.tasks.stage import Context


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
    return [rows[index] for index in order_of(len(rows), seed)]


def order_of(count: int, seed: int) -> list[int]:
    """The order in which a set's conversations are taken, by their places in the set."""
    # A hash of seed and position is the same on every machine and Python version; a random
    # generator's shuffle is not.
    return sorted(
        range(count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest()
    )


def read_conversations(path: Path) -> list[Conversation]:
    """Conversations from rows in each format of `ebbline.tasks.data.formats.chats`, in each kind of
    file of `ebbline.tasks.data.reader`.

    Raises DataError, which names file and line, for any other content, an empty set, and a turn
    without text.
    """
    rows = [conversation_of(row.values, row.where) for row in read_set(path, "train")]
    if not rows:
        raise DataError(f"{path} holds no conversation")
    return rows


def is_training_data(row: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation, by its columns. A text in `prompt` or `question` is the same
    in a prompt set, which also has ids.
    """
    name = chat_format(row)
    asked = row.get(name.partition(" and ")[0])
    return name != "" and not (name.startswith(("prompt", "question")) and isinstance(asked, str))
