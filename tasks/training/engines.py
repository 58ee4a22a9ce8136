"""The interface of a training engine, and the engine for one device. The engine for a gang of
processes is `ebbline.tasks.training.gang_engine`.

Invariant: every engine computes the same loss and the same update from the same global batch.
Checkpoints lie in the Context's scratch folder and have one format for all engines and numbers of
processes. A training that a gang of four began may continue on two processes or on one device.
"""

import errno
import gc
import logging
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from ebbline.tasks.data.batches import Row, collate, count_tokens
from ebbline.tasks.errors import Leaving, TrainingError
from ebbline.tasks.files import write_whole
from ebbline.tasks.models.adapters import Slots, slots_of, without_deprecation
from ebbline.tasks.models.adapters import take_off as take_adapter_off
from ebbline.tasks.models.loading import DTYPES, load_model, load_tokenizer
from ebbline.tasks.specs import Dtype, TrainSpec
from ebbline.tasks.stage import Context
from ebbline.tasks.training.anchoring import average_step
from ebbline.tasks.training.micro_batch import learn, learnt
from ebbline.tasks.training.penalties import Contrast, Penalty, alignments_for, penalty_of

_log = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")
WIDTH = torch.float32.itemsize  # of each trained number: weights, gradients and moments
Curve = list[tuple[int, float, float, int]]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Saved:
    """The state of a training between two steps: each trained tensor, whole, and its AdamW moments.
    The step number is the length of the curve.
    """

    curve: Curve
    parameters: Tensors
    # By MOMENTS, then by the parameter's name. Empty before the first step.
    moments: dict[str, Tensors]
    # The moving averages of the parameters; empty without `ema_decay`
    averages: Tensors = field(default_factory=dict)


class Stepped(NamedTuple):
    """What one optimiser step did. `loss` is the mean over the `tokens` with a label, and
    `gradient_norm` the length of the whole gradient before it was clipped. `fastest_s` and
    `slowest_s` are the seconds of a gang's members until they met.
    """

    loss: float
    tokens: int
    gradient_norm: float
    fastest_s: float | None = None
    slowest_s: float | None = None


class Engine(ABC):
    """A model in training. `micro_batch` is the number of rows of one pass on a device."""

    tokenizer: Any
    ctx: Context
    micro_batch: int
    _saved_at: float

    @abstractmethod
    def step(self, batch: Sequence[Row], learning_rate: float) -> Stepped:
        """Do one optimiser step on a global batch."""

    @abstractmethod
    def resume(self) -> Curve:
        """Load the checkpoint and return its curve; empty without a checkpoint."""

    @abstractmethod
    def gathered(self) -> AbstractContextManager[Any]:
        """Yields the model with its trained tensors whole and in float32, to save it. No step may
        follow.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the model and its memory."""

    @abstractmethod
    def agreed(self) -> tuple[bool, bool]:
        """(a checkpoint is due, a machine is about to go). All members of a gang get the same
        answer.
        """

    @abstractmethod
    def state(self, curve: Curve) -> Saved | None:
        """The content of a checkpoint; None on a member that writes none."""

    def checkpoint(self, curve: Curve) -> None:
        """Write a checkpoint when one is due or a machine is about to go.

        `ctx.saved` is called once the file is complete. Raises Leaving, after the write, when a
        machine is about to go.
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

    def wait(self) -> None:  # noqa: B027  # one device has no other members
        """Wait until every member of a gang has reached this point."""


class Trainee:
    """The trained tensors of one training on one device, by name, and their optimiser.

    Forward and backward passes are in `dtype`. Invariant: gradients are accumulated and weights
    updated in float32. Each bfloat16 parameter is rounded from a float32 master after each step.
    Without a master, a step smaller than half the spacing of bfloat16 changes nothing, and most
    steps of a fine-tuning are smaller.

    A `penalty` acts once a step, on the gradients before they are clipped.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, torch.nn.Parameter]],
        spec: TrainSpec,
        dtype: torch.dtype = torch.float32,
        penalty: Penalty | None = None,
    ) -> None:
        self.named, self._norm, self._penalty = named, spec.gradient_norm, penalty
        self.parameters = [parameter for _, parameter in named]
        self.masters = [_master(parameter, dtype) for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=spec.learning_rate, weight_decay=spec.weight_decay
        )
        self._decay = spec.ema_decay
        self._averages = {
            name: tensor.detach().clone() for name, tensor in self._by_name() if spec.ema_decay
        }

    def update(self, learning_rate: float) -> float:
        """Add the penalty's gradients, clip, do one AdamW step and drop the gradients. Returns the
        length of the whole gradient before it was clipped.
        """
        if self._penalty is not None:
            self._penalty.add_gradients(self._by_name())
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self._norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self._averages:
            average_step(self._averages, dict(self._by_name()), self._decay)
        self._round()
        self.forget()
        return norm.item()

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None

    def state(self, curve: Curve) -> Saved:
        by_name = self._by_name()
        moments = {
            moment: {name: self.optimizer.state[master][moment] for name, master in by_name}
            for moment in MOMENTS
        }
        weights = {name: master.data for name, master in by_name}
        return Saved(curve, weights, moments, self._averages)

    def restore(self, saved: Saved) -> None:
        with torch.no_grad():
            for name, average in self._averages.items():
                average.copy_(saved.averages[name])
            for name, master in self._by_name():
                master.copy_(saved.parameters[name])
                if saved.moments:
                    moments = {moment: saved.moments[moment][name].to(master) for moment in MOMENTS}
                    self.optimizer.state[master] = {
                        "step": torch.tensor(float(len(saved.curve))),
                        **moments,
                    }
        self._round()

    def show_result(self) -> None:
        """Replace the model's parameters by their averages, else by their masters, to save them. No
        step may follow.
        """
        for (name, parameter), master in zip(self.named, self.masters, strict=True):
            parameter.data = self._averages.get(name, master.data)

    def _by_name(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, m) for (name, _), m in zip(self.named, self.masters, strict=True)]

    def _round(self) -> None:
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)


def _master(parameter: torch.nn.Parameter, dtype: torch.dtype) -> torch.nn.Parameter:
    """The tensor that the optimiser updates, in float32 or wider: the parameter itself, or its
    master if passes are in a narrower `dtype`.

    Each gradient of a parameter is added to its master's as soon as it is complete.
    """
    if parameter.dtype.itemsize < WIDTH:
        parameter.data = parameter.data.float()
    if dtype.itemsize >= WIDTH:
        return parameter
    master = torch.nn.Parameter(parameter.detach())
    parameter.data = parameter.data.to(dtype)

    def move_gradient(_: torch.Tensor) -> None:
        if parameter.grad is not None:
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    parameter.register_post_accumulate_grad_hook(move_gradient)  # type: ignore[no-untyped-call]
    return master


class SingleDevice(Engine):
    """Plain PyTorch on one device.

    LoRA trainings share the resident base model; full fine-tuning loads its own copy.
    """

    def __init__(
        self, spec: TrainSpec, folder: Path, ctx: Context, contrast: Contrast | None = None
    ) -> None:
        self.spec, self.ctx = spec, ctx
        if spec.method == "lora" and ctx.residents is not None:
            self._resident, self.tokenizer = ctx.residents.model(
                folder, spec.quantisation, spec.dtype, ctx.device, spec.chat
            )
        else:
            # Masters begin with the stored weights. Rounded weights would put their rounding into
            # the difference of the two models.
            stored: Dtype = "float32" if spec.method == "full" else spec.dtype
            self._resident, self.tokenizer = (
                load_model(folder, spec.quantisation, stored, ctx.device),
                load_tokenizer(folder, spec.chat),
            )
        self._slots = slots_of(self._resident)
        self.model = trainable(self._resident, spec, ctx)
        self.model.train()
        named = [
            (name, tensor) for name, tensor in self.model.named_parameters() if tensor.requires_grad
        ]
        alignments = alignments_for(spec, [name for name, _ in named], contrast, ctx.device)
        self.trainee = Trainee(
            named,
            spec,
            DTYPES[spec.dtype] if spec.method == "full" else torch.float32,
            penalty_of(spec, alignments),
        )
        self.micro_batch = learnt(ctx.scratch).limited(
            min(ctx.micro_batch or spec.global_batch, spec.global_batch)
        )
        self._saved_at = time.monotonic()

    def step(self, batch: Sequence[Row], learning_rate: float) -> Stepped:
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
            # Outside the except block: the failed step's tensors are freed before the next attempt.
            self.micro_batch //= 2
            learn(self.ctx.scratch, most=self.micro_batch)
            self.trainee.forget()
            gc.collect()
        return Stepped(float(loss), tokens, self.trainee.update(learning_rate))

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
        self.trainee.show_result()
        return nullcontext(self.model)

    def close(self) -> None:
        self.trainee.forget()
        if self.spec.method == "lora":
            take_off(self._resident, self._slots, self.ctx)


def trainable(base: Any, spec: TrainSpec, ctx: Context) -> Any:
    """The model with the trained weights marked: a new LoRA adapter from `spec.seed`, or all."""
    if spec.method == "full":
        return base.requires_grad_(True)
    base.requires_grad_(False)
    torch.manual_seed(spec.seed)
    with without_deprecation():
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
    """Turn on gradient checkpointing: the backward pass recomputes each layer's activations."""
    # bitsandbytes stores tensors for the backward pass on its autograd context. Only reentrant
    # checkpointing releases that context. Without it, a gang's gathered NF4 weights and the inputs
    # of int8 layers stay in memory until the backward pass.
    reentrant = ctx.world_size > 1 or spec.quantisation == "int8"
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    # The line above registers a hook for some models. Without the next line a second hook would
    # be registered and never removed.
    base.disable_input_require_grads()
    base.enable_input_require_grads()


def take_off(base: Any, slots: Slots, ctx: Context) -> None:
    """Remove the adapters from a resident base and undo every change of `trainable`. `slots` are
    its modules from before.
    """
    take_adapter_off(base, slots)
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
    """Next-token cross-entropy of some rows, summed over labelled positions, in float32."""
    batch = collate(rows, pad, device)
    labels = batch.pop("labels")
    return next_token_loss(model(**batch).logits, labels)


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, summed over labelled positions, in float32.

    `logits` is (rows, tokens, vocabulary), `labels` is (rows, tokens) with -100 for no label.
    """
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=-100,
        reduction="sum",
    )


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


def write_checkpoint(ctx: Context, saved: Saved) -> None:
    """Replace the checkpoint in `ctx.scratch` atomically, then call `ctx.saved`."""
    content = {
        "curve": saved.curve,
        "parameters": saved.parameters,
        "moments": saved.moments,
        "averages": saved.averages,
    }
    write_whole(ctx.scratch / "checkpoint.pt", lambda fresh: torch.save(content, fresh))
    ctx.saved()


def read_checkpoint(ctx: Context) -> Saved | None:
    """The checkpoint in `ctx.scratch`, or None without one.

    An unreadable checkpoint is removed with a warning, and counts as none. So does one that is not
    in float32: its training would continue from rounded weights.
    """
    path = ctx.scratch / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        # In a truncated file torch seeks to a negative offset, which gives EINVAL.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        _remove(path, f"cannot be read ({type(error).__name__})")
        return None
    averages = content.get("averages", {})  # earlier versions wrote none
    tensors = [content["parameters"], *content["moments"].values(), averages]
    if any(tensor.dtype.itemsize < WIDTH for named in tensors for tensor in named.values()):
        _remove(path, "is not in float32")
        return None
    curve = [(int(step), loss, rate, int(tokens)) for step, loss, rate, tokens in content["curve"]]
    return Saved(curve, content["parameters"], content["moments"], averages)


def _remove(path: Path, reason: str) -> None:
    _log.warning("the checkpoint %s %s; this training starts over", path, reason)
    path.unlink()
