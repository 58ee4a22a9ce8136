"""What `tasks.weights` takes for a model folder and for an adapter, and what it says about everything else; all of it real."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, MixtralConfig, Phi3Config, PreTrainedConfig

from tasks.errors import ModelError
from tasks.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, read_adapter
from tests.tiny import Pair

SMALL = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
Q0 = "model.layers.0.self_attn.q_proj"


def built(folder: Path, config: PreTrainedConfig) -> Pair:
    """A random model of that architecture, and one that differs from it in every weight."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    model.save_pretrained(folder / "aligned")
    return Pair(folder / "base", folder / "aligned")


def lora(folder: Path, model: Path, dtype: torch.dtype = torch.float32, seed: int = 1, **settings: Any) -> Path:
    """A LoRA adapter that PEFT saved, with a random number added to everything that it would train."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **settings})
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=dtype), config, autocast_adapter_dtype=False)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(folder, safe_serialization=True)
    return folder


def edited(folder: Path, source: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = "model.safetensors") -> Path:
    """A copy of a folder after `change` to its tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def configured(folder: Path, source: Path, file: str = ADAPTER_CONFIG, **settings: object) -> Path:
    """A copy of a folder with other settings in its config; None takes one out."""
    shutil.copytree(source, folder)
    config = {**json.loads((folder / file).read_text()), **settings}
    (folder / file).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("quantisation", "how"), [({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "absmax"), ({"load_in_8bit": True}, "SCB")]
)
def test_a_checkpoint_that_bitsandbytes_quantised_is_refused(pair, tmp_path, quantisation, how):
    model = AutoModelForCausalLM.from_pretrained(pair.aligned, quantization_config=BitsAndBytesConfig(**quantisation), device_map="cpu")
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match=rf"{tmp_path}/small holds {Q0} quantised \(.*{how}\).* Give the unquantised folder"):
        Checkpoint(tmp_path / "small").weight(Q0)
    assert Checkpoint(tmp_path / "small").weight("lm_head").dtype == torch.float32  # which bitsandbytes leaves as it is


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("qweight", torch.int32),
        ("weight", torch.float8_e4m3fn),
        ("weight", torch.int8),
        ("weight_packed", torch.int32),
    ],
)
def test_a_checkpoint_in_another_quantised_format_is_refused(pair, tmp_path, suffix, dtype):
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q0}.{suffix}"] = tensors.pop(f"{Q0}.weight").to(dtype)

    with pytest.raises(ModelError, match=rf"small holds {Q0} quantised \(.+\).* Give the unquantised folder"):
        Checkpoint(edited(tmp_path / "small", pair.base, quantise)).weight(Q0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA .*`use_dora`"),
        ({"init_lora_weights": "pissa"}, "'pissa'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "'olora'.*path_initial_model_for_weight_conversion"),
    ],
)
def test_a_lora_whose_update_is_not_b_a_is_refused_by_name(pair, tmp_path, settings, reason):
    with pytest.raises(ModelError, match=f"{tmp_path}/adapter .*{reason}"):
        read_adapter(lora(tmp_path / "adapter", pair.aligned, **settings))


@pytest.mark.parametrize("setting", ["use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "layer_replication"])
def test_a_setting_that_makes_another_update_is_refused_by_its_name(pair, tmp_path, setting):
    adapter = lora(tmp_path / "plain", pair.aligned)
    with pytest.raises(ModelError, match=f"{tmp_path}/adapter is .*`{setting}` in adapter_config.json"):
        read_adapter(configured(tmp_path / "adapter", adapter, **{setting: True}))


def test_an_adapter_of_another_kind_is_refused(pair, tmp_path):
    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), config).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ModelError, match="ia3 is a IA3 adapter; Safe LoRA is defined for LoRA"):
        read_adapter(tmp_path / "ia3")


def test_a_pissa_adapter_that_peft_converted_is_a_plain_one(pair, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), config)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "start")
    tuned.peft_config["default"].init_lora_weights = "pissa"
    for parameter in tuned.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) * parameter.requires_grad
    merged = tuned.get_submodule(f"base_model.model.{Q0}")
    trained = merged.weight + merged.get_delta_weight("default")
    tuned.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    adapter = read_adapter(tmp_path / "plain")
    a, b = (adapter.tensors[name] for name in (adapter.modules[Q0].lora_A, adapter.modules[Q0].lora_B))
    scale = adapter.config["lora_alpha"] / adapter.config["r"]
    torch.testing.assert_close(Checkpoint(pair.aligned).weight(Q0) + scale * b @ a, trained, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_fused_experts_is_refused_and_one_of_attention_is_not(tmp_path):
    model = built(tmp_path, MixtralConfig(**SMALL, num_local_experts=4)).aligned
    with pytest.raises(ModelError, match="fused experts.*no single weight matrix.*`target_parameters`"):
        read_adapter(lora(tmp_path / "experts", model, target_parameters=["mlp.experts.gate_up_proj"]))
    assert len(read_adapter(lora(tmp_path / "attention", model)).modules) == 2


def test_an_adapter_of_split_projections_names_the_tensor_that_a_fused_checkpoint_has(tmp_path):
    model = built(tmp_path, Phi3Config(**SMALL)).base
    with pytest.raises(ModelError, match=rf"{tmp_path}/base has no tensor '{Q0}.weight'; the nearest is '.*qkv_proj.weight'"):
        Checkpoint(model).weight(Q0)


def test_a_folder_with_named_adapters_only_is_refused_with_their_names(pair, tmp_path):
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), LoraConfig(target_modules=["q_proj"]), adapter_name="first")
    tuned.add_adapter("second", LoraConfig(target_modules=["v_proj"]))
    tuned.save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match=f"two holds no adapter itself, .*: first, second. Name one, as {tmp_path}/two/first"):
        read_adapter(tmp_path / "two")
    assert read_adapter(tmp_path / "two" / "second").modules.keys() == {f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)}


@pytest.mark.parametrize("setting", ["explicit", "absent, which means tied"])
def test_a_tied_output_layer_is_the_embedding_that_is_stored(tmp_path, setting):
    # What Gemma and GPT-2 have on the hub: the key is not written where it equals the default, which is true.
    model = built(tmp_path / "pair", Gemma2Config(**SMALL, head_dim=16)).base
    if setting != "explicit":
        model = configured(tmp_path / "model", model, "config.json", tie_word_embeddings=None)
        assert AutoModelForCausalLM.from_pretrained(model).config.tie_word_embeddings
    checkpoint = Checkpoint(model)
    assert "lm_head.weight" not in checkpoint.names
    assert torch.equal(checkpoint.weight("lm_head"), load_file(model / "model.safetensors")["model.embed_tokens.weight"])


def test_an_output_layer_that_is_missing_and_not_tied_is_an_error(pair, tmp_path):
    model = edited(tmp_path / "model", pair.base, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=f"{tmp_path}/model has no tensor 'lm_head.weight'"):
        Checkpoint(model).weight("lm_head")


def sharded(folder: Path, model: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_a_shard_that_lacks_a_tensor_is_named_and_so_is_one_that_is_cut_off_or_gone(pair, tmp_path):
    model = sharded(tmp_path / "model", pair.base)
    shard = Checkpoint(model).names[f"{Q0}.weight"]
    tensors = load_file(shard)
    save_file({name: tensor for name, tensor in tensors.items() if name != f"{Q0}.weight"}, shard)
    with pytest.raises(ModelError, match=f"{shard} lacks '{Q0}.weight', which its index promises"):
        Checkpoint(model).weight(Q0)
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelError, match=f"{shard} cannot be read .* is the download complete"):
        Checkpoint(model).weight(Q0)
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard} cannot be read .* is the download complete"):
        Checkpoint(model).weight(Q0)


def test_an_index_that_is_no_index_is_named(pair, tmp_path):
    model = sharded(tmp_path / "model", pair.base)
    for text in ("{", "{}"):
        (model / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match="model.safetensors.index.json"):
            Checkpoint(model).weight(Q0)


def test_a_pickled_adapter_is_refused_with_the_remedy(pair, tmp_path):
    adapter = lora(tmp_path / "adapter", pair.aligned)
    torch.save(load_file(adapter / ADAPTER_WEIGHTS), adapter / "adapter_model.bin")
    (adapter / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(ModelError, match="holds a pickled adapter_model.bin; .* Load it with PEFT and save it again"):
        read_adapter(adapter)
