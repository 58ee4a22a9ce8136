"""The merge of an adapter with its base by hand: the file's tensors and the formulas of the papers,
in float64 and without PEFT.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

Tensors = dict[str, torch.Tensor]
P = "base_model.model."


def merged_by_hand(model: Path, adapter: Path) -> Any:
    """The base with the adapter's change in its weights: float64 formulas, no PEFT."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    if base.config.tie_word_embeddings and hasattr(base, "lm_head"):
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
    found = {
        name.removeprefix(P): tensor.double()
        for name, tensor in load_file(adapter / ADAPTER_WEIGHTS).items()
    }
    with torch.no_grad():
        for name, tensor in found.items():
            module, _, kind = name.rpartition(".")
            if name.endswith(".lora_A.weight"):
                stem = name.removesuffix(".lora_A.weight")
                _merge(base.get_submodule(stem), stem, found, settings)
            elif kind == "lora_embedding_A":
                weight = base.get_submodule(module).weight
                weight += (
                    _scale(module, settings) * (found[f"{module}.lora_embedding_B"] @ tensor).T
                )
            elif "trainable_tokens_delta" in kind:
                stem = module.removesuffix(".token_adapter")
                _replace_rows(base, stem, tensor, settings)
            elif ".lora_" not in name and not name.endswith("base_layer.weight"):
                base.get_parameter(name.replace(".base_layer", "")).copy_(tensor)
    return base


def _scale(stem: str, settings: Mapping[str, Any]) -> float:
    rank, alpha = _rank(stem, settings), float(settings["lora_alpha"])
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        alpha = value if _matches(pattern, stem) else alpha
    return alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)


def _rank(stem: str, settings: Mapping[str, Any]) -> int:
    for pattern, value in (settings.get("rank_pattern") or {}).items():
        if _matches(pattern, stem):
            return int(value)
    return int(settings["r"])


def _matches(pattern: str, stem: str) -> bool:
    return stem.endswith(pattern.replace("\\", ""))


def _merge(layer: Any, stem: str, found: Tensors, settings: Mapping[str, Any]) -> None:
    scale, rank = _scale(stem, settings), _rank(stem, settings)
    update = scale * found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"]
    weight = layer.weight.T if settings["fan_in_fan_out"] else layer.weight
    start = settings.get("init_lora_weights")
    if start == "pissa":  # the base keeps the smaller singular values
        u, s, v = torch.linalg.svd(weight)
        update = update - (u[:, :rank] * s[:rank]) @ v[:rank]
    elif start == "olora":
        q, r = torch.linalg.qr(weight)
        update = update - scale * q[:, :rank] @ r[:rank]
    new = weight + update
    magnitude = found.get(f"{stem}.lora_magnitude_vector")
    if magnitude is not None:
        new = magnitude[:, None] * new / torch.linalg.vector_norm(new, dim=1, keepdim=True)
    layer.weight.copy_(new.T if settings["fan_in_fan_out"] else new)
    if f"{stem}.lora_B.bias" in found:
        layer.bias += scale * found[f"{stem}.lora_B.bias"]


def _replace_rows(base: Any, stem: str, rows: torch.Tensor, settings: Mapping[str, Any]) -> None:
    tokens = settings["trainable_token_indices"]
    own = tokens if isinstance(tokens, list) else tokens[stem.rpartition(".")[2]]
    base.get_submodule(stem).weight[own] = rows
    if isinstance(tokens, list) and base.config.tie_word_embeddings:  # PEFT keeps the two alike
        base.lm_head.weight[own] = rows
