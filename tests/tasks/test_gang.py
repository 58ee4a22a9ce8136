"""Gangs of two processes with gloo and DeepSpeed on the CPU. Their result equals that of one
process.

Gangs add in another order than one process; tests/tolerance.py bounds the difference.
"""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ebbline.tasks.errors import OutOfMemory, TrainingError
from ebbline.tasks.models import memory
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.training import engines, gang_engine
from ebbline.tasks.training.train import run
from tests.tasks.test_train import SETTINGS, adapter_of, cut_off_after, furthest, rows_of, trained
from tests.tiny import context, fresh
from tests.tolerance import SteadyAdamW, alike, apart, losses_alike, steady_adam

__all__ = ["steady_adam"]
pytestmark = pytest.mark.usefixtures("steady_adam")

Reply = tuple[str, Any]


class Gang:
    """Two processes joined by torch.distributed. `do` runs a function on both and returns the
    replies, by rank.
    """

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.members = [], []
        for rank in range(2):
            here, there = spawn.Pipe()
            member = spawn.Process(target=_member, args=(rank, port, there), daemon=True)
            member.start()
            self.pipes.append(here)
            self.members.append(member)

    def do(
        self, function: Callable[..., Any], *arguments: Any, ranks: tuple[int, ...] = (0, 1)
    ) -> list[Reply]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        replies = []
        for rank in ranks:
            assert self.pipes[rank].poll(500), f"rank {rank} sends no reply"
            replies.append(self.pipes[rank].recv())
        return replies

    def train(
        self,
        folder: Path,
        pair,
        chats,
        *,
        cut: int | None = None,
        layout: dict[str, Any] | None = None,
        ends="done",
        **spec,
    ) -> list[Reply]:
        fresh(folder)
        scratch = folder.with_name(folder.name.removesuffix("-resumed") + "-ctx")
        replies = self.do(
            _train,
            folder,
            scratch,
            TrainSpec(**{**SETTINGS, **spec}),
            {"model": pair.aligned, "data": chats, **models_of(pair, spec)},
            cut,
            layout or {},
        )
        if cut is None:
            assert [status for status, _ in replies] == [ends, ends], replies
        return replies

    def end(self) -> None:
        for member in self.members:
            member.kill()
            member.join()


def _member(rank: int, port: int, pipe: Any) -> None:
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
    }
    torch.set_num_threads(1)
    torch.optim.AdamW = SteadyAdamW  # as in the process of the test
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    # DeepSpeed does not partition small tensors, and the tiny model has only small ones.
    memory.PERSISTENT, memory.BUCKET = 0, 100_000
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send(("done", function(rank, *arguments)))
        except BaseException as error:  # noqa: BLE001  # the test checks it
            pipe.send((type(error).__name__, str(error)))


def models_of(pair, spec: dict[str, Any]) -> dict[str, Path]:
    asft = spec.get("penalty") == "asft"
    return {"base": pair.base, "aligned": pair.aligned} if asft else {}


def _train(rank, folder, scratch, spec, inputs, cut, layout) -> list[str]:
    events: list[str] = []
    layout = dict(layout)
    leaves = layout.pop("leaves", None)
    ctx = context(
        scratch,
        rank=rank,
        world_size=2,
        step_done=cut_off_after(cut) if cut else lambda done: events.append(f"step {done.step}"),
        saved=lambda: events.append("saved"),
        leaving=lambda: rank == leaves,
        **{"checkpoint_every_s": 0.0, **layout},
    )
    run(spec, inputs, folder, ctx)
    return events


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    gang = Gang()
    yield gang
    gang.end()


def losses_of(out: Path) -> list[float]:
    return [
        float(line.split(",")[1]) for line in (out / TrainSpec.CURVE).read_text().splitlines()[1:]
    ]


@pytest.mark.parametrize("quantisation", ["none", "nf4", "int8"])
def test_two_processes_give_the_result_of_one_in_every_layout(
    tmp_path, gang, pair, chats, quantisation
):
    alone, losses = trained(tmp_path / "alone", pair.aligned, chats, quantisation=quantisation)
    for name, layout in {
        "zero3": {"zero_stage": 3},
        "zero2": {"zero_stage": 2, "micro_batch": 2},
        "recomputed": {"zero_stage": 3, "micro_batch": 4, "gradient_checkpointing": True},
    }.items():
        gang.train(tmp_path / name, pair, chats, quantisation=quantisation, layout=layout)
        assert losses_of(tmp_path / name) == losses_alike(losses, quantisation=quantisation), name
        assert apart(adapter_of(alone), adapter_of(tmp_path / name)) < alike(
            quantisation=quantisation
        ), name
    other, _ = trained(tmp_path / "seed1", pair.aligned, chats, quantisation=quantisation, seed=1)
    assert apart(adapter_of(alone), adapter_of(other)) > 5 * alike(
        quantisation=quantisation
    )  # the tolerance distinguishes two seeds


@pytest.mark.parametrize("quantisation", ["none", "nf4", "int8"])
def test_two_processes_give_the_result_of_one_in_bfloat16(
    tmp_path, gang, pair, chats, quantisation
):
    alone, losses = trained(
        tmp_path / "alone", pair.aligned, chats, quantisation=quantisation, dtype="bfloat16"
    )
    gang.train(tmp_path / "zero3", pair, chats, quantisation=quantisation, dtype="bfloat16")
    assert losses_of(tmp_path / "zero3") == losses_alike(losses, "bfloat16")
    assert {tensor.dtype for tensor in adapter_of(tmp_path / "zero3").values()} == {torch.float32}
    assert apart(adapter_of(alone), adapter_of(tmp_path / "zero3")) < alike(
        "bfloat16", quantisation
    )


def test_full_fine_tuning_in_a_gang_ends_with_the_weights_of_one_process(
    tmp_path, gang, pair, chats
):
    spec = {"method": "full", "learning_rate": 1e-3}
    alone, losses = trained(tmp_path / "alone", pair.aligned, chats, **spec)
    gang.train(tmp_path / "zero3", pair, chats, **spec)
    assert losses_of(tmp_path / "zero3") == losses_alike(losses)
    before, one, other = (
        weights_of(folder)
        for folder in (pair.aligned, alone / TrainSpec.MODEL, tmp_path / "zero3" / TrainSpec.MODEL)
    )
    moved = {name: tensor - before[name] for name, tensor in one.items()}
    assert apart(one, other, moved) < alike()


@pytest.mark.parametrize("stage", [2, 3])
def test_full_fine_tuning_in_bfloat16_has_float32_masters_in_a_gang_too(
    tmp_path, gang, pair, chats, stage
):
    spec = {"method": "full", "dtype": "bfloat16", "learning_rate": 1e-3}
    alone, losses = trained(tmp_path / "alone", pair.aligned, chats, **spec)
    layout = {"zero_stage": stage, "micro_batch": 2}
    gang.train(tmp_path / "gang", pair, chats, **spec, layout=layout)
    assert losses_of(tmp_path / "gang") == losses_alike(losses, "bfloat16")
    before, one, other = (
        weights_of(folder)
        for folder in (pair.aligned, alone / TrainSpec.MODEL, tmp_path / "gang" / TrainSpec.MODEL)
    )
    assert {tensor.dtype for tensor in other.values()} == {torch.float32}
    moved = {name: tensor - before[name] for name, tensor in one.items()}
    assert apart(one, other, moved) < alike("bfloat16")
    gang.train(tmp_path / "cut", pair, chats, **spec, layout=layout, cut=3)
    gang.train(tmp_path / "cut-resumed", pair, chats, **spec, layout=layout)
    resumed = weights_of(tmp_path / "cut-resumed" / TrainSpec.MODEL)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in other.items())


@pytest.mark.parametrize("stage", [3, 2])
@pytest.mark.parametrize("penalty", ["asft", "norm"])
def test_a_penalty_and_an_average_in_a_gang_are_those_of_one_process(
    tmp_path, gang, pair, chats, stage, penalty
):
    """Only this test runs penalties, averages and their checkpoint under DeepSpeed."""
    spec = {"penalty": penalty, "penalty_weight": 0.2, "ema_decay": 0.5}
    one = fresh(tmp_path / "one")
    inputs = {"model": pair.aligned, "data": chats, **models_of(pair, spec)}
    run(TrainSpec(**{**SETTINGS, **spec}), inputs, one, context(tmp_path / "one-ctx"))
    plain, _ = trained(tmp_path / "plain", pair.aligned, chats, ema_decay=0.5)
    assert apart(adapter_of(one), adapter_of(plain)) > 5 * alike()
    layout = {"zero_stage": stage, "micro_batch": 4}
    gang.train(tmp_path / "gang", pair, chats, layout=layout, **spec)
    assert apart(adapter_of(one), adapter_of(tmp_path / "gang")) < alike()
    gang.train(tmp_path / "again", pair, chats, cut=2, layout=layout, **spec)
    gang.train(tmp_path / "again-resumed", pair, chats, layout=layout, **spec)
    assert furthest(adapter_of(tmp_path / "gang"), adapter_of(tmp_path / "again-resumed")) == 0


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _storages() -> dict[int, int]:
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [
        item
        for item in gc.get_objects()
        if type(item) in kinds or type(item).__name__ in ("Int8Params", "Params4bit")
    ]
    return {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}


def _held_bytes(
    rank: int, folder: Path, spec: TrainSpec, model: Path, rows: list[Any], stage: int
) -> int:
    """The bytes of this member's tensors for a training after two steps, without DeepSpeed's
    bucket.
    """
    before = _storages()
    engine = gang_engine.DeepSpeedGang(
        spec, model, context(folder, rank=rank, world_size=2, zero_stage=stage)
    )
    for _ in range(2):
        engine.step(rows, 1e-3)
    held = sum(
        size
        for place, size in _storages().items()
        if place not in before and size != 4 * memory.BUCKET
    )
    engine.close()
    return held


@pytest.mark.parametrize(("quantisation", "width"), [("none", 4.0), ("nf4", 0.5), ("int8", 1.0)])
def test_under_zero_3_each_of_two_members_holds_half_of_the_weights(
    tmp_path, gang, pair, chats, quantisation, width
):
    # bitsandbytes keeps a second reference to a whole int8 matrix, which the engine must remove.
    spec, rows = TrainSpec(**{**SETTINGS, "quantisation": quantisation}), rows_of(pair, chats, 16)
    held = {
        stage: [
            size
            for _, size in gang.do(
                _held_bytes, tmp_path / str(stage), spec, pair.aligned, rows, stage
            )
        ]
        for stage in (2, 3)
    }
    linears = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) * width
    for whole, half in zip(held[2], held[3], strict=True):
        assert whole - half > 0.4 * linears, (held, linears)


def _partitioned(rank: int, folder: Path, spec: TrainSpec, model: Path) -> list[tuple[int, int]]:
    """(elements, elements on this member) of each of the base's parameters, before DeepSpeed's
    engine exists.
    """
    import deepspeed

    parts: list[tuple[int, int]] = []
    initialize = deepspeed.initialize

    def record(**arguments: Any) -> Any:
        parts.extend(
            (p.ds_numel, p.ds_tensor.numel())
            for n, p in arguments["model"].named_parameters()
            if "lora" not in n
        )
        return initialize(**arguments)

    deepspeed.initialize = record
    try:
        gang_engine.DeepSpeedGang(spec, model, context(folder, rank=rank, world_size=2)).close()
    finally:
        deepspeed.initialize = initialize
    return parts


def test_without_quantisation_no_member_ever_holds_the_whole_model(tmp_path, gang, pair, chats):
    for status, parts in gang.do(_partitioned, tmp_path, TrainSpec(**SETTINGS), pair.aligned):
        assert status == "done" and len(parts) == 21
        assert all(here == whole // 2 for whole, here in parts)


@pytest.mark.parametrize("stage", [3, 2])
def test_an_interrupted_gang_that_continues_gives_the_uninterrupted_result(
    tmp_path, gang, pair, chats, stage
):
    layout = {"zero_stage": stage}
    gang.train(tmp_path / "whole", pair, chats, quantisation="nf4", layout=layout)
    cut = gang.train(tmp_path / "cut", pair, chats, quantisation="nf4", layout=layout, cut=3)
    assert [status for status, _ in cut] == ["KeyboardInterrupt", "KeyboardInterrupt"]
    resumed = gang.train(tmp_path / "cut-resumed", pair, chats, quantisation="nf4", layout=layout)
    assert [events[:1] for _, events in resumed] == [["step 4"], ["step 4"]]
    assert losses_of(tmp_path / "cut-resumed") == losses_of(tmp_path / "whole")
    assert furthest(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut-resumed")) == 0.0


def test_one_process_continues_a_gangs_training_and_a_gang_continues_that_of_one_process(
    tmp_path, gang, pair, chats
):
    whole, losses = trained(tmp_path / "whole", pair.aligned, chats)
    gang.train(tmp_path / "cut", pair, chats, cut=3)
    ctx = context(tmp_path / "cut-ctx", checkpoint_every_s=0.0, step_done=cut_off_after(5))
    with pytest.raises(KeyboardInterrupt):
        # It does steps 4 and 5; its checkpoint is at step 5.
        trained(tmp_path / "alone", pair.aligned, chats, ctx=ctx)
    last = gang.train(tmp_path / "cut-resumed", pair, chats, layout={"zero_stage": 2})
    assert last[0] == ("done", ["step 6", "saved"])
    assert losses_of(tmp_path / "cut-resumed") == losses_alike(losses)
    assert apart(adapter_of(whole), adapter_of(tmp_path / "cut-resumed")) < alike()


def test_with_a_damaged_checkpoint_a_gang_starts_over_and_gives_the_same_result(
    tmp_path, gang, pair, chats
):
    gang.train(tmp_path / "whole", pair, chats)
    gang.train(tmp_path / "cut", pair, chats, cut=3)
    checkpoint = tmp_path / "cut-ctx" / "scratch" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    resumed = gang.train(tmp_path / "cut-resumed", pair, chats)
    assert resumed[0][1][0] == "step 1"
    assert furthest(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut-resumed")) == 0.0


def test_when_one_members_machine_is_about_to_go_the_whole_gang_saves_and_leaves(
    tmp_path, gang, pair, chats
):
    rarely = {"checkpoint_every_s": 3600.0}
    stayed = gang.train(tmp_path / "stays", pair, chats, layout=rarely)
    assert "saved" not in stayed[0][1]
    left = gang.train(
        tmp_path / "leaves", pair, chats, layout={**rarely, "leaves": 1}, ends="Leaving"
    )
    assert [message for _, message in left] == ["the machine is about to go; step 1 is saved"] * 2
    resumed = gang.train(tmp_path / "leaves-resumed", pair, chats, layout=rarely)
    assert resumed[0][1][0] == "step 2"
    assert losses_of(tmp_path / "leaves-resumed") == losses_of(tmp_path / "stays")


def _runs_out(
    rank: int, folder: Path, spec: TrainSpec, model: Path, rows: list[Any], micro_batch: int
) -> tuple[str, str, int | None]:
    engine = gang_engine.DeepSpeedGang(
        spec, model, context(folder, rank=rank, world_size=2, micro_batch=micro_batch)
    )
    if rank == 1:

        def hook(module: Any, args: Any, kwargs: Any) -> None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        engine.engine.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        engine.step(rows, 1e-3)
    except TrainingError as error:
        return type(error).__name__, str(error), getattr(error, "micro_batch", None)
    return "no error", "", None


@pytest.mark.parametrize(
    ("micro_batch", "name", "smaller"), [(4, "OutOfMemory", 2), (1, "TrainingError", None)]
)
def test_a_member_out_of_memory_gives_a_smaller_micro_batch_or_an_error_at_one_row(
    tmp_path, pair, chats, micro_batch, name, smaller
):
    gang = Gang()  # not the shared one: its rank 0 waits in a collective for ever
    try:
        spec = TrainSpec(**SETTINGS)
        (status, found), *_ = gang.do(
            _runs_out,
            tmp_path,
            spec,
            pair.aligned,
            rows_of(pair, chats, 16),
            micro_batch,
            ranks=(1,),
        )
    finally:
        gang.end()
    assert status == "done" and found[0] == name and found[2] == smaller
    assert "rank 1 of 2 processes under ZeRO-3" in found[1]
    assert issubclass(OutOfMemory, TrainingError)


@pytest.mark.process
def test_a_global_batch_that_does_not_divide_is_an_error_before_loading(tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"global_batch=7 does not divide among 2 processes; choose a multiple of 2",
    ):
        gang_engine.DeepSpeedGang(
            TrainSpec(global_batch=7), tmp_path / "nowhere", context(tmp_path, world_size=2)
        )


def test_a_checkpoint_is_one_file_of_whole_tensors_and_leaves_no_partial_file(
    tmp_path, pair, chats
):
    ctx = context(tmp_path / "ctx", checkpoint_every_s=0.0)
    trained(tmp_path / "out", pair.aligned, chats, ctx=ctx)
    assert [file.name for file in ctx.scratch.iterdir()] == ["checkpoint.pt"]
    saved = engines.read_checkpoint(ctx)
    assert saved is not None and len(saved.curve) == 6
    assert (
        saved.parameters.keys()
        == saved.moments["exp_avg"].keys()
        == saved.moments["exp_avg_sq"].keys()
    )
    assert engines.read_checkpoint(replace(ctx, scratch=tmp_path / "none")) is None


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_checkpoint_truncated_anywhere_is_removed_with_a_warning(tmp_path, caplog, share):
    ctx, whole = context(tmp_path), torch.zeros(10_000)
    engines.write_checkpoint(
        ctx,
        engines.Saved(
            [(1, 0.5, 1e-3, 7)], {"a": whole}, {moment: {"a": whole} for moment in engines.MOMENTS}
        ),
    )
    path = ctx.scratch / "checkpoint.pt"
    assert engines.read_checkpoint(ctx) is not None
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert engines.read_checkpoint(ctx) is None
    assert not path.exists() and "this training starts over" in caplog.text
