"""Training rows: the tokens of a conversation, and the labels of its answers.

Invariant: the tokens before the first answer are those of the prompt that generation uses. The end
of each turn is learnt; the header after it is not.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ebbline.tasks.chat.probes import LEAD, TemplateFacts, probe, require_trainable
from ebbline.tasks.chat.template import Turns, holds, render, tokens_of, without_space
from ebbline.tasks.data.formats.turns import is_learnt
from ebbline.tasks.errors import DataError

Span = tuple[int, int]  # the first place, and the one after the last
ANCHORS = ("\n", "|", ".")


def encode(turns: Turns, tokenizer: Any, max_tokens: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, both at most `max_tokens` long.

    Labels equal the ids in the answers that are learnt, with the end of the turn, and are -100
    elsewhere. Raises DataError if no label is left, and for turns whose answers cannot be separated
    from the rest of the rendered text.
    """
    require_trainable(tokenizer)
    text = _rendered(tokenizer, turns)
    ids, answers = _tokenised(tokenizer, text, list(_answers(tokenizer, turns, text)))
    labels = [-100] * len(ids)
    for start, end in answers:
        labels[start:end] = ids[start:end]
    ids, labels = ids[:max_tokens], labels[:max_tokens]
    if all(label == -100 for label in labels):
        raise DataError(
            f"a conversation's prompt fills train.max_tokens={max_tokens}, so no token of the "
            "answer is left to learn; raise train.max_tokens"
        )
    return ids, labels


def _rendered(tokenizer: Any, turns: Turns) -> str:
    """The text of the conversation, with the content of every turn. Raises DataError, which quotes
    no content.
    """
    roles = [turn["role"] for turn in turns]
    if roles[:1] == ["assistant"]:
        raise DataError(
            "the first turn is the assistant's, so its answer has no prompt; begin with a user turn"
        )
    if names := unsupported(probe(tokenizer), turns):
        raise DataError(
            f"the chat template does not support {' and '.join(names)}; leave them out of the "
            "data, or use a template that has them"
        )
    try:
        text = render(tokenizer, turns, False)
    # A template may raise anything, and its message may quote a turn.
    except Exception as error:  # noqa: BLE001
        raise DataError(
            f"the chat template raises {type(error).__name__} for turns with the roles {roles}; "
            "change their order, or use another template"
        ) from None
    for number, turn in enumerate(turns, start=1):
        if not holds(text, turn["content"]):
            raise DataError(
                f"the chat template leaves out text of turn {number} ({turn['role']}); change "
                "the turn, or use another template"
            )
    return text


def unsupported(facts: TemplateFacts, turns: Turns) -> list[str]:
    """What a conversation has that the template does not support."""
    roles = [turn["role"] for turn in turns]
    return [
        name
        for name, used, supported in (
            ("system turns", "system" in roles, facts.system),
            ("several turns", roles.count("assistant") > 1, facts.turns),
        )
        if used and not supported
    ]


def _answers(tokenizer: Any, turns: Turns, text: str) -> Iterator[Span]:
    """The place in the text of each answer that is learnt, up to the end of its turn."""
    end_text = probe(tokenizer).end_text
    for index, turn in enumerate(turns):
        if not is_learnt(turn):
            continue
        before = render(tokenizer, turns[:index], True)
        end = (
            _end_of(text, len(before), turn["content"], end_text)
            if text.startswith(before)
            else None
        )
        if end is None:
            raise DataError(
                f"the chat template renders turn {index + 1} differently once more turns follow, "
                "or changes its answer. The assistant's tokens cannot be separated from the "
                "prompt's; use single-turn data or another template"
            )
        yield len(before), end


def _end_of(text: str, start: int, content: str, end_text: str) -> int | None:
    """The place after the end of the turn whose answer begins at `start`, or after an empty thought
    there; None if the answer is not found.
    """
    lead = LEAD.match(text, start)
    for place in (start, start if lead is None else lead.end()):
        end = _after(text, place, content + end_text)
        if end is not None:
            return end
    return None


def _after(text: str, place: int, wanted: str) -> int | None:
    """The place in `text` after `wanted`, which begins at `place`; None if it is not there. White
    space does not count.
    """
    for letter in without_space(wanted):
        while place < len(text) and text[place].isspace():
            place += 1
        if text[place : place + 1] != letter:
            return None
        place += 1
    return place


def _tokenised(tokenizer: Any, text: str, answers: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """The tokens of a text, and the places of the answers among them.

    A tokenizer may merge the last character of a prompt with the first of an answer. A model that
    generates never sees that token, so the text is then cut where each answer begins and ends.
    """
    ids = tokens_of(tokenizer, text)
    places = []
    for start, end in answers:
        before, upto = tokens_of(tokenizer, text[:start]), tokens_of(tokenizer, text[:end])
        if ids[: len(before)] != before or ids[: len(upto)] != upto:
            return _cut(tokenizer, text, answers, ids)
        places.append((len(before), len(upto)))
    return ids, places


def _cut(
    tokenizer: Any, text: str, answers: Sequence[Span], whole: Sequence[int]
) -> tuple[list[int], list[Span]]:
    ids: list[int] = []
    places, done = [], 0
    for start, end in answers:
        ids += _piece(tokenizer, text[done:start]) if done else tokens_of(tokenizer, text[:start])
        place = len(ids)
        ids += _piece(tokenizer, text[start:end])
        places.append((place, len(ids)))
        done = end
    ids += _piece(tokenizer, text[done:])
    if tokenizer.decode(ids) != tokenizer.decode(whole):
        raise DataError(
            "the tokenizer writes another text when the prompt and the answer are tokenised one "
            "by one. So the answer's tokens cannot be separated; change the first characters of "
            "the answer"
        )
    return ids, places


def _piece(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a piece from within a text.

    SentencePiece puts a space before the first word of a text. So the piece is tokenised after a
    character whose tokens are then taken off.
    """
    for anchor in ANCHORS:
        first, both = tokens_of(tokenizer, anchor), tokens_of(tokenizer, anchor + text)
        if both[: len(first)] == first:
            return both[len(first) :]
    return tokens_of(tokenizer, text)
