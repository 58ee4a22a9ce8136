"""Weights by name, one tensor at a time, from Hugging Face folders (safetensors only).

A tensor that `read` returns is memory-mapped: its bytes come from the file as they are used, and
are freed with it.
"""

import difflib
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from ebbline.tasks.errors import ModelError
from ebbline.tasks.headers.files import (
    ADAPTER_CONFIG,
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    SINGLE,
    read_json,
)
from ebbline.tasks.models.adapter_names import canonical
from ebbline.tasks.paths import check_named_files, inside

# What quantisers store beside a weight, or in its place (bitsandbytes, GPTQ and AWQ, FP8,
# compressed-tensors).
_QUANTISED = (
    "weight.absmax",
    "SCB",
    "weight.SCB",
    "qweight",
    "weight_scale_inv",
    "weight_scale",
    "weight_packed",
)
# Models whose projections are Conv1D, stored as (d_in, d_out), and the names of these projections.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
_HEADS = ("lm_head", "embed_out")
_FEW = (
    8  # waits for the disk: a program's own pages make some; a large module, one for each 128 KiB
)
T = TypeVar("T")


class Checkpoint:
    """The tensors of a model folder, single or sharded. It holds no tensor in memory; only tensors
    that `read` returned take memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def names(self) -> Mapping[str, Path]:
        """Tensor name -> the file that holds it."""
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{index} has no `weight_map`; is the download complete?")
            found = {name: inside(self.folder, file, index) for name, file in weight_map.items()}
            if not single.exists():
                return found
            # transformers reads the single file, and vLLM the shards
            if others := sorted(file for file in {*found.values()} - {single} if file.exists()):
                raise ModelError(
                    f"{single} and {others[0]} are both there, and may be two models; remove the "
                    f"one that is not meant, and {index.name} if it is the second"
                )
        if not single.exists():
            raise ModelError(
                f"no model.safetensors and no index in {self.folder}; ebbline reads "
                "safetensors only"
            )
        with opened(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)

    def require_whole(self) -> None:
        """Raise ModelError unless every shard holds exactly the tensors that the index promises
        from it; reads no weight.
        """
        promised: dict[Path, set[str]] = {}
        for name, file in self.names.items():
            promised.setdefault(file, set()).add(name)
        for file, names in sorted(promised.items()):
            with opened(file) as tensors:
                held = set(tensors.keys())
            for name in sorted(names - held):
                raise ModelError(
                    f"{file} lacks {name!r}, which its index promises; is the download complete?"
                )
            for name in sorted(held - names):
                raise ModelError(
                    f"{file} holds {name!r}, which the index does not name for this file; are its "
                    "shards those of one model? Download or save the model again"
                )

    def require(self) -> None:
        """Raise ModelError if this is no model folder; reads no weight."""
        _ = self.names, self.config

    def dtype_of(self, name: str) -> str:
        """How a tensor is stored, in safetensors' words such as BF16 and I8; reads no weight."""
        with opened(self.names[name]) as tensors:
            found: str = tensors.get_slice(name).get_dtype()
        return found

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return read_json(self.folder / CONFIG) if (self.folder / CONFIG).exists() else {}

    def is_conv1d(self, module: str) -> bool:
        """Whether a module's weight is stored as (d_in, d_out). Raises ModelError if config.json
        does not show that.
        """
        if module.rpartition(".")[2] not in _CONV1D:
            return False
        types = _model_types(self.config)
        if not types:
            raise ModelError(
                f"{self.folder} has no config.json with a model_type, which says how "
                f"{module} is stored; add it"
            )
        return not types.isdisjoint(_CONV1D_MODELS)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name. Raises ModelError if it is missing or its file unreadable."""
        if name not in self.names:
            if "quantization_config" in self.config:
                raise ModelError(
                    self._quantised(
                        name,
                        str(
                            self.config["quantization_config"].get("quant_method", "unknown method")
                        ),
                    )
                )
            raise ModelError(f"{self.folder} has no tensor {name!r}; {self._hint(name)}")
        with opened(self.names[name]) as tensors:
            if name not in tensors.keys():  # noqa: SIM118  # not a dict
                raise ModelError(
                    f"{self.names[name]} lacks {name!r}, which its index promises; is the "
                    "download complete?"
                )
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    def read_as(self, name: str) -> torch.Tensor:
        """The tensor that a model calls `name`, under whatever name this folder stores it."""
        return self.read(self._stored(name))

    def weight(self, module: str) -> torch.Tensor:
        """A module's weight as it is stored. Raises ModelError if it is missing or quantised."""
        name = self._stored(f"{module}.weight")
        quantised = next(
            (
                suffix
                for suffix in _QUANTISED
                if f"{name.removesuffix('weight')}{suffix}" in self.names
            ),
            None,
        )
        if quantised is None:
            tensor = self.read(name)
            if tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 2:
                return tensor
            quantised = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(self._quantised(name, quantised))

    def _quantised(self, name: str, how: str) -> str:
        return (
            f"{self.folder} holds {name.removesuffix('.weight')} quantised ({how}); Safe "
            "LoRA needs the weights from before quantisation. Give the unquantised folder "
            "that it was made from"
        )

    def _stored(self, name: str) -> str:
        """The name under which this folder stores `name`: itself, with another prefix, or the one
        tensor of a tied embedding.
        """
        if name in self.names:
            return name
        same = [other for other in self.names if canonical(other) == canonical(name)]
        if len(same) == 1:
            return same[0]
        # The same module under another prefix: `transformer.h.0...` is stored as `h.0...` if only
        # the body was saved.
        other_prefix = [
            other
            for other in self.names
            if other.endswith(f".{name}") or name.endswith(f".{other}")
        ]
        if len(other_prefix) == 1:
            return other_prefix[0]
        module = name.removesuffix(".weight").rpartition(".")[2]
        others = _EMBEDDINGS if module in _HEADS else _HEADS if module in _EMBEDDINGS else ()
        tied = [
            other
            for other in self.names
            if other.removesuffix(".weight").rpartition(".")[2] in others
        ]
        # Most models tie head and embedding without saying so.
        return tied[0] if len(tied) == 1 and self.is_tied is not False else name

    @property
    def is_tied(self) -> bool | None:
        """Whether the config says that head and embedding are one tensor; None if it does not."""
        found: bool | None = self.config.get(
            "tie_word_embeddings", (self.config.get("text_config") or {}).get("tie_word_embeddings")
        )
        return found

    def require_one_head(self) -> None:
        """Raise ModelError if the folder of a model with a tied head holds another head too: some
        libraries would use it, and some would not.
        """
        heads, embeddings = (
            [name for name in self.names if name.removesuffix(".weight").endswith(modules)]
            for modules in (_HEADS, _EMBEDDINGS)
        )
        if len(heads) == len(embeddings) == 1 and not torch.equal(
            self.read(heads[0]), self.read(embeddings[0])
        ):
            raise ModelError(
                f"{self.names[heads[0]]}: {heads[0]} is not equal to {embeddings[0]}, and "
                f"`tie_word_embeddings` in {self.folder / 'config.json'} makes them one. Set it to "
                "false if the model has a head of its own, or remove that tensor"
            )

    def _hint(self, name: str) -> str:
        fused = {
            "q_proj": "qkv",
            "k_proj": "qkv",
            "v_proj": "qkv",
            "gate_proj": "gate_up",
            "up_proj": "gate_up",
            "experts": "experts",
        }
        parts = [part for key, part in fused.items() if key in name]
        near = [
            other for other in self.names if any(part in other for part in parts)
        ] or difflib.get_close_matches(name, self.names, 1)
        return (f"the nearest is {near[0]!r}. " if near else "") + (
            "Base, aligned and adapter must be of one architecture, and have their "
            "matrices fused or split alike"
        )


def _model_types(config: Mapping[str, Any]) -> set[str]:
    """The model types of a config and of its parts."""
    own = {config["model_type"]} if "model_type" in config else set()
    return own.union(*(_model_types(part) for part in config.values() if isinstance(part, dict)))


def read_ahead(
    reads: Sequence[Callable[[], tuple[torch.Tensor, ...]]],
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield what each of `reads` returns, in order. While the files come from the disk, a thread
    reads the bytes of the next one.

    Files that the page cache holds are not read ahead: the thread would compete for the
    processors, and its pages would count as memory of this process.
    """

    def read_and_map(read: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        tensors = read()
        for tensor in tensors:
            tensor.flatten().view(torch.uint8)[::4096].sum()  # one byte of each page maps the page
        return tensors

    with ThreadPoolExecutor(1, "read-ahead") as reader:
        pending, waits = None, None
        for index, read in enumerate(reads):
            tensors = read() if pending is None else pending.result()
            earlier, waits, pending = waits, _waits_for_disk(), None
            if earlier is not None and waits > earlier + _FEW and index + 1 < len(reads):
                pending = reader.submit(read_and_map, reads[index + 1])
            yield tensors
            del tensors  # so that at most two are in memory


def _waits_for_disk() -> int:
    """How often this process waited for a page that was not in the page cache."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def require_model_folder(folder: Path) -> Checkpoint:
    """The tensors of a folder that holds one model and nothing that changes it. Raises ModelError
    for any other folder; reads no weight but a tied head.
    """
    check_named_files(folder)
    model = Checkpoint(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"no .safetensors file in {folder}; ebbline reads no other weight format. "
            "Convert the model first."
        )
    if (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"{folder} holds {ADAPTER_CONFIG}, and transformers would apply that adapter to the "
            "model unasked. Move the adapter's files to a folder of their own; for an adapter "
            "alone, give its base as the model"
        )
    if model.config.get("transformers_weights"):
        raise ModelError(
            f"`transformers_weights` in {folder / CONFIG} names another file than "
            "model.safetensors. Remove the setting and rename that file"
        )
    model.require_whole()
    if (folder / GENERATION_CONFIG).exists():
        _require_end_tokens(folder / GENERATION_CONFIG)
    if model.is_tied:
        model.require_one_head()
    return model


def _require_end_tokens(path: Path) -> None:
    """Raises ModelError for decoding settings that name no end tokens, or are damaged:
    transformers would leave them out.
    """
    ends = read_json(path).get("eos_token_id")
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and type(token) is not int:
            raise ModelError(
                f"`eos_token_id` in {path} is {ends!r}; write a token's number, or a list of them"
            )


def is_embedding_or_head(module: str) -> bool:
    return module.rpartition(".")[2] in (*_EMBEDDINGS, *_HEADS)


def opened(path: Path) -> Any:
    """Open a safetensors file. Raises ModelError that names a truncated or foreign file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({error}); is the download complete?"
        ) from error
