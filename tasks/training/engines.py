"""What a training step runs on: one device, or a gang of processes
(`ebbline.tasks.training.gang_engine`).

Both take the same global batch and give the same loss; `ebbline.tasks.training.train` cannot tell
them apart. `gathered` yields the whole model's trained tensors. `checkpoint` and `resume` keep an
interrupted training in the Context's scratch folder, in one form for all engines and numbers of
processes: a training that a gang of four began may be continued by two, or by one device.
"""

import errno
import gc
import logging
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from ebbline.tasks.data.batches import Row, collate, count_tokens
from ebbline.tasks.errors import Leaving, TrainingError
from ebbline.tasks.files import write_whole
from ebbline.tasks.models.loading import load_model, load_tokenizer
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Context

_log = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")
Curve = list[tuple[int, float, float, int]]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Saved:
    """A training between two steps: the trained tensors whole, by name, and AdamW's moments of
    each. The curve's length is its step.
    """

    curve: Curve
    parameters: Tensors
    moments: dict[
        str, Tensors
    ]  # by MOMENTS, then by the parameter's name; empty before the first step


class Engine(ABC):
    """A model being trained. `step` does one optimiser step on a global batch and returns (mean
    token loss, tokens).
    """

    tokenizer: Any
    ctx: Context
    _saved_at: float

    @abstractmethod
    def step(self, batch: Sequence[Row], learning_rate: float) -> tuple[float, int]: ...

    @abstractmethod
    def resume(self) -> Curve: ...

    @abstractmethod
    def gathered(self) -> AbstractContextManager[Any]: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def agreed(self) -> tuple[bool, bool]:
        """(a checkpoint is due, this machine or a partner's is about to go); the same on every
        member of a gang.
        """

    @abstractmethod
    def state(self, curve: Curve) -> Saved | None:
        """What a checkpoint holds; None on a member that writes none."""

    def checkpoint(self, curve: Curve) -> None:
        """Write a checkpoint when one is due, and say so to `ctx.saved` once it is whole on the
        disk.

        Raises Leaving, when all that is done is saved, for a machine that is about to go.
        """
        due, leaving = self.agreed()
        if not due and not leaving:
            return
        saved = self.state(curve)
        if saved is not None:
            write_checkpoint(self.ctx, saved)
        self._saved_at = time.monotonic()
        if leaving:
            self.wait()
            raise Leaving(f"the machine is about to go; step {len(curve)} is saved")

    def wait(self) -> None:  # noqa: B027  # on one device there is nobody to wait for
        """Wait until every member of a gang has come this far."""


class Trainee:
    """The tensors that one training changes on one device, by name, and the AdamW that changes
    them.
    """

    def __init__(self, named: Sequence[tuple[str, torch.nn.Parameter]], spec: TrainSpec) -> None:
        self.named, self._norm = named, spec.gradient_norm
        self.parameters = [parameter for _, parameter in named]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay
        )

    def update(self, learning_rate: float) -> None:
        """One step along the gradients that are there, which are clipped, and then gone."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self._norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state(self, curve: Curve) -> Saved:
        moments = {
            moment: {
                name: self.optimizer.state[parameter][moment] for name, parameter in self.named
            }
            for moment in MOMENTS
        }
        return Saved(curve, {name: parameter.data for name, parameter in self.named}, moments)

    def restore(self, saved: Saved) -> None:
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(saved.parameters[name])
                if saved.moments:
                    moments = {
                        moment: saved.moments[moment][name].to(parameter) for moment in MOMENTS
                    }
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(len(saved.curve))),
                        **moments,
                    }


class SingleDevice(Engine):
    """Plain PyTorch. The model stays resident between LoRA trainings; full fine-tuning loads a copy
    of its own.
    """

    def __init__(self, spec: TrainSpec, folder: Path, ctx: Context) -> None:
        self.spec, self.ctx = spec, ctx
        if spec.method == "lora" and ctx.residents is not None:
            self._resident, self.tokenizer = ctx.residents.model(
                folder, spec.quantisation, spec.dtype, ctx.device
            )
        else:
            self._resident, self.tokenizer = (
                load_model(folder, spec.quantisation, spec.dtype, ctx.device),
                load_tokenizer(folder),
            )
        self.model = trainable(self._resident, spec, ctx)
        self.model.train()
        self.trainee = Trainee(
            [
                (name, tensor)
                for name, tensor in self.model.named_parameters()
                if tensor.requires_grad
            ],
            spec,
        )
        self.micro_batch = min(ctx.micro_batch or spec.global_batch, spec.global_batch)
        self._saved_at = time.monotonic()

    def step(self, batch: Sequence[Row], learning_rate: float) -> tuple[float, int]:
        tokens = count_tokens(batch)
        while True:
            try:
                loss = sum(
                    self._backward(batch[i : i + self.micro_batch], tokens)
                    for i in range(0, len(batch), self.micro_batch)
                )
                break
            except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if self.micro_batch == 1:
                    raise too_large(self.spec, self.ctx) from error
            # Outside the except block, so that the failed step's tensors are free before the next
            # try.
            self.micro_batch //= 2
            self.trainee.forget()
            gc.collect()
        self.trainee.update(learning_rate)
        return float(loss), tokens

    def _backward(self, rows: Sequence[Row], tokens: int) -> float:
        loss = token_loss(self.model, rows, self.tokenizer.pad_token_id, self.ctx.device) / tokens
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return loss.item()

    def resume(self) -> Curve:
        saved = read_checkpoint(self.ctx)
        if saved is None:
            return []
        self.trainee.restore(saved)
        return saved.curve

    def agreed(self) -> tuple[bool, bool]:
        return time.monotonic() - self._saved_at >= self.ctx.checkpoint_every_s, self.ctx.leaving()

    def state(self, curve: Curve) -> Saved:
        return self.trainee.state(curve)

    def gathered(self) -> AbstractContextManager[Any]:
        return nullcontext(self.model)

    def close(self) -> None:
        self.trainee.forget()
        if self.spec.method == "lora":
            take_off(self.model, self._resident, self.ctx)


def trainable(base: Any, spec: TrainSpec, ctx: Context) -> Any:
    """The model with what `spec` trains marked as trainable: a fresh LoRA adapter (seeded), or
    every weight.
    """
    if spec.method == "full":
        return base.requires_grad_(True)
    base.requires_grad_(False)
    torch.manual_seed(spec.seed)
    model = get_peft_model(base, lora_config(spec))
    if ctx.recomputes:
        recompute(base, spec, ctx)
    return model


def lora_config(spec: TrainSpec) -> LoraConfig:
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.rank * spec.alpha_over_rank,
        lora_dropout=spec.dropout,
        target_modules=list(spec.target_modules),
        task_type="CAUSAL_LM",
    )


def recompute(base: Any, spec: TrainSpec, ctx: Context) -> None:
    """Have the base compute each layer's activations again in the backward pass."""
    # bitsandbytes keeps what it needs for the backward pass on its autograd context, where only the
    # reentrant kind lets go of it: with the other kind a gang's gathered NF4 weights, and int8's
    # inputs, stay from the forward pass to the backward one.
    reentrant = ctx.world_size > 1 or spec.quantisation == "int8"
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.enable_input_require_grads()


def take_off(model: Any, base: Any, ctx: Context) -> None:
    """Take the adapters off a resident base and leave it as it was before `trainable`."""
    model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    if ctx.recomputes:
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
    base.eval()


def too_large(spec: TrainSpec, ctx: Context) -> TrainingError:
    return TrainingError(
        f"out of memory with one row of at most {spec.max_tokens} tokens on {ctx.device};"
        " lower train.max_tokens, quantise the base (quantisation: nf4), or give the model "
        "more GPUs"
    )


def token_loss(model: Any, rows: Sequence[Row], pad: int, device: str) -> torch.Tensor:
    """Cross-entropy of the next token, summed over labelled positions, in float32."""
    batch = collate(rows, pad, device)
    labels = batch.pop("labels")
    return next_token_loss(model(**batch).logits, labels)


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same from logits (rows, tokens, vocabulary) and labels (rows, tokens)."""
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=-100,
        reduction="sum",
    )


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


def write_checkpoint(ctx: Context, saved: Saved) -> None:
    """Replace the checkpoint in `ctx.scratch` in one move, then tell `ctx.saved`."""
    content = {"curve": saved.curve, "parameters": saved.parameters, "moments": saved.moments}
    write_whole(ctx.scratch / "checkpoint.pt", lambda fresh: torch.save(content, fresh))
    ctx.saved()


def read_checkpoint(ctx: Context) -> Saved | None:
    """The checkpoint in `ctx.scratch`; None when there is none, or none that can be read: such a
    one is removed, with a warning.
    """
    path = ctx.scratch / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        if (
            isinstance(error, OSError) and error.errno != errno.EINVAL
        ):  # torch seeks before the start of a file that was cut off
            raise
        _log.warning(
            "the checkpoint %s cannot be read (%s); this training starts over",
            path,
            type(error).__name__,
        )
        path.unlink()
        return None
    curve = [(int(step), loss, rate, int(tokens)) for step, loss, rate, tokens in found["curve"]]
    return Saved(curve, found["parameters"], found["moments"])
