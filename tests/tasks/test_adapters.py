"""Every tensor of an adapter lands on the model, or it is an error. Nothing of an adapter stays
on the base. Shown on the corpus of tests/tasks/adapter_corpus.py.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from ebbline.tasks.errors import ModelError
from ebbline.tasks.headers.files import SINGLE
from ebbline.tasks.models.adapter_file import Adapter, read_adapter, read_adapter_file
from ebbline.tasks.models.adapter_names import canonical, matched
from ebbline.tasks.models.adapters import fitted_by_peft, with_adapter
from ebbline.tasks.models.brought.fitted import SAME_NAMES, fitted, lands_by_headers
from ebbline.tasks.models.loading import Residents, fingerprint, load_model
from ebbline.tasks.models.weights import Checkpoint
from tests.tasks.adapter_corpus import (
    IDS,
    MEASURED,
    OTHER_KINDS,
    REJECTED,
    Case,
    build_models,
    make,
    set_one,
    tensors,
)
from tests.tasks.adapter_merge import merged_by_hand
from tests.tasks.test_weights import SMALL, lora

model = pytest.mark.model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def residents() -> Residents:
    return Residents()


@pytest.fixture(scope="module")
def corpus(models, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Name -> (the adapter, the adapter as PEFT saved it)."""
    folder = tmp_path_factory.mktemp("corpus")
    return {
        name: make(case, models, folder / str(number))
        for number, (name, case) in enumerate(MEASURED.items())
    }


def logits(residents: Residents, folder: Path, adapter: Path | None) -> torch.Tensor:
    base, _ = residents.model(folder, "none", "float32", "cpu")
    with torch.no_grad(), with_adapter(base.eval(), adapter) as adapted:
        found: torch.Tensor = adapted(IDS).logits.clone()
    return found


def digest(model: torch.nn.Module) -> str:
    """Of every bit of a model's tensors, and of which of them are shared."""
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), []).append(name)
    content.update(str(sorted(names.values())).encode())
    return content.hexdigest()


@model
@pytest.mark.parametrize("name", MEASURED)
def test_an_adapter_is_measured_as_its_merge_by_hand(models, corpus, residents, name):
    folder, (adapter, saved) = models[MEASURED[name].model], corpus[name]
    with torch.no_grad():
        wanted = merged_by_hand(folder, adapter if "float" in name else saved)(IDS).logits
    found, bare = logits(residents, folder, adapter), logits(residents, folder, None)
    effect = (wanted - bare).abs().max()
    assert effect > 0.1
    assert (found - wanted).abs().max() < 1e-4 * (1 + wanted.abs().max()), name


@model
@pytest.mark.parametrize("name", MEASURED)
def test_the_base_is_bit_identical_after_an_adapter(models, corpus, residents, name):
    folder = models[MEASURED[name].model]
    wanted = digest(load_model(folder, "none", "float32", "cpu"))
    logits(residents, folder, corpus[name][0])
    assert digest(residents.model(folder, "none", "float32", "cpu")[0]) == wanted


@model
def test_an_adapter_that_leaves_no_trace_costs_no_reload(models, corpus):
    residents = Residents()
    unchanged = ("plain", "dora", "saved head", "tokens", "adapted embedding", "all biases")
    for name in unchanged:
        before = digest(residents.model(models["untied"], "none", "float32", "cpu")[0])
        logits(residents, models["untied"], corpus[name][0])
        assert digest(residents.model(models["untied"], "none", "float32", "cpu")[0]) == before
    logits(residents, models["untied"], None)
    assert residents.loads == 1
    for name in ("pissa", "olora"):
        loads = residents.loads
        logits(residents, models["untied"], corpus[name][0])
        logits(residents, models["untied"], None)
        assert residents.loads == loads + 1, name


ORDERED = ("plain", "pissa", "olora", "all biases", "saved head and embedding", "tokens of both")


@model
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(ORDERED))
def test_adapters_in_every_order_have_the_numbers_that_each_has_alone(models, corpus, order):
    together = Residents()
    for name in order:
        found = logits(together, models["untied"], corpus[name][0])
        assert torch.equal(found, alone(models, corpus, name)), order


def alone(models, corpus, name, kept={}):  # noqa: B006  # kept for all examples
    if name not in kept:
        kept[name] = logits(Residents(), models["untied"], corpus[name][0])
    return kept[name]


@model
@pytest.mark.parametrize("name", REJECTED)
def test_an_adapter_that_does_not_land_whole_is_an_error_that_names_it(models, tmp_path, name):
    case = REJECTED[name]
    adapter, _ = make(case, models, tmp_path)
    base = load_model(models[case.model], "none", "float32", "cpu")
    before = digest(base)
    with pytest.raises(ModelError, match=case.says) as error, with_adapter(base, adapter):
        pass
    assert str(adapter) in str(error.value)
    assert digest(base) == before
    # `project` checks by the same code, in the same words; only the values are not copied there
    if name != "beyond float32":
        with pytest.raises(ModelError) as other:
            fitted(read_adapter_file(adapter), Checkpoint(models[case.model]))
        assert str(other.value) == str(error.value)


@model
@pytest.mark.parametrize("other", ["narrow", "deep"])
def test_an_adapter_of_another_base_is_an_error(models, corpus, other):
    base = load_model(models[other], "none", "float32", "cpu")
    reason = "has the shape" if other == "narrow" else r"lacks .*layers\.2"
    with (
        pytest.raises(ModelError, match=f"{reason}.*another model"),
        with_adapter(base, corpus["plain"][0]),
    ):
        pass


@model
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_an_adapter_of_another_kind_is_an_error(models, tmp_path, kind):
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(models["untied"]), OTHER_KINDS[kind]
    )
    tuned.save_pretrained(tmp_path / "adapter")
    base = load_model(models["untied"], "none", "float32", "cpu")
    with pytest.raises(ModelError, match="of type"), with_adapter(base, tmp_path / "adapter"):
        pass


@model
@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_a_quantised_base_is_left_as_it_was_and_takes_no_adapter_that_moves_it(
    models, corpus, quantisation
):
    base = load_model(models["untied"], quantisation, "float32", "cpu")
    with torch.no_grad():
        before = digest(base), fingerprint(base), base(IDS).logits
        for name in ("plain", "saved head", *(["dora"] if quantisation == "nf4" else [])):
            with with_adapter(base, corpus[name][0]) as adapted:
                assert not torch.equal(adapted(IDS).logits, before[2])
        assert fingerprint(base) == before[1]
        assert torch.equal(base(IDS).logits, before[2])
    for name in ("pissa", "olora", *(["dora"] if quantisation == "int8" else [])):
        with (
            pytest.raises(ModelError, match="base(|.*quantised). Measure it with `quantisation"),
            with_adapter(base, corpus[name][0]),
        ):
            pass


@model
def test_a_plain_adapter_has_the_models_names_for_the_projection(models, corpus):
    for name, case in MEASURED.items():
        try:
            saved = read_adapter(corpus[name][1])
        except ModelError:  # what `project` rejects, as DoRA, whatever its names
            continue
        file, folder = read_adapter_file(corpus[name][0]), Checkpoint(models[case.model])
        found = fitted(file, folder)
        assert found.modules == saved.modules and found.tensors.keys() == saved.tensors.keys()
        assert lands_by_headers(file, folder) == (name in BY_HEADERS), name
        require_equal(found, fitted_by_peft(file, folder))


# Where two configs and the headers show where an adapter lands. All others need PEFT.
BY_HEADERS = {
    *("plain", "rslora", "orthogonal", "gaussian", "unsloth", "axolotl", "trl"),
    *("float16", "bfloat16", "float64", "pickle beside it", "every linear layer"),
}


def require_equal(found: Adapter, wanted: Adapter) -> None:
    assert (found.config, found.modules) == (wanted.config, wanted.modules)
    assert found.carried == wanted.carried and found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert found.tensors[name] is tensor or torch.equal(found.tensors[name], tensor)


@model
@pytest.mark.parametrize("name", sorted(SAME_NAMES))
def test_headers_show_where_an_adapter_lands_as_peft_does(tmp_path, name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SMALL, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = Checkpoint(tmp_path / "model")
    for number, targets in enumerate(("all-linear", ["q_proj", "1.mlp.up_proj"])):
        adapter = lora(tmp_path / str(number), model.folder, target_modules=targets)
        file = read_adapter_file(adapter)
        assert lands_by_headers(file, model)
        require_equal(fitted(file, model), fitted_by_peft(file, model))


ADAPTER_EDITS = {
    "r": [2, 4.0, True],
    "lora_alpha": [1e-320, 1e308, 0.5],
    "lora_dropout": [2, None, "0.1", 0.1],
    "target_modules": [
        *([], ["q_proj"], ["v_proj", "q_proj"], ["q_proj", "mlp"], ["self_attn.q_proj"]),
        *(["proj"], "all-linear", "q_proj", ["q_proj", "layers.1.self_attn.v_proj"], None),
    ],
    "bias": ["all", "lora_only", None],
    "use_rslora": [True],
    "use_dora": [True],
    "fan_in_fan_out": [True],
    "exclude_modules": [["v_proj"]],
    "layers_to_transform": [[0], 0, 1],
    "modules_to_save": [["lm_head"]],
    "rank_pattern": [{"v_proj": 2}],
    "alpha_pattern": [{"v_proj": 2}],
    "trainable_token_indices": [[1]],
    "use_wora": [True],
}
MODEL_EDITS = {
    "model_type": ["qwen3", "mistral", "gemma", "gpt2", "unheard", None],
    "num_hidden_layers": [1, 3, "2", None],
    "hidden_size": [32, 128, None],
    "intermediate_size": [48, None],
    "num_attention_heads": [2, 8, None],
    "num_key_value_heads": [1, 4, None],
    "head_dim": [8, 32, None],
    "quantization_config": [{"quant_method": "gptq"}],
}


@st.composite
def edits(draw: st.DrawFn, choices: Mapping[str, Sequence[object]]) -> dict[str, object]:
    names = draw(st.lists(st.sampled_from(sorted(choices)), max_size=2, unique=True))
    return {name: draw(st.sampled_from(choices[name])) for name in names}


@model
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(adapter=edits(ADAPTER_EDITS), config=edits(MODEL_EDITS))
def test_headers_never_accept_what_peft_rejects(models, corpus, adapter, config):
    model = Checkpoint(models["untied"])
    file = read_adapter_file(corpus["plain"][0])
    file = replace(file, config={**file.config, **adapter})
    model.config = {**model.config, **config}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model.config))
        (Path(folder) / SINGLE).symlink_to(models["untied"] / SINGLE)
        if lands_by_headers(file, model):
            on_disk = Checkpoint(Path(folder))
            require_equal(fitted(file, model), fitted_by_peft(file, on_disk))


@model
def test_a_fingerprint_notices_what_adapters_change(models):
    base = load_model(models["tied"], "none", "float32", "cpu")
    before = fingerprint(base)
    base(IDS)
    assert fingerprint(base) == before
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.bias.add_(1e-3)
    assert (moved := fingerprint(base)) != before
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    assert (untied := fingerprint(base)) != moved
    base.model.norm.register_forward_hook(lambda *given: None)
    assert fingerprint(base) != untied


WRAPPED = st.lists(
    st.sampled_from(["_orig_mod", "module", "_fsdp_wrapped_module"]), min_size=0, max_size=2
)
LAYERS = [f"model.layers.{i}.{part}.lora_A.weight" for i in (0, 1, 10) for part in ("q", "mlp.up")]


@given(
    wrapped=st.lists(WRAPPED, min_size=len(LAYERS), max_size=len(LAYERS)),
    place=st.integers(0, 4),
    prefix=st.sampled_from(["model.", "language_model.model.", "model.language_model."]),
)
def test_wrappers_and_the_text_part_do_not_change_which_layer_is_meant(wrapped, place, prefix):
    def name(layer: str, wrappers: list[str]) -> str:
        parts = layer.replace("model.", prefix, 1).split(".")
        return ".".join(["base_model", "model", *parts[:place], *wrappers, *parts[place:]])

    expected = [f"base_model.model.{layer}" for layer in LAYERS]
    names = [name(layer, wrappers) for layer, wrappers in zip(LAYERS, wrapped, strict=True)]
    assert matched(names, expected) == dict(zip(names, expected, strict=True))


@given(st.integers(1, len(LAYERS) - 1), st.permutations(LAYERS))
def test_two_prefixes_in_one_file_are_never_joined(cut, layers):
    expected = [f"base_model.model.{layer}" for layer in LAYERS]
    names = [
        f"base_model.model.{'language_model.' if index < cut else ''}{layer}"
        for index, layer in enumerate(layers)
    ]
    assert set(matched(names, expected)) == set(names[cut:])


def test_one_name_may_not_mean_two_layers():
    expected = ["model.layers.0.q", "model.language_model.layers.0.q"]
    assert canonical(expected[0]) == canonical(expected[1])
    assert matched(["language_model.model.layers.0.q"], expected) == {}
    assert matched(["a.module.b", "a.b"], ["a.b"]) == {}


def test_the_corpus_has_at_least_forty_adapters():
    assert len(MEASURED) >= 40 and len(REJECTED) >= 40
    assert all(isinstance(case, Case) and case.says for case in REJECTED.values())


@model
def test_an_adapter_without_any_update_is_known_from_its_file(models, corpus, tmp_path):
    zero = {"B": set_all(".lora_B."), "A": set_all(".lora_A."), "embedding": set_all("embedding_B")}
    dead = {
        "B": Case({}, zero["B"]),
        "A": Case({}, zero["A"]),
        "embedding": Case({"target_modules": ["embed_tokens"]}, zero["embedding"]),
    }
    alive = {
        "one of them": Case({}, set_one("lora_B", lambda t: t * 0)),
        "a trained head": Case({"modules_to_save": ["lm_head"]}, zero["B"]),
        "dora": Case({"use_dora": True}, zero["B"]),
        "pissa": Case({"init_lora_weights": "pissa"}, zero["B"]),
        "biases of B": Case({"lora_bias": True, "target_modules": ["q_proj"]}, zero["B"]),
    }
    for name, case in {**dead, **alive}.items():
        adapter, _ = make(case, models, tmp_path / name)
        assert read_adapter_file(adapter).changes_nothing == (name in dead), name
    residents = Residents()
    for name in dead:
        measured = logits(residents, models["untied"], tmp_path / name / "adapter")
        assert torch.equal(measured, logits(residents, models["untied"], None)), name
    for name in MEASURED:
        assert not read_adapter_file(corpus[name][0]).changes_nothing, name


def set_all(part):
    def change(found):
        for name in found:
            if part in name and name.endswith(("weight", "lora_embedding_B")):
                found[name] = torch.zeros_like(found[name])

    return tensors(change)
