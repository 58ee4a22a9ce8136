"""The stage `lox`: the aligned model with its leading directions of alignment strengthened.

    W = W_aligned + factor * SVD_directions(V),   V = W_aligned - W_base          (arXiv 2506.15606)

It changes every matrix of the model, embeddings and head included, as the published code does, and
leaves vectors such as norms. V is computed in float64; the published code subtracts in bfloat16.
Files are read shard by shard, and memory is that of one shard.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import save_file

from ebbline.tasks.defences.computing.directions import extrapolated
from ebbline.tasks.errors import ModelError
from ebbline.tasks.models.weights import Checkpoint, opened, require_model_folder
from ebbline.tasks.specs import LoxSpec
from ebbline.tasks.stage import Context

COPIED = (".json", ".jinja", ".model", ".txt")  # settings and tokenizer


def run(spec: LoxSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    """Write the model to `out`/model, with the files and dtypes of the aligned one.

    Raises ModelError for a folder that is no model and for quantised weights, and ProjectionError
    as `extrapolated` does.
    """
    aligned, base = require_model_folder(inputs["model"]), Checkpoint(inputs["base"])
    folder = out / spec.MODEL
    folder.mkdir()
    for file in sorted(inputs["model"].iterdir()):
        if file.is_file() and PurePosixPath(file.name).suffix in COPIED:
            shutil.copyfile(file, folder / file.name)
    done, total = 0, len(aligned.names)
    for file in sorted(set(aligned.names.values())):
        tensors = {}
        with opened(file) as stored:
            metadata = stored.metadata()
            for name in stored.keys():  # noqa: SIM118  # not a dict
                tensors[name] = _moved(name, stored.get_tensor(name), base, spec, ctx.device)
                done += 1
                ctx.progress(done, total, name)
        save_file(tensors, folder / file.relative_to(inputs["model"]), metadata)


def _moved(
    name: str, aligned_OI: torch.Tensor, base: Checkpoint, spec: LoxSpec, device: str
) -> torch.Tensor:
    if aligned_OI.ndim < 2:
        return aligned_OI
    if aligned_OI.ndim > 2:
        raise ModelError(
            f"{name} has the shape {tuple(aligned_OI.shape)}; LoX is defined for matrices. Leave "
            "lox.factor out for a model with stacked experts"
        )
    if not aligned_OI.dtype.is_floating_point or aligned_OI.dtype.itemsize < 2:
        raise ModelError(
            f"{name} is stored as {aligned_OI.dtype}; LoX needs the weights from before "
            "quantisation. Give the unquantised folder that it was made from"
        )
    base_OI = base.read_as(name)
    return extrapolated(name, base_OI, aligned_OI, spec.directions, spec.factor, device)
