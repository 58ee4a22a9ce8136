"""What a chat template does, read from a few invented turns that it renders.

A template whose prompts are not the beginning of its training text is an error: what is measured
would not be what was learnt.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any, Literal

from ebbline.tasks.chat.template import bound, own_template, render, tokens_of
from ebbline.tasks.chat.thoughts import opened_thought
from ebbline.tasks.errors import ModelError
from ebbline.tasks.specs import Chat

USER, ANSWER, SYSTEM = "How is the marsh today?", "Calm and green.", "Speak of herons."
NEXT_USER, NEXT_ANSWER = "And the reeds?", "Tall ones."
DAYS = ("2001-02-03", "2024-07-26")
# What may stand between a generation prompt and an answer: whitespace, and an empty thought.
LEAD = re.compile(r"\s*(?:<think>)?\s*(?:</think>)?\s*")
_TAGS = r"<think>|<thinking>|<thought>|<reasoning>|<seed:think>|\[THINK\]"
_KNOWN = re.compile(rf"{_TAGS}|</think>|enable_thinking|reasoning_content", re.IGNORECASE)


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template does.

    `end_of_turn` is the token that ends an answer, None if the template writes none; `end_text` is
    the text after an answer up to this token. `system` and `turns` state whether the template
    renders system turns and several turns so that they can be learnt. `dated` is true for a
    template that writes the date.

    `thoughts` are `opened` when the generation prompt ends inside a thought, after the tag `opens`;
    `known` when only the template's text mentions them. `trainable` is false when the training
    text does not begin with the generation prompt.
    """

    sha256: str
    end_of_turn: int | None
    end_text: str
    system: bool
    turns: bool
    dated: bool
    thoughts: Literal["none", "known", "opened"]
    opens: str
    trainable: bool

    def record(self) -> dict[str, Any]:
        return asdict(self)


def probe(tokenizer: Any) -> TemplateFacts:
    """The facts of the tokenizer's template. Raises ModelError, whose message continues "the chat
    template".
    """
    return _probed(tokenizer, tokenizer.chat_template)


def check_chat(tokenizer: Any, chat: Chat, where: object) -> TemplateFacts:
    """The facts of a bound template. Raises ModelError for a template or a setting that does not do
    what a measurement needs.
    """
    try:
        facts = probe(tokenizer)
    except ModelError as error:
        raise ModelError(f"the chat template in {where} {error}") from None
    if chat.thinking is not None and not _has_switch(tokenizer, chat):
        raise ModelError(
            f"the chat template in {where} has no switch for thoughts; remove `thinking` from "
            "`chat`"
        )
    return facts


def require_trainable(tokenizer: Any) -> None:
    """Raises ModelError for a template that serves generation only."""
    facts, where = probe(tokenizer), tokenizer.name_or_path or "the tokenizer"
    if not facts.trainable:
        raise ModelError(
            f"the chat template in {where} opens a thought in its generation prompt "
            f"({facts.opens}) and not in its training text. Train with another template, for "
            "example an edited chat_template.jinja"
        )
    if facts.end_of_turn is None:
        raise ModelError(
            f"the chat template in {where} writes no end token after an answer, so a fine-tuned "
            "model would not learn to stop. Write {{ eos_token }} after the assistant's content"
        )


@lru_cache(maxsize=16)
def _probed(tokenizer: Any, template: str) -> TemplateFacts:
    prompt, whole = _text(tokenizer, (USER,), True), _text(tokenizer, (USER, ANSWER), False)
    if USER not in prompt or USER not in whole or ANSWER not in whole:
        raise ModelError(
            "leaves out the text of a turn; use a template that writes the content of each turn"
        )
    opened = opened_thought(prompt)
    trainable = whole.startswith(prompt)
    start = len(prompt) - (0 if trainable else len(opened))
    if not whole.startswith(prompt[:start]):
        raise ModelError(
            "writes a generation prompt that is not the beginning of its training text; correct "
            "the part after `{% if add_generation_prompt %}`"
        )
    lead, found, tail = whole[start:].partition(ANSWER)
    if not found or not LEAD.fullmatch(lead):
        if prompt == _text(tokenizer, (USER,), False):
            raise ModelError(
                f"writes no generation prompt: in training an answer follows {lead!r}, and the "
                "prompt lacks it; write it at the end, in `{% if add_generation_prompt %}`"
            )
        raise ModelError(
            f"writes {lead!r} between the generation prompt and the answer, so the prompt is not "
            "what an answer follows in training; use another template"
        )
    _require_one_start(tokenizer, prompt)
    own, end = own_template(template), _end_token(tokenizer, tail)
    return TemplateFacts(
        sha256=sha256(own.encode()).hexdigest(),
        end_of_turn=end,
        end_text="" if end is None else _up_to(tail, tokenizer.convert_ids_to_tokens(end)),
        system=_renders_system(tokenizer),
        turns=_renders_turns(tokenizer),
        dated=len({_text(tokenizer, (USER,), True, bound(own, Chat(date=day))) for day in DAYS})
        > 1,
        thoughts="opened" if opened else "known" if _KNOWN.search(own) else "none",
        opens=opened.strip(),
        trainable=trainable,
    )


def _text(
    tokenizer: Any, contents: Sequence[str], prompt: bool, template: str | None = None
) -> str:
    """The text of turns that alternate between user and assistant."""
    turns = [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]
    try:
        return render(tokenizer, turns, prompt, template)
    # A template may raise anything.
    except Exception as error:  # noqa: BLE001
        raise ModelError(
            f"cannot render a question and its answer ({type(error).__name__}: {error}); use "
            "another template"
        ) from None


def _require_one_start(tokenizer: Any, prompt: str) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and tokens_of(tokenizer, prompt)[:2] == [bos, bos]:
        raise ModelError(
            f"and the tokenizer write {tokenizer.bos_token} twice at the start of a prompt; remove "
            "one of them"
        )


def _end_token(tokenizer: Any, tail: str) -> int | None:
    """The first added token after an answer, such as </s>, <|im_end|> or <|eot_id|>."""
    added = {tokenizer.eos_token_id, *tokenizer.added_tokens_encoder.values()}
    added -= {tokenizer.unk_token_id}
    return next((token for token in tokens_of(tokenizer, tail) if token in added), None)


def _up_to(text: str, end: str) -> str:
    return text[: text.index(end) + len(end)]


def _renders_system(tokenizer: Any) -> bool:
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    answer = {"role": "assistant", "content": ANSWER}
    try:
        prompt, whole = render(tokenizer, turns, True), render(tokenizer, [*turns, answer], False)
    # As above: many templates raise an error for a system turn.
    except Exception:  # noqa: BLE001
        return False
    return SYSTEM in prompt and USER in prompt and SYSTEM in whole


def _renders_turns(tokenizer: Any) -> bool:
    contents = (USER, ANSWER, NEXT_USER, NEXT_ANSWER)
    try:
        prompts = [_text(tokenizer, contents[:length], True) for length in (1, 3)]
        whole = _text(tokenizer, contents, False)
    except ModelError:
        return False
    prompts = [prompt.removesuffix(opened_thought(prompt)) for prompt in prompts]
    return all(whole.startswith(prompt) for prompt in prompts) and all(
        content in whole for content in contents
    )


def _has_switch(tokenizer: Any, chat: Chat) -> bool:
    own = own_template(tokenizer.chat_template)
    texts = {
        _text(tokenizer, (USER,), True, bound(own, chat.model_copy(update={"thinking": thinking})))
        for thinking in (True, False)
    }
    return len(texts) > 1
