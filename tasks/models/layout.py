"""How a training is laid out in a GPU's memory, and what a record keeps of where it ran."""

import json
import logging
import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ebbline.tasks.models import memory
from ebbline.tasks.specs import Spec, TrainSpec
from ebbline.tasks.stage import Context

_log = logging.getLogger(__name__)


def laid_out(
    spec: Spec,
    inputs: Mapping[str, Path],
    ctx: Context,
    memory_gb: float | None,
    beside: Sequence[TrainSpec] = (),
) -> tuple[Context, float | None]:
    """The Context with a training's layout in it, and the GB it is predicted to allocate on each
    GPU; None where that is not known.

    A training whose micro-batch nobody chose gets the largest that fits, if the GPU's memory is
    known; in a pack, with those `beside` it, the largest that each of them would get alone. Raises
    TrainingError, before anything is loaded, when not even one row fits.
    """
    path = inputs["model"] / "config.json" if "model" in inputs else None
    if (
        not isinstance(spec, TrainSpec) or path is None or not path.exists()
    ):  # a model that is none is an error when it is loaded
        return ctx, None
    config = json.loads(path.read_text())
    if not memory.predictable(config, spec):
        return ctx, None
    if ctx.device != "cpu" and memory_gb is None:
        import torch  # only a worker has torch

        memory_gb = torch.cuda.get_device_properties(ctx.device).total_memory / memory.GB
    if (
        ctx.micro_batch is None
        and memory_gb is not None
        and spec.global_batch % ctx.world_size == 0
    ):
        layouts = [
            memory.fitting(config, member, ctx.world_size, memory_gb) for member in (spec, *beside)
        ]
        smallest = min(layouts, key=lambda layout: layout.micro_batch)
        ctx = replace(
            ctx, micro_batch=smallest.micro_batch, zero_stage=smallest.zero_stage or ctx.zero_stage
        )
    share = max(1, spec.global_batch // ctx.world_size)
    stage = ctx.zero_stage if ctx.world_size > 1 else 0
    layout = memory.Layout(
        ctx.world_size, stage, min(ctx.micro_batch or share, share), ctx.recomputes
    )
    return ctx, memory.predict(memory.shape_of(config), spec, layout, beside).allocated_gb


def forget_peak(device: str) -> None:
    if device != "cpu":
        import torch  # only a worker has torch

        torch.cuda.reset_peak_memory_stats()


def environment(ctx: Context, predicted_gb: float | None) -> dict[str, object]:
    """What an attempt's record keeps of where it ran. `peak_memory_gb` is this process's on the
    host, since it began.
    """
    environment: dict[str, object] = {
        "device": ctx.device,
        "host": platform.node(),
        "python": platform.python_version(),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 3),
    }
    if predicted_gb is not None:
        environment["predicted_memory_gb"] = round(predicted_gb, 3)
    if ctx.device != "cpu":
        import torch  # only a worker has torch

        peak_gb = torch.cuda.max_memory_allocated() / memory.GB
        environment["peak_gpu_memory_gb"] = round(peak_gb, 3)
        warn_of_a_wrong_prediction(predicted_gb, peak_gb)
    return environment


def warn_of_a_wrong_prediction(predicted_gb: float | None, peak_gb: float) -> None:
    if predicted_gb is not None and abs(predicted_gb - peak_gb) > 0.2 * peak_gb:
        _log.warning(
            "this training was predicted to allocate %.1f GB on each GPU and allocated %.1f GB",
            predicted_gb,
            peak_gb,
        )
