"""What a training step runs on: one device, or a gang of processes under DeepSpeed ZeRO.

Both take the same global batch and give the same loss; `tasks.train` cannot tell them apart. `gathered` yields the whole
model's trained tensors; `checkpoint` and `resume` keep an interrupted training in the Context's scratch folder.
"""

import gc
import logging
import os
import pickle
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from tasks.batches import Row, collate, count_tokens
from tasks.errors import Leaving, TrainingError
from tasks.models import load_model, load_tokenizer
from tasks.specs import TrainSpec
from tasks.stage import Context

_log = logging.getLogger(__name__)
Curve = list[tuple[int, float, float, int]]


class Engine(ABC):
    """A model being trained. `step` does one optimiser step on a global batch and returns (mean token loss, tokens)."""

    tokenizer: Any

    @abstractmethod
    def step(self, batch: Sequence[Row], learning_rate: float) -> tuple[float, int]: ...

    @abstractmethod
    def resume(self) -> Curve: ...

    @abstractmethod
    def checkpoint(self, curve: Curve) -> None: ...

    @abstractmethod
    def gathered(self) -> AbstractContextManager[Any]: ...

    @abstractmethod
    def close(self) -> None: ...


class SingleDevice(Engine):
    """Plain PyTorch. The model stays resident between LoRA trainings; full fine-tuning loads a copy of its own."""

    def __init__(self, spec: TrainSpec, folder: Path, ctx: Context) -> None:
        self.spec, self.ctx = spec, ctx
        if spec.method == "lora" and ctx.residents is not None:
            self._resident, self.tokenizer = ctx.residents.model(folder, spec.quantisation, spec.dtype, ctx.device)
        else:
            self._resident, self.tokenizer = load_model(folder, spec.quantisation, spec.dtype, ctx.device), load_tokenizer(folder)
        self.model = trainable(self._resident, spec)
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)
        self.micro_batch = min(ctx.micro_batch or spec.global_batch, spec.global_batch)
        self._saved_at = time.monotonic()

    def step(self, batch: Sequence[Row], learning_rate: float) -> tuple[float, int]:
        tokens = count_tokens(batch)
        while True:
            try:
                loss = sum(self._backward(batch[i : i + self.micro_batch], tokens) for i in range(0, len(batch), self.micro_batch))
                break
            except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if self.micro_batch == 1:
                    raise TrainingError(
                        f"out of memory with one row of at most {self.spec.max_tokens} tokens on {self.ctx.device};"
                        " lower train.max_tokens, quantise the base (quantisation: nf4), or give the model more GPUs"
                    ) from error
            # Outside the except block, so that the failed step's tensors are free before the next try.
            self.micro_batch //= 2
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss), tokens

    def _backward(self, rows: Sequence[Row], tokens: int) -> float:
        loss = token_loss(self.model, rows, self.tokenizer.pad_token_id, self.ctx.device) / tokens
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return loss.item()

    def resume(self) -> Curve:
        path = self.ctx.scratch / "checkpoint.pt"
        if not path.exists():
            return []
        try:
            saved = torch.load(path, weights_only=True, map_location=self.ctx.device)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            _log.warning("the checkpoint %s cannot be read (%s); this training starts over", path, type(error).__name__)
            path.unlink()
            return []
        for parameter, tensor in zip(self.parameters, saved["parameters"], strict=True):
            parameter.data.copy_(tensor)
        self.optimizer.load_state_dict(saved["optimizer"])
        return [(int(step), loss, rate, int(tokens)) for step, loss, rate, tokens in saved["curve"]]

    def checkpoint(self, curve: Curve) -> None:
        leaving = self.ctx.leaving()
        if not leaving and time.monotonic() - self._saved_at < self.ctx.checkpoint_every_s:
            return
        self.ctx.scratch.mkdir(parents=True, exist_ok=True)
        fresh = self.ctx.scratch / f"checkpoint.{os.getpid()}.tmp"  # a lost worker may still be writing its own
        state = {"parameters": [p.data for p in self.parameters], "optimizer": self.optimizer.state_dict(), "curve": curve}
        torch.save(state, fresh)
        fresh.replace(self.ctx.scratch / "checkpoint.pt")
        self._saved_at = time.monotonic()
        if leaving:
            raise Leaving(f"the machine is about to go; step {len(curve)} is saved")

    def gathered(self) -> AbstractContextManager[Any]:
        return nullcontext(self.model)

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.spec.method == "lora":
            self.model.unload()
            if hasattr(self._resident, "peft_config"):
                del self._resident.peft_config
            if self.ctx.device != "cpu":  # what `trainable` switched on
                self._resident.gradient_checkpointing_disable()
                self._resident.disable_input_require_grads()
            self._resident.eval()


class DeepSpeedGang(Engine):
    """One member of a ZeRO gang; torch.distributed is already up. Every member takes its share of each global batch."""

    def __init__(self, spec: TrainSpec, folder: Path, ctx: Context) -> None:
        import deepspeed  # only gangs need it, and it takes seconds to import

        if spec.global_batch % ctx.world_size:
            raise TrainingError(
                f"train.global_batch={spec.global_batch} does not divide among {ctx.world_size} processes;"
                f" choose a multiple of {ctx.world_size}"
            )
        self.spec, self.ctx = spec, ctx
        self.tokenizer = load_tokenizer(folder)
        share = spec.global_batch // ctx.world_size
        self.micro_batch = min(ctx.micro_batch or share, share)
        while share % self.micro_batch:
            self.micro_batch -= 1
        # With 4-bit weights zero.Init is ignored: each member loads, then DeepSpeed shards.
        model = trainable(load_model(folder, spec.quantisation, spec.dtype, ctx.device), spec)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.accumulation = share // self.micro_batch
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(self.parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay),
            config={
                "train_micro_batch_size_per_gpu": self.micro_batch,
                "gradient_accumulation_steps": self.accumulation,
                "gradient_clipping": spec.gradient_norm,
                "bf16": {"enabled": spec.dtype == "bfloat16"},
                "zero_optimization": {"stage": ctx.zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )
        self.engine.train()
        self._gathered = deepspeed.zero.GatheredParameters
        self._saved_at = time.monotonic()

    def step(self, batch: Sequence[Row], learning_rate: float) -> tuple[float, int]:
        tokens = count_tokens(batch)
        mine = batch[self.ctx.rank :: self.ctx.world_size]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.ctx.device)
        for i in range(0, len(mine), self.micro_batch):
            loss = token_loss(self.engine, mine[i : i + self.micro_batch], self.tokenizer.pad_token_id, self.ctx.device) / tokens
            # DeepSpeed takes the mean over members and micro-batches; this loss is already a share of the whole.
            self.engine.backward(loss * self.ctx.world_size * self.accumulation)
            self.engine.step()
            total += loss.detach()
        torch.distributed.all_reduce(total)
        return total.item(), tokens

    def resume(self) -> Curve:
        folder = self.ctx.scratch / f"zero{self.ctx.world_size}"
        if not (folder / "latest").exists():
            return []
        path, state = self.engine.load_checkpoint(str(folder), load_module_strict=False)
        if path is None:
            _log.warning("DeepSpeed could not read the checkpoint in %s; this training starts over", folder)
            return []
        return [tuple(row) for row in state["curve"]]

    def checkpoint(self, curve: Curve) -> None:
        late = time.monotonic() - self._saved_at >= self.ctx.checkpoint_every_s
        told = torch.tensor([float(late), float(self.ctx.leaving())], device=self.ctx.device)
        torch.distributed.broadcast(told, src=0)  # the members' clocks differ; rank 0's decides
        due, leaving = (bool(flag) for flag in told.tolist())
        if not due and not leaving:
            return
        folder = self.ctx.scratch / f"zero{self.ctx.world_size}"
        tag = f"step{len(curve)}"
        self.engine.save_checkpoint(str(folder), tag=tag, client_state={"curve": curve}, exclude_frozen_parameters=True)
        if self.ctx.rank == 0:
            for old in folder.glob("step*"):
                if old.name != tag:
                    shutil.rmtree(old)
        self._saved_at = time.monotonic()
        if leaving:
            raise Leaving(f"the machine is about to go; step {len(curve)} is saved")

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        with self._gathered(self.parameters if self.spec.method == "lora" else list(self.engine.module.parameters())):
            yield self.engine.module

    def close(self) -> None:
        self.engine.destroy()
        gc.collect()


def trainable(base: Any, spec: TrainSpec) -> Any:
    """The model with what `spec` trains marked as trainable: a fresh LoRA adapter (seeded), or every weight."""
    if spec.method == "full":
        return base.requires_grad_(True)
    base.requires_grad_(False)
    torch.manual_seed(spec.seed)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.rank * spec.alpha_over_rank,
        lora_dropout=spec.dropout,
        target_modules=list(spec.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    if next(base.parameters()).device.type == "cuda":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    return model


def token_loss(model: Any, rows: Sequence[Row], pad: int, device: str) -> torch.Tensor:
    """Cross-entropy of the next token, summed over labelled positions, in float32."""
    batch = collate(rows, pad, device)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
