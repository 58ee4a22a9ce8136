"""The engine of a gang: one training on several processes under DeepSpeed ZeRO. It needs an
initialised torch.distributed.

Every member computes its share of each global batch. Under ZeRO-3 the base's weights are
partitioned among the members and gathered layer by layer. Under ZeRO-1 and 2 every member holds all
weights, and only gradients and optimiser state are partitioned.

Invariant: the same Spec gives the same result as on one device, up to the order of additions. So
here too LoRA matrices are float32, gradients are added up in float32, and bfloat16 weights have
float32 masters.

Loading: without quantisation rank 0 reads the files and `zero.Init` partitions each tensor when it
is created, so no member ever holds the whole model. DeepSpeed cannot do this with quantised
weights: each member loads all of them, and they are partitioned afterwards.
"""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.autograd._functions import MatmulLtState
from bitsandbytes.nn import Linear8bitLt
from safetensors import safe_open

from ebbline.tasks.data.batches import Row, count_tokens
from ebbline.tasks.errors import OutOfMemory, TrainingError
from ebbline.tasks.models.loading import load_model, load_tokenizer
from ebbline.tasks.models.memory import zero_buffers
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Context
from ebbline.tasks.training.anchoring import average_step
from ebbline.tasks.training.engines import (
    MOMENTS,
    Curve,
    Engine,
    Saved,
    Stepped,
    Tensors,
    out_of_memory,
    read_checkpoint,
    token_loss,
    trainable,
)
from ebbline.tasks.training.micro_batch import learn
from ebbline.tasks.training.penalties import (
    Contrast,
    ModuleAlignment,
    Penalty,
    alignments_of,
    modules_in,
    pairs_in,
    penalty_of,
    require_difference,
)

WIDER = {"F16", "F32", "F64"}  # safetensors' names of dtypes with more digits than bfloat16


class DeepSpeedGang(Engine):
    """One member of a gang."""

    def __init__(
        self, spec: TrainSpec, folder: Path, ctx: Context, contrast: Contrast | None = None
    ) -> None:
        import deepspeed  # only gangs need it, and the import takes seconds

        # On CPUs DeepSpeed would compile this inference operation for a minute on first use. No
        # training calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if spec.global_batch % ctx.world_size:
            raise TrainingError(
                f"train.global_batch={spec.global_batch} does not divide among "
                f"{ctx.world_size} processes;"
                f" choose a multiple of {ctx.world_size}"
            )
        self.spec, self.ctx = spec, ctx
        self.tokenizer = load_tokenizer(folder, spec.chat)
        share = spec.global_batch // ctx.world_size
        self.micro_batch = min(ctx.micro_batch or share, share)
        while share % self.micro_batch:
            self.micro_batch -= 1
        self.accumulation = share // self.micro_batch
        if ctx.rank == 0:
            learn(ctx.scratch, used=self.micro_batch)
        zero = {"stage": ctx.zero_stage, **zero_buffers(ctx.zero_stage)}
        model = trainable(self._load(folder, zero), spec, ctx)
        self._named = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        self.parameters = [parameter for _, parameter in self._named]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(
                self.parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay
            ),
            config={
                "train_micro_batch_size_per_gpu": self.micro_batch,
                "gradient_accumulation_steps": self.accumulation,
                "gradient_clipping": spec.gradient_norm,
                # Off with LoRA: DeepSpeed would also make the LoRA matrices bfloat16, which are
                # float32 on one device.
                "bf16": {"enabled": spec.method == "full" and spec.dtype == "bfloat16"},
                "data_types": {"grad_accum_dtype": "fp32"},
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )
        self.engine.train()
        self._gathered = deepspeed.zero.GatheredParameters
        if spec.method == "full" and spec.dtype == "bfloat16" and _stored_wider(folder):
            self._start_from_stored_weights(folder)
        self._penalty = self._own_penalty(contrast)
        # Rank 0 holds the averages.
        self._averages: Tensors = dict(self._weights()) if spec.ema_decay else {}
        self._saved_at = time.monotonic()

    def _load(self, folder: Path, zero: dict[str, Any]) -> Any:
        spec, ctx = self.spec, self.ctx
        if ctx.zero_stage < 3 or spec.quantisation != "none":
            model = load_model(folder, spec.quantisation, spec.dtype, ctx.device)
            if ctx.zero_stage == 3 and spec.quantisation == "int8":
                _use_partitioned_int8(model)
            return model
        from transformers.integrations import HfDeepSpeedConfig

        bf16 = {"enabled": spec.dtype == "bfloat16"}
        # While this object exists, from_pretrained creates its tensors under zero.Init.
        zero_init = HfDeepSpeedConfig(
            {"train_micro_batch_size_per_gpu": 1, "bf16": bf16, "zero_optimization": zero}
        )
        model = load_model(folder, spec.quantisation, spec.dtype, ctx.device)
        del zero_init
        return model

    def _start_from_stored_weights(self, folder: Path) -> None:
        """Set the masters to the stored weights. DeepSpeed began them with bfloat16 weights."""
        stored: dict[str, torch.Tensor] = {}
        if self.ctx.rank == 0:
            stored = dict(load_model(folder, "none", "float32", "cpu").named_parameters())
        for name, parameter in self._named:
            whole = torch.empty(_shape(parameter), dtype=torch.float32, device=self.ctx.device)
            if self.ctx.rank == 0:
                whole.copy_(stored[name].detach())
            dist.broadcast(whole, src=0)
            self._put(parameter, whole, None)

    def step(self, batch: Sequence[Row], learning_rate: float) -> Stepped:
        tokens, began = count_tokens(batch), time.monotonic()
        own_rows = batch[self.ctx.rank :: self.ctx.world_size]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.ctx.device)
        try:
            for i in range(0, len(own_rows), self.micro_batch):
                loss = (
                    token_loss(
                        self.engine,
                        own_rows[i : i + self.micro_batch],
                        self.tokenizer.pad_token_id,
                        self.ctx.device,
                    )
                    / tokens
                )
                # DeepSpeed averages over members and micro-batches. This loss is already divided by
                # all tokens, so the average is undone.
                self.engine.backward(loss * self.ctx.world_size * self.accumulation)
                if self._penalty is not None and i + self.micro_batch >= len(own_rows):
                    self._penalise(self._penalty)
                self.engine.step()
                total += loss.detach()
        except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
            if out_of_memory(error):
                raise self._smaller() from error
            raise
        # A member's own time ends before it waits for the others' losses. The maximum of negative
        # times is the fastest.
        own_s = time.monotonic() - began
        times = torch.tensor([own_s, -own_s], device=self.ctx.device)
        if self.spec.ema_decay:
            weights = dict(self._weights())
            if self._averages:
                average_step(self._averages, weights, self.spec.ema_decay)
        dist.all_reduce(total)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        slowest_s, fastest_s = times.tolist()
        norm = self.engine.get_global_grad_norm()
        length = math.nan if norm is None else float(norm)
        return Stepped(total.item(), tokens, length, -fastest_s, slowest_s)

    def _own_penalty(self, contrast: Contrast | None) -> Penalty | None:
        """The penalty with V of this member's share of the modules: every N-th of N members."""
        alignments: dict[str, ModuleAlignment] = {}
        if self.spec.reads_alignment:
            own = modules_in(name for name, _ in self._named)[self.ctx.rank :: self.ctx.world_size]
            alignments = alignments_of(self.spec, own, contrast, self.ctx.device)
            different = torch.tensor(
                float(any(each.norm for each in alignments.values())), device=self.ctx.device
            )
            dist.all_reduce(different)
            require_difference(bool(different))
        return penalty_of(self.spec, alignments)

    def _penalise(self, penalty: Penalty) -> None:
        """Add the penalty's gradients, each computed by the member with its module's V.

        Every member calls this after the last backward pass of a step.
        """
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_full_grad,
            safe_set_full_grad,
            safe_set_local_grad,
        )

        for number, (module, pair) in enumerate(pairs_in(self._named).items()):
            owner = number % self.ctx.world_size
            whole = [safe_get_full_fp32_param(parameter) for parameter in pair]
            added = [torch.zeros_like(matrix) for matrix in whole]
            if owner == self.ctx.rank:
                added = list(penalty.gradients(module, *whole))
            for parameter, gradient in zip(pair, added, strict=True):
                gradient = gradient.contiguous()
                dist.broadcast(gradient, src=owner)
                gradient += safe_get_full_grad(parameter)
                if self.ctx.zero_stage < 3:
                    safe_set_full_grad(parameter, gradient)
                else:
                    safe_set_local_grad(parameter, self._part(parameter, gradient))

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each trained tensor, whole and in float32, on rank 0. Every member must exhaust it."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._named:  # each call gathers one tensor, on every member
            whole = safe_get_full_fp32_param(parameter)
            if self.ctx.rank == 0:
                yield name, whole

    def _smaller(self) -> TrainingError:
        """The error of a member that ran out of memory.

        The other members wait in a collective, so the gang must end and restart with a smaller
        micro-batch.
        """
        layout = f"{self.ctx.world_size} processes under ZeRO-{self.ctx.zero_stage}"
        if self.micro_batch > 1:
            half = self.micro_batch // 2
            return OutOfMemory(
                f"rank {self.ctx.rank} of {layout} ran out of memory with a micro-batch of "
                f"{self.micro_batch}",
                half,
            )
        return TrainingError(
            f"out of memory with one row of at most {self.spec.max_tokens} tokens on rank "
            f"{self.ctx.rank} of {layout};"
            " lower train.max_tokens, quantise the base (quantisation: nf4), or give the "
            "model more GPUs"
        )

    def agreed(self) -> tuple[bool, bool]:
        # The members' clocks differ, so rank 0 decides when a checkpoint is due. Every member's
        # machine can be about to go.
        due = (
            self.ctx.rank == 0 and time.monotonic() - self._saved_at >= self.ctx.checkpoint_every_s
        )
        flags = torch.tensor([float(due), float(self.ctx.leaving())], device=self.ctx.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        any_due, any_leaving = (bool(flag) for flag in flags.tolist())
        return any_due, any_leaving

    def wait(self) -> None:
        dist.barrier()

    def state(self, curve: Curve) -> Saved | None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        averages = {name: average.cpu() for name, average in self._averages.items()}
        saved = Saved(curve, {}, {moment: {} for moment in MOMENTS}, averages)
        for name, parameter in self._named:  # each call gathers one tensor, on every member
            weight = safe_get_full_fp32_param(parameter)
            moments = {
                moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS
            }
            if self.ctx.rank == 0:
                saved.parameters[name] = weight.cpu()
                for moment, tensor in moments.items():
                    saved.moments[moment][name] = tensor.cpu()
        return saved if self.ctx.rank == 0 else None

    def resume(self) -> Curve:
        # Rank 0 reads the checkpoint and broadcasts it, so the members need no shared folder.
        saved = read_checkpoint(self.ctx) if self.ctx.rank == 0 else None
        broadcast: list[Curve | None] = [None if saved is None else saved.curve]
        dist.broadcast_object_list(broadcast, src=0)
        curve = broadcast[0]
        if curve is None:
            return []
        self._begin_moments(len(curve))
        for name, average in self._averages.items():
            if saved is not None:
                average.copy_(saved.averages[name])
        for name, parameter in self._named:
            for moment in (None, *MOMENTS):
                whole = torch.empty(_shape(parameter), dtype=torch.float32, device=self.ctx.device)
                if saved is not None:
                    whole.copy_(
                        saved.parameters[name] if moment is None else saved.moments[moment][name]
                    )
                dist.broadcast(whole, src=0)
                self._put(parameter, whole, moment)
        return curve

    def _begin_moments(self, steps: int) -> None:
        """Create AdamW's moments, which otherwise its first step creates."""
        stage_3 = self.ctx.zero_stage == 3
        flats = (
            self.optimizer.fp32_partitioned_groups_flat
            if stage_3
            else self.optimizer.single_partition_of_fp32_groups
        )
        for flat in flats:
            empty = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self.optimizer.optimizer.state[flat] = {"step": torch.tensor(float(steps)), **empty}
        if not stage_3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _put(self, parameter: torch.nn.Parameter, whole: torch.Tensor, moment: str | None) -> None:
        """Set this member's part of a weight (moment None) or of one of its AdamW moments."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        # DeepSpeed holds two copies of a weight, one for the model and one for the optimiser.
        if moment is None:
            with torch.no_grad(), self._gathered([parameter], modifier_rank=0):
                parameter.copy_(whole)
        if self.ctx.zero_stage < 3:
            if moment is None:
                safe_set_full_fp32_param(parameter, whole)
            else:
                safe_set_full_optimizer_state(parameter, whole, moment)
            return
        part = self._part(parameter, whole)
        if moment is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, moment)

    def _part(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """This member's part of a tensor under ZeRO-3. DeepSpeed pads the last member's part."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = torch.zeros(size * self.ctx.world_size, device=whole.device)
        padded[: whole.numel()] = whole.flatten()
        return padded[size * self.ctx.rank : size * (self.ctx.rank + 1)]

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        if self.spec.method == "lora":
            with self._gathered(self.parameters):
                for name, parameter in self._named:
                    if name in self._averages:
                        parameter.data = self._averages[name]
                yield self.engine.module
            return
        from deepspeed.utils import safe_get_full_fp32_param

        # Whole weights gathered on a GPU would be in the model's dtype, and may not fit there.
        for _, parameter in self._named:  # each call gathers one tensor, on every member
            master = safe_get_full_fp32_param(parameter)
            if self.ctx.rank == 0:
                parameter.data = master.cpu()
        yield self.engine.module

    def close(self) -> None:
        self.engine.destroy()
        gc.collect()


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    """A parameter's whole shape, partitioned or not."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _stored_wider(folder: Path) -> bool:
    """Whether a model folder has weights that bfloat16 rounds."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            if {tensors.get_slice(name).get_dtype() for name in tensors.keys()} & WIDER:  # noqa: SIM118
                return True
    return False


class _Int8State(MatmulLtState):  # type: ignore[misc]  # bitsandbytes is untyped
    """bitsandbytes' state of an int8 layer, without its own reference to the matrix.

    That reference would keep the whole matrix on every member under ZeRO-3. Here the matrix is read
    from the layer's weight on each use.
    """

    def __init__(self, weight: Any, scales: torch.Tensor, outliers: float) -> None:
        self.weight, self.SCB, self.threshold, self.has_fp16_weights = (
            weight,
            scales,
            outliers,
            False,
        )

    @property
    def CB(self) -> torch.Tensor:
        matrix: torch.Tensor = self.weight.data
        return matrix


def _use_partitioned_int8(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            weight = module.weight
            module.state = _Int8State(weight, weight.SCB, module.state.threshold)
            weight.CB = weight.SCB = None
