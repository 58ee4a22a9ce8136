"""What a model's files say before it is loaded: its architecture, the shapes of its tensors, and
its config with one set of names.

Invariant: `parameters` is exact or None. It is the sum over the headers of the weights' files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ebbline.tasks.errors import ModelError
from ebbline.tasks.headers.files import CONFIG, INDEX, SINGLE, read_json, tensor_shapes
from ebbline.tasks.headers.gguf_header import GgufHeader, read_gguf
from ebbline.tasks.paths import inside

KnownFrom = Literal["the weights' headers", "the GGUF header", "config.json"]
_HEADS = ("lm_head.weight", "embed_out.weight")
_GGUF_HEAD = "output.weight"
_EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight"),
    *("token_embd.weight", "embeddings.weight"),
)
# Stored by some programs beside the weights: masks, and the frequencies of rotary embeddings.
_NO_PARAMETERS = (
    *("inv_freq", "masked_bias", "rope_freqs.weight", "rope_factors_long.weight"),
    "rope_factors_short.weight",
)
# One number under the names of the architectures' config.json; the first that is there counts.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "key_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_width": ("head_dim", "attention_head_dim", "kv_channels"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_width": ("moe_intermediate_size",),
}
_GGUF_NAMES: Mapping[str, str] = {
    "layers": "block_count",
    "hidden": "embedding_length",
    "heads": "attention.head_count",
    "key_heads": "attention.head_count_kv",
    "head_width": "attention.key_length",
    "intermediate": "feed_forward_length",
    "positions": "context_length",
    "experts": "expert_count",
    "expert_width": "expert_feed_forward_length",
}
# Their MLP has two matrices; that of all others is gated and has three.
UNGATED = {
    *("gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "codegen", "opt", "bloom", "mpt"),
    *(
        "falcon",
        "phi",
        "starcoder2",
        "persimmon",
        "xglm",
        "biogpt",
        "phi2",
        "starcoder",
        "nemotron",
    ),
}
# Where config.json is silent, these tie the head to the embedding.
_TIED = {
    *("gpt2", "gpt_bigcode", "gpt_neo", "opt", "bloom", "mpt", "falcon", "starcoder2", "cohere"),
    *("gemma", "gemma2", "gemma3", "gemma3_text"),
}


@dataclass(frozen=True)
class ModelHeader:
    """`numbers` are the sizes that the config gives, by the names of `_NAMES`. `shapes` has each
    tensor's shape, outputs first; it is empty if the weights are not there.
    """

    architecture: str
    numbers: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    known_from: KnownFrom
    tied: bool
    quantised: bool = False

    @property
    def parameters(self) -> int | None:
        """The exact number of parameters; None without weights, and for packed ones."""
        if not self.shapes or self.quantised:
            return None
        return sum(
            math.prod(shape)
            for name, shape in self.shapes.items()
            if not name.endswith(_NO_PARAMETERS)
            and not (len(shape) == 4 and shape[0] == 1)  # GPT-2's mask
            and not (self.tied and name.endswith(_HEADS))
        )

    @property
    def embeddings(self) -> int | None:
        """The number of tokens that have an embedding."""
        found = (shape[0] for name, shape in self.shapes.items() if name.endswith(_EMBEDDINGS))
        return max(found, default=self.numbers.get("vocabulary"))


def read_header(path: Path) -> ModelHeader:
    """The header of a model folder or a GGUF file. Raises ModelError if its files say nothing."""
    return _of_gguf(read_gguf(path)) if path.is_file() else _of_folder(path, stamps_of(path))


def stamps_of(path: Path) -> tuple[tuple[str, int, int], ...]:
    """The names, times and sizes of the files that a header comes from: a key for caches."""
    files = [path] if path.is_file() else [path / name for name in (CONFIG, INDEX, SINGLE)]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


@lru_cache(maxsize=64)
def _of_folder(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> ModelHeader:
    """`stamps` is only a key of the cache."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} has no {CONFIG}; is it a model folder?")
    config = read_json(folder / CONFIG)
    # A multimodal model's language part has a config of its own.
    parts = (config.get(name) for name in ("text_config", "llm_config"))
    text: dict[str, Any] = next((part for part in parts if isinstance(part, dict)), {})
    whole = {**config, **text}
    shapes = _shapes(folder)
    architecture = str(config.get("model_type") or "an unnamed architecture")
    numbers = {
        name: found for name, keys in _NAMES.items() if (found := _number(whole, keys)) is not None
    }
    if whole.get("multi_query") and not whole.get("new_decoder_architecture"):
        numbers["key_heads"] = 1
    tied = whole.get("tie_word_embeddings", None if shapes else architecture in _TIED)
    return ModelHeader(
        architecture,
        numbers,
        shapes,
        "the weights' headers" if shapes else "config.json",
        tied=bool(tied) or (bool(shapes) and not _has_head(shapes)),
        quantised="quantization_config" in config,
    )


def _of_gguf(header: GgufHeader) -> ModelHeader:
    numbers: dict[str, int] = {}
    for name, key in _GGUF_NAMES.items():
        found = header.setting(key)
        # Some models give a number for each layer.
        found = max(found, default=None) if isinstance(found, list) else found
        if isinstance(found, int) and found > 0:
            numbers[name] = found
    embedding = next((s for name, s in header.shapes.items() if name.endswith(_EMBEDDINGS)), None)
    if embedding is not None:
        numbers["vocabulary"] = embedding[0]
    return ModelHeader(
        header.architecture,
        numbers,
        header.shapes,
        "the GGUF header",
        tied=not _has_head(header.shapes),
    )


def _has_head(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return _GGUF_HEAD in shapes or any(name.endswith(_HEADS) for name in shapes)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape; empty if a file of the weights is missing. Raises ModelError for a
    damaged file.
    """
    if (folder / INDEX).is_file():
        named = read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict):
            raise ModelError(f"{folder / INDEX} has no `weight_map`; is the download complete?")
        files = [inside(folder, name, folder / INDEX) for name in dict.fromkeys(named.values())]
    else:
        files = [folder / SINGLE]
    if not all(file.is_file() for file in files):
        return {}
    return {name: shape for file in files for name, shape in tensor_shapes(file).items()}


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = next((config[name] for name in names if config.get(name) is not None), None)
    if isinstance(found, list):  # a number for each layer
        found = max((each for each in found if type(each) is int), default=None)
    return found if type(found) is int and found > 0 else None
