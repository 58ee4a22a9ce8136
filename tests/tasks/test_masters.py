"""Training in bfloat16 keeps what is trained in float32: weights, gradients, AdamW's moments, the
checkpoint and the saved result.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.training import engines
from ebbline.tasks.training.engines import SingleDevice, Trainee
from ebbline.tasks.training.pack_engine import Member, Pack
from tests.tasks.test_train import SETTINGS, cut_off_after, rows_of, trained
from tests.tiny import context
from tests.tolerance import alike, apart, losses_alike, steady_adam

__all__ = ["steady_adam"]
FULL = {"method": "full", "dtype": "bfloat16", "learning_rate": 1e-5, "steps": 60, "epochs": 1.0}


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def change(before, after):
    return torch.cat([(after[name].double() - before[name]).flatten() for name in before])


def test_sixty_small_steps_in_bfloat16_change_the_weights_that_float32_changes(
    tmp_path, pair, chats
):
    before, found = weights_of(pair.aligned), {}
    for dtype in ("float32", "bfloat16"):
        out, _ = trained(tmp_path / dtype, pair.aligned, chats, **{**FULL, "dtype": dtype})
        found[dtype] = change(before, weights_of(out / TrainSpec.MODEL))
        config = json.loads((out / TrainSpec.MODEL / "config.json").read_text())
        assert config["dtype"] == "float32"
    shares = {dtype: float((each != 0).float().mean()) for dtype, each in found.items()}
    assert abs(shares["bfloat16"] - shares["float32"]) < 0.01 < shares["float32"]
    # A rounded start or a rounded result would put rounding into V, far more than 60 steps do.
    alike_V = torch.nn.functional.cosine_similarity(found["float32"], found["bfloat16"], dim=0)
    assert alike_V > 0.9


@pytest.mark.usefixtures("steady_adam")
def test_full_training_in_bfloat16_does_not_depend_on_the_micro_batch(tmp_path, pair, chats):
    spec = {**FULL, "learning_rate": 1e-3, "steps": 6}
    before, found, losses = weights_of(pair.aligned), {}, {}
    for size in (2, 16):
        ctx = context(tmp_path / f"ctx{size}", micro_batch=size)
        out, losses[size] = trained(tmp_path / f"out{size}", pair.aligned, chats, ctx=ctx, **spec)
        found[size] = weights_of(out / TrainSpec.MODEL)
    moved = {name: tensor - before[name] for name, tensor in found[16].items()}
    assert losses[2] == losses_alike(losses[16], "bfloat16")
    assert apart(found[16], found[2], moved) < alike("bfloat16")


def test_a_full_training_in_bfloat16_that_continues_keeps_its_masters(tmp_path, pair, chats):
    spec = {**FULL, "steps": 8}
    whole, losses = trained(tmp_path / "whole", pair.aligned, chats, **spec)
    ctx = context(tmp_path / "ctx", checkpoint_every_s=0.0, step_done=cut_off_after(4))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", pair.aligned, chats, ctx=ctx, **spec)
    saved = engines.read_checkpoint(ctx)
    assert saved is not None
    tensors = [saved.parameters, *saved.moments.values()]
    assert {tensor.dtype for named in tensors for tensor in named.values()} == {torch.float32}
    resumed, continued = trained(
        tmp_path / "resumed", pair.aligned, chats, ctx=context(tmp_path / "ctx"), **spec
    )
    assert continued == losses
    name = "model/model.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_a_checkpoint_that_is_not_in_float32_is_removed_with_a_warning(tmp_path, caplog):
    ctx = context(tmp_path)
    for parameter, moment in [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]:
        moments = {name: {"a": torch.zeros(3, dtype=moment)} for name in engines.MOMENTS}
        engines.write_checkpoint(
            ctx,
            engines.Saved([(1, 0.5, 1e-3, 7)], {"a": torch.zeros(3, dtype=parameter)}, moments),
        )
        caplog.clear()
        assert engines.read_checkpoint(ctx) is None
        assert "is not in float32; this training starts over" in caplog.text
        assert not (ctx.scratch / "checkpoint.pt").exists()


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_adapters_on_a_bfloat16_base_are_float32_alone_and_in_a_pack(
    tmp_path, pair, chats, quantisation
):
    spec = TrainSpec(**{**SETTINGS, "dtype": "bfloat16", "quantisation": quantisation})
    alone = SingleDevice(spec, pair.aligned, context(tmp_path / "alone"))
    alone.step(rows_of(pair, chats, 16), 1e-3)
    members = [
        Member(
            spec.model_copy(update={"rank": rank}), tmp_path, context(tmp_path / str(rank)), name
        )
        for rank, name in ((2, "a"), (4, "b"))
    ]
    pack = Pack(members, pair.aligned)
    pack.backward({member: rows_of(pair, chats, 16) for member in members})
    for trainee in pack.trainees.values():
        trainee.update(1e-3)
    for trainee in (alone.trainee, *pack.trainees.values()):
        held = [state[moment] for state in trainee.optimizer.state.values() for moment in state]
        assert {tensor.dtype for tensor in [*trainee.parameters, *held]} == {torch.float32}


@given(
    start=st.floats(-4, 4).filter(lambda value: abs(value) > 1e-3),
    rates=st.lists(st.floats(1e-7, 1e-3), min_size=1, max_size=20),
    parts=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_a_bfloat16_parameter_follows_the_float32_training_of_equal_gradients(start, rates, parts):
    """The master equals a float32 training bit by bit, and the parameter is the master rounded."""
    wide = torch.nn.Parameter(torch.tensor([start, -start]))
    narrow = torch.nn.Parameter(torch.tensor([start, -start]))
    spec = TrainSpec(**{**SETTINGS, "weight_decay": 0.1})
    plain = Trainee([("w", wide)], spec)
    rounded = Trainee([("w", narrow)], spec, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    for step, rate in enumerate(rates):
        for part in range(parts):
            factor = torch.tensor([0.5 + step, -1.0 - part])  # exact in both dtypes
            (wide * factor).sum().backward()
            (narrow * factor.bfloat16()).sum().backward()
        plain.update(rate)
        rounded.update(rate)
        assert torch.equal(rounded.masters[0], wide)
        assert torch.equal(narrow, wide.bfloat16())


def test_a_trained_weight_that_is_not_finite_is_an_error(tmp_path, pair, chats, monkeypatch):
    def broken(self):
        self.masters[0].data.fill_(float("inf"))

    monkeypatch.setattr(Trainee, "show_result", broken)
    with pytest.raises(engines.TrainingError, match=r"the trained tensor .* is not finite"):
        trained(tmp_path / "out", pair.aligned, chats, **{**FULL, "dtype": "float32", "steps": 1})
    assert not (tmp_path / "out" / TrainSpec.MODEL).exists()
