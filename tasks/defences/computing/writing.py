"""The files of a defended adapter, which PEFT loads as they are.

Where only B changes, the config is copied byte for byte. Where a rank or a scale changes, the
config states every module's rank and alpha: by `r` and `lora_alpha` if all are equal, else by
`rank_pattern` and `alpha_pattern` with one exact name each.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ebbline.tasks.defences.computing.factors import Factors
from ebbline.tasks.defences.project import write_adapter
from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.headers.files import ADAPTER_CONFIG
from ebbline.tasks.models.adapter_file import Adapter

MOST_LOST = 0.01  # of a tensor's norm, when it is stored in the adapter's dtype


def update_of(adapter: Adapter, module: str) -> Factors:
    """A module's update, with the scale that PEFT gives it."""
    names = adapter.modules[module]
    a_RI, b_OR = adapter.tensors[names.lora_A], adapter.tensors[names.lora_B]
    alpha = float(
        _pattern(adapter.config.get("alpha_pattern"), module, adapter.config["lora_alpha"])
    )
    return Factors(a_RI, b_OR, alpha / _divisor(adapter, a_RI.shape[0]))


def _divisor(adapter: Adapter, rank: int) -> float:
    return math.sqrt(rank) if adapter.config.get("use_rslora") else float(rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the pattern that PEFT takes for a module."""
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key  # only adapters with patterns need peft

    return patterns.get(get_pattern_key(patterns, module), default)


def write_defended(
    adapter: Adapter, changed: Mapping[str, Factors], out: Path
) -> dict[str, Factors]:
    """Write an adapter with new updates to `out`, in the dtypes of its A and B. Returns the updates
    as they are stored.

    Raises ProjectionError when a dtype changes a tensor, or the columns that are new in it, by more
    than MOST_LOST of its norm.
    """
    layout = {module: update_of(adapter, module) for module in adapter.modules}
    b, a = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    regrown = False
    for module, new in changed.items():
        old = layout[module]
        b[module] = _stored(new.lora_B_OR, old.lora_B_OR.dtype, module, adapter, old.rank)
        a_RI = new.lora_A_RI
        if a_RI is not old.lora_A_RI:
            a_RI = a[module] = _stored(a_RI, old.lora_A_RI.dtype, module, adapter)
        regrown |= new.rank != old.rank or new.scale != old.scale
        layout[module] = Factors(a_RI, b[module], new.scale)
    write_adapter(replace(adapter, tensors=_with_a(adapter, a)), b, out)
    if regrown:
        config = {**adapter.config, **_ranks(adapter, layout)}
        (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))
    return {module: layout[module] for module in changed}


def _with_a(adapter: Adapter, a: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {adapter.modules[module].lora_A: tensor for module, tensor in a.items()}
    return {**adapter.tensors, **names}


def _stored(
    tensor: torch.Tensor, dtype: torch.dtype, module: str, adapter: Adapter, columns: int = 0
) -> torch.Tensor:
    """The tensor in a dtype. Its columns from `columns` on are checked apart: beside the others
    they may be small enough to vanish unseen.
    """
    stored = tensor.to(dtype).contiguous()
    for part in (slice(None), slice(columns, None)):
        whole, kept = tensor[..., part].double(), stored[..., part].double()
        lost = float(torch.linalg.vector_norm(kept - whole))
        if not lost <= MOST_LOST * float(torch.linalg.vector_norm(whole)):
            raise ProjectionError(
                f"{module}: the new update is beyond the range of {dtype}; save {adapter.folder} "
                "in float32"
            )
    return stored


def _ranks(adapter: Adapter, layout: Mapping[str, Factors]) -> dict[str, Any]:
    """The settings that give every module its rank and scale."""
    ranks = {module: each.rank for module, each in layout.items()}
    alphas = {
        module: _plain(each.scale * _divisor(adapter, each.rank)) for module, each in layout.items()
    }
    if len(set(ranks.values())) == 1 and len(set(alphas.values())) == 1:
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        return {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}
    default, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    # A name with ^ matches one module only; PEFT matches the ends of names otherwise.
    return {
        "rank_pattern": {_exact(name): each for name, each in ranks.items() if each != default},
        "alpha_pattern": {_exact(name): each for name, each in alphas.items() if each != alpha},
    }


def _exact(module: str) -> str:
    return f"^{re.escape(module)}"


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number
