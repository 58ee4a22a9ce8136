"""Weights by name, one tensor at a time, from Hugging Face folders and PEFT adapters (safetensors only)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tasks.errors import ModelError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


class Checkpoint:
    """The tensors of a model folder, single or sharded. Memory is what `read` returns and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def names(self) -> Mapping[str, Path]:
        """Tensor name -> the file that holds it."""
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            return {name: self.folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        single = self.folder / "model.safetensors"
        if not single.exists():
            raise ModelError(f"no model.safetensors and no index in {self.folder}; ebbline reads safetensors only")
        with opened(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)

    def read(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise ModelError(f"{self.folder} has no tensor {name!r}; base, aligned and adapter must be of one architecture")
        with opened(self.names[name]) as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter: `pairs` maps a module's name in the base model to its (A, B) tensor names."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    pairs: Mapping[str, tuple[str, str]]


def read_adapter(folder: Path) -> Adapter:
    """Raises ModelError for anything that is not one plain LoRA adapter, saying what it is."""
    if not (folder / ADAPTER_CONFIG).exists() or not (folder / ADAPTER_WEIGHTS).exists():
        raise ModelError(f"{folder} lacks {ADAPTER_CONFIG} or {ADAPTER_WEIGHTS}; it is not a PEFT adapter in safetensors")
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise ModelError(f"{folder} is a {kind} adapter; Safe LoRA is defined for plain LoRA updates B.A only")
    with opened(folder / ADAPTER_WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    pairs = {}
    for name in sorted(tensors):
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            partner = f"{stem}.lora_B.weight"
            if partner not in tensors:
                raise ModelError(f"{folder}: {name} has no {partner}; the adapter is damaged")
            pairs[stem.removeprefix("base_model.model.")] = (name, partner)
    if not pairs:
        raise ModelError(f"{folder} holds no LoRA matrices")
    return Adapter(folder, config, tensors, pairs)


def opened(path: Path) -> Any:
    """safe_open, with a truncated or foreign file named."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors ({error}); is the download complete?") from error
