"""Greedy decoding by transformers, with the settings of the Spec and nothing else.

A model folder may ship decoding settings (generation_config.json, or old keys in config.json), and
transformers takes from them whatever a caller leaves open. Qwen2.5 ships a repetition penalty, for
example. A setting that is off is None, and None counts as open. So while this module generates, the
model's own settings are put aside as a whole; only its end tokens are kept.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ebbline.tasks.chat.probes import probe
from ebbline.tasks.errors import ModelError
from ebbline.tasks.specs import Decoding

# What a GenerationConfig holds that says nothing about how the next token is chosen.
NO_SETTING = {
    "bos_token_id",
    "decoder_start_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_length",
    "max_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    "transformers_version",
}


# The arguments of a forward pass that reads on from a cache
NEEDED = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}


def has_plain_cache(model: Any) -> bool:
    """Whether the model has a plain attention cache in every layer and `logits_to_keep`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = DynamicCache(config=inner.config).layers
    return bool(
        inspect.signature(inner.forward).parameters.keys() >= NEEDED
        and layers
        and {type(layer) for layer in layers} == {DynamicLayer}
    )


def end_tokens(own: GenerationConfig, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the model's, the tokenizer's and the chat template's. The
    model's files need not name the last.

    A judge may have no chat template, or one that a measured model must not have.
    """
    declared = own.eos_token_id
    tokens = {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    tokens |= {*(declared if isinstance(declared, list) else [declared])}
    return sorted(token for token in tokens if token is not None)


def _end_of_turn(tokenizer: Any) -> int | None:
    """The template's end token; None without a template that renders an answer.

    A measured model's template was checked when it was loaded. A judge needs none: HarmBench's has
    no template, and Llama Guard's writes a whole conversation as one question.
    """
    try:
        return probe(tokenizer).end_of_turn
    except ModelError:
        return None


def settings_not_used(own: GenerationConfig, decoding: Decoding) -> dict[str, Any]:
    """The decoding settings that a model ships and `decoding` replaces, for the record.

    Numbers are as shipped. Of anything else only the size or the type is kept: it may hold text.
    """
    stated = decoding.model_dump()
    return {
        name: value if isinstance(value, bool | int | float) else _size(value)
        for name, value in sorted(own.to_dict().items())
        if not name.startswith("_")
        and name not in NO_SETTING
        and value is not None
        and (name not in stated or value != stated[name])
    }


def _size(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list | dict) else type(value).__name__


def shipped(folder: Path) -> GenerationConfig:
    """The decoding settings that transformers would read from a model folder."""
    if (folder / GENERATION_CONFIG_NAME).exists():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(
        folder, config_file_name=CONFIG_NAME, _from_model_config=True
    )


@contextmanager
def only(
    model: Any, decoding: Decoding, ends: Sequence[int], pad: int, **length: int
) -> Iterator[GenerationConfig]:
    """The settings for `model.generate`, which are also the model's own while this is open.

    `length` is max_new_tokens or max_length. PEFT copies a wrapper's settings to the model inside,
    so they are set on the innermost model.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = GenerationConfig(
        **decoding.model_dump(),
        **length,
        eos_token_id=list(ends),
        pad_token_id=pad,
        disable_compile=True,
    )
    own = inner.generation_config
    inner.generation_config = settings
    try:
        yield settings
    finally:
        inner.generation_config = own
