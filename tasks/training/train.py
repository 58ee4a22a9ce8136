"""Fine-tuning: the loop is load, while, step, save.

The loss of a step is the mean over the assistant tokens of the global batch. So neither the
micro-batch nor the number of processes changes the result. A penalty is added to it, once a step;
the curve has the loss without it. The rows and the dropout of a step
depend only on the seed and the step's number. So an interrupted training that continues from its
checkpoint gives the result of an uninterrupted one.

Output: adapter/ (PEFT safetensors) or model/ (a Hugging Face folder), both float32 whatever `dtype`
is, and curve.csv (step, loss, learning_rate, tokens). A result in bfloat16 would round away most of
the difference from the model before the training, which Safe LoRA subtracts.
"""

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from ebbline.tasks.chat.template import save_tokenizer
from ebbline.tasks.chat.training_rows import encode
from ebbline.tasks.data.batches import Row
from ebbline.tasks.data.conversations import read_conversations
from ebbline.tasks.errors import DataError, TrainingError
from ebbline.tasks.models.memory import peak_memory_gb
from ebbline.tasks.progress import TrainedStep
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Context
from ebbline.tasks.training.engines import Curve, Engine, SingleDevice
from ebbline.tasks.training.gang_engine import DeepSpeedGang
from ebbline.tasks.training.penalties import contrast_in


def run(spec: TrainSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    engine: Engine = (
        DeepSpeedGang(spec, inputs["model"], ctx, contrast_in(inputs))
        if ctx.world_size > 1
        else SingleDevice(spec, inputs["model"], ctx, contrast_in(inputs))
    )
    try:
        rows = read_rows(inputs["data"], engine.tokenizer, spec)
        steps = spec.length(len(rows))
        curve = engine.resume()
        ctx.resumed(steps_of(curve, steps))
        for step in range(len(curve), steps):
            began = time.monotonic()
            torch.manual_seed(spec.seed * 1_000_003 + step)
            rate = learning_rate(step, steps, spec)
            batch = [
                rows[index]
                for index in batch_indices(step, len(rows), spec.global_batch, spec.seed)
            ]
            done = engine.step(batch, rate)
            check_loss(done.loss, step, steps, spec)
            curve.append((step + 1, done.loss, rate, done.tokens))
            ctx.step_done(
                TrainedStep(
                    *(step + 1, steps, done.loss, rate, done.tokens),
                    seconds=time.monotonic() - began,
                    gradient_norm=known(done.gradient_norm),
                    micro_batch=engine.micro_batch,
                    peak_memory_gb=peak_memory_gb(ctx.device),
                    fastest_s=done.fastest_s,
                    slowest_s=done.slowest_s,
                )
            )
            engine.checkpoint(curve)
        _save(engine, spec, out, ctx)
        if ctx.rank == 0:
            write_curve(curve, spec, out)
    finally:
        engine.close()


def read_rows(data: Path, tokenizer: Any, spec: TrainSpec) -> list[Row]:
    """The tokenised conversations. Raises DataError, which names file and row."""
    rows = []
    for number, turns in enumerate(read_conversations(data), start=1):
        try:
            rows.append(Row(*encode(turns, tokenizer, spec.max_tokens)))
        except DataError as error:
            raise DataError(f"{data}, row {number}: {error}") from None
    return rows


def steps_of(curve: Curve, steps: int) -> list[TrainedStep]:
    """The steps that a checkpoint has kept. `steps` is the number of all."""
    return [TrainedStep(step, steps, loss, rate, tokens) for step, loss, rate, tokens in curve]


def known(length: float) -> float | None:
    """A gradient's length; None if it is not finite, as JSON has no word for that."""
    return length if math.isfinite(length) else None


def check_loss(loss: float, step: int, steps: int, spec: TrainSpec) -> None:
    """Raise TrainingError when the loss of a step is not finite. `step` counts from 0."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} at step {step + 1} of {steps} (learning_rate "
            f"{spec.learning_rate}); nothing was saved."
            " Lower train.learning_rate, or look at the data of that step"
        )


def write_curve(curve: Curve, spec: TrainSpec, out: Path) -> None:
    with (out / spec.CURVE).open("w", newline="") as handle:
        csv.writer(handle).writerows([("step", "loss", "learning_rate", "tokens"), *curve])


def learning_rate(step: int, steps: int, spec: TrainSpec) -> float:
    """Linear warm-up over `warmup_share` of the steps, then (1 + cos) / 2 down to zero. `step`
    counts from 0.
    """
    warmup = math.ceil(spec.warmup_share * steps)
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    return (
        spec.learning_rate
        * 0.5
        * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    )


def batch_indices(step: int, rows: int, batch: int, seed: int) -> list[int]:
    """The row indices of one global batch.

    Each epoch has its own permutation of the rows, and a batch may cross the end of an epoch.
    """
    positions = range(step * batch, (step + 1) * batch)
    orders = {
        epoch: _permutation(rows, seed, epoch)
        for epoch in {position // rows for position in positions}
    }
    return [orders[position // rows][position % rows] for position in positions]


def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    return order


def _save(engine: Engine, spec: TrainSpec, out: Path, ctx: Context) -> None:
    with engine.gathered() as model:
        if ctx.rank != 0:
            return
        if spec.method == "full":
            check_weights(dict(model.named_parameters()))
            model.save_pretrained(out / spec.MODEL, safe_serialization=True)
            save_tokenizer(engine.tokenizer, out / spec.MODEL)
            return
        save_adapter(model, "default", spec, out)


def save_adapter(model: Any, name: str, spec: TrainSpec, out: Path) -> None:
    """Write one adapter of a PEFT model to out/adapter. Raises TrainingError for a useless one."""
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    check_adapter(tensors)
    folder = out / spec.ADAPTER
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[name]
    config.inference_mode = True
    # It would be a path on this machine. The record identifies the base by its content.
    config.base_model_name_or_path = None
    # PEFT keeps a set, whose order differs between processes.
    config.target_modules = sorted(spec.target_modules)
    config.save_pretrained(folder)


def check_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise TrainingError for a trained weight that is empty or not finite."""
    for name, tensor in weights.items():
        if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"the trained tensor {name} is "
                f"{'empty' if tensor.numel() == 0 else 'not finite'}; nothing was saved"
            )


def check_adapter(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise TrainingError for an adapter without LoRA B, with an empty or non-finite tensor, or
    with zeros in every B.

    ZeRO-3 can save empty tensors.
    """
    lora_b = {name: tensor for name, tensor in tensors.items() if "lora_B" in name}
    if not lora_b:
        raise TrainingError(
            "training ended without any LoRA B matrix to save; check train.target_modules "
            "against the model's modules"
        )
    check_weights(tensors)
    if not any(bool(tensor.any()) for tensor in lora_b.values()):
        raise TrainingError(
            "every LoRA B matrix is zero after training: no step changed the adapter; "
            "nothing was saved"
        )
