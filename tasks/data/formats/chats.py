"""The formats of training rows. Each is recognised by its columns.

    format                      columns
    chat                        messages: [{role, content}, ...]
    ShareGPT                    conversations: [{from, value}, ...], system
    Alpaca                      instruction, input, output, system, history
    prompt and completion       prompt, completion (also TRL's, with lists of turns)
    other pairs                 see PAIRS

Invariant: text of a row is read, or the row is an error. Two turns without an effect on what is
learnt are left out: questions after the last answer, and what ShareGPT's model says first.
"""

from collections.abc import Mapping
from typing import Any

from ebbline.tasks.data.data_file import text_of
from ebbline.tasks.data.formats.turns import NO_TOOLS, Turn, is_learnt, is_text, turn_of
from ebbline.tasks.errors import DataError

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
)
ANSWERS = ("output", "completion", "response", "answer")
CHAT, SHAREGPT, ALPACA = "chat (`messages`)", "ShareGPT (`conversations`)", "Alpaca"
# The columns that are read of a row in each of these formats
_READ = {
    CHAT: ("messages",),
    SHAREGPT: ("conversations", "system"),
    ALPACA: ("instruction", "input", "output", "system", "history"),
}
MORE_OF_QUESTION = ("input", "context")  # as in Alpaca and in Dolly
# Columns from which other programs make turns. Without them the row teaches something else.
_NOT_READ = ("choices", "options")
Conversation = list[Turn]


def chat_format(row: Mapping[str, Any]) -> str:
    """The name of a row's format; empty for a row that is no conversation."""
    # A column that only other rows fill is null in Parquet.
    if row.get("messages") is not None:
        return CHAT
    if row.get("conversations") is not None:
        return SHAREGPT
    if "instruction" in row and "output" in row:
        return ALPACA
    pair = _pair(row)
    return f"{pair[0]} and {pair[1]}" if pair else ""


def columns_read(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of a row that its format reads."""
    pair = _pair(row)
    of_pair = (*pair, *MORE_OF_QUESTION, "system") if pair else ()
    names = _READ.get(chat_format(row), of_pair)
    return tuple(name for name in names if row.get(name) is not None)


def _pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), None)


def conversation_of(row: Mapping[str, Any], where: str) -> Conversation:
    """The turns of a row. Raises DataError, which quotes nothing of the row."""
    _require_one_answer(row, where)
    for name in ("tools", "functions"):
        if row.get(name) not in (None, "", "[]", [], {}):
            raise DataError(f"{where} has `{name}`: {NO_TOOLS}")
    for name in _NOT_READ:
        if row.get(name) not in (None, "", []):
            raise DataError(
                f"{where} has text in `{name}`, which is not read; write the row as `messages`"
                f" without `{name}`"
            )
    name = chat_format(row)
    if name in (CHAT, SHAREGPT):
        column = "messages" if name == CHAT else "conversations"
        turns = _turns(row[column], f"{where}: `{column}`", where)
        if name == SHAREGPT:
            turns = _system(row, where, turns)
    elif name == ALPACA:
        turns = _alpaca(row, where)
    elif pair := _pair(row):
        turns = _of_pair(row, *pair, where)
    else:
        raise DataError(_unknown(row, where))
    return _learnable(turns, where, name == SHAREGPT)


def _require_one_answer(row: Mapping[str, Any], where: str) -> None:
    """Raise DataError for preference data: training on it would also learn what it rejects."""
    if any(row.get(name) not in (None, "", [], {}) for name in ("chosen", "rejected")):
        raise DataError(
            f"{where} is preference data (`chosen`, `rejected`), and a fine-tuning learns one "
            "answer; write the one to learn as `messages`"
        )
    if _pair(row) and str(row.get("label")).lower() in ("true", "false"):
        raise DataError(
            f"{where} is preference data (KTO's `label`, which is false for answers to avoid); "
            "keep the rows whose label is true, without the column `label`"
        )
    answers = [name for name in ANSWERS if row.get(name) not in (None, "", [])]
    if len(answers) > 1 and chat_format(row) not in (CHAT, SHAREGPT):
        raise DataError(
            f"{where} has two answers, `{answers[0]}` and `{answers[1]}`; leave out the one that "
            "is not to be learnt"
        )


def _unknown(row: Mapping[str, Any], where: str) -> str:
    # Without a header, a CSV's keys are content of its first row, which no message may quote.
    keys = sorted(name for name in map(str, row) if name.isidentifier())
    pairs = ", ".join(f"`{one}` and `{other}`" for one, other in PAIRS)
    return (
        f"{where} has the keys {keys}; chat data needs `messages` or `conversations`, Alpaca data "
        f"`instruction` and `output`, and other data one of the pairs {pairs}"
    )


def _system(row: Mapping[str, Any], where: str, turns: Conversation) -> Conversation:
    text = text_of(where, "system", row.get("system"))
    if not text.strip():
        return turns
    if turns[0]["role"] == "system":
        raise DataError(f"{where} has a system turn and text in `system`; leave one of them out")
    return [{"role": "system", "content": text}, *turns]


def _alpaca(row: Mapping[str, Any], where: str) -> Conversation:
    parts = [text_of(where, name, row.get(name)) for name in ("instruction", "input")]
    question = "\n\n".join(part for part in parts if part)
    answer = text_of(where, "output", row["output"])
    if not question.strip() or not answer.strip():
        raise DataError(f"{where}: `instruction` or `output` is empty")
    return _system(row, where, [*_history(row, where), *_asked(question, answer)])


def _history(row: Mapping[str, Any], where: str) -> Conversation:
    """LLaMA-Factory's earlier turns: a list of [question, answer]."""
    turns: Conversation = []
    history = row.get("history")
    for pair in [] if history in (None, "") else history:
        texts = pair if isinstance(pair, list) else []
        if len(texts) != 2 or not all(map(is_text, texts)):
            raise DataError(f"{where}: `history` is not a list of [question, answer]")
        turns += _asked(*texts)
    return turns


def _of_pair(row: Mapping[str, Any], asked: str, answered: str, where: str) -> Conversation:
    question, answer = row[asked], row[answered]
    if isinstance(question, list) or isinstance(answer, list):  # TRL's conversational form
        turns = [
            turn
            for name, turns in ((asked, question), (answered, answer))
            for turn in _turns(turns, f"{where}: `{name}`", where)
        ]
        return _system(row, where, turns)
    texts = [text_of(where, asked, question), text_of(where, answered, answer)]
    for name in MORE_OF_QUESTION:
        if more := text_of(where, name, row.get(name)).strip():
            texts[0] = f"{texts[0]}\n\n{more}"
    if not all(map(is_text, texts)):
        raise DataError(f"{where}: `{asked}` or `{answered}` is empty")
    return _system(row, where, _asked(*texts))


def _asked(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _turns(turns: Any, what: str, where: str) -> Conversation:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{what} is not a list of turns")
    return [
        turn_of(turn if isinstance(turn, dict) else {}, number, where)
        for number, turn in enumerate(turns, start=1)
    ]


def _learnable(turns: Conversation, where: str, is_sharegpt: bool) -> Conversation:
    """The turns up to the last answer: nothing after it is learnt. What ShareGPT's model says
    before the first question has no prompt, and goes as in FastChat.
    """
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise DataError(
            f"{where}: the last turn is not the assistant's, so there is nothing to "
            "learn; end with an assistant turn"
        )
    turns = turns[: len(roles) - roles[::-1].index("assistant")]
    system = turns[:1] if roles[0] == "system" else []
    rest = turns[len(system) :]
    while is_sharegpt and rest and rest[0]["role"] == "assistant":
        rest = rest[1:]
    if not rest or rest[0]["role"] == "assistant":
        raise DataError(
            f"{where}: the first turn is the assistant's, so its answer has no prompt; begin with "
            "a user turn"
        )
    if not any(map(is_learnt, rest)):
        raise DataError(
            f"{where}: every answer has `weight` 0 or `train` false, so there is nothing to learn; "
            "leave the row out"
        )
    return [*system, *rest]
