"""The exact projector's bases: for each module, orthonormal columns that hold a given share of V's
energy.

Bases depend only on the two models' weights and cost far more than a projection, so they are
computed once. A study has a stage for them. A projection outside a study caches them in a folder.
Each basis is written as soon as it is computed, so an interrupted computation continues.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ebbline.tasks.defences.projectors import alignment_basis
from ebbline.tasks.errors import ModelError, ProjectionError
from ebbline.tasks.files import write_whole
from ebbline.tasks.models.weights import Checkpoint, opened
from ebbline.tasks.paths import inside
from ebbline.tasks.specs import SubspaceSpec
from ebbline.tasks.stage import Context

BASIS = "basis"
DIGEST = "sha256"  # the metadata field with the digest of the basis; earlier versions wrote none
VERSION = 1  # part of the name of a cached basis; raise it when the computation changes


class Bases:
    """Bases at one energy. A `folder` caches them by the content of both weights, so a cached basis
    is never stale.
    """

    def __init__(self, energy: float, folder: Path | None, device: str = "cpu") -> None:
        self.energy, self.folder, self.device = energy, folder, device

    def basis(
        self, module: str, base_OI: torch.Tensor, aligned_OI: torch.Tensor, models: tuple[str, str]
    ) -> torch.Tensor:
        """The (O, K) basis of a module."""
        if self.folder is None:
            return alignment_basis(module, base_OI, aligned_OI, self.energy, self.device, models)
        return read_basis(self.file(self.folder, module, base_OI, aligned_OI, models))

    def file(
        self,
        folder: Path,
        module: str,
        base_OI: torch.Tensor,
        aligned_OI: torch.Tensor,
        models: tuple[str, str],
    ) -> Path:
        """The file in `folder` with this module's basis. A missing file is computed first."""
        path = folder / f"{self._name(base_OI, aligned_OI)}.safetensors"
        if not path.exists():
            basis_OK = alignment_basis(
                module, base_OI, aligned_OI, self.energy, self.device, models
            )
            metadata = {DIGEST: _bytes_digest(basis_OK)}
            write_whole(path, lambda fresh: save_file({BASIS: basis_OK}, fresh, metadata))
        return path

    def _name(self, base_OI: torch.Tensor, aligned_OI: torch.Tensor) -> str:
        content = hashlib.sha256(f"{VERSION} {self.energy!r}".encode())
        for weight in (base_OI, aligned_OI):
            content.update(f"{weight.dtype} {tuple(weight.shape)}".encode())
            content.update(weight.contiguous().view(torch.uint8).numpy().data)
        return content.hexdigest()


def read_basis(path: Path) -> torch.Tensor:
    """The (O, K) basis in a file. Raises ProjectionError for a damaged file."""
    try:
        with opened(path) as file:
            basis_OK: torch.Tensor = file.get_tensor(BASIS)
            recorded = (file.metadata() or {}).get(DIGEST)
        whole = recorded is None or recorded == _bytes_digest(basis_OK)
    except (ModelError, SafetensorError):
        whole = False
    if not whole:
        raise ProjectionError(
            f"{path} is a damaged basis; delete it, and the next run recomputes it"
        )
    return basis_OK


def _bytes_digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def run(spec: SubspaceSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    """Write every target module's basis to a file in `out`, and an index of module -> file."""
    base, aligned = Checkpoint(inputs["base"]), Checkpoint(inputs["aligned"])
    suffixes = tuple(f".{target}.weight" for target in spec.target_modules)
    modules = sorted(
        name.removesuffix(".weight") for name in aligned.names if f".{name}".endswith(suffixes)
    )
    if not modules:
        raise ProjectionError(
            f"no module of {inputs['aligned']} is named {' or '.join(spec.target_modules)}"
        )
    scratch = ctx.scratch / "bases"
    bases = Bases(spec.energy, scratch, ctx.device)
    files = {}
    for done, module in enumerate(modules, start=1):
        base_OI, aligned_OI = (
            model.weight(module).T if model.is_conv1d(module) else model.weight(module)
            for model in (base, aligned)
        )
        files[module] = bases.file(
            scratch, module, base_OI, aligned_OI, (str(base.folder), str(aligned.folder))
        )
        ctx.progress(done, len(modules), module)
    for file in set(files.values()):  # modules with equal weights share a file
        file.replace(out / file.name)
    (out / spec.INDEX).write_text(
        json.dumps({module: file.name for module, file in files.items()}, indent=1)
    )


def read_index(folder: Path) -> dict[str, Path]:
    """Module -> the file of its basis, from a subspace's folder."""
    path = folder / SubspaceSpec.INDEX
    index: dict[str, str] = json.loads(path.read_text())
    return {module: inside(folder, name, path) for module, name in index.items()}
