"""The turns of a conversation in training rows: who speaks, what text it is, and whether it is
learnt.

Invariant: text of a turn is read, or the row is an error that names line and turn.
"""

from collections.abc import Mapping
from typing import Any

from ebbline.tasks.data.data_file import text_of
from ebbline.tasks.errors import DataError

OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
# Whether a turn is learnt: OpenAI's key, Axolotl's, and Axolotl's of earlier versions
WEIGHTS = ("weight", "train", "training")
_LEARNT = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
NO_TOOLS = "tools are not trained. Leave conversations with tools out"
_THOUGHT = "it is not read. Write the thought into `content`, between the model's own tags"
_SPANS = "parts of a turn are not marked. Mark whole turns with `train`"
# Keys of a turn that change the text or what is learnt of it, and the remedy
_UNREAD = {
    "tool_calls": NO_TOOLS,
    "function_call": NO_TOOLS,
    "tool_call_id": NO_TOOLS,
    "name": "it is not read. Remove it, or write the name into `content`",
    "refusal": "it is not read. Write the text as `content`",
    "reasoning_content": _THOUGHT,
    "reasoning": _THOUGHT,
    "thinking": _THOUGHT,
    "train_detail": _SPANS,
    "training_detail": _SPANS,
}
Turn = dict[str, str]


def turn_of(turn: Mapping[str, Any], number: int, where: str) -> Turn:
    """A turn as `role` and `content`; an answer that is not learnt also has the `weight` 0.

    Raises DataError, which quotes nothing of the turn.
    """
    which = f"{where}: turn {number}"
    _require_plain(turn, which)
    role, content = OPENAI_ROLES.get(str(turn.get("role"))), turn.get("content")
    if turn.get("role") is None and content is None:
        role, content = SHAREGPT_ROLES.get(str(turn.get("from"))), turn.get("value")
    text = _joined(content, where) if isinstance(content, list) else content
    if role is None or not is_text(text):
        raise DataError(
            f"{where}: a turn needs a role of {tuple(OPENAI_ROLES)} and non-empty text as content; "
            f"a turn of ShareGPT needs `from`, one of {tuple(SHAREGPT_ROLES)}, and `value`"
        )
    return {"role": role, "content": str(text), **_weight(turn, role, which)}


def is_learnt(turn: Mapping[str, str]) -> bool:
    """Whether a turn is an answer that is learnt."""
    return turn["role"] == "assistant" and turn.get("weight") != "0"


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _require_plain(turn: Mapping[str, Any], where: str) -> None:
    """Raises DataError for a role or a key under which the turn means more than its text."""
    for role in (turn.get("role"), turn.get("from")):
        if isinstance(role, str) and role in TOOL_ROLES:
            raise DataError(f"{where} has the role {role}: turns of {NO_TOOLS}")
    for name, remedy in _UNREAD.items():
        if turn.get(name) not in (None, "", [], {}):
            raise DataError(f"{where} has `{name}`: {remedy}")


def _weight(turn: Mapping[str, Any], role: str, where: str) -> Turn:
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


def _joined(parts: list[Any], where: str) -> str:
    """The text of content parts, joined as chat templates do: with nothing between them."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or part.get("text") is None:
            raise DataError(
                f"{where}: a turn's content has a part that is no text (`type: text`); ebbline "
                "reads text only, so leave such rows out"
            )
        texts.append(text_of(where, "text", part["text"]))
    return "".join(texts)
