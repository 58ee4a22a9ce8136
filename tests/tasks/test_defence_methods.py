"""Defences after a training: their formulas, the settings that change nothing, and their knobs.

The models and adapters are tensors in files; no model is built.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ebbline.tasks.defences.computing.directions import extrapolated, leading_directions
from ebbline.tasks.defences.computing.factors import Factors
from ebbline.tasks.defences.computing.measured import DefenceWeights, measure
from ebbline.tasks.defences.computing.writing import update_of, write_defended
from ebbline.tasks.defences.gate import ModuleRow
from ebbline.tasks.defences.methods.knobs import folder_name, grid
from ebbline.tasks.defences.methods.method import Measured, ReadModule
from ebbline.tasks.defences.methods.registry import METHODS, method_named
from ebbline.tasks.defences.projectors import Projection, Update
from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ebbline.tasks.models.adapter_file import read_adapter
from ebbline.tasks.models.weights import Checkpoint
from tests.tasks.test_safelora import made

SIZES = {"q_proj": (12, 10), "up_proj": (20, 12)}
shapes = st.tuples(st.integers(2, 20), st.integers(2, 20), st.integers(1, 6), st.integers(0, 9999))


def saved_adapter(folder: Path, rank: int, alpha: float, seed: int) -> Path:
    """A PEFT adapter of four modules, written without PEFT."""
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for kind, (d_out, d_in) in SIZES.items():
            name = f"base_model.model.layers.{layer}.{kind}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(SIZES)}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """base, aligned, adapter and safety."""
    folder = tmp_path_factory.mktemp("defences")
    generator, models = torch.Generator().manual_seed(0), {"base": {}, "aligned": {}}
    for layer in range(2):
        for kind, shape in SIZES.items():
            name = f"layers.{layer}.{kind}.weight"
            models["base"][name] = torch.randn(shape, generator=generator)
            change = 0.3 * torch.randn(shape, generator=generator)
            models["aligned"][name] = models["base"][name] + change
    for which, tensors in models.items():
        (folder / which).mkdir()
        save_file(tensors, folder / which / "model.safetensors")
    saved_adapter(folder / "adapter", 3, 6, 1)
    saved_adapter(folder / "safety", 2, 5, 2)
    return folder


def made_by(files: Path, out: Path, name: str, **given) -> dict[str, Factors]:
    """The adapter after a defence, written to `out`: module -> its new update, of those changed."""
    method, adapter = method_named(name), read_adapter(files / "adapter")
    safety = read_adapter(files / "safety")
    (setting,) = (method.filled(each) for each in grid(method.knobs, given))
    source = DefenceWeights(
        Checkpoint(files / "base"), Checkpoint(files / "aligned"), method=method, settings=[setting]
    )
    (out / "spool").mkdir(parents=True)
    (rows,), spool = measure([adapter], source, out / "spool", lambda *step: None)
    changed = {
        module: method.defended(
            Measured(
                module, update_of(adapter, module), spool.kept(module, 0), update_of(safety, module)
            ),
            setting,
        )
        for module in method.chosen(rows, setting)
    }
    write_defended(adapter, changed, out)
    return changed


def whole(update: Factors) -> torch.Tensor:
    return update.scale * (update.lora_B_OR.double() @ update.lora_A_RI.double())


def updates(folder: Path) -> dict[str, torch.Tensor]:
    adapter = read_adapter(folder)
    return {module: whole(update_of(adapter, module)) for module in adapter.modules}


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("scale", {"factor": 1.0}),
        ("safe_lora", {"threshold": -1.0}),
        ("drop", {"modules": 0}),
        ("safe_merge", {"weight": 0.0, "threshold": 1.0}),
        ("subspace_removal", {"k": 0}),
    ],
)
def test_the_setting_that_changes_nothing_leaves_the_adapter_bit_for_bit(
    files, tmp_path, name, knobs
):
    assert not made_by(files, tmp_path / "out", name, **knobs)
    before, after = (load_file(x / ADAPTER_WEIGHTS) for x in (files / "adapter", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)
    assert (tmp_path / "out" / ADAPTER_CONFIG).read_bytes() == (
        files / "adapter" / ADAPTER_CONFIG
    ).read_bytes()


def test_a_scale_of_one_changes_no_bit_even_when_it_is_computed():
    a, b = torch.randn(3, 5), torch.randn(4, 3).bfloat16()
    assert torch.equal(Factors(a, b).times(1.0).lora_B_OR.bfloat16(), b)


def test_dropping_every_module_leaves_the_aligned_model_bit_for_bit(files, tmp_path):
    made_by(files, tmp_path / "out", "drop", threshold=1.0)
    found = updates(tmp_path / "out")
    assert len(found) == 4
    for module, weight in load_file(files / "aligned" / "model.safetensors").items():
        assert torch.equal(weight + found[module.removesuffix(".weight")].float(), weight)


def test_scaling_by_module_type_multiplies_those_updates_only(files, tmp_path):
    made_by(files, tmp_path / "out", "scale", factor=0.25, types="q_proj")
    before, after = updates(files / "adapter"), updates(tmp_path / "out")
    for module in before:
        assert torch.equal(
            after[module], before[module] * (0.25 if module.endswith("q_proj") else 1.0)
        )
    with pytest.raises(ProjectionError, match="no module of type 'o_proj'; it has q_proj, up_proj"):
        made_by(files, tmp_path / "other", "scale", types="o_proj")


@pytest.mark.parametrize("weight", [0.2, 0.75, 1.0])
def test_a_safety_merge_is_the_weighted_sum_of_the_two_updates(files, tmp_path, weight):
    """Exact in dW, where PEFT's `linear` has cross terms; a weight of 1 is the safety adapter."""
    made_by(files, tmp_path / "out", "safe_merge", weight=weight, threshold=1.0)
    one, two, found = (updates(x) for x in (files / "adapter", files / "safety", tmp_path / "out"))
    for module in one:
        expected = (1 - weight) * one[module] + weight * two[module]
        torch.testing.assert_close(found[module], expected, rtol=1e-6, atol=1e-6)
        assert weight < 1 or torch.equal(found[module], two[module])
    config = json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())
    assert config["r"] == (2 if weight == 1 else 5)


def test_a_merge_of_some_modules_states_their_ranks_by_exact_names(files, tmp_path):
    changed = made_by(files, tmp_path / "out", "safe_merge", weight=0.5, modules=1)
    (module,) = changed
    config = json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    name = "^" + module.replace(".", r"\.")
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({name: 5}, {name: 5})
    found, before = updates(tmp_path / "out"), updates(files / "adapter")
    assert {each for each in found if not torch.equal(found[each], before[each])} == {module}


def test_a_module_that_the_safety_adapter_lacks_is_an_error(files):
    method, adapter = method_named("safe_merge"), read_adapter(files / "adapter")
    module = next(iter(adapter.modules))
    with pytest.raises(ProjectionError, match=f"safety adapter has no update of {module}"):
        method.defended(Measured(module, update_of(adapter, module), {}), {"weight": 0.5})


@given(shape=shapes, k=st.integers(1, 8))
def test_removal_takes_out_what_undoes_alignment_and_nothing_else(shape, k):
    """Equal to the definition by a whole SVD; no looked-at direction is undone any more."""
    base, aligned, a, b = made(*shape)
    method, update = method_named("subspace_removal"), Factors(a, b, 2.0)
    settings = [{"k": k}, {"k": 1}]
    projection = Projection(b, 0.5, 0.5)
    kept = method.measure(ReadModule("m", base, aligned), Update(a, b), projection, settings)
    found = method.defended(Measured("m", update, kept), settings[0])
    u, s, w = torch.linalg.svd(aligned.double() - base.double(), full_matrices=False)
    if len(s) > 1 and float((s[:-1] - s[1:]).min() / s[0]) < 1e-3:
        return  # the order or the directions of nearly equal values are not determined
    expected, removed = whole(update), 0
    for i in range(min(k, len(s))):
        c = float(u[:, i] @ expected @ w[i])
        if c < 0:
            expected, removed = expected - c * torch.outer(u[:, i], w[i]), removed + 1
    size = float(whole(update).norm())
    torch.testing.assert_close(whole(found), expected, rtol=0, atol=1e-5 * size)
    assert found.rank == shape[2] + removed <= shape[2] + k
    left = torch.einsum("ok,oi,ki->k", u[:, :k], whole(found), w[:k])
    assert float(left.min()) >= -1e-5 * size


def test_directions_are_the_leading_singular_triplets_and_none_where_the_models_are_equal():
    base, aligned, _, _ = made(9, 14, 2, 3)
    v = aligned.double() - base.double()
    for x, y in ((base, aligned), (base.T, aligned.T)):  # wide and tall
        found = leading_directions("m", x, y, 4)
        product = (found.left_OK * found.values_K) @ found.right_KI
        u, s, w = torch.linalg.svd(y.double() - x.double(), full_matrices=False)
        torch.testing.assert_close(product, (u[:, :4] * s[:4]) @ w[:4], rtol=0, atol=1e-9)
    assert len(leading_directions("m", base, base, 4).values_K) == 0
    low = base.double() + torch.outer(v[:, 0], v[0])
    assert len(leading_directions("m", base.double(), low, 4).values_K) == 1
    with pytest.raises(ProjectionError, match="NaN"):
        leading_directions("m", base, aligned * torch.nan, 4)


def test_extrapolation_adds_the_leading_directions_of_alignment():
    base, aligned, _, _ = made(8, 6, 2, 0)
    u, s, w = torch.linalg.svd(aligned.double() - base.double(), full_matrices=False)
    expected = aligned.double() + 1.25 * (u[:, :2] * s[:2]) @ w[:2]
    found = extrapolated("m", base, aligned, 2, 1.25)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert extrapolated("m", base, aligned, 2, 0.0) is aligned
    assert extrapolated("m", base.bfloat16(), aligned.bfloat16(), 2, 1.0).dtype == torch.bfloat16


def test_a_gate_orders_its_modules_as_safe_lora_does():
    rows = {"a": ModuleRow(0.3, 1), "b": ModuleRow(0.1, 1), "c": ModuleRow(None, None, "zero")}
    for name in ("safe_lora", "drop", "safe_merge"):
        method = method_named(name)
        assert method.chosen(rows, {"threshold": 0.3, "modules": None, "weight": 0.5}) == {"a", "b"}
        assert method.chosen(rows, {"threshold": None, "modules": 1, "weight": 0.5}) == {"b"}


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("scale", {"factr": 1.0}, "no knob 'factr'; its knobs are factor, types"),
        ("scale", {"factor": 1.5}, "factor is 1.5; it takes: 0 to 1"),
        ("scale", {"factor": True}, "factor is True"),
        ("scale", {"factor": [0.5, 0.5]}, "0.5 is given twice"),
        ("scale", {"factor": []}, "factor has no value"),
        ("drop", {"modules": 2.5}, "modules is 2.5; it takes: integer from 0"),
        ("drop", {"modules": 2, "threshold": 0.5}, "not both"),
        ("safe_lora", {"projector": "other"}, "approximate or exact"),
        ("safe_lora", {"energy": 0.5}, "energy is a setting of the exact projector"),
        ("safe_lora", {"projector": "exact", "energy": 1.0}, "above 0, below 1"),
        ("safe_lora", {"projector": ["exact", "approximate"]}, "takes one a call"),
        ("subspace_removal", {"k": -1}, "integer from 0"),
    ],
)
def test_an_invalid_knob_is_an_error_that_names_it(name, knobs, message):
    method = method_named(name)
    with pytest.raises(ProjectionError, match=message):
        [method.filled(each) for each in grid(method.knobs, knobs)]


def test_defaults_are_filled_in_and_lists_are_combined():
    method = method_named("safe_merge")
    (default,) = [method.filled(each) for each in grid(method.knobs, {})]
    assert (default["weight"], default["threshold"], default["energy"]) == (0.2, 0.5, None)
    exact = method.filled(grid(method.knobs, {"projector": "exact"})[0])
    assert exact["energy"] == 0.9
    both = grid(method.knobs, {"weight": [0.1, 0.2], "modules": [1, 2]})
    assert len(both) == 4
    assert folder_name(both[1], ["weight", "modules"]) == "weight-0.1+modules-2"
    assert folder_name({"types": "../q_proj,a"}, ["types"]) == "types-..-q_proj-a"


def test_every_method_is_described():
    for method in METHODS:
        assert method.formula and method.source and method.knobs and method_named(method.name)
        assert "Knob" in (type(method).__doc__ or "") and "Errors" in (type(method).__doc__ or "")


@pytest.mark.process
def test_the_lists_of_methods_and_controls_import_no_torch():
    code = (
        "import sys, ebbline.commands.defended.listing; "
        "sys.exit(bool({'torch', 'peft', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
