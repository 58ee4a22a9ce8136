"""What `ebbline.tasks.models.weights` accepts as a model folder and as an adapter, and its errors
for everything else. Every folder is saved by transformers or PEFT; some
are then edited.
"""

import json
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, PreTrainedConfig

from ebbline.tasks.errors import ModelError
from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ebbline.tasks.models import weights
from ebbline.tasks.models.adapter_file import read_adapter
from ebbline.tasks.models.weights import Checkpoint, read_ahead
from tests.tiny import Pair
from tests.tolerance import merged, within

SMALL = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
Q0 = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def built(folder: Path, config: PreTrainedConfig) -> Pair:
    """A random model of that architecture, and one whose weights all differ from it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    model.save_pretrained(folder / "aligned")
    return Pair(folder / "base", folder / "aligned")


def lora(
    folder: Path, model: Path, dtype: torch.dtype = torch.float32, seed: int = 1, **settings: Any
) -> Path:
    """A LoRA adapter that PEFT saved, with random numbers added to all that it would train."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    )
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        config,
        autocast_adapter_dtype=False,
    )
    for parameter in tuned.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    tuned.save_pretrained(folder, safe_serialization=True)
    return folder


def edited(
    folder: Path,
    source: Path,
    change: Callable[[Tensors], object] = lambda tensors: None,
    **settings: object,
) -> Path:
    """A copy of a model's or an adapter's folder after `change` to its tensors, with other settings
    in its config; None removes a setting.
    """
    shutil.copytree(source, folder)
    names = (
        (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
        if (folder / ADAPTER_CONFIG).exists()
        else ("model.safetensors", "config.json")
    )
    weights, config = (folder / name for name in names)
    tensors, changed = load_file(weights), {**json.loads(config.read_text()), **settings}
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    config.write_text(
        json.dumps({name: value for name, value in changed.items() if value is not None})
    )
    return folder


BITSANDBYTES = {
    "absmax": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "SCB": {"load_in_8bit": True},
}
STORED_DTYPES = {
    "qweight": torch.int32,
    "weight_packed": torch.int32,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


@pytest.mark.parametrize("kind", [*BITSANDBYTES, *STORED_DTYPES])
def test_a_quantised_checkpoint_is_an_error(pair, tmp_path, kind):
    def quantise(tensors: Tensors) -> None:
        tensors[f"{Q0}.{kind if kind.startswith('weight') or kind == 'qweight' else 'weight'}"] = (
            tensors.pop(f"{Q0}.weight").to(STORED_DTYPES[kind])
        )

    if kind in BITSANDBYTES:
        bits = BitsAndBytesConfig(**BITSANDBYTES[kind])
        AutoModelForCausalLM.from_pretrained(
            pair.aligned, quantization_config=bits, device_map="cpu"
        ).save_pretrained(tmp_path / "few")
    else:
        edited(tmp_path / "few", pair.aligned, quantise)
    with pytest.raises(
        ModelError,
        match=rf"{tmp_path}/few holds {Q0} quantised \(.*{kind}.*\).* Give the unquantised folder",
    ):
        Checkpoint(tmp_path / "few").weight(Q0)
    # lm_head is not quantised
    assert Checkpoint(tmp_path / "few").weight("lm_head").dtype == torch.float32


MOVES_BASE = "moves part of the base weights.*path_initial_model_for_weight_conversion"
TRAINED_SO = [
    ({"use_dora": True}, {}, "`use_dora`"),
    *(({"init_lora_weights": kind}, {}, f"{kind}.*{MOVES_BASE}") for kind in ("pissa", "olora")),
]
CONFIGURED_SO = [
    ({}, {kind: True}, f"`{kind}`")
    for kind in (
        "use_qalora",
        "use_bdlora",
        "kasa_config",
        "monteclora_config",
        "layer_replication",
    )
]


@pytest.mark.parametrize(("trained_with", "configured", "why"), TRAINED_SO + CONFIGURED_SO)
def test_a_lora_whose_update_is_not_b_a_is_an_error_that_names_it(
    pair, tmp_path, trained_with, configured, why
):
    with pytest.raises(ModelError, match=f"{tmp_path}/adapter .*{why}"):
        read_adapter(
            edited(
                tmp_path / "adapter",
                lora(tmp_path / "saved", pair.aligned, **trained_with),
                **configured,
            )
        )


def test_a_pissa_adapter_that_peft_converted_is_a_plain_lora(pair, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), config)
    # As in PEFT's guide, to save the start of the conversion
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "start")
    tuned.peft_config["default"].init_lora_weights = "pissa"
    for parameter in tuned.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) * parameter.requires_grad
    trained = (
        layer := tuned.get_submodule(f"base_model.model.{Q0}")
    ).weight + layer.get_delta_weight("default")
    tuned.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    adapter = read_adapter(tmp_path / "plain")
    a, b = adapter.tensors[adapter.modules[Q0].lora_A], adapter.tensors[adapter.modules[Q0].lora_B]
    scale = adapter.config["lora_alpha"] / adapter.config["r"]
    weight = Checkpoint(pair.aligned).weight(Q0)
    # The trained weight is W - PiSSA's start + its end: one sum of W and all 2 r products.
    within(trained, weight.double() + scale * b.double() @ a.double(), merged(weight, a, b, scale))


def test_a_folder_that_is_no_adapter_is_an_error_that_says_what_it_is(pair, tmp_path):
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pair.aligned),
        LoraConfig(target_modules=["q_proj"]),
        adapter_name="first",
    )
    tuned.add_adapter("second", LoraConfig(target_modules=["v_proj"]))
    tuned.save_pretrained(tmp_path / "two")
    with pytest.raises(
        ModelError,
        match=f"two holds no adapter itself, .*: first, second. Name one, as {tmp_path}/two/first",
    ):
        read_adapter(tmp_path / "two")
    assert read_adapter(tmp_path / "two" / "second").modules.keys() == {
        f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)
    }
    weights = tmp_path / "two" / "second" / ADAPTER_WEIGHTS
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(
        ModelError,
        match="holds a pickled adapter_model.bin; .* Load it with PEFT and save it again",
    ):
        read_adapter(weights.parent)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pair.aligned),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    )
    tuned.save_pretrained(tmp_path / "ia3")
    with pytest.raises(
        ModelError, match="ia3 is an adapter of type IA3; ebbline measures and projects LoRA"
    ):
        read_adapter(tmp_path / "ia3")


@pytest.mark.model
def test_an_output_layer_that_is_not_stored_is_tied_unless_the_config_denies_it(tmp_path):
    # As in many configs on the hub, where true is the architecture's default
    model = edited(
        tmp_path / "model",
        built(tmp_path, Gemma2Config(**SMALL, head_dim=16)).base,
        tie_word_embeddings=None,
    )
    assert AutoModelForCausalLM.from_pretrained(model).config.tie_word_embeddings
    assert torch.equal(
        Checkpoint(model).weight("lm_head"),
        load_file(model / "model.safetensors")["model.embed_tokens.weight"],
    )


def test_a_damaged_shard_or_index_is_an_error_that_names_it(pair, tmp_path):
    def fails_with(reason: str) -> None:
        with pytest.raises(ModelError, match=reason):
            Checkpoint(folder).weight(Q0)

    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(pair.base).save_pretrained(folder, max_shard_size="100KB")
    shard = Checkpoint(folder).names[f"{Q0}.weight"]
    tensors = load_file(shard)
    save_file({name: tensor for name, tensor in tensors.items() if name != f"{Q0}.weight"}, shard)
    fails_with(f"{shard} lacks '{Q0}.weight', which its index promises")
    shard.write_bytes(shard.read_bytes()[:-10])
    fails_with(f"{shard} cannot be read .* is the download complete")
    shard.unlink()
    fails_with(f"{shard} cannot be read .* is the download complete")
    for text in ("{", "{}"):
        (folder / "model.safetensors.index.json").write_text(text)
        fails_with(f"{folder}/model.safetensors.index.json")


def test_a_single_file_beside_shards_is_an_error(pair, tmp_path):
    AutoModelForCausalLM.from_pretrained(pair.aligned).save_pretrained(
        tmp_path, max_shard_size="100KB"
    )
    shutil.copy(pair.base / "model.safetensors", tmp_path)
    with pytest.raises(ModelError, match="are both there, and may be two models"):
        Checkpoint(tmp_path).weight(Q0)


@pytest.mark.parametrize("waits, ahead", [([5, 5, 9, 17], []), ([5, 90, 180, 180], [2, 3])])
def test_only_files_that_come_from_the_disk_are_read_ahead(monkeypatch, waits, ahead):
    main, counts, by_thread = threading.get_ident(), iter(waits), list[int]()

    def read(number: int) -> tuple[torch.Tensor, ...]:
        if threading.get_ident() != main:
            by_thread.append(number)
        return (torch.full((3, 5), float(number)),)

    monkeypatch.setattr(weights, "_waits_for_disk", lambda: next(counts))
    found = list(read_ahead([partial(read, number) for number in range(len(waits))]))
    assert [float(tensor[0, 0]) for (tensor,) in found] == list(range(len(waits)))
    assert by_thread == ahead
    assert list(read_ahead([])) == []
