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

from ebbline.tasks.data.data_file import text_of
from ebbline.tasks.data.reader import data_files, read_rows
from ebbline.tasks.errors import DataError
from ebbline.tasks.specs import DataSpec
from ebbline.tasks.stage import Context

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
OTHER_ROLES = {
    **dict.fromkeys(
        ("tool", "function", "function_call", "function_response", "observation", "ipython"),
        "turns of tools are not trained. Leave conversations with tools out",
    ),
    "developer": "write it as `system`",
}
# Whether a turn is learnt: OpenAI's key, Axolotl's, and Axolotl's of earlier versions
WEIGHTS = ("weight", "train", "training")
_LEARNT = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
_TOOLS = "tools are not trained. Leave conversations with tools out"
_THOUGHT = "it is not read. Write the thought into `content`, between the model's own tags"
_SPANS = "parts of a turn are not marked. Mark whole turns with `train`"
# Keys of a turn that change the text or what is learnt of it, and the remedy
_UNREAD = {
    "tool_calls": _TOOLS,
    "function_call": _TOOLS,
    "tool_call_id": _TOOLS,
    "name": "it is not read. Remove it, or write the name into `content`",
    "refusal": "it is not read. Write the text as `content`",
    "reasoning_content": _THOUGHT,
    "reasoning": _THOUGHT,
    "thinking": _THOUGHT,
    "train_detail": _SPANS,
    "training_detail": _SPANS,
}
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
    return [rows[index] for index in order_of(len(rows), seed)]


def order_of(count: int, seed: int) -> list[int]:
    """The order in which a set's conversations are taken, by their places in the set."""
    # A hash of seed and position is the same on every machine and Python version; a random
    # generator's shuffle is not.
    return sorted(
        range(count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest()
    )


def read_conversations(path: Path) -> list[Conversation]:
    """Conversations from chat rows (`messages`), ShareGPT rows (`conversations`) or Alpaca rows
    (`instruction`, `input`, `output`), in each format of `ebbline.tasks.data.reader`.

    Raises DataError, which names file and line, for any other content, an empty set, and a turn
    without text.
    """
    if path.is_dir():
        files = data_files(path)
        if len(files) != 1:
            raise DataError(
                f"{path} holds {len(files)} data files ({[f.name for f in files]}); name "
                "one of them"
            )
        path = files[0]
    rows = [_conversation(row.values, row.where) for row in read_rows(path)]
    if not rows:
        raise DataError(f"{path} holds no conversation")
    return rows


def is_training_data(row: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation, by its columns."""
    chat = any(row.get(name) is not None for name in ("messages", "conversations"))
    return chat or ("instruction" in row and "output" in row)


def _conversation(row: Mapping[str, Any], where: str) -> Conversation:
    # A column that only other rows fill is null in Parquet.
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            if name == "conversations":
                _require_read_whole(row, where)
            _require_no_tools(row, where)
            return _turns(row[name], f"{where}: `{name}`", where)
    if "instruction" in row and "output" in row:
        _require_read_whole(row, where)
        parts = [text_of(where, name, row.get(name)) for name in ("instruction", "input")]
        question = "\n\n".join(part for part in parts if part)
        answer = text_of(where, "output", row["output"])
        if not question.strip() or not answer.strip():
            raise DataError(f"{where}: `instruction` or `output` is empty")
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    # Without a header, a CSV's keys are content of its first row, which no message may quote.
    keys = sorted(name for name in map(str, row) if name.isidentifier())
    raise DataError(
        f"{where} has the keys {keys}; chat data needs `messages` or `conversations`, Alpaca data "
        "`instruction` and `output`"
    )


def _turns(turns: Any, what: str, where: str) -> Conversation:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{what} is not a list of turns")
    read: Conversation = []
    for number, turn in enumerate(turns, start=1):
        named = turn if isinstance(turn, dict) else {}
        _require_plain(named, f"{where}: turn {number}")
        role, content = named.get("role"), named.get("content")
        if role is None and content is None:
            role, content = SHAREGPT_ROLES.get(str(named.get("from"))), named.get("value")
        if role not in ROLES or not _is_text(content):
            raise DataError(
                f"{where}: a turn needs a role of {ROLES} and non-empty text as content; a turn of "
                f"ShareGPT needs `from`, one of {tuple(SHAREGPT_ROLES)}, and `value`"
            )
        weight = _weight(named, str(role), f"{where}: turn {number}")
        read.append({"role": str(role), "content": str(content), **weight})
    if read[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last turn is not the assistant's, so there is nothing to "
            "learn; end with an assistant turn"
        )
    if not any(map(is_learnt, read)):
        raise DataError(
            f"{where}: every answer has `weight` 0 or `train` false, so there is nothing to learn; "
            "leave the row out"
        )
    return read


def is_learnt(turn: Mapping[str, str]) -> bool:
    """Whether a turn is an answer that is learnt."""
    return turn["role"] == "assistant" and turn.get("weight") != "0"


def _weight(turn: Mapping[str, Any], role: str, where: str) -> dict[str, str]:
    """The weight of a turn, where it is an answer that is not learnt."""
    learnt = True
    for name in WEIGHTS:
        if turn.get(name) in (None, ""):
            continue
        given = _LEARNT.get(str(turn[name]).lower())
        if given is None:
            raise DataError(
                f"{where} has a `{name}` other than 0, 1, true and false; a turn is learnt or not"
            )
        if given and role != "assistant":
            raise DataError(
                f"{where} is the {role}'s and has `{name}` {str(turn[name]).lower()}, but only "
                "the assistant's turns are learnt; remove the key"
            )
        learnt = learnt and given
    return {} if learnt or role != "assistant" else {"weight": "0"}


def _require_plain(turn: Mapping[str, Any], where: str) -> None:
    """Raises DataError for a role or a key under which the turn means more than its text."""
    for role in (turn.get("role"), turn.get("from")):
        if isinstance(role, str) and role in OTHER_ROLES:
            raise DataError(f"{where} has the role {role}: {OTHER_ROLES[role]}")
    for name, remedy in _UNREAD.items():
        if turn.get(name) not in (None, "", [], {}):
            raise DataError(f"{where} has `{name}`: {remedy}")


def _require_no_tools(row: Mapping[str, Any], where: str) -> None:
    for name in ("tools", "functions"):
        if row.get(name) not in (None, "", "[]", [], {}):
            raise DataError(f"{where} has `{name}`: {_TOOLS}")


def _require_read_whole(row: Mapping[str, Any], where: str) -> None:
    # Other programs make turns of these columns. Without them the row teaches something else.
    for name in ("system", "history", "tools"):
        if row.get(name) not in (None, "", []):
            raise DataError(
                f"{where} has text in `{name}`, which is not read; write the row as `messages`"
            )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
