"""Which modules take C B: the gate of Safe LoRA, over cosines that were measured once. Imports no
torch.

What a projection found is a row per module, in a file of its own, so that a threshold is chosen,
drawn or swept without reading a weight.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ebbline.tasks.errors import ProjectionError


@dataclass(frozen=True)
class ModuleRow:
    """cos(C B A, B A) and ||C B A|| / ||B A|| of one module; or the `reason` why it has no cosine
    and is never projected.
    """

    cosine: float | None
    norm_ratio: float | None
    reason: str = ""


@dataclass(frozen=True)
class ProjectedRows:
    """What was measured of one adapter, module by module, and which modules took their
    projection.
    """

    rows: Mapping[str, ModuleRow]
    taken: frozenset[str]


def write_rows(rows: Mapping[str, ModuleRow], path: Path) -> None:
    path.write_text(
        json.dumps(
            {module: asdict(rows[module]) for module in sorted(rows)}, indent=1, allow_nan=False
        )
    )


def read_rows(path: Path) -> dict[str, ModuleRow]:
    """Module -> its row, from a file that `write_rows` wrote."""
    return {module: ModuleRow(**row) for module, row in json.loads(path.read_text()).items()}


def chosen(
    rows: Mapping[str, ModuleRow], threshold: float | None, modules: int | None
) -> frozenset[str]:
    """The modules that take C B: cosine <= threshold (as the reference does), or exactly the n
    lowest, ties by name.

    With neither, none. Raises ProjectionError when fewer than n modules have a cosine.
    """
    known = {name: row.cosine for name, row in rows.items() if row.cosine is not None}
    if threshold is not None:
        return frozenset(name for name, cosine in known.items() if cosine <= threshold)
    if modules is not None:
        if modules > len(known):
            raise ProjectionError(
                f"{modules} modules are to be projected, but the adapter has {len(known)} "
                "that can be"
            )
        return frozenset(sorted(known, key=lambda name: (known[name], name))[:modules])
    return frozenset()
