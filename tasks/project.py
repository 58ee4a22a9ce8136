"""The two stages of Safe LoRA: `project` (every module's C.B and cosine, once per adapter) and `apply` (a threshold).

`project` takes no threshold. A threshold only chooses which modules take C.B, so `apply` copies tensors and its output
depends on the set of chosen modules alone: two thresholds between the same neighbouring cosines give the same bytes, and
so share every evaluation behind them.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from tasks.errors import ProjectionError
from tasks.safelora import chosen, project
from tasks.specs import ApplySpec, ProjectSpec
from tasks.stage import Context
from tasks.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, Checkpoint, opened, read_adapter


def run_project(spec: ProjectSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    adapter = read_adapter(inputs["adapter"])
    base, aligned = Checkpoint(inputs["base"]), Checkpoint(inputs["aligned"])
    projected, modules = {}, {}
    for done, (module, (name_a, name_b)) in enumerate(adapter.pairs.items(), start=1):
        weight = f"{module}.weight"
        found = project(
            module,
            base.read(weight),
            aligned.read(weight),
            adapter.tensors[name_a],
            adapter.tensors[name_b],
            spec.projector,
            spec.energy,
        )
        projected[name_b] = found.projected_OR.to(adapter.tensors[name_b].dtype).contiguous()
        modules[module] = {"cosine": found.cosine, "norm_ratio": found.norm_ratio}
        ctx.progress(done, len(adapter.pairs), module)
    save_file(projected, out / spec.PROJECTED, metadata={"format": "pt"})
    (out / spec.COSINES).write_text(json.dumps(modules, indent=1, sort_keys=True, allow_nan=False))


def run_apply(spec: ApplySpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    adapter = read_adapter(inputs["adapter"])
    cosines = read_cosines(inputs["projection"])
    take = chosen(cosines, spec.threshold, spec.modules)
    write_projected(adapter, inputs["projection"], take, out)


def read_cosines(projection: Path) -> dict[str, float | None]:
    """Module -> cos(C B A, B A), from a projection's folder."""
    return {module: row["cosine"] for module, row in json.loads((projection / ProjectSpec.COSINES).read_text()).items()}


def write_projected(adapter: Adapter, projection: Path, take: frozenset[str], out: Path) -> None:
    """An ordinary PEFT adapter in `out`, with C.B in place of B for the modules in `take`."""
    tensors = dict(adapter.tensors)
    with opened(projection / ProjectSpec.PROJECTED) as file:
        for module in take:
            if module not in adapter.pairs:
                raise ProjectionError(f"the projection names {module}, which the adapter in {adapter.folder} does not have")
            name_b = adapter.pairs[module][1]
            tensors[name_b] = file.get_tensor(name_b)
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(adapter.folder / ADAPTER_CONFIG, out / ADAPTER_CONFIG)
    (out / ApplySpec.CHOSEN).write_text(json.dumps(sorted(take)))
