"""The stages of a defence other than Safe LoRA in a study: `measure` once for each adapter, and
`defend` for each setting and each draw of a control.

The folder `adapter` of `defend` holds what `apply` writes: an adapter, and the names of its changed
modules. So equal adapters have equal bytes and are measured once, whatever the defence.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from ebbline.tasks.defences.computing.factors import Factors, effect
from ebbline.tasks.defences.computing.making import new_updates
from ebbline.tasks.defences.computing.measured import DefenceWeights, Spool, measure
from ebbline.tasks.defences.computing.writing import update_of, write_defended
from ebbline.tasks.defences.controls.registry import control_named
from ebbline.tasks.defences.gate import ModuleRow, read_rows, write_rows
from ebbline.tasks.defences.methods.method import PROJECTED, Measured, Method
from ebbline.tasks.defences.methods.registry import method_named
from ebbline.tasks.defences.subspace import Bases, read_basis, read_index
from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.models.adapter_file import Adapter, read_adapter, read_adapter_file
from ebbline.tasks.models.brought.fitted import fitted
from ebbline.tasks.models.brought.folder import TOKENIZER_FILES
from ebbline.tasks.models.weights import Checkpoint, opened
from ebbline.tasks.paths import inside
from ebbline.tasks.specs import DefendSpec, MeasureSpec, ProjectSpec
from ebbline.tasks.stage import Context


class StageBases(Bases):
    """The exact projector's bases from a `subspace` stage."""

    def __init__(self, folder: Path) -> None:
        self._files = read_index(folder)

    def basis(
        self, module: str, base_OI: torch.Tensor, aligned_OI: torch.Tensor, models: tuple[str, str]
    ) -> torch.Tensor:
        if module not in self._files:
            raise ProjectionError(
                f"the subspace has no basis for {module}; its modules are those that "
                "train.target_modules names"
            )
        return read_basis(self._files[module])


def run_measure(spec: MeasureSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    """Write the rows of an adapter's modules, and what the method keeps of each module."""
    method = method_named(spec.method)
    base, aligned = Checkpoint(inputs["base"]), Checkpoint(inputs["aligned"])
    adapter = fitted(read_adapter_file(inputs["adapter"]), aligned)
    bases = StageBases(inputs["subspace"]) if "subspace" in inputs else None
    source = DefenceWeights(
        base,
        aligned,
        bases,
        method=method,
        settings=[spec.knobs],
        rotations=spec.draws,
    )
    (rows,), spool = measure([adapter], source, out, ctx.progress, ctx.device)
    write_rows(rows, out / spec.COSINES)
    files = {module: path.name for module, path in sorted(spool.files.items())}
    (out / spec.KEPT).write_text(json.dumps(files, indent=1))


def run_defend(spec: DefendSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    """Write the adapter of one setting, and the effect on each module."""
    method = method_named(spec.method)
    control = None if spec.control is None else control_named(spec.control)
    adapter, folder = read_adapter(inputs["adapter"]), inputs["measurement"]
    safety = read_adapter(inputs["safety"]) if "safety" in inputs else None
    rows = read_rows(folder / MeasureSpec.COSINES)
    kept = _Kept(method, adapter, folder, safety)
    changed = new_updates(method, spec.knobs, rows, kept.measured, control, spec.draw or 0)
    fresh = out / spec.ADAPTER
    fresh.mkdir()
    stored = write_defended(adapter, changed, fresh)
    for name in TOKENIZER_FILES:  # of an adapter that brought its own
        if (adapter.folder / name).is_file():
            shutil.copyfile(adapter.folder / name, fresh / name)
    (fresh / spec.CHOSEN).write_text(json.dumps(sorted(stored)))
    (out / spec.EFFECTS).write_text(
        json.dumps(_effects(adapter, rows, stored), indent=1, allow_nan=False)
    )


class _Kept:
    """What a measurement kept of each module: of `project` C B, of `measure` what it lists."""

    def __init__(
        self, method: Method, adapter: Adapter, folder: Path, safety: Adapter | None
    ) -> None:
        self._adapter, self._safety = adapter, safety
        self._projected = folder / ProjectSpec.PROJECTED
        listed = folder / MeasureSpec.KEPT
        self._spool = Spool(
            {module: inside(folder, name, listed) for module, name in _listed(listed).items()}
            if listed.is_file()
            else {}
        )

    def measured(self, module: str) -> Measured:
        safety = (
            update_of(self._safety, module)
            if self._safety is not None and module in self._safety.modules
            else None
        )
        return Measured(module, update_of(self._adapter, module), self._kept(module), safety)

    def _kept(self, module: str) -> dict[str, torch.Tensor]:
        if not self._projected.is_file():
            return self._spool.kept(module, 0)
        with opened(self._projected) as file:
            return {PROJECTED: file.get_tensor(module)} if module in file.keys() else {}  # noqa: SIM118


def _listed(path: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(path.read_text())
    return found


def _effects(
    adapter: Adapter, rows: Mapping[str, ModuleRow], stored: Mapping[str, Factors]
) -> dict[str, object]:
    """Module -> its row, and the effect of its new update; none where it keeps its own."""
    return {
        module: {
            **asdict(row),
            "changed": module in stored,
            "effect": asdict(effect(update_of(adapter, module), stored[module]))
            if module in stored
            else None,
        }
        for module, row in sorted(rows.items())
    }
