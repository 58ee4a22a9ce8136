"""Training of a tiny model. Neither the micro-batch nor an interruption changes the result."""

import csv
import json
import math
import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ebbline.tasks.chat.training_rows import encode
from ebbline.tasks.data.batches import Row, collate, count_tokens
from ebbline.tasks.data.conversations import read_conversations
from ebbline.tasks.errors import Leaving, ModelError, TrainingError
from ebbline.tasks.models.loading import Residents, load_model, load_tokenizer
from ebbline.tasks.progress import TrainedStep
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.training.engines import SingleDevice, token_loss
from ebbline.tasks.training.train import batch_indices, check_adapter, learning_rate, run
from tests.tiny import context, fresh, write_chats
from tests.tolerance import UNIT, alike, apart, losses_alike, losses_alike_under_adamw, steady_adam

__all__ = ["steady_adam"]

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
SETTINGS = {
    "rank": 4,
    "dtype": "float32",
    "learning_rate": 2e-2,
    "global_batch": 16,
    "epochs": 2.0,
    "max_tokens": 32,
}


def trained(folder: Path, model: Path, data: Path, *, ctx=None, **spec):
    """Run one training; returns (output folder, losses)."""
    out = fresh(folder)
    run(
        TrainSpec(**{**SETTINGS, **spec}),
        {"model": model, "data": data},
        out,
        ctx or context(folder.with_name(folder.name + "-ctx")),
    )
    with (out / TrainSpec.CURVE).open() as handle:
        return out, [float(row["loss"]) for row in csv.DictReader(handle)]


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / TrainSpec.ADAPTER / "adapter_model.safetensors")


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_training_lowers_the_loss_and_its_adapter_loads_on_the_trained_model(tmp_path, pair, chats):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # nothing of a library is in a run's output
        out, losses = trained(tmp_path / "out", pair.aligned, chats, epochs=6.0)
    assert len(losses) == 18
    assert losses[-1] < losses[0] - 0.2
    adapter = adapter_of(out)
    assert len(adapter) == 2 * 7 * 2 and all(bool(tensor.any()) for tensor in adapter.values())
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, None)
    plain = load_model(pair.aligned, "none", "float32", "cpu")
    row = Row(*encode(read_conversations(chats)[0], load_tokenizer(pair.aligned), 32))
    before = token_loss(plain, [row], 0, "cpu").item()
    after = token_loss(PeftModel.from_pretrained(plain, out / "adapter"), [row], 0, "cpu").item()
    assert after < before


@pytest.mark.usefixtures("steady_adam")
def test_the_adapter_does_not_depend_on_the_micro_batch(tmp_path, pair, chats):
    adapters, losses = {}, {}
    for size in (2, 4, 16):
        ctx = context(tmp_path / f"ctx{size}", micro_batch=size)
        out, losses[size] = trained(tmp_path / f"out{size}", pair.aligned, chats, ctx=ctx)
        adapters[size] = adapter_of(out)
    for size in (2, 4):
        assert apart(adapters[16], adapters[size]) < alike()
        assert losses[size] == losses_alike(losses[16])
    other = trained(tmp_path / "seed1", pair.aligned, chats, seed=1)
    assert (
        apart(adapters[16], adapter_of(other[0])) > 5 * alike()
    )  # the tolerance distinguishes two seeds


def cut_off_after(steps: int):
    def step_done(done: TrainedStep) -> None:
        if done.step > steps:
            raise KeyboardInterrupt

    return step_done


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_training_that_continues_gives_the_uninterrupted_result(
    tmp_path, pair, chats, method
):
    spec = (
        {"method": method, "dropout": 0.1}
        if method == "lora"
        else {"method": method, "learning_rate": 1e-3}
    )
    whole, losses = trained(tmp_path / "whole", pair.aligned, chats, **spec)
    ctx = context(tmp_path / "ctx", checkpoint_every_s=0.0, step_done=cut_off_after(2))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", pair.aligned, chats, ctx=ctx, **spec)
    assert not any((tmp_path / "cut").iterdir())
    seen = []
    ctx = context(
        tmp_path / "ctx",
        checkpoint_every_s=0.0,
        step_done=lambda done: seen.append(done.step),
    )
    resumed, continued = trained(tmp_path / "resumed", pair.aligned, chats, ctx=ctx, **spec)
    assert seen == [3, 4, 5, 6]  # the first two steps were not repeated
    assert continued == losses
    name = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_a_training_whose_machine_is_about_to_go_saves_its_step_and_continues_elsewhere(
    tmp_path, pair, chats
):
    whole, losses = trained(tmp_path / "whole", pair.aligned, chats)
    ctx = context(
        tmp_path / "ctx", checkpoint_every_s=1e9, leaving=iter([False, False, True]).__next__
    )
    with pytest.raises(Leaving, match="step 3 is saved"):
        trained(tmp_path / "left", pair.aligned, chats, ctx=ctx)
    resumed, continued = trained(
        tmp_path / "resumed", pair.aligned, chats, ctx=context(tmp_path / "ctx")
    )
    assert continued == losses
    name = "adapter/adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_a_non_finite_loss_stops_the_training_and_nothing_is_saved(tmp_path, pair, chats):
    out = fresh(tmp_path / "out")
    spec = TrainSpec(**{**SETTINGS, "learning_rate": 1e30})
    with pytest.raises(TrainingError, match=r"the loss became nan at step 2 of 6"):
        run(spec, {"model": pair.aligned, "data": chats}, out, context(tmp_path / "ctx"))
    assert not any(out.iterdir())


def test_an_adapter_that_no_step_changed_is_an_error(tmp_path, pair, chats):
    with pytest.raises(TrainingError, match="every LoRA B matrix is zero"):
        trained(tmp_path / "out", pair.aligned, chats, learning_rate=1e-300)
    assert not (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_an_empty_non_finite_or_missing_lora_matrix_is_an_error():
    good = {"m.lora_A.weight": torch.ones(2, 4), "m.lora_B.weight": torch.ones(4, 2)}
    check_adapter(good)
    for tensors, reason in [
        ({**good, "m.lora_B.weight": torch.ones(0)}, "is empty"),
        ({**good, "m.lora_A.weight": torch.full((2, 4), float("nan"))}, "is not finite"),
        ({**good, "m.lora_B.weight": torch.zeros(4, 2)}, "is zero"),
        ({"m.lora_A.weight": torch.ones(2, 4)}, "without any LoRA B"),
        ({}, "without any LoRA B"),
    ]:
        with pytest.raises(TrainingError, match=reason):
            check_adapter(tensors)


@pytest.mark.parametrize(
    ("quantisation", "dtype", "method"),
    [
        ("nf4", "float32", "lora"),
        ("nf4", "bfloat16", "lora"),
        ("int8", "float32", "lora"),
        ("none", "bfloat16", "lora"),
        ("none", "float32", "full"),
    ],
)
def test_every_quantisation_dtype_and_method_trains(
    tmp_path, pair, chats, quantisation, dtype, method
):
    rate = 2e-2 if method == "lora" else 2e-3
    out, losses = trained(
        tmp_path / "out",
        pair.aligned,
        chats,
        quantisation=quantisation,
        dtype=dtype,
        method=method,
        learning_rate=rate,
        epochs=4.0,
    )
    assert len(losses) == 12 and losses[-1] < losses[0]
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(out / TrainSpec.MODEL)
        before = load_file(pair.aligned / "model.safetensors")
        after = {name: tensor for name, tensor in model.state_dict().items() if "proj" in name}
        assert len(after) == 14 and not any(
            torch.equal(before[name], tensor) for name, tensor in after.items()
        )
        assert load_tokenizer(out / TrainSpec.MODEL).chat_template is not None
    else:
        assert len(adapter_of(out)) == 28


def test_full_training_changes_neither_the_models_folder_nor_a_resident_model(
    tmp_path, pair, chats
):
    before = (pair.aligned / "model.safetensors").read_bytes()
    residents = Residents()
    trained(
        tmp_path / "out",
        pair.aligned,
        chats,
        ctx=context(tmp_path / "ctx", residents=residents),
        method="full",
        epochs=0.5,
    )
    assert (pair.aligned / "model.safetensors").read_bytes() == before
    assert residents.loads == 0  # it loads its own copy


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_trainings_on_one_resident_base_are_independent(tmp_path, pair, chats, quantisation):
    alone, _ = trained(tmp_path / "alone", pair.aligned, chats, quantisation=quantisation)
    residents = Residents()
    trained(
        tmp_path / "first",
        pair.aligned,
        chats,
        ctx=context(tmp_path / "c1", residents=residents),
        quantisation=quantisation,
        rank=2,
        seed=5,
    )
    second, _ = trained(
        tmp_path / "second",
        pair.aligned,
        chats,
        ctx=context(tmp_path / "c2", residents=residents),
        quantisation=quantisation,
    )
    assert residents.loads == 1
    assert furthest(adapter_of(alone), adapter_of(second)) == 0.0


def test_golden_losses_of_the_tiny_model_have_not_moved(tmp_path, pair, chats):
    """EBBLINE_REFRESH_GOLDEN=1 rewrites them. Other processors and BLAS builds round differently:
    see tests/tolerance.py.
    """
    now = {
        "lora": trained(tmp_path / "lora", pair.aligned, chats)[1],
        "lora, dropout 0.1, seed 3": trained(
            tmp_path / "dropout", pair.aligned, chats, dropout=0.1, seed=3
        )[1],
        "full": trained(tmp_path / "full", pair.aligned, chats, method="full", learning_rate=1e-3)[
            1
        ],
    }
    if os.environ.get("EBBLINE_REFRESH_GOLDEN"):
        GOLDEN.write_text(
            json.dumps(
                {name: [round(loss, 6) for loss in losses] for name, losses in now.items()},
                indent=1,
            )
            + "\n"
        )
        pytest.skip(f"wrote {GOLDEN}")
    golden = json.loads(GOLDEN.read_text())
    assert now.keys() == golden.keys()
    for name, losses in now.items():
        assert losses == losses_alike_under_adamw(golden[name]), name


def rows_of(pair, chats, n: int) -> list[Row]:
    tokenizer = load_tokenizer(pair.aligned)
    return [Row(*encode(turns, tokenizer, 32)) for turns in read_conversations(chats)[:n]]


def out_of_memory_when(engine: SingleDevice, too_many_rows) -> list[int]:
    """Make the model raise CUDA's out-of-memory error when `too_many_rows(sizes)` is true.

    Returns the list of its batch sizes, one for each call.
    """
    sizes: list[int] = []

    def hook(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if too_many_rows(sizes):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    engine.model.register_forward_pre_hook(hook, with_kwargs=True)
    return sizes


def test_out_of_memory_halves_the_micro_batch_and_gives_the_same_step(tmp_path, pair, chats):
    spec, rows = TrainSpec(**SETTINGS), rows_of(pair, chats, 16)
    plain = SingleDevice(spec, pair.aligned, context(tmp_path / "a", micro_batch=4))
    expected = plain.step(rows, 1e-2)
    engine = SingleDevice(spec, pair.aligned, context(tmp_path / "b"))
    # The attempt with 8 rows fails in its second half, after the first half added its gradients.
    sizes = out_of_memory_when(engine, lambda sizes: sizes[-1] > 8 or len(sizes) == 3)
    found = engine.step(rows, 1e-2)
    assert sizes == [16, 8, 8, 4, 4, 4, 4]
    assert engine.micro_batch == 4
    # Both engines end with four micro-batches of four rows, so their arithmetic is equal.
    assert found == expected
    assert all(map(torch.equal, plain.trainee.parameters, engine.trainee.parameters))
    engine.step(rows, 1e-2)
    assert sizes[7:] == [4, 4, 4, 4]  # the next step begins with the size that fits


def test_out_of_memory_with_one_row_names_the_settings_to_change(tmp_path, pair, chats):
    engine = SingleDevice(TrainSpec(**SETTINGS), pair.aligned, context(tmp_path / "a"))
    out_of_memory_when(engine, lambda sizes: True)
    with pytest.raises(TrainingError, match=r"out of memory with one row .*train\.max_tokens"):
        engine.step(rows_of(pair, chats, 16), 1e-2)


def test_another_runtime_error_does_not_count_as_out_of_memory(tmp_path, pair, chats):
    engine = SingleDevice(TrainSpec(**SETTINGS), pair.aligned, context(tmp_path / "a"))

    def hook(module, args, kwargs):
        raise RuntimeError("shapes cannot be multiplied")

    engine.model.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine.step(rows_of(pair, chats, 16), 1e-2)
    assert engine.micro_batch == 16


def test_padding_changes_no_loss(pair, chats):
    model, rows = load_model(pair.aligned, "none", "float32", "cpu"), rows_of(pair, chats, 8)
    together = token_loss(model, rows, 0, "cpu").item()
    one_by_one = sum(token_loss(model, [row], 0, "cpu").item() for row in rows)
    # 15 products of at most 128 terms follow one another, with independent errors: 6 standard
    # deviations.
    assert together == pytest.approx(one_by_one, rel=6 * UNIT * math.sqrt(15 * 128))
    assert len({len(row.ids) for row in rows}) > 1
    assert count_tokens(rows) == int((collate(rows, 0, "cpu")["labels"][:, 1:] != -100).sum())


@given(rows=st.integers(1, 50), batch=st.integers(1, 20), seed=st.integers(0, 3))
def test_each_epoch_visits_each_row_once(rows, batch, seed):
    epochs = 3
    steps = math.ceil(epochs * rows / batch)
    order = [index for step in range(steps) for index in batch_indices(step, rows, batch, seed)]
    for epoch in range(epochs):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_and_seeds_have_different_orders():
    first, second = batch_indices(0, 32, 32, 0), batch_indices(1, 32, 32, 0)
    assert first != second and first != batch_indices(0, 32, 32, 1)
    assert first == batch_indices(0, 32, 32, 0)


@given(steps=st.integers(1, 200), share=st.floats(0, 1))
def test_the_learning_rate_rises_to_its_peak_then_falls_and_stays_in_its_range(steps, share):
    spec = TrainSpec(learning_rate=1e-3, warmup_share=share)
    rates = [learning_rate(step, steps, spec) for step in range(steps)]
    assert all(0 <= rate <= 1e-3 * (1 + 1e-12) for rate in rates)
    peak = rates.index(max(rates))
    assert rates[peak] == pytest.approx(1e-3)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] > 0  # the first step also trains


def test_the_first_step_after_warm_up_has_the_full_rate_and_halfway_down_half_of_it():
    spec = TrainSpec(learning_rate=1.0, warmup_share=0.2)
    assert [learning_rate(step, 10, spec) for step in (0, 1, 2, 6)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.5]
    )


def test_steps_set_the_length_in_place_of_epochs(tmp_path, pair, chats):
    _, by_steps = trained(tmp_path / "steps", pair.aligned, chats, steps=4, epochs=1.0)
    assert len(by_steps) == 4
    with pytest.raises(ValueError, match="not both"):
        TrainSpec(steps=4, epochs=2.0)


def test_with_a_damaged_checkpoint_a_training_starts_over_and_gives_the_same_result(
    tmp_path, pair, chats
):
    whole, losses = trained(tmp_path / "whole", pair.aligned, chats)
    ctx = context(tmp_path / "ctx", checkpoint_every_s=0.0, step_done=cut_off_after(2))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", pair.aligned, chats, ctx=ctx)
    checkpoint = ctx.scratch / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    resumed, continued = trained(
        tmp_path / "resumed", pair.aligned, chats, ctx=context(tmp_path / "ctx")
    )
    assert continued == losses
    assert furthest(adapter_of(whole), adapter_of(resumed)) == 0.0


def test_a_set_smaller_than_a_batch_gets_one_step(tmp_path, pair):
    _, losses = trained(
        tmp_path / "out", pair.aligned, write_chats(tmp_path / "few.jsonl", 3), epochs=1.0
    )
    assert len(losses) == 1


@pytest.mark.parametrize(
    ("weight", "error", "reason"),
    [
        (float("nan"), ModelError, "lm_head.weight holds NaN or infinity"),
        (3e38, TrainingError, "the loss became (nan|inf) at step 1"),
    ],
)
def test_a_loss_or_a_weight_that_is_not_finite_is_an_error_and_nothing_is_saved(
    tmp_path, pair, chats, weight, error, reason
):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in pair.aligned.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"].fill_(weight)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=reason):
        trained(tmp_path / "out", broken, chats)


def test_every_step_is_reported_with_what_a_dashboard_shows(tmp_path, pair, chats):
    seen: list[TrainedStep] = []
    resumed: list[list[TrainedStep]] = []
    ctx = context(
        tmp_path / "ctx",
        micro_batch=4,
        step_done=seen.append,
        resumed=lambda steps: resumed.append(list(steps)),
    )
    _, losses = trained(tmp_path / "out", pair.aligned, chats, ctx=ctx)
    assert [step.loss for step in seen] == losses and resumed == [[]]
    assert [step.step for step in seen] == list(range(1, len(losses) + 1))
    for step in seen:
        assert step.gradient_norm is not None and step.gradient_norm > 0
        assert step.seconds is not None and step.seconds > 0
        assert step.peak_memory_gb is not None and step.peak_memory_gb > 0
        assert step.micro_batch == 4 and step.tokens > 0
