"""`ebbline defend` by itself: adapters that PEFT made, and the outcome loaded by PEFT again.

Its checks of adapters and models are those of `ebbline project`, whose tests name each case.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.commands.defended.defend import RECORD, DefendedAdapter, defend
from ebbline.commands.project import project
from ebbline.tasks.defences import subspace
from ebbline.tasks.defences.computing.factors import effect as effect_of
from ebbline.tasks.defences.computing.writing import update_of
from ebbline.tasks.defences.projectors import alignment_basis
from ebbline.tasks.errors import ModelError, ProjectionError
from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ebbline.tasks.models.adapter_file import read_adapter
from tests.tasks.test_weights import SMALL, built, edited, lora
from tests.tiny import Pair
from tests.tolerance import merged, within

PATTERNS = {
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 7},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
}


@pytest.fixture(scope="module")
def made(pair, tmp_path_factory) -> Path:
    """An adapter with rank and alpha patterns, an rsLoRA, and a safety adapter."""
    folder = tmp_path_factory.mktemp("defended")
    lora(folder / "adapter", pair.aligned, **PATTERNS)
    lora(folder / "rslora", pair.aligned, use_rslora=True, target_modules="all-linear")
    lora(folder / "safety", pair.aligned, r=3, lora_alpha=5, seed=9, target_modules="all-linear")
    return folder


def models(pair: Pair) -> dict[str, Path]:
    return {"base": pair.base, "aligned": pair.aligned}


def merged_change(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight when it merges an adapter, by the name of its module."""
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter
    ).merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    return {
        name.removesuffix(".weight"): tensor.double() - plain[name].double()
        for name, tensor in tuned.state_dict().items()
        if not torch.equal(tensor, plain[name])
    }


def agrees(model: Path, done: DefendedAdapter) -> None:
    """PEFT loads the outcome whole, and merges the updates that its factors and scales say."""
    adapter, found = read_adapter(done.out), merged_change(model, done.out)
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    for module in adapter.modules:
        update = update_of(adapter, module)
        a, b = update.lora_A_RI.double(), update.lora_B_OR.double()
        if not b.any():
            assert module not in found
            continue
        bound = merged(weights[f"{module}.weight"], a, b, update.scale)
        within(found.pop(module), update.scale * (b @ a), bound)
    assert not found


CASES = {
    "safe_lora": {"knobs": {"threshold": 1.0}},
    "exact": {"method": "safe_lora", "knobs": {"modules": 2, "projector": "exact"}},
    "scale": {"knobs": {"factor": 0.3}},
    "drop": {"knobs": {"modules": 3}},
    "safe_merge": {"knobs": {"modules": 2, "weight": 0.4}},
    "subspace_removal": {"knobs": {"k": 6}},
}


@pytest.mark.parametrize("which", ["adapter", "rslora"])
def test_peft_loads_every_outcome_and_merges_the_update_that_the_formula_says(
    pair, made, tmp_path, which
):
    for case, settings in CASES.items():
        name = settings.get("method", case)
        given = models(pair) if name != "scale" else {"aligned": pair.aligned}
        if name == "safe_merge":
            given["safety"] = made / "safety"
        (done,) = defend(
            [made / which], tmp_path / case, method=name, knobs=settings["knobs"], **given
        )
        assert done.changed, case
        agrees(pair.aligned, done)
        old, new = read_adapter(made / which), read_adapter(done.out)
        for module in old.modules:
            before, after = update_of(old, module), update_of(new, module)
            if module not in done.changed:
                assert torch.equal(before.lora_B_OR, after.lora_B_OR)
                assert (before.scale, before.rank) == (after.scale, after.rank)
            elif name == "safe_merge":
                other = update_of(read_adapter(made / "safety"), module)
                expected = sum(
                    share * each.scale * (each.lora_B_OR.double() @ each.lora_A_RI.double())
                    for share, each in ((0.6, before), (0.4, other))
                )
                found = after.scale * (after.lora_B_OR.double() @ after.lora_A_RI.double())
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grown = json.loads((tmp_path / "safe_merge" / ADAPTER_CONFIG).read_text())
    assert len(grown["rank_pattern"]) == (3 if which == "adapter" else 2)


def test_safe_lora_by_defend_is_project_bit_for_bit_with_and_without_controls(pair, made, tmp_path):
    project([made / "adapter"], out=tmp_path / "one", threshold=[0.6, 0.7], **models(pair))
    for out, controls in (("two", False), ("three", True)):
        defend(
            made / "adapter",
            tmp_path / out,
            knobs={"threshold": [0.6, 0.7]},
            controls=controls,
            draws=1,
            **models(pair),
        )
    for threshold in ("threshold-0.6", "threshold-0.7"):
        one = (tmp_path / "one" / threshold / ADAPTER_WEIGHTS).read_bytes()
        assert one == (tmp_path / "two" / threshold / ADAPTER_WEIGHTS).read_bytes()
        assert one == (tmp_path / "three" / threshold / "defence" / ADAPTER_WEIGHTS).read_bytes()


def test_every_control_has_a_folder_a_draw_and_its_partners_lengths(pair, made, tmp_path):
    both = [made / "adapter", made / "rslora"]
    done = defend(
        both, tmp_path / "out", knobs={"modules": 4}, controls=True, draws=2, **models(pair)
    )
    labels = ["defence", "shrink_matched", *(f"random_subspace-{n}" for n in range(2))]
    labels += [f"random_modules-{n}" for n in range(2)]
    assert [each.out.name for each in done] == labels * 2
    for of_one in (done[:6], done[6:]):
        partner = of_one[0]
        for each in of_one[1:4]:
            agrees(pair.aligned, each)
            assert each.changed == partner.changed
            for module, effect in each.effects.items():
                assert effect.norm_after == pytest.approx(
                    partner.effects[module].norm_after, rel=1e-6
                )
        assert {len(each.changed) for each in of_one} == {4}
        assert all(
            effect.result_explained == pytest.approx(1.0) for effect in of_one[1].effects.values()
        )
    record = json.loads((done[3].out / RECORD).read_text())
    assert (record["settings"]["control"], record["settings"]["draw"]) == ("random_subspace", 1)
    assert "philox" in record["settings"]["generator"]
    again = defend(
        [made / "rslora"],
        tmp_path / "alone",
        knobs={"modules": 4},
        controls=True,
        draws=2,
        **models(pair),
    )
    assert [each.changed for each in again] == [each.changed for each in done[6:]]


def test_the_exact_projector_has_one_basis_a_module_for_all_adapters_settings_and_draws(
    pair, made, tmp_path, monkeypatch
):
    modules = []

    def counted(module, *rest):
        modules.append(module)
        return alignment_basis(module, *rest)

    monkeypatch.setattr(subspace, "alignment_basis", counted)
    knobs = {"projector": "exact", "energy": 0.5, "modules": [2, 4]}
    both = [made / "adapter", made / "rslora"]
    done = defend(both, tmp_path / "out", knobs=knobs, controls=True, **models(pair))
    assert len(done) == 2 * 2 * 8 and len(modules) == len(set(modules)) == 14
    assert done[0].out.parts[-3:] == ("adapter", "modules-2", "defence")


@pytest.mark.model
def test_dropping_all_is_the_aligned_model_and_embeddings_and_conv1d_are_defended(tmp_path):
    """GPT-2 stores its linear weights as (d_in, d_out), and so does every embedding."""
    pair = built(
        tmp_path, GPT2Config(vocab_size=50, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    )
    settings = {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}
    adapter = lora(tmp_path / "adapter", pair.aligned, **settings)
    knobs = {"threshold": 1.0}
    (done,) = defend(adapter, tmp_path / "drop", method="drop", knobs=knobs, **models(pair))
    assert len(done.changed) == 3 and merged_change(pair.aligned, done.out) == {}
    (done,) = defend(adapter, tmp_path / "k", method="subspace_removal", **models(pair))
    before, after = (merged_change(pair.aligned, each) for each in (adapter, done.out))
    base, aligned = (
        AutoModelForCausalLM.from_pretrained(each).state_dict()
        for each in (pair.base, pair.aligned)
    )
    for module, effect in done.effects.items():
        v = (aligned[f"{module}.weight"] - base[f"{module}.weight"]).double()
        u, _, w = torch.linalg.svd(v, full_matrices=False)
        was, now = (torch.einsum("oi,ok,ki->k", each[module], u, w)[:8] for each in (before, after))
        within(now, was.clamp(min=0.0), torch.full_like(now, 1e-4) * effect.norm_before)
        assert bool((was < 0).any())


@pytest.mark.parametrize("method", ["safe_lora", "drop", "subspace_removal"])
def test_two_adapters_have_the_outcomes_that_each_has_alone(pair, made, tmp_path, method):
    two = [made / "adapter", made / "rslora"]
    together = defend(two, tmp_path / "two", method=method, **models(pair))
    for adapter, done in zip(two, together, strict=True):
        (alone,) = defend(adapter, tmp_path / adapter.name, method=method, **models(pair))
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (done.out / name).read_bytes() == (alone.out / name).read_bytes()


def test_the_record_describes_the_saved_updates(pair, tmp_path):
    adapter = lora(tmp_path / "adapter", pair.aligned, dtype=torch.bfloat16)
    knobs = {"threshold": 1.0}
    done = defend(
        adapter, tmp_path / "out", method="safe_lora", knobs=knobs, controls=True, **models(pair)
    )
    for each in done:
        saved = read_adapter(each.out)
        for module, found in each.effects.items():
            assert found == effect_of(
                update_of(read_adapter(adapter), module), update_of(saved, module)
            )


def test_a_module_without_a_direction_to_remove_is_not_changed(pair, made, tmp_path):
    (done,) = defend(
        made / "adapter", tmp_path / "k", method="subspace_removal", knobs={"k": 1}, **models(pair)
    )
    before, after = read_adapter(made / "adapter"), read_adapter(done.out)
    same = {
        module
        for module in before.modules
        if torch.equal(update_of(before, module).lora_B_OR, update_of(after, module).lora_B_OR)
    }
    assert same and set(done.changed) == before.modules.keys() - same


def test_columns_that_the_dtype_would_lose_are_an_error(pair, tmp_path):
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "lora_B" in name:
                tensors[name] *= 1e-5

    large = lora(tmp_path / "large", pair.aligned, dtype=torch.float16)
    adapter = edited(tmp_path / "adapter", large, shrink)
    with pytest.raises(ProjectionError, match=r"beyond the range of torch.float16; save"):
        defend(adapter, tmp_path / "out", method="subspace_removal", **models(pair))
    assert not (tmp_path / "out").exists()


def test_a_bfloat16_adapter_keeps_its_dtype(pair, tmp_path):
    adapter = lora(tmp_path / "adapter", pair.aligned, dtype=torch.bfloat16)
    safety = lora(tmp_path / "safety", pair.aligned, r=2)
    knobs = {"threshold": 1.0}
    (done,) = defend(
        adapter, tmp_path / "out", method="safe_merge", knobs=knobs, safety=safety, **models(pair)
    )
    assert {tensor.dtype for tensor in read_adapter(done.out).tensors.values()} == {torch.bfloat16}


def test_what_cannot_be_done_is_an_error_before_anything_is_written(pair, made, tmp_path):
    both, adapter = models(pair), made / "adapter"
    narrow = built(tmp_path, Qwen2Config(**{**SMALL, "hidden_size": 32}))
    dora = lora(tmp_path / "dora", pair.aligned, use_dora=True)
    before = sorted(tmp_path.iterdir())
    for message, error, settings in (
        ("drop needs base, aligned; base is missing", ProjectionError, {"method": "drop"}),
        ("safety is missing", ProjectionError, {"method": "safe_merge", **both}),
        (
            "scale does not read base; leave it out",
            ProjectionError,
            {"method": "scale", **both},
        ),
        (
            "does not read safety",
            ProjectionError,
            {**both, "safety": made / "safety"},
        ),
        ("scale has no control", ProjectionError, {"method": "scale", "controls": True}),
        (
            "draws must be an integer from 1",
            ProjectionError,
            {**both, "controls": True, "draws": 0},
        ),
        ("no method 'nope'; there are safe_lora, scale", ProjectionError, {"method": "nope"}),
        ("fewer|with a cosine", ProjectionError, {**both, "knobs": {"modules": 99}}),
        ("lacks|fit|takes", ModelError, {"method": "scale", "aligned": narrow.aligned}),
        ("cannot compute on 'nowhere'", ProjectionError, {**both, "device": "nowhere"}),
    ):
        with pytest.raises(error, match=message):
            defend(adapter, tmp_path / "out", **settings)
    with pytest.raises(ModelError, match="is DoRA"):
        defend(dora, tmp_path / "out", method="scale")
    with pytest.raises(ProjectionError, match="is given twice"):
        defend([adapter, adapter], tmp_path / "out", method="scale")
    assert sorted(tmp_path.iterdir()) == before


def invoke(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["defend", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_lists_methods_and_knobs_when_none_is_named():
    for words in ([], ["--method"], ["--method", "--wide"]):
        code, listed, _ = invoke(*words)
        assert code == 0 and "subspace_removal" in listed and "random_subspace" in listed
    code, listed, _ = invoke("--method", "--json")
    found = json.loads(listed)
    assert [each["name"] for each in found["methods"]][:2] == ["safe_lora", "scale"]
    assert invoke("--out", "somewhere")[0] == 2 and invoke("--method", "scale")[0] == 2


def test_the_command_takes_a_list_of_values_and_prints_json_or_a_line_each(made, tmp_path):
    given = ["--method", "scale", "--adapter", made / "adapter"]
    values = ["--knob", "factor=0.5", "--knob", "factor=0.25"]
    code, text, _ = invoke(*given, *values, "--out", tmp_path / "text")
    assert code == 0 and "scale: factor 0.5; factor 0.25" in text
    assert (
        f"{tmp_path / 'text' / 'factor-0.25'}: 6 of 6 modules changed; median length 0.250" in text
    )
    code, printed, _ = invoke(*given, *values, "--out", tmp_path / "json", "--json")
    records = json.loads(printed)["adapters"]
    assert [each["settings"]["knobs"]["factor"] for each in records] == [0.5, 0.25]
    assert records[0] == json.loads((tmp_path / "json/factor-0.5" / RECORD).read_text()) | {
        "out": str(tmp_path / "json/factor-0.5")
    }
    assert sorted(records[0]["modules"]) == sorted(read_adapter(made / "adapter").modules)
    for knob in ("factor", "factor=many", "other=1"):
        code, _, errors = invoke(*given, "--knob", knob, "--out", tmp_path / "wrong")
        assert code == 1 and knob.partition("=")[0] in errors


def test_the_config_of_a_changed_b_is_copied_byte_for_byte(made, tmp_path):
    (done,) = defend(made / "rslora", tmp_path / "out", method="scale")
    copied = (done.out / ADAPTER_CONFIG).read_bytes()
    assert copied == (made / "rslora" / ADAPTER_CONFIG).read_bytes()
    assert LoraConfig.from_pretrained(done.out).use_rslora
