"""A tokenizer or chat template that was saved beside an adapter.

TRL, Unsloth and Axolotl save the tokenizer with each adapter. A measurement uses it only when its
Spec says so; otherwise its result names what differs from the model's.
"""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer

from ebbline.tasks.chat.template import own_template
from ebbline.tasks.errors import ModelError

TEMPLATE = "chat_template.jinja"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZERS)


def read_tokenizer(folder: Path, adapter: Path | None = None) -> Any:
    """The tokenizer of a model folder; with `adapter` the one beside it, or the model's tokenizer
    with the chat template beside it. Raises ModelError if there is none.
    """
    if adapter is None:
        return _read(folder)
    template = adapter / TEMPLATE
    if not has_tokenizer(adapter) and not template.exists():
        raise ModelError(
            f"`tokenizer: adapter` is set, and {adapter} holds neither a tokenizer nor "
            f"{TEMPLATE}; use `tokenizer: model`, or save the adapter's tokenizer there"
        )
    tokenizer = _read(adapter if has_tokenizer(adapter) else folder)
    if template.exists():
        try:
            tokenizer.chat_template = template.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(
                f"{template} is not UTF-8 ({error.reason}); save it as UTF-8"
            ) from None
    return tokenizer


def _read(folder: Path) -> Any:
    tokenizer = _loaded(folder)
    longest = tokenizer.model_max_length
    is_number = isinstance(longest, int | float) and not isinstance(longest, bool)
    if not is_number or not longest > 0:
        raise ModelError(
            f"`model_max_length` in {folder / 'tokenizer_config.json'} is {longest!r}, not a "
            "number above 0; write the number without quotes, or remove the setting"
        )
    return tokenizer


def _loaded(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=False,
            padding_side="left",
            local_files_only=True,
            # A folder may set it; a template's own tokens would then be read as ordinary text.
            split_special_tokens=False,
        )
    except StrictDataclassError as error:  # transformers also reads the model's config
        reason = " ".join(str(error).split())[:500]
        raise ModelError(f"{folder / 'config.json'} cannot be loaded: {reason}") from None
    # The tokenizers library raises bare exceptions for damaged files.
    except Exception as error:  # noqa: BLE001
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {reason}); add "
            "tokenizer.json and tokenizer_config.json to the folder"
        ) from None


def unused_beside(adapter: Path | None, model: Path, tokenizer: Any) -> list[str]:
    """What a tokenizer or template beside an adapter has different from the one in use, by name."""
    if adapter is None or not (has_tokenizer(adapter) or (adapter / TEMPLATE).exists()):
        return []
    try:
        beside = read_tokenizer(model, adapter)
    except ModelError:
        return ["unreadable tokenizer"]
    different = []
    if (
        beside.chat_template
        and _stripped(beside.chat_template) != own_template(tokenizer.chat_template).strip()
    ):
        different.append("chat template")
    if beside.get_vocab() != tokenizer.get_vocab():
        different.append("vocabulary")
    return different + [
        name.replace("_", " ")
        for name in SPECIAL
        if getattr(beside, name) not in (None, getattr(tokenizer, name))
    ]


def _stripped(template: Any) -> str:
    return str(template.get("default", "") if isinstance(template, dict) else template).strip()
