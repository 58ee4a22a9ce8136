"""A model's chat template, bound to the settings of a Spec; and rendering with it.

`bind` puts the settings (date, thoughts) into the template's own text. So whoever renders with the
tokenizer, lm-eval too, gets the text that the Spec states, whatever the day.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ebbline.tasks.errors import DataError, ModelError
from ebbline.tasks.specs import Chat

Turns = Sequence[Mapping[str, str]]

_END_OF_SETTINGS = "{# the model's own template follows #}\n"
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
# strftime's directives that depend on the date alone. `%-d` is glibc's; templates use it.
_DIRECTIVES = (
    "-d -m -H -I -M -S -j a A w d b B m y Y H I p M S f j U W c x X F T R D e G V u".split()
)


def bind(tokenizer: Any, chat: Chat, where: object) -> None:
    """Choose the template that `chat` names or holds, and put the settings into it. The attribute
    `own_chat_template` of the tokenizer keeps the template without them, for saving.

    Raises ModelError if there is no such template, and for a random one.
    """
    own = tokenizer.chat_template if chat.text is None else chat.text
    if not own:
        raise ModelError(
            f"the tokenizer in {where} has no chat template; ebbline studies chat models. Add "
            "chat_template.jinja to the folder, or write `chat_template: FILE` for this model in "
            "the study"
        )
    named: Mapping[str, str] = own if isinstance(own, Mapping) else {"default": own}
    name = chat.template or "default"
    if name not in named:
        raise ModelError(
            f"the tokenizer in {where} has no chat template {name!r}; it has {sorted(named)}. "
            "Name one of them as `template` in `chat`"
        )
    template = named[name].removeprefix("\ufeff")  # a mark of the file, which editors write
    if found := _RANDOM.search(template):
        raise ModelError(
            f"the chat template in {where} uses {found[0].strip()!r}, so one prompt has many "
            "texts; remove it from the template"
        )
    tokenizer.own_chat_template = own
    tokenizer.chat_template = bound(template, chat)


def bound(template: str, chat: Chat) -> str:
    """The template with the settings in front: `strftime_now` and `date_string` give the date of
    `chat`, and the switches for thoughts are set.
    """
    day = datetime.fromisoformat(chat.date)
    replaced = "format" + "".join(
        f" | replace({json.dumps('%' + letter)}, {json.dumps(day.strftime('%' + letter))})"
        for letter in _DIRECTIVES
    )
    settings: dict[str, object] = {"date_string": day.strftime("%d %b %Y")}
    if chat.thinking is not None:
        # Qwen and GLM call the switch enable_thinking, DeepSeek and Granite thinking.
        settings |= {"enable_thinking": chat.thinking, "thinking": chat.thinking}
    assignments = "".join(
        f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in settings.items()
    )
    # Jinja drops the newline after the comment, so the model's template begins at a line's start.
    return (
        f"{{%- macro strftime_now(format) -%}}{{%- set day = {replaced} -%}}"
        "{%- if '%' in day %}{{ raise_exception('unknown date format') }}{% endif -%}{{- day -}}"
        f"{{%- endmacro -%}}{assignments}{_END_OF_SETTINGS}{template}"
    )


def own_template(template: str) -> str:
    """The model's own template in a bound one."""
    return template.partition(_END_OF_SETTINGS)[2] or template


def render(tokenizer: Any, turns: Turns, prompt: bool, template: str | None = None) -> str:
    """The text of a conversation; with `prompt` up to where the model's answer begins."""
    # Without the weight of a turn, which is no text
    texts = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    text: str = tokenizer.apply_chat_template(
        texts, chat_template=template, add_generation_prompt=prompt, tokenize=False
    )
    return text


def holds(text: str, content: str) -> bool:
    """Whether a rendered text has the whole content of a turn."""
    return without_space(content) in without_space(text)


def without_space(text: str) -> str:
    # Templates strip turns, and some put an empty line after a thought.
    return "".join(text.split())


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a rendered text. The template writes all special tokens; none is added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt, as the only message of a chat.

    Raises DataError for a prompt that the chat template shortens or changes.
    """
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        text = render(tokenizer, [{"role": "user", "content": prompt}], True)
        if not holds(text, prompt):
            raise DataError(
                f"the chat template leaves out or changes text of prompt {number}; use another "
                "template, or remove the prompt"
            )
        encoded.append(tokens_of(tokenizer, text))
    return encoded


def save_tokenizer(tokenizer: Any, folder: object) -> None:
    """Save a bound tokenizer with the model's own template."""
    template = tokenizer.chat_template
    tokenizer.chat_template = getattr(tokenizer, "own_chat_template", template)
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = template
