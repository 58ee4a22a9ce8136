"""A model folder is loaded whole, or is an error that names the file and the tensor.

The corpus holds folders that transformers would load in silence.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ebbline.commands.project import project
from ebbline.tasks.errors import ModelError
from ebbline.tasks.models.loading import Residents, load_model
from ebbline.tasks.models.model_folder import load_whole
from tests.tasks.adapter_corpus import IDS, build_models
from tests.tasks.test_weights import lora

pytestmark = pytest.mark.model
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return build_models(tmp_path_factory.mktemp("models"))


def tensors(change: Callable[[Tensors], object]) -> Edit:
    def edit(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def config(**settings: object) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return edit


def in_shards(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="60KB")


def index(change: Callable[[dict[str, str]], object]) -> Edit:
    def edit(folder: Path) -> None:
        in_shards(folder)
        found = json.loads((folder / INDEX).read_text())
        change(found["weight_map"])
        (folder / INDEX).write_text(json.dumps(found))

    return edit


def shard(change: Callable[[Path], object]) -> Edit:
    def edit(folder: Path) -> None:
        in_shards(folder)
        change(folder / json.loads((folder / INDEX).read_text())["weight_map"][Q0])

    return edit


def without_one(path: Path) -> None:
    found = load_file(path)
    del found[Q0]
    save_file(found, path, metadata={"format": "pt"})


def poisoned(path: Path) -> None:
    found = load_file(path)
    found[Q0][1, 2] = float("nan")
    save_file(found, path, metadata={"format": "pt"})


def renamed_file(name: str) -> Edit:
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def prefixed(folder: Path) -> None:
    tensors(lambda t: [t.update({f"other.{n}": t.pop(n)}) for n in list(t)])(folder)


def tied_copy(folder: Path) -> None:
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)


def old_buffers(folder: Path) -> None:
    """As the first Llama checkpoints on the hub hold them."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors(lambda t: t.update({name: torch.ones(8)}))(folder)


def in_bfloat16(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


def other_head(folder: Path) -> None:
    tied_copy(folder)
    tensors(lambda t: t["lm_head.weight"].add_(1))(folder)


def other_head_of_gpt2(folder: Path) -> None:
    """Its config.json leaves out that the head is tied, which is the default."""
    tensors(lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}))(folder)
    settings = json.loads((folder / "config.json").read_text())
    del settings["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(settings))


def single_and_shards(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "kept")
    in_shards(folder)
    (folder / "kept").rename(folder / WEIGHTS)


def decoding(text: str) -> Edit:
    return lambda folder: (folder / "generation_config.json").write_text(text)


SOUND: dict[str, tuple[str, Edit]] = {
    "as saved": ("untied", lambda folder: None),
    "in shards": ("untied", in_shards),
    "tied": ("tied", lambda folder: None),
    "tied, and the head stored too": ("tied", tied_copy),
    "old rotary buffers": ("untied", old_buffers),
    "an original/ folder": ("untied", lambda folder: (folder / "original").mkdir()),
    "pickles beside it": (
        "untied",
        lambda folder: (folder / "pytorch_model.bin").write_text("pickled"),
    ),
    "in bfloat16": ("untied", in_bfloat16),
    "Conv1D": ("conv1d", lambda folder: None),
}

DAMAGED: dict[str, tuple[str, Edit, str]] = {
    "an adapter in it": (
        "untied",
        lambda folder: lora(folder, folder),
        "holds adapter_config.json, and transformers would apply that adapter",
    ),
    "an adapter's config in it": (
        "untied",
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "holds adapter_config.json",
    ),
    "a weight is missing": ("untied", tensors(lambda t: t.pop(Q0)), f"lacks {Q0} .*random"),
    "a bias is missing": (
        "untied",
        tensors(lambda t: t.pop(Q0.replace("weight", "bias"))),
        "lacks .*q_proj.bias .*random",
    ),
    "the head is missing": (
        "untied",
        tensors(lambda t: t.pop("lm_head.weight")),
        "lacks lm_head.weight",
    ),
    "a layer is missing": (
        "untied",
        config(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"lacks model\.layers\.2",
    ),
    "a layer too many": (
        "untied",
        config(num_hidden_layers=1, layer_types=["full_attention"]),
        r"holds model\.layers\.1.* no place for",
    ),
    "a foreign tensor": (
        "untied",
        tensors(lambda t: t.update({"x.weight": torch.ones(2)})),
        "holds x.weight",
    ),
    "lora left in it": (
        "untied",
        tensors(lambda t: t.update({Q0.replace("weight", "lora_A.weight"): torch.ones(2)})),
        "holds .*lora_A.weight",
    ),
    "all under another prefix": ("untied", prefixed, "lacks "),
    "a config that contradicts itself": (
        "untied",
        config(num_hidden_layers=3),
        "cannot be loaded: .*num_hidden_layers",
    ),
    "another config": ("untied", config(model_type="llama"), "holds .*q_proj.bias|holds .*bias"),
    "another width": (
        "untied",
        config(intermediate_size=64),
        r"has the shape .* config.json asks for",
    ),
    "another vocabulary": ("untied", config(vocab_size=60), "has the shape .* asks for"),
    "NaN": ("untied", tensors(lambda t: t[Q0].fill_(float("nan"))), f"{Q0} holds NaN or infinity"),
    "infinity": (
        "untied",
        tensors(lambda t: t["model.norm.weight"].div_(0)),
        "model.norm.weight holds NaN or infinity",
    ),
    "NaN in a shard": ("untied", shard(poisoned), f"model-0.*{Q0} holds NaN"),
    "NaN in a tied embedding": (
        "tied",
        tensors(lambda t: t["model.embed_tokens.weight"][3].fill_(float("nan"))),
        "embed_tokens.weight holds NaN",
    ),
    "a shard is missing": ("untied", shard(Path.unlink), "model-0.* cannot be read"),
    "a shard is cut off": (
        "untied",
        shard(lambda path: path.write_bytes(path.read_bytes()[:-9])),
        "model-0.* cannot be read",
    ),
    "a shard lacks a tensor": ("untied", shard(without_one), f"lacks '{Q0}', which its index"),
    "the index lacks a tensor": (
        "untied",
        index(lambda names: names.pop(Q0)),
        f"holds '{Q0}', which the index does not name",
    ),
    "the index names another shard": (
        "untied",
        index(lambda names: names.update({Q0: names["lm_head.weight"]})),
        f"'{Q0}'",
    ),
    "the index promises too much": (
        "untied",
        index(lambda names: names.update({"x.weight": names[Q0]})),
        "lacks 'x.weight', which its index promises",
    ),
    "an index without names": (
        "untied",
        lambda folder: (in_shards(folder), (folder / INDEX).write_text("{}")),
        "has no `weight_map`",
    ),
    "only pickles": ("untied", renamed_file("pytorch_model.bin"), "no .safetensors file"),
    "weights under another name": ("untied", renamed_file("other.safetensors"), "no model.safete"),
    "a config that names other weights": (
        "untied",
        config(transformers_weights="other.safetensors"),
        "`transformers_weights`",
    ),
    "cut off": (
        "untied",
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
        "cannot be read as safetensors",
    ),
    "no config": ("untied", lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
    "another head than the tied one": (
        "tied",
        other_head,
        "lm_head.weight is not equal to model.embed_tokens.weight, and `tie_word_embeddings`",
    ),
    "another head than the one tied by default": (
        "conv1d",
        other_head_of_gpt2,
        "lm_head.weight is not equal to transformer.wte.weight",
    ),
    "a single file and shards": ("untied", single_and_shards, "are both there, and may be two"),
    "integers": (
        "untied",
        tensors(lambda t: t.update({Q0: (1000 * t[Q0]).to(torch.int8)})),
        f"{Q0} is stored as I8",
    ),
    "a quantiser that is not installed": (
        "untied",
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "cannot be loaded: .*GPTQ",
    ),
    "damaged decoding settings": ("untied", decoding("{"), "generation_config.json is not JSON"),
    "an end token as text": (
        "untied",
        decoding('{"eos_token_id": [2, "</s>"]}'),
        "`eos_token_id` in .*generation_config.json is",
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_whole_folder_gives_the_numbers_of_its_weights(models, tmp_path, name):
    family, edit = SOUND[name]
    shutil.copytree(models[family], tmp_path / "model")
    edit(tmp_path / "model")
    with torch.no_grad():
        found = load_model(tmp_path / "model", "none", "float32", "cpu").eval()(IDS).logits
        wanted = AutoModelForCausalLM.from_pretrained(models[family]).eval()(IDS).logits
    # bfloat16 keeps 8 bits of each weight
    close = 2.0**-4 if "bfloat16" in name else 1e-6
    assert (found - wanted).abs().max() <= close * (1 + wanted.abs().max())


@pytest.mark.parametrize("name", DAMAGED)
def test_a_folder_that_is_not_whole_is_an_error_that_says_why(models, tmp_path, name):
    family, edit, says = DAMAGED[name]
    shutil.copytree(models[family], tmp_path / "model")
    edit(tmp_path / "model")
    with pytest.raises(ModelError, match=says) as error:
        Residents().model(tmp_path / "model", "none", "float32", "cpu")
    assert str(tmp_path / "model") in str(error.value)


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
@pytest.mark.parametrize(
    "name", ["NaN", "a weight is missing", "a foreign tensor", "another width"]
)
def test_quantising_hides_no_damage(models, tmp_path, name, quantisation):
    family, edit, says = DAMAGED[name]
    shutil.copytree(models[family], tmp_path / "model")
    edit(tmp_path / "model")
    with pytest.raises(ModelError, match=says):
        load_model(tmp_path / "model", quantisation, "float32", "cpu")


@pytest.mark.parametrize(
    "name",
    [
        "an adapter in it",
        "a shard is missing",
        "the index lacks a tensor",
        "only pickles",
        "a single file and shards",
        "an end token as text",
    ],
)
@pytest.mark.parametrize("which", ["base", "aligned"])
def test_project_checks_the_folders_in_the_same_words(models, tmp_path, name, which):
    family, edit, says = DAMAGED[name]
    adapter = lora(tmp_path / "adapter", models[family])
    shutil.copytree(models[family], tmp_path / "model")
    edit(tmp_path / "model")
    pair = {"base": models[family], "aligned": models[family], which: tmp_path / "model"}
    with pytest.raises(ModelError, match=says):
        project([adapter], pair["base"], pair["aligned"], tmp_path / "out")


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_a_quantised_folder_is_not_measured_under_the_name_of_another_quantisation(
    models, tmp_path, quantisation
):
    load_model(models["untied"], "nf4", "float32", "cpu").save_pretrained(tmp_path / "model")
    shutil.copytree(models["untied"], tmp_path / "model", dirs_exist_ok=True, ignore=_has_weights)
    with pytest.raises(ModelError, match="is already quantised .*bitsandbytes"):
        load_model(tmp_path / "model", quantisation, "float32", "cpu")
    stored = load_model(tmp_path / "model", "none", "float32", "cpu")
    assert stored.is_quantized


def _has_weights(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((".safetensors", "config.json"))]


def test_a_classifier_without_its_head_is_an_error(models):
    with pytest.raises(ModelError, match="lacks score.weight .*random"):
        load_whole(AutoModelForSequenceClassification, models["untied"])


def test_the_corpus_has_at_least_twenty_folders():
    assert len(DAMAGED) >= 20
