"""The engine of a pack: one frozen base with an adapter for each member. The training loop is
`ebbline.tasks.training.packed`.

The rows of all members go through the base as one batch, so each weight is read and dequantised
once for all members. At each adapted linear layer, a member's rows use its own LoRA matrices.
Members of equal rank share one batched product.

Invariant: rows of different members never mix. One backward pass gives each member the gradients of
its own loss, up to the rounding of a larger matrix product (docs/packing.md).
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer

from ebbline.tasks.data.batches import Row, collate, count_tokens
from ebbline.tasks.errors import TrainingError
from ebbline.tasks.models.adapters import slots_of, without_deprecation
from ebbline.tasks.models.loading import load_model, load_tokenizer
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Context
from ebbline.tasks.training.engines import (
    Curve,
    Trainee,
    lora_config,
    next_token_loss,
    out_of_memory,
    read_checkpoint,
    recompute,
    take_off,
    too_large,
    write_checkpoint,
)
from ebbline.tasks.training.micro_batch import learn, learnt
from ebbline.tasks.training.penalties import (
    Contrast,
    ModuleAlignment,
    alignments_for,
    penalty_of,
)


@dataclass(eq=False)
class Member:
    """One training of a pack, with the arguments of `ebbline.tasks.training.train.run`.

    `seconds` is its share of the pack's time. The shares of all members add up to the pack's time.
    """

    spec: TrainSpec
    out: Path
    ctx: Context
    name: str = ""
    curve: Curve = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Branch:
    """Members of equal rank and the slice of a batch that holds their rows.

    `scaling` is (members, 1, 1).
    """

    names: tuple[str, ...]
    rows: slice
    scaling: torch.Tensor


class Pack:
    """A resident base with one adapter for each member, initialised from the member's own seed."""

    def __init__(
        self, members: Sequence[Member], folder: Path, contrast: Contrast | None = None
    ) -> None:
        self.ctx, spec = members[0].ctx, members[0].spec
        if self.ctx.residents is not None:
            self._base, self.tokenizer = self.ctx.residents.model(
                folder, spec.quantisation, spec.dtype, self.ctx.device, spec.chat
            )
        else:
            self._base, self.tokenizer = (
                load_model(folder, spec.quantisation, spec.dtype, self.ctx.device),
                load_tokenizer(folder, spec.chat),
            )
        self._base.requires_grad_(False)
        self._slots = slots_of(self._base)
        self.model: Any = None
        self.trainees: dict[str, Trainee] = {}
        alignments: dict[str, ModuleAlignment] | None = None
        for number, member in enumerate(members):
            member.name = f"member{number}"
            torch.manual_seed(member.spec.seed)
            if self.model is None:
                with without_deprecation():
                    self.model = get_peft_model(
                        self._base, lora_config(member.spec), adapter_name=member.name
                    )
            else:
                self.model.add_adapter(member.name, lora_config(member.spec))
            named = _named(self.model, member.name)
            alignments = alignments or alignments_for(
                member.spec, [name for name, _ in named], contrast, self.ctx.device
            )
            self.trainees[member.name] = Trainee(
                named, member.spec, penalty=penalty_of(member.spec, alignments)
            )
        if self.ctx.recomputes:
            recompute(self._base, spec, self.ctx)
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                _check_linear(module, members[0].name)
                module.forward = partial(self._through, module)
        self.model.train()
        most = min(self.ctx.micro_batch or spec.global_batch, spec.global_batch)
        self.micro_batch = min(learnt(member.ctx.scratch).limited(most) for member in members)
        self.members_at_once = len(members)
        self._branches: list[_Branch] = []

    def resume(self, member: Member) -> None:
        """Continue from the member's checkpoint, if it has one. Any engine may have written it."""
        saved = read_checkpoint(member.ctx)
        if saved is not None:
            self.trainees[member.name].restore(saved)
            member.curve = saved.curve

    def checkpoint(self, member: Member) -> None:
        if member.curve:
            write_checkpoint(member.ctx, self.trainees[member.name].state(member.curve))

    def backward(self, batches: Mapping[Member, Sequence[Row]]) -> dict[Member, float]:
        """Compute the gradients of each member's loss; returns the losses.

        A loss is the mean over the tokens of the member's own batch. When memory runs out, the step
        is retried with half the rows of each member. From one row on, half the members go through
        at once. Raises TrainingError when one row of one member does not fit.
        """
        tokens = {member: count_tokens(batch) for member, batch in batches.items()}
        while True:
            try:
                return self._once(batches, tokens)
            except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if self.micro_batch == 1 and self.members_at_once == 1:
                    raise too_large(next(iter(batches)).spec, self.ctx) from error
            # Outside the except block: the failed step's tensors are freed before the next attempt.
            if self.micro_batch > 1:
                self.micro_batch //= 2
                for member in batches:
                    learn(member.ctx.scratch, most=self.micro_batch)
            else:
                self.members_at_once = (min(self.members_at_once, len(batches)) + 1) // 2
            for member in batches:
                self.trainees[member.name].forget()
            gc.collect()

    def _once(
        self, batches: Mapping[Member, Sequence[Row]], tokens: Mapping[Member, int]
    ) -> dict[Member, float]:
        losses = dict.fromkeys(batches, 0.0)
        ordered = sorted(batches, key=lambda member: (member.spec.rank, member.name))
        for first in range(0, len(ordered), self.members_at_once):
            chosen = ordered[first : first + self.members_at_once]
            for start in range(0, len(batches[chosen[0]]), self.micro_batch):
                parts = [batches[member][start : start + self.micro_batch] for member in chosen]
                self._branches = _branches(chosen, len(parts[0]), self.ctx.device)
                batch = collate(
                    [row for part in parts for row in part],
                    self.tokenizer.pad_token_id,
                    self.ctx.device,
                )
                labels = batch.pop("labels").chunk(len(chosen))
                logits = self.model(**batch).logits.chunk(len(chosen))
                each = [
                    next_token_loss(own_logits, own_labels) / tokens[member]
                    for member, own_logits, own_labels in zip(chosen, logits, labels, strict=True)
                ]
                del logits
                stacked = torch.stack(each)
                stacked.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                for member, loss in zip(chosen, stacked.tolist(), strict=True):
                    losses[member] += loss
        return losses

    def _through(self, module: Any, inputs: torch.Tensor) -> torch.Tensor:
        """A LoRA layer's forward pass, with the matrices of each row's member.

        Shapes: (rows, tokens, inputs) -> (rows, tokens, outputs).
        """
        result: torch.Tensor = module.base_layer(inputs)
        deltas = []
        for branch in self._branches:
            down = torch.stack(
                [module.lora_A[name].weight for name in branch.names]
            )  # (members, rank, inputs)
            up = torch.stack(
                [module.lora_B[name].weight for name in branch.names]
            )  # (members, outputs, rank)
            rows = inputs[branch.rows]
            flat = rows.reshape(len(branch.names), -1, rows.shape[-1]).to(down.dtype)
            delta = torch.bmm(
                torch.bmm(flat, down.transpose(1, 2)) * branch.scaling, up.transpose(1, 2)
            )
            deltas.append(delta.view(*rows.shape[:-1], -1))
        delta = deltas[0] if len(deltas) == 1 else torch.cat(deltas)
        # bfloat16 must be rounded where PEFT rounds it: after the sum in its plain linear, before
        # the sum in its quantised layers.
        return (
            (result + delta).to(result.dtype)
            if isinstance(module, LoraLinear)
            else result + delta.to(result.dtype)
        )

    def close(self) -> None:
        for trainee in self.trainees.values():
            trainee.forget()
        take_off(self._base, self._slots, self.ctx)


def _named(model: Any, adapter: str) -> list[tuple[str, torch.nn.Parameter]]:
    """An adapter's tensors, made trainable, by the names of a training outside a pack."""
    found = [
        (name.replace(f".{adapter}.", ".default."), tensor)
        for name, tensor in model.named_parameters()
        if f".{adapter}." in name
    ]
    for _, tensor in found:
        tensor.requires_grad_(True)
    return found


def _branches(members: Sequence[Member], rows: int, device: str) -> list[_Branch]:
    """One branch for each rank; `members` are sorted by rank and have `rows` rows each."""
    branches, start = [], 0
    for _, group in groupby(members, key=lambda member: member.spec.rank):
        equal_rank = list(group)
        scaling = torch.tensor(
            [member.spec.alpha_over_rank for member in equal_rank], device=device
        ).view(-1, 1, 1)
        branches.append(
            _Branch(
                tuple(member.name for member in equal_rank),
                slice(start, start + rows * len(equal_rank)),
                scaling,
            )
        )
        start += rows * len(equal_rank)
    return branches


def _check_linear(module: Any, name: str) -> None:
    if name not in module.lora_A or not isinstance(module.lora_A[name], torch.nn.Linear):
        raise TrainingError(
            f"a LoRA layer on {type(module.get_base_layer()).__name__} cannot be packed; "
            "train.target_modules may name only linear layers"
        )
