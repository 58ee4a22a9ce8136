"""Read the models once, module by module, and keep on the disk what a defence and its controls need
of them. Two modules' weights are in memory at a time, as in a projection.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from ebbline.tasks.defences.computing.draws import normals
from ebbline.tasks.defences.computing.rotation import Rotation
from ebbline.tasks.defences.controls.random_subspace import rotated
from ebbline.tasks.defences.gate import ModuleRow
from ebbline.tasks.defences.methods.knobs import Values
from ebbline.tasks.defences.methods.method import Method, ReadModule, Tensors
from ebbline.tasks.defences.project import Progress, Weights, projections, row_of
from ebbline.tasks.defences.projectors import Projection, Update, Workspace
from ebbline.tasks.defences.subspace import Bases
from ebbline.tasks.models.adapter_file import Adapter
from ebbline.tasks.models.weights import opened


@dataclass(frozen=True)
class MeasuredProjection(Projection):
    """A projection with the tensors that a defence and its controls keep."""

    kept: Tensors = field(default_factory=dict)


class OnceBases(Bases):
    """Bases that keep the last module's: without a cache, its rotations would compute it again."""

    _last: tuple[str, torch.Tensor] | None = None

    def basis(
        self, module: str, base_OI: torch.Tensor, aligned_OI: torch.Tensor, models: tuple[str, str]
    ) -> torch.Tensor:
        if self._last is None or self._last[0] != module:
            self._last = module, super().basis(module, base_OI, aligned_OI, models)
        return self._last[1]


@dataclass(frozen=True, kw_only=True)
class DefenceWeights(Weights):
    """The two models, read for a defence at all its settings. `rotations` is the number of draws of
    Q C Q^T B (see computing.rotation), 0 for none.

    An adapter's projection does not depend on them, bit for bit: they are computed apart.
    """

    method: Method
    settings: Sequence[Values]
    rotations: int = 0

    def project(
        self,
        module: str,
        embedding: bool,
        tensors: tuple[torch.Tensor, ...],
        updates: Sequence[Update],
        space: Workspace,
    ) -> list[Projection]:
        found = super().project(module, embedding, tensors, updates, space)
        read = ReadModule(
            module, *self.as_matrices(module, embedding, tensors), device=str(space.device)
        )
        kept = [
            dict(self.method.measure(read, update, projection, self.settings))
            for update, projection in zip(updates, found, strict=True)
        ]
        for draw in range(self.rotations):
            rotations = [Rotation(update.lora_B_OR, _frames(module, draw)) for update in updates]
            turned = [
                Update(update.lora_A_RI, rotation.into(), update.adapter)
                for update, rotation in zip(updates, rotations, strict=True)
            ]
            outcomes = super().project(module, embedding, tensors, turned, space)
            for own, rotation, outcome in zip(kept, rotations, outcomes, strict=True):
                own[rotated(draw)] = rotation.back(outcome.projected_OR)
        return [
            MeasuredProjection(each.projected_OR, each.cosine, each.norm_ratio, each.reason, own)
            for each, own in zip(found, kept, strict=True)
        ]


def _frames(module: str, draw: int) -> Callable[[str, int, int], NDArray[np.float64]]:
    return lambda which, rows, columns: normals(
        f"random_subspace {which}", draw, module, rows, columns
    )


@dataclass(frozen=True)
class Spool:
    """What was kept: module -> its file. A module's name is data, so the files have numbers."""

    files: Mapping[str, Path]

    def kept(self, module: str, adapter: int) -> dict[str, torch.Tensor]:
        """The tensors of one module of one adapter, by their names."""
        if module not in self.files:
            return {}
        prefix = f"{adapter}."
        with opened(self.files[module]) as file:
            return {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118  # not a dict
                if name.startswith(prefix)
            }


def measure(
    adapters: Sequence[Adapter],
    source: DefenceWeights,
    folder: Path,
    progress: Progress,
    device: str = "cpu",
) -> tuple[list[dict[str, ModuleRow]], Spool]:
    """Each adapter's rows, and what was kept, in files of `folder`.

    Raises ProjectionError as `projections` does.
    """
    rows: list[dict[str, ModuleRow]] = [{} for _ in adapters]
    files: dict[str, Path] = {}
    for module, found in projections(adapters, source, progress, device):
        kept: dict[str, torch.Tensor] = {}
        for number, outcome in found.items():
            rows[number][module] = row_of(outcome)
            if isinstance(outcome, MeasuredProjection):
                # Copies: adapters may share what is kept, and a file holds no tensor twice
                kept |= {
                    f"{number}.{name}": tensor.clone(memory_format=torch.contiguous_format)
                    for name, tensor in outcome.kept.items()
                }
        if kept:
            files[module] = folder / f"{len(files)}.safetensors"
            save_file(kept, files[module])
    return rows, Spool(files)
