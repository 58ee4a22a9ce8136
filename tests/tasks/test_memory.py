"""Predicted memory, each part against what PyTorch, PEFT and bitsandbytes allocate. The table in
docs/gangs.md comes from here.
"""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from ebbline.tasks.data.batches import Row
from ebbline.tasks.errors import ModelError, TrainingError
from ebbline.tasks.models.loading import load_model, load_tokenizer
from ebbline.tasks.models.memory import (
    GB,
    Layout,
    constant_bytes,
    fits,
    fitting,
    kept_per_token,
    laid_out,
    most_packed,
    predict,
    predictable,
    quantised_bytes,
    shape_of,
    warn_of_a_wrong_prediction,
)
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.training.engines import token_loss, trainable
from ebbline.tasks.training.pack_engine import Member, Pack
from tests.tiny import context

DOC = Path(__file__).parents[2] / "docs" / "gangs.md"
COMMON = {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False}
LLAMA_2 = {
    "7b": {
        **COMMON,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
    },
    "13b": {
        **COMMON,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "intermediate_size": 13824,
    },
    "70b": {
        **COMMON,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
    },
}
LONG = TrainSpec(rank=8, quantisation="nf4", max_tokens=2048, global_batch=16)


def with_quantisation(quantisation: str) -> TrainSpec:
    return LONG.model_copy(update={"quantisation": quantisation})


def table() -> str:
    """Llama-2-70B, LoRA of rank 8 on all linears, 2,048 tokens, a global batch of 16, with the
    largest micro-batch that fits.
    """
    shape = shape_of(LLAMA_2["70b"])
    lines = [
        "| base | GPUs | layout | loading | training | of it: base | activations | all else |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for quantisation in ("nf4", "int8", "none"):
        spec = with_quantisation(quantisation)
        for gpus in (2, 4, 8):
            for memory_gb in (40, 80):
                head = (
                    f"| {'bf16' if quantisation == 'none' else quantisation} | {gpus} x "
                    f"{memory_gb} GB |"
                )
                try:
                    layout = fitting(LLAMA_2["70b"], spec, gpus, memory_gb)
                except TrainingError as error:
                    lines.append(
                        f"{head} does not fit: {str(error).split('What would fit: ')[1]} | "
                        "| | | | |"
                    )
                    continue
                found = predict(shape, spec, layout)
                parts = dict(found.training)
                base = parts.pop("base weights") + parts.pop("quantisation constants")
                activations = parts.pop("layer inputs") + parts.pop(
                    "a layer's activations, or the logits"
                )
                figures = [
                    found.loading,
                    sum(found.training.values()),
                    base,
                    activations,
                    sum(parts.values()),
                ]
                cells = " | ".join(f"{figure / GB:.1f}" for figure in figures)
                lines.append(
                    f"{head} ZeRO-{layout.zero_stage}, micro-batch {layout.micro_batch} | {cells} |"
                )
    return "\n".join(lines)


def test_the_table_in_the_documentation_equals_what_the_code_computes():
    assert table() in DOC.read_text()


@pytest.mark.model
@pytest.mark.parametrize("size", ["7b", "13b", "70b"])
def test_parameters_of_llama_2_and_of_its_adapters_are_counted_exactly(size, tmp_path):
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(**{k: v for k, v in LLAMA_2[size].items() if k != "model_type"})
        )
        assert sum(p.numel() for p in model.parameters()) == shape_of(LLAMA_2[size]).parameters
        for spec in (
            TrainSpec(rank=8),
            TrainSpec(rank=16, target_modules=("q_proj", "v_proj", "down_proj")),
        ):
            model = LlamaForCausalLM(
                LlamaConfig(**{k: v for k, v in LLAMA_2[size].items() if k != "model_type"})
            )
            lora = [
                p.numel()
                for p in trainable(model, spec, context(tmp_path)).parameters()
                if p.requires_grad
            ]
            assert sorted(lora) == sorted(shape_of(LLAMA_2[size]).adapter(spec))


def test_parameters_of_the_tiny_model_are_counted_exactly(pair):
    config = json.loads((pair.aligned / "config.json").read_text())
    assert shape_of(config).parameters == sum(
        p.numel() for p in load_model(pair.aligned, "none", "float32", "cpu").parameters()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_is_predicted_with_the_bytes_that_bitsandbytes_holds(pair, dtype):
    model = load_model(pair.aligned, "nf4", dtype, "cpu")
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    packed = sum(layer.weight.untyped_storage().nbytes() for layer in layers)
    states = [layer.weight.quant_state for layer in layers]
    held = [
        tensor
        for s in states
        for tensor in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)
    ]
    shape = shape_of(json.loads((pair.aligned / "config.json").read_text()))
    assert quantised_bytes(shape, "nf4", 4) == packed
    assert constant_bytes(shape, "nf4") == sum(
        tensor.numel() * tensor.element_size() for tensor in held
    )


def test_int8_is_predicted_with_the_bytes_that_bitsandbytes_holds(pair):
    model = load_model(pair.aligned, "int8", "float32", "cpu")
    weights = [p for p in model.parameters() if type(p).__name__ == "Int8Params"]
    shape = shape_of(json.loads((pair.aligned / "config.json").read_text()))
    assert quantised_bytes(shape, "int8", 4) == sum(p.untyped_storage().nbytes() for p in weights)
    assert constant_bytes(shape, "int8") == sum(
        p.SCB.numel() * p.SCB.element_size() for p in weights
    )


def small_llama(dtype: torch.dtype, vocabulary: int, layers: int, recompute: bool, folder: Path):
    """(a small Llama with LoRA, its shape, its spec). It is 256 wide, so that rounding and
    bookkeeping are small beside its tensors.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    spec = TrainSpec(
        rank=8, dtype="float32" if dtype == torch.float32 else "bfloat16", max_tokens=128
    )
    model = trainable(
        LlamaForCausalLM(config).to(dtype), spec, context(folder, gradient_checkpointing=recompute)
    )
    model.config.use_cache = False
    return model.train(), shape_of(config.to_dict()), spec


ROWS = [Row([i % 120 for i in range(128)], [5] * 128)] * 2


@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_keeps_for_its_backward_pass_is_counted_to_the_byte(tmp_path, dtype):
    def kept(layers: int) -> int:
        model, _, _ = small_llama(dtype, 128, layers, False, tmp_path)
        own = {
            item.untyped_storage().data_ptr() for item in (*model.parameters(), *model.buffers())
        }
        seen: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            token_loss(model, ROWS, 0, "cpu")
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    _, shape, spec = small_llama(dtype, 128, 1, False, tmp_path)
    assert kept(3) - kept(2) == kept_per_token(shape, spec) * 2 * 128


@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "recompute"), [(128, True), (8000, True), (128, False)])
def test_a_steps_peak_is_predicted_within_a_tenth_of_the_allocators(
    tmp_path, dtype, vocabulary, recompute
):
    model, shape, spec = small_llama(dtype, vocabulary, 6, recompute, tmp_path)
    token_loss(model, ROWS, 0, "cpu").backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        token_loss(model, ROWS, 0, "cpu").backward()
    events = sorted(
        (e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    )
    level = peak = 0
    for event in events:
        level += event.nbytes()
        peak = max(peak, level)
    found = predict(shape, spec, Layout(1, 0, 2, recompute)).training
    assert found["layer inputs"] + found["a layer's activations, or the logits"] == pytest.approx(
        peak, rel=0.1
    )


@pytest.mark.parametrize("recompute", [True, False])
def test_a_packs_peak_is_predicted_at_most_a_fifth_above_the_allocators_and_not_below(
    pair, tmp_path, recompute
):
    model, shape, spec = small_llama(torch.float32, 128, 6, recompute, tmp_path)
    folder = tmp_path / "model"
    base = model.unload()
    base.save_pretrained(folder)
    load_tokenizer(pair.aligned).save_pretrained(folder)
    specs = [spec.model_copy(update={"rank": rank, "global_batch": 2}) for rank in (4, 8, 8, 32)]
    pack = [
        Member(one, tmp_path, context(tmp_path, gradient_checkpointing=recompute)) for one in specs
    ]
    engine = Pack(pack, folder)
    engine.backward(dict.fromkeys(pack, ROWS))
    for member in pack:
        engine.trainees[member.name].forget()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine.backward(dict.fromkeys(pack, ROWS))
    engine.close()
    events = sorted(
        (e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    )
    level = peak = 0
    for event in events:
        level += event.nbytes()
        peak = max(peak, level)
    found = dict(predict(shape, specs[0], Layout(1, 0, 2, recompute), specs[1:]).training)
    transient = (
        found["layer inputs"]
        + found["a layer's activations, or the logits"]
        + found["stacked adapters"]
        + found["gradients"]
    )
    # Above the peak, because the prediction counts all gradients, which come one by one
    assert 0.98 * peak < transient < 1.2 * peak


@pytest.mark.parametrize("memory_gb", [12.0, 24.0, 80.0])
def test_the_largest_pack_that_fits_has_the_micro_batch_of_one_training(memory_gb):
    spec = LONG.model_copy(update={"max_tokens": 512, "global_batch": 4})
    shape, layout = shape_of(LLAMA_2["7b"]), fitting(LLAMA_2["7b"], spec, 1, memory_gb)
    most = most_packed(LLAMA_2["7b"], spec, memory_gb, 1000)
    assert fits(predict(shape, spec, layout, [spec] * (most - 1)), memory_gb)
    assert not fits(predict(shape, spec, layout, [spec] * most), memory_gb)
    assert most_packed(LLAMA_2["7b"], spec, memory_gb, 2) == min(2, most)
    assert most_packed(LLAMA_2["7b"], spec, 4.0, 1000) == 0


@pytest.mark.slow
@settings(max_examples=20)
@given(
    ranks=st.lists(st.sampled_from([4, 8, 16, 64, 256]), min_size=1, max_size=40),
    memory_gb=st.sampled_from([16.0, 24.0, 80.0]),
)
def test_unlike_adapters_whose_shares_add_up_to_one_fit_together(ranks, memory_gb):
    specs = [
        LONG.model_copy(update={"rank": rank, "max_tokens": 512, "global_batch": 2})
        for rank in ranks
    ]
    shares, pack = 0.0, []
    for spec in specs:
        share = 1 / max(1, most_packed(LLAMA_2["7b"], spec, memory_gb, 64))
        if shares + share <= 1:
            shares, pack = shares + share, [*pack, spec]
    layout = Layout(
        1, 0, min(fitting(LLAMA_2["7b"], spec, 1, memory_gb).micro_batch for spec in pack)
    )
    assert fits(predict(shape_of(LLAMA_2["7b"]), pack[0], layout, pack[1:]), memory_gb)


def test_llama_2_70b_with_qlora_on_two_gpus_of_40_gb_is_near_the_published_figure():
    # 36.6 GB a GPU: PEFT's documentation, QLoRA with DeepSpeed ZeRO-3, rank 8 on all linears, 2,048
    # tokens, micro-batch 2, storage bf16.
    found = predict(shape_of(LLAMA_2["70b"]), LONG, Layout(2, 3, 2))
    assert found.total_gb == pytest.approx(36.6, rel=0.05)
    # Loading holds the whole NF4 model on each GPU, before it is sharded
    assert sum(found.training.values()) < found.loading


@given(
    quantisation=st.sampled_from(["none", "int8", "nf4"]),
    gpus=st.sampled_from([1, 2, 4, 8, 16]),
    memory_gb=st.integers(8, 200),
    tokens=st.sampled_from([256, 1024, 4096]),
    size=st.sampled_from(["7b", "13b", "70b"]),
)
def test_the_chosen_layout_fits_and_no_larger_micro_batch_does(
    quantisation, gpus, memory_gb, tokens, size
):
    spec, shape = (
        LONG.model_copy(update={"quantisation": quantisation, "max_tokens": tokens}),
        shape_of(LLAMA_2[size]),
    )
    try:
        layout = fitting(LLAMA_2[size], spec, gpus, memory_gb)
    except TrainingError as error:
        assert f"on each of {gpus} GPU" in str(error) and "What would fit: " in str(error)
        larger = 1
    else:
        assert fits(predict(shape, spec, layout), memory_gb)
        assert spec.global_batch // gpus % layout.micro_batch == 0
        larger = layout.micro_batch * 2
    if larger <= spec.global_batch // gpus:
        assert not any(
            fits(predict(shape, spec, Layout(gpus, s, larger)), memory_gb)
            for s in ((0,) if gpus == 1 else (2, 3))
        )


def test_a_training_that_does_not_fit_is_an_error_that_says_what_would():
    with pytest.raises(
        TrainingError,
        match=r"needs \d+\.\d GB on each of 4 GPUs of 40 GB.*What would fit: 8 such GPUs, or "
        r"quantisation",
    ):
        fitting(LLAMA_2["70b"], with_quantisation("none"), 4, 40)


def test_another_family_of_models_and_full_fine_tuning_are_not_predicted():
    assert predictable(LLAMA_2["7b"], LONG)
    assert not predictable({**LLAMA_2["7b"], "model_type": "gpt2"}, LONG)
    assert not predictable({**LLAMA_2["7b"], "attention_bias": True}, LONG)
    assert not predictable(LLAMA_2["7b"], TrainSpec(method="full"))
    with pytest.raises(ModelError, match="'gpt2'"):
        shape_of({"model_type": "gpt2"})


def test_a_worker_uses_the_largest_micro_batch_that_fits_unless_one_is_set(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2["70b"]))
    inputs = {"model": tmp_path}
    ctx = context(tmp_path / "ctx", world_size=2)
    laid, predicted_gb = laid_out(LONG, inputs, ctx, 40.0)
    assert (laid.micro_batch, laid.zero_stage) == (2, 3)
    assert predicted_gb is not None and predicted_gb > 34
    assert (
        laid_out(LONG, inputs, context(tmp_path / "ctx", world_size=2, micro_batch=1), 40.0)[
            0
        ].micro_batch
        == 1
    )
    assert laid_out(LONG, inputs, ctx, None)[0] == ctx  # the GPU's memory is unknown
    with pytest.raises(TrainingError, match="1 GPU of 24 GB"):
        laid_out(LONG, inputs, context(tmp_path / "ctx"), 24.0)


def test_a_prediction_error_above_a_fifth_is_a_warning(caplog):
    warn_of_a_wrong_prediction(10.0, 9.0)
    warn_of_a_wrong_prediction(None, 9.0)
    assert not caplog.records
    warn_of_a_wrong_prediction(10.0, 13.0)
    assert "predicted to allocate 10.0 GB on each GPU and allocated 13.0 GB" in caplog.text


def test_the_alignment_of_a_penalty_is_counted_once_a_pack_and_shared_by_a_gang():
    shape, asft = shape_of(LLAMA_2["7b"]), LONG.model_copy(update={"penalty": "asft"})
    elements = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    item = "alignment of the penalty"
    one = predict(shape, asft, Layout(1, 0, 1))
    assert one.training[item] == 2 * elements
    assert predict(shape, asft, Layout(1, 0, 1), [asft]).training[item] == 2 * elements
    assert predict(shape, asft, Layout(4, 3, 1)).training[item] == 2 * elements / 4
    off = asft.model_copy(update={"penalty_weight": 0.0})
    assert predict(shape, off, Layout(1, 0, 1)) == predict(shape, LONG, Layout(1, 0, 1))


def test_moving_averages_are_as_large_as_the_adapters_that_have_them():
    shape, averaged = shape_of(LLAMA_2["7b"]), LONG.model_copy(update={"ema_decay": 0.9})
    layout = Layout(1, 0, 1)
    found = predict(shape, averaged, layout, [LONG]).training["moving averages"]
    assert found == 4 * sum(shape.adapter(LONG))
    assert "moving averages" not in predict(shape, LONG, layout).training
