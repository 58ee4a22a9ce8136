"""Weights by name, one tensor at a time, from Hugging Face folders and PEFT adapters (safetensors
only).

A tensor that `read` returns is memory-mapped: its bytes come from the file as they are used, and
are freed with it.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from ebbline.tasks.errors import ModelError
from ebbline.tasks.paths import inside

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

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
# Initialisations that move part of the base weight into A and B, so the update is not B A.
_MOVES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Settings under which a LoRA adapter's update is not B A of one weight matrix.
_OTHER_UPDATES = {
    "use_dora": "DoRA (it also learns a magnitude for each row)",
    "use_qalora": "QALoRA (its A acts on pooled inputs)",
    "use_bdlora": "BD-LoRA (its matrices are block-diagonal)",
    "kasa_config": "KaSA (it has singular values between B and A)",
    "monteclora_config": "MonteCLoRA (its update is a mixture of samples)",
    "layer_replication": "an adapter for replicated layers, which no checkpoint holds",
    "target_parameters": "an adapter of parameters (as for fused experts), which are no single "
    "weight matrix",
}
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
        index, single = (
            self.folder / "model.safetensors.index.json",
            self.folder / "model.safetensors",
        )
        if index.exists() and not single.exists():  # transformers, too, prefers the single file
            weight_map = _json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{index} has no `weight_map`; is the download complete?")
            return {name: inside(self.folder, file, index) for name, file in weight_map.items()}
        if not single.exists():
            raise ModelError(
                f"no model.safetensors and no index in {self.folder}; ebbline reads "
                "safetensors only"
            )
        with opened(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)

    def require(self) -> None:
        """Raise ModelError if this is no model folder; reads no weight."""
        _ = self.names, self.config

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return _json(self.folder / "config.json") if (self.folder / "config.json").exists() else {}

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
        return tied[0] if len(tied) == 1 and self._may_tie() else name

    def _may_tie(self) -> bool:
        """False only if the config says that head and embedding are two tensors. Most models tie
        them without saying so.
        """
        found = self.config.get(
            "tie_word_embeddings", (self.config.get("text_config") or {}).get("tie_word_embeddings")
        )
        return found is not False

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


@dataclass(frozen=True)
class LoraModule:
    """The names of one module's A and B in an adapter's file. An embedding's weight is stored as
    (d_in, d_out).
    """

    lora_A: str
    lora_B: str
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter: its `modules` by their names in the base model, and `carried`, the names
    of the tensors that are no LoRA.

    Safe LoRA is not defined for `carried` tensors (modules_to_save, biases, new tokens). A
    projected adapter keeps them unchanged.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    modules: Mapping[str, LoraModule]
    carried: tuple[str, ...]


def read_adapter(folder: Path) -> Adapter:
    """Read a folder that holds one plain LoRA adapter. Raises ModelError for anything else, and
    says what it is and what to do.
    """
    if not (folder / ADAPTER_CONFIG).exists() or not (folder / ADAPTER_WEIGHTS).exists():
        raise ModelError(_no_adapter(folder))
    config = _json(folder / ADAPTER_CONFIG)
    _require_plain_lora(folder, config)
    with opened(folder / ADAPTER_WEIGHTS) as file:
        # Not a dict
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    modules: dict[str, LoraModule] = {}
    for name in sorted(tensors):
        for first, second in (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora_embedding_A", ".lora_embedding_B"),
        ):
            if name.endswith(second) and name.removesuffix(second) + first not in tensors:
                raise ModelError(
                    f"{folder}: {name} has no {name.removesuffix(second)}{first}; the "
                    "adapter is damaged"
                )
            if not name.endswith(first):
                continue
            stem = name.removesuffix(first)
            if stem + second not in tensors:
                raise ModelError(f"{folder}: {name} has no {stem}{second}; the adapter is damaged")
            if tensors[name].ndim != 2 or tensors[stem + second].ndim != 2:
                raise ModelError(
                    f"{folder}: {stem} is a convolution's LoRA; Safe LoRA is defined for "
                    "weight matrices"
                )
            modules[stem.removeprefix("base_model.model.")] = LoraModule(
                name, stem + second, "embedding" in first
            )
    used = {name for module in modules.values() for name in (module.lora_A, module.lora_B)}
    carried = tuple(name for name in sorted(tensors) if name not in used)
    foreign = next(
        (
            name
            for name in carried
            if ".lora_A." in name or (".lora_B." in name and not name.endswith(".bias"))
        ),
        None,
    )
    if foreign is not None:
        raise ModelError(
            f"{folder}: {foreign!r} is not a name that PEFT saves; write the adapter with "
            "`save_pretrained`"
        )
    if not modules:
        raise ModelError(f"{folder} holds no LoRA matrices")
    return Adapter(folder, config, tensors, modules, carried)


def _require_plain_lora(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{folder} is an adapter of type {config.get('peft_type')}; Safe LoRA is "
            "defined for LoRA's update B A only"
        )
    for setting, what in _OTHER_UPDATES.items():
        if config.get(setting):
            raise ModelError(
                f"{folder} is {what}; Safe LoRA is defined for LoRA's update B A only "
                f"(`{setting}` in {ADAPTER_CONFIG})"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_MOVES_BASE):
        raise ModelError(
            f"{folder} was started with init_lora_weights={start!r}, which moves part of "
            "the base weights into A and B, so its"
            " update is not B A. "
            + (
                "Retrain it from a plain LoRA start"
                if start.startswith("loftq")
                else (
                    "Save it with PEFT's `path_initial_model_for_weight_conversion`, which "
                    "makes it a plain LoRA"
                )
            )
        )


def _model_types(config: Mapping[str, Any]) -> set[str]:
    """The model types of a config and of its parts."""
    own = {config["model_type"]} if "model_type" in config else set()
    return own.union(*(_model_types(part) for part in config.values() if isinstance(part, dict)))


def adapters_in(folder: Path) -> list[str]:
    """The names of the folders in `folder` that hold adapters. PEFT saves every adapter there whose
    name is not `default`.
    """
    return sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))


def _no_adapter(folder: Path) -> str:
    if not folder.is_dir():
        return (
            f"{folder} is a file; give the folder that holds it"
            if folder.exists()
            else f"there is no folder {folder}"
        )
    if names := adapters_in(folder):
        return (
            f"{folder} holds no adapter itself, but its folders do: "
            f"{', '.join(names)}. Name one, as {folder / names[0]}"
        )
    if (folder / "adapter_model.bin").exists():
        return (
            f"{folder} holds a pickled adapter_model.bin; ebbline reads safetensors only. Load "
            "it with PEFT and save it again"
        )
    return (
        f"{folder} lacks {ADAPTER_CONFIG} or {ADAPTER_WEIGHTS}; it is not a PEFT adapter in "
        "safetensors"
    )


def read_ahead(
    reads: Sequence[Callable[[], tuple[torch.Tensor, ...]]],
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield what each of `reads` returns, in order. Meanwhile a thread reads the bytes of the next
    one from the disk.
    """

    def read_and_map(read: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        tensors = read()
        for tensor in tensors:
            tensor.flatten().view(torch.uint8)[::4096].sum()  # one byte of each page maps the page
        return tensors

    with ThreadPoolExecutor(1, "read-ahead") as reader:
        pending = reader.submit(read_and_map, reads[0]) if reads else None
        for index in range(len(reads)):
            assert pending is not None
            tensors = pending.result()
            pending = (
                reader.submit(read_and_map, reads[index + 1]) if index + 1 < len(reads) else None
            )
            yield tensors
            del tensors  # so that at most two are in memory


def opened(path: Path) -> Any:
    """Open a safetensors file. Raises ModelError that names a truncated or foreign file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({error}); is the download complete?"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); is the download complete?") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object; is it the right file?")
    return found
