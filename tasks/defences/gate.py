"""The gate of Safe LoRA: the choice of the modules to project, by their cosines. Imports no torch.

A projection writes one row for each module to a file of its own. So thresholds are chosen, drawn
and swept without reading a weight. Both rules of the gate choose the modules of lowest cosine, so
the number of chosen modules identifies the mask for an adapter.
"""

import bisect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.specs import ApplySpec, ProjectSpec

File = Callable[[str], Path]
"""The path of a stage's file, by the file's name. From a remote store only this file is fetched."""
Reading = NDArray[np.float64]
"""The measured values of one adapter that the effect of the knobs depends on, ascending."""
NO_DIRECTION = "base and aligned weights are equal"
NO_UPDATE = "the update is zero"
NO_BASE = "the study names no base model"
"""The reasons for a module without a cosine."""


@dataclass(frozen=True)
class ModuleRow:
    """cos(C B A, B A) and ||C B A|| / ||B A|| of one module.

    A module without a cosine is never projected, and `reason` says why.
    """

    cosine: float | None
    norm_ratio: float | None
    reason: str = ""


@dataclass(frozen=True)
class ProjectedRows:
    """The rows of one adapter's modules, and the names of the modules chosen to be projected."""

    rows: Mapping[str, ModuleRow]
    chosen: frozenset[str]


def write_rows(rows: Mapping[str, ModuleRow], path: Path) -> None:
    path.write_text(
        json.dumps(
            {module: asdict(rows[module]) for module in sorted(rows)}, indent=1, allow_nan=False
        )
    )


def read_rows(path: Path) -> dict[str, ModuleRow]:
    """Module -> its row, from a file of `write_rows`."""
    return {module: ModuleRow(**row) for module, row in json.loads(path.read_text()).items()}


def projected_rows(measured_file: File, made_file: File) -> ProjectedRows:
    """The rows and the projected modules of one adapter, from the files of both stages."""
    names: list[str] = json.loads(made_file(ApplySpec.CHOSEN).read_text())
    return ProjectedRows(read_rows(measured_file(ProjectSpec.COSINES)), frozenset(names))


def cosines_by_module(rows: Mapping[str, ModuleRow]) -> dict[str, float]:
    """Module -> its cosine. Modules without a cosine are left out."""
    return {name: row.cosine for name, row in rows.items() if row.cosine is not None}


def projected_count(
    ascending: Sequence[float] | Reading, threshold: float | None, modules: int | None
) -> int | None:
    """The number of modules to project, by the ascending cosines of an adapter.

    A threshold projects the modules with cosine <= threshold, as the reference implementation does.
    `modules` projects exactly that many modules of lowest cosine; None when fewer have a cosine.
    Without a rule the number is 0.
    """
    if threshold is not None:
        return bisect.bisect_right(ascending, threshold)
    if modules is not None:
        return modules if modules <= len(ascending) else None
    return 0


def chosen(
    rows: Mapping[str, ModuleRow], threshold: float | None, modules: int | None
) -> frozenset[str]:
    """The modules that `projected_count` counts. Equal cosines are ordered by module name.

    Raises ProjectionError when fewer than `modules` modules have a cosine.
    """
    cosines = cosines_by_module(rows)
    lowest = sorted(cosines, key=lambda name: (cosines[name], name))
    count = projected_count([cosines[name] for name in lowest], threshold, modules)
    if count is None:
        raise ProjectionError(
            f"{modules} modules are to be projected, but the adapter has {len(cosines)} with a "
            "cosine"
        )
    return frozenset(lowest[:count])


def share_steps(rows: Mapping[str, ModuleRow]) -> list[tuple[float, float]]:
    """(cosine, share of all modules that this threshold projects) at each distinct cosine,
    ascending.
    """
    ascending = sorted(cosines_by_module(rows).values())
    steps = {value: projected_count(ascending, value, None) or 0 for value in ascending}
    return [(value, count / len(rows)) for value, count in steps.items()]


def chosen_by(rows: Mapping[str, ModuleRow], spec: ApplySpec) -> frozenset[str]:
    """The modules that a Spec projects. Raises ProjectionError as `chosen` does."""
    return chosen(rows, spec.threshold, spec.modules)
