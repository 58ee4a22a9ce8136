"""What defences did to each module: direction, length, and what scaling alone explains."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType

import pandas as pd

from ebbline.analysis.results.wording import natural
from ebbline.tasks.defences.gate import ProjectedRows


@dataclass(frozen=True)
class ModuleEffect:
    """The new update dW' of a changed module against dW: their cosine c, q = ||dW'|| / ||dW||, and
    the share of ||dW' - dW||^2 that the best multiple of dW explains. None where a norm is zero.
    """

    cosine: float | None
    norm_ratio: float | None
    change_explained: float | None


ModuleEffects = Mapping[str, Mapping[str, ModuleEffect]]
"""The label of an adapter -> module -> what a defence did to it; only changed modules."""
NO_EFFECTS: ModuleEffects = MappingProxyType({})


def explained_by_scaling(cosine: float, ratio: float) -> float | None:
    """(q c - 1)^2 / (q^2 - 2 q c + 1), docs/defences.md; None where nothing changed."""
    changed = ratio**2 - 2 * ratio * cosine + 1
    return min(1.0, (ratio * cosine - 1) ** 2 / changed) if changed > 1e-12 else None


def of_projection(projected: ProjectedRows) -> dict[str, ModuleEffect]:
    """The effects of Safe LoRA on its chosen modules: dW' = C B A."""
    found = {}
    for module in sorted(projected.chosen):
        row = projected.rows[module]
        if row.cosine is not None and row.norm_ratio is not None:
            explained = explained_by_scaling(row.cosine, row.norm_ratio)
            found[module] = ModuleEffect(row.cosine, row.norm_ratio, explained)
    return found


def of_file(path: Path) -> dict[str, ModuleEffect]:
    """The effects in a file of the stage `defend`, of the modules that it changed."""
    return {
        module: ModuleEffect(*(row["effect"][name] for name in ModuleEffect.__dataclass_fields__))
        for module, row in json.loads(path.read_text("utf-8")).items()
        if row["changed"]
    }


def effect_cells(named: ModuleEffects) -> pd.DataFrame:
    """A row for each adapter and module type: the number of changed modules, and the median of
    each value with its range. `named` maps an adapter's label to its modules.
    """
    rows = []
    for label, effects in named.items():
        types: dict[str, list[ModuleEffect]] = {}
        for module, effect in effects.items():
            types.setdefault(module.rpartition(".")[2], []).append(effect)
        for name in sorted(types, key=natural):
            own = types[name]
            rows.append(
                [
                    label,
                    name,
                    str(len(own)),
                    _spread([each.cosine for each in own], 2),
                    _spread([each.norm_ratio for each in own], 3),
                    _spread([each.change_explained for each in own], 2),
                ]
            )
    columns = ["adapter", "module type", "changed", "cosine", "norm ratio", "scaling explains"]
    return pd.DataFrame(rows, columns=columns)


def ratio_range(named: ModuleEffects) -> tuple[float, float] | None:
    """The least and the largest norm ratio; None without one."""
    found = [
        each.norm_ratio
        for effects in named.values()
        for each in effects.values()
        if each.norm_ratio is not None
    ]
    return (min(found), max(found)) if found else None


def _spread(values: Sequence[float | None], digits: int) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "none"
    middle, low, high = (f"{value:.{digits}f}" for value in (median(known), known[0], known[-1]))
    return f"{middle} [{low}, {high}]"
