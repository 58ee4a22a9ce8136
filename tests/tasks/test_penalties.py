"""Penalties and averages act in every engine as their definitions say. All tests train a model."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ebbline.tasks.errors import TrainingError
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.training.engines import SingleDevice, read_checkpoint
from ebbline.tasks.training.pack_engine import Member
from ebbline.tasks.training.packed import run as run_pack
from ebbline.tasks.training.penalties import Contrast, contrast_in
from ebbline.tasks.training.train import run
from tests.tasks.test_train import SETTINGS, adapter_of, cut_off_after, furthest, rows_of
from tests.tiny import context, fresh
from tests.tolerance import alike, apart, steady_adam

__all__ = ["steady_adam"]
ASFT = {"penalty": "asft", "penalty_weight": 0.05}
NORM = {"penalty": "norm", "penalty_weight": 0.05}


def settings(**changes):
    return TrainSpec(**{**SETTINGS, **changes})


def inputs_of(spec, pair, data):
    models = {"base": pair.base, "aligned": pair.aligned} if spec.penalty == "asft" else {}
    return {"model": pair.aligned, "data": data, **models}


def trained(folder, pair, data, ctx=None, **changes):
    spec, out = settings(**changes), fresh(folder)
    run(spec, inputs_of(spec, pair, data), out, ctx or context(folder.with_name("ctx-" + out.name)))
    return adapter_of(out)


def defined(name, a, b, pair, module):
    """A module's penalty by its definition, in float64; C and the update are formed."""
    update = b.double() @ a.double()
    if name == "norm":
        return update.square().sum()
    base, aligned = (
        load_file(folder / "model.safetensors")[f"{module}.weight"].double()
        for folder in (pair.base, pair.aligned)
    )
    v = aligned - base
    return (update - v @ v.T / v.norm() @ update).square().sum()


@pytest.mark.parametrize("penalty", [ASFT, NORM], ids=["asft", "norm"])
def test_a_step_adds_the_gradient_of_the_penalty_by_its_definition(tmp_path, pair, chats, penalty):
    spec = settings(**penalty)
    contrast = contrast_in(inputs_of(spec, pair, chats))
    engine = SingleDevice(spec, pair.aligned, context(tmp_path), contrast)
    torch.manual_seed(3)
    for _, tensor in engine.trainee.named:
        tensor.data = 0.1 * torch.randn(tensor.shape)
        tensor.grad = torch.ones_like(tensor)
    expected = {}
    matrices = {
        name.removeprefix("base_model.model."): tensor for name, tensor in engine.trainee.named
    }
    for name, a in matrices.items():
        module, found, rest = name.partition(".lora_A.")
        if found:
            b = matrices[f"{module}.lora_B.{rest}"]
            value = 0.05 * defined(spec.penalty, a, b, pair, module)
            expected[name], expected[f"{module}.lora_B.{rest}"] = torch.autograd.grad(value, (a, b))
    engine.trainee._penalty.add_gradients(engine.trainee.named)
    assert len(expected) == len(matrices)
    for name, tensor in matrices.items():
        torch.testing.assert_close(tensor.grad, 1 + expected[name].float(), rtol=1e-4, atol=1e-5)
    engine.close()


def test_a_weight_of_zero_and_a_decay_of_zero_are_off_bit_for_bit(tmp_path, pair, chats):
    plain = trained(tmp_path / "plain", pair, chats)
    for name, changes in {
        "asft": {**ASFT, "penalty_weight": 0.0},
        "norm": {**NORM, "penalty_weight": 0.0},
        "average": {"ema_decay": 0.0},
    }.items():
        assert furthest(plain, trained(tmp_path / name, pair, chats, **changes)) == 0
    assert furthest(plain, trained(tmp_path / "on", pair, chats, **NORM)) > 0


def test_the_norm_penalty_shortens_the_update_and_the_asft_penalty_what_is_outside(
    tmp_path, pair, chats
):
    def total(name, tensors):
        found = 0.0
        for key, a in tensors.items():
            if "lora_A" in key:
                module = key.removeprefix("base_model.model.").partition(".lora_A")[0]
                b = tensors[key.replace("lora_A", "lora_B")]
                found += float(defined(name, a, b, pair, module))
        return found

    plain = trained(tmp_path / "plain", pair, chats)
    for name, penalty in (("norm", NORM), ("asft", ASFT)):
        found = trained(tmp_path / name, pair, chats, **{**penalty, "penalty_weight": 1.0})
        assert total(name, found) < 0.9 * total(name, plain)


def test_an_average_is_that_of_the_weights_after_each_step(tmp_path, pair, chats):
    spec = settings(ema_decay=0.7)
    engine = SingleDevice(spec, pair.aligned, context(tmp_path))
    rows = rows_of(pair, chats, 16)
    named = engine.trainee.named
    average = {name: tensor.detach().double() for name, tensor in named}
    for _ in range(4):
        engine.step(rows, 1e-2)
        for name, tensor in named:
            average[name] = 0.7 * average[name] + 0.3 * tensor.detach().double()
    with engine.gathered() as model:
        for name, tensor in model.named_parameters():
            if name in average:
                torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-7)
    engine.close()


def test_an_interrupted_training_continues_with_its_penalty_and_its_average(tmp_path, pair, chats):
    changes = {**ASFT, "ema_decay": 0.9}
    whole = trained(tmp_path / "whole", pair, chats, **changes)
    cut = context(tmp_path / "ctx", checkpoint_every_s=0.0, step_done=cut_off_after(2))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", pair, chats, cut, **changes)
    saved = read_checkpoint(cut)
    assert saved is not None and saved.averages.keys() == saved.parameters.keys()
    resumed = trained(tmp_path / "resumed", pair, chats, context(tmp_path / "ctx"), **changes)
    assert furthest(whole, resumed) == 0


@pytest.mark.usefixtures("steady_adam")
def test_members_of_a_pack_have_their_own_weights_and_decays(tmp_path, pair, chats):
    specs = [
        settings(**ASFT),
        settings(**{**ASFT, "penalty_weight": 0.5}, ema_decay=0.8),
        settings(**ASFT, ema_decay=0.5, seed=1),
    ]
    members = [
        Member(spec, fresh(tmp_path / f"out{number}"), context(tmp_path / f"ctx{number}"))
        for number, spec in enumerate(specs)
    ]
    for _, error in run_pack(members, pair.aligned, chats, Contrast(pair.base, pair.aligned)):
        assert error is None
    for number, member in enumerate(members):
        alone = fresh(tmp_path / f"alone{number}")
        inputs = inputs_of(member.spec, pair, chats)
        run(member.spec, inputs, alone, context(tmp_path / f"alone-ctx{number}"))
        assert apart(adapter_of(alone), adapter_of(member.out)) < alike()


def test_asft_without_its_two_models_or_with_equal_ones_is_an_error(tmp_path, pair, chats):
    inputs = {"model": pair.aligned, "data": chats}
    equal = {"base": pair.aligned, "aligned": pair.aligned}
    for number, (models, message) in enumerate(
        [({}, "give both"), (equal, "equal in every module")]
    ):
        out, ctx = fresh(tmp_path / f"out{number}"), context(tmp_path / "ctx")
        with pytest.raises(TrainingError, match=message):
            run(settings(**ASFT), {**inputs, **models}, out, ctx)


def test_a_damaged_weight_of_either_model_is_an_error_with_its_module(tmp_path, pair, chats):
    damaged = fresh(tmp_path / "base")
    for file in pair.base.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        run(
            settings(**ASFT),
            {"model": pair.aligned, "data": chats, "base": damaged, "aligned": pair.aligned},
            fresh(tmp_path / "out"),
            context(tmp_path / "ctx"),
        )
