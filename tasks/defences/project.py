"""The two stages of Safe LoRA: `project` computes every module's C.B and cosine, once for each
adapter; `apply` writes the projected adapter.

`project` has no threshold. `apply` only copies tensors, and its output depends only on the set of
chosen modules. So two thresholds between the same neighbouring cosines give the same bytes, and
share every later evaluation.

Memory is that of the adapter and the largest module (its V and two weights), for models of any
size.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from ebbline.tasks.defences.gate import (
    NO_BASE,
    NO_DIRECTION,
    ModuleRow,
    chosen_by,
    read_rows,
    write_rows,
)
from ebbline.tasks.defences.projectors import (
    Projection,
    Update,
    Workspace,
    check_shapes,
    project,
    project_onto,
)
from ebbline.tasks.defences.subspace import Bases, read_basis, read_index
from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ebbline.tasks.models.adapter_file import Adapter, read_adapter, read_adapter_file
from ebbline.tasks.models.brought.fitted import fitted
from ebbline.tasks.models.brought.folder import TOKENIZER_FILES
from ebbline.tasks.models.weights import Checkpoint, opened, read_ahead
from ebbline.tasks.specs import ApplySpec, ProjectSpec
from ebbline.tasks.stage import Context

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Weights:
    """The two models that Safe LoRA compares. The projector is exact with `bases`, else
    approximate.
    """

    base: Checkpoint
    aligned: Checkpoint
    bases: Bases | None = None

    def read(self, module: str) -> tuple[torch.Tensor, ...]:
        """A module's base and aligned weights as stored, memory-mapped from their files."""
        return self.base.weight(module), self.aligned.weight(module)

    def as_matrices(
        self, module: str, embedding: bool, tensors: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A module's two weights as (O, I), from what `read` returned."""
        base_OI, aligned_OI = (
            tensor.T.contiguous() if embedding or model.is_conv1d(module) else tensor
            for model, tensor in zip((self.base, self.aligned), tensors, strict=True)
        )
        return base_OI, aligned_OI

    def project(
        self,
        module: str,
        embedding: bool,
        tensors: tuple[torch.Tensor, ...],
        updates: Sequence[Update],
        space: Workspace,
    ) -> list[Projection]:
        base_OI, aligned_OI = self.as_matrices(module, embedding, tensors)
        models = str(self.base.folder), str(self.aligned.folder)
        if self.bases is None:
            return project(module, base_OI, aligned_OI, updates, space, models)
        check_shapes(module, base_OI, aligned_OI, updates)
        return project_onto(
            module, self.bases.basis(module, base_OI, aligned_OI, models), updates, space
        )


@dataclass(frozen=True)
class Subspace:
    """The bases of a `subspace` stage, for the exact projector. The models are not needed."""

    files: Mapping[str, Path]

    def read(self, module: str) -> tuple[torch.Tensor, ...]:
        if module not in self.files:
            raise ProjectionError(
                f"the subspace has no basis for {module}; its modules are those that "
                "train.target_modules names"
            )
        return (read_basis(self.files[module]),)

    def project(
        self,
        module: str,
        embedding: bool,
        tensors: tuple[torch.Tensor, ...],
        updates: Sequence[Update],
        space: Workspace,
    ) -> list[Projection]:
        return project_onto(module, tensors[0], updates, space)


def projections(
    adapters: Sequence[Adapter], source: Weights | Subspace, progress: Progress, device: str = "cpu"
) -> Iterator[tuple[str, dict[int, Projection]]]:
    """Project several adapters; each weight is read once.

    Yields (module, {adapter's index: its projection}) for every module of any adapter. Raises
    ProjectionError when a module cannot be computed, and when the two models are equal.
    """
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    embeddings = {
        module for adapter in adapters for module, lora in adapter.modules.items() if lora.embedding
    }
    space, different = Workspace(device), 0
    reads = [partial(source.read, module) for module in modules]
    ahead = read_ahead(reads)
    for done, module in enumerate(modules, start=1):
        tensors = next(ahead)
        own = [number for number, adapter in enumerate(adapters) if module in adapter.modules]
        found = source.project(
            module,
            module in embeddings,
            tensors,
            [_update(adapters[number], module) for number in own],
            space,
        )
        del tensors
        different += any(outcome.reason != NO_DIRECTION for outcome in found)
        yield module, dict(zip(own, found, strict=True))
        progress(done, len(modules), module)
    if not different:
        raise ProjectionError(
            "base and aligned are equal in every module that the adapter has; give two "
            "models that differ by alignment"
        )


def _update(adapter: Adapter, module: str) -> Update:
    names = adapter.modules[module]
    return Update(adapter.tensors[names.lora_A], adapter.tensors[names.lora_B], str(adapter.folder))


def row_of(outcome: Projection) -> ModuleRow:
    return ModuleRow(outcome.cosine, outcome.norm_ratio, outcome.reason)


def as_saved(outcome: Projection, adapter: Adapter, module: str) -> torch.Tensor:
    """C.B in the dtype of the adapter's B.

    Raises ProjectionError when that dtype changes C.B by more than 1% of its norm.
    """
    b_OR = adapter.tensors[adapter.modules[module].lora_B]
    cb_OR = outcome.projected_OR.to(b_OR.dtype).contiguous()
    error = float(torch.linalg.vector_norm(cb_OR.float() - outcome.projected_OR))
    if not error <= 0.01 * float(torch.linalg.vector_norm(outcome.projected_OR)):
        raise ProjectionError(
            f"{module}: C B is beyond the range of {b_OR.dtype}; save {adapter.folder} in float32"
        )
    return cb_OR


def write_adapter(adapter: Adapter, projected: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write a PEFT adapter to `out`, with `projected` (module -> C.B) in place of B."""
    tensors = {
        **adapter.tensors,
        **{adapter.modules[module].lora_B: cb_OR for module, cb_OR in projected.items()},
    }
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(adapter.folder / ADAPTER_CONFIG, out / ADAPTER_CONFIG)


def run_project(spec: ProjectSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    source: Weights | Subspace
    if "base" not in inputs and "subspace" not in inputs:
        modules = read_adapter(inputs["adapter"]).modules
        save_file({}, out / spec.PROJECTED, metadata={"format": "pt"})
        write_rows({each: ModuleRow(None, None, NO_BASE) for each in modules}, out / spec.COSINES)
        return
    if spec.projector == "exact":  # its inputs hold no model that the names could be checked with
        adapter = read_adapter(inputs["adapter"])
        source = Subspace(read_index(inputs["subspace"]))
    else:
        source = Weights(Checkpoint(inputs["base"]), Checkpoint(inputs["aligned"]))
        adapter = fitted(read_adapter_file(inputs["adapter"]), source.aligned)
    projected, rows = {}, {}
    for module, found in projections([adapter], source, ctx.progress, ctx.device):
        projected[module] = as_saved(found[0], adapter, module)
        rows[module] = row_of(found[0])
    save_file(projected, out / spec.PROJECTED, metadata={"format": "pt"})
    write_rows(rows, out / spec.COSINES)


def run_apply(spec: ApplySpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    adapter, projection = read_adapter(inputs["adapter"]), inputs["projection"]
    chosen = chosen_by(read_rows(projection / ProjectSpec.COSINES), spec)
    unknown = sorted(chosen - adapter.modules.keys())
    if unknown:
        raise ProjectionError(
            f"the projection names {unknown[0]}, which the adapter in {adapter.folder} "
            "does not have"
        )
    with opened(projection / ProjectSpec.PROJECTED) as file:
        write_adapter(adapter, {module: file.get_tensor(module) for module in chosen}, out)
    for name in TOKENIZER_FILES:  # of an adapter that brought its own
        if (adapter.folder / name).is_file():
            shutil.copyfile(adapter.folder / name, out / name)
    (out / ApplySpec.CHOSEN).write_text(json.dumps(sorted(chosen)))
