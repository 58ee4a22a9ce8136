"""The stages `project` and `apply` on an adapter that PEFT saved: names, files and equal bytes."""

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ebbline.tasks.defences.gate import read_rows
from ebbline.tasks.defences.project import Weights, projections, run_apply, run_project
from ebbline.tasks.defences.projectors import Projection
from ebbline.tasks.defences.subspace import run as run_subspace
from ebbline.tasks.errors import ModelError, ProjectionError
from ebbline.tasks.identity import content_digest
from ebbline.tasks.models.adapter_file import read_adapter
from ebbline.tasks.models.weights import Checkpoint
from ebbline.tasks.specs import ApplySpec, ProjectSpec, SubspaceSpec, TrainSpec
from tests.tasks.test_safelora import GRAM, by_definition, measured, slack
from tests.tiny import context, fresh
from tests.tolerance import gamma, merged, within

GOLDEN = Path(__file__).parents[1] / "golden" / "projections.json"
TARGETS = TrainSpec().target_modules


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory) -> Path:
    """An adapter with random A and B on every linear layer, saved by PEFT."""
    torch.manual_seed(7)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pair.aligned),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False),
    )
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def projection(pair, adapter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("projection")
    run_project(
        ProjectSpec(),
        {"adapter": adapter, "base": pair.base, "aligned": pair.aligned},
        folder,
        context(folder.with_name("c")),
    )
    return folder


def applied(folder: Path, adapter: Path, projection: Path, **spec) -> Path:
    out = fresh(folder)
    run_apply(
        ApplySpec(**spec),
        {"adapter": adapter, "projection": projection},
        out,
        context(folder.with_name(folder.name + "-ctx")),
    )
    return out


def sorted_cosines(projection: Path) -> list[float]:
    return sorted(row.cosine for row in read_rows(projection / ProjectSpec.COSINES).values())


def test_every_module_is_projected_by_its_own_weights(pair, adapter, projection):
    loaded = read_adapter(adapter)
    rows = read_rows(projection / ProjectSpec.COSINES)
    projected = load_file(projection / ProjectSpec.PROJECTED)
    assert len(rows) == 14 and rows.keys() == loaded.modules.keys()
    assert len({row.cosine for row in rows.values()}) == 14
    base, aligned = (
        load_file(pair.base / "model.safetensors"),
        load_file(pair.aligned / "model.safetensors"),
    )
    for module, lora in loaded.modules.items():
        weights = base[f"{module}.weight"], aligned[f"{module}.weight"]
        tensors = *weights, loaded.tensors[lora.lora_A], loaded.tensors[lora.lora_B]
        row = (rows[module].cosine, rows[module].norm_ratio)
        slack(*tensors).holds(Projection(projected[module], *row), *by_definition(*tensors))
        within(row, measured(projected[module], *tensors[2:]), GRAM)  # of the saved C B


def test_the_projections_of_a_tiny_pair_equal_the_golden_file(pair, adapter, projection, tmp_path):
    exact = fresh(tmp_path / "exact")
    models = {"base": pair.base, "aligned": pair.aligned}
    run_subspace(
        SubspaceSpec(energy=0.5, target_modules=TARGETS),
        models,
        fresh(tmp_path / "subspace"),
        context(tmp_path / "c"),
    )
    spec = ProjectSpec(projector="exact", energy=0.5)
    run_project(
        spec,
        {"adapter": adapter, "subspace": tmp_path / "subspace"},
        exact,
        context(tmp_path / "d"),
    )
    now = {}
    for projector, folder in (("approximate", projection), ("exact", exact)):
        norms = {
            module: float(tensor.double().norm())
            for module, tensor in load_file(folder / ProjectSpec.PROJECTED).items()
        }
        rows = read_rows(folder / ProjectSpec.COSINES)
        now[projector] = {
            m: {"cosine": row.cosine, "norm_ratio": row.norm_ratio, "norm_of_CB": norms[m]}
            for m, row in rows.items()
        }
    if os.environ.get("EBBLINE_REFRESH_GOLDEN"):
        GOLDEN.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        pytest.skip(f"wrote {GOLDEN}")
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == now.keys()
    for projector, modules in golden.items():
        assert modules.keys() == now[projector].keys()
        for module, row in modules.items():
            # Sums of at most 128 terms, and ||V||. Random weights differ between processors by
            # about 4 roundings.
            assert now[projector][module] == pytest.approx(row, rel=gamma(2 * 128 + 64)), (
                f"{projector}, {module}"
            )


def test_never_more_than_two_modules_of_the_models_are_in_memory(pair, adapter, monkeypatch):
    read, alive, most = Checkpoint.read, [], []

    def counted(self, name):
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most.append(sum(each() is not None for each in alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    found = list(
        projections(
            [read_adapter(adapter)],
            Weights(Checkpoint(pair.base), Checkpoint(pair.aligned)),
            lambda *progress: None,
        )
    )
    assert len(found) == 14 and len(most) == 28 and max(most) <= 2 * 2


def test_a_sharded_checkpoint_gives_the_same_projection_as_a_single_file(
    pair, adapter, projection, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(pair.aligned)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    out = fresh(tmp_path / "out")
    run_project(
        ProjectSpec(),
        {"adapter": adapter, "base": pair.base, "aligned": tmp_path / "sharded"},
        out,
        context(tmp_path / "c"),
    )
    assert content_digest(out) == content_digest(projection)


def test_without_a_rule_the_adapter_keeps_every_tensor(adapter, projection, tmp_path):
    out = applied(tmp_path / "out", adapter, projection)
    before, after = (
        load_file(adapter / "adapter_model.safetensors"),
        load_file(out / "adapter_model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((out / ApplySpec.CHOSEN).read_text()) == []


def test_thresholds_between_two_neighbouring_cosines_give_the_same_bytes(
    adapter, projection, tmp_path
):
    cosines = sorted_cosines(projection)
    low, high = cosines[4], cosines[5]
    contents = [
        content_digest(applied(tmp_path / str(index), adapter, projection, threshold=threshold))
        for index, threshold in enumerate(
            [low, low + (high - low) / 3, low + (high - low) / 2, high]
        )
    ]
    # The gate is <=, so a threshold equal to a cosine projects that module.
    assert contents[0] == contents[1] == contents[2]
    assert contents[3] != contents[2]


def test_a_threshold_and_the_number_of_modules_it_takes_give_the_same_bytes(
    adapter, projection, tmp_path
):
    cosines = sorted_cosines(projection)
    one = applied(tmp_path / "threshold", adapter, projection, threshold=cosines[2])
    other = applied(tmp_path / "number", adapter, projection, modules=3)
    assert content_digest(one) == content_digest(other)
    assert len(json.loads((one / ApplySpec.CHOSEN).read_text())) == 3


def test_the_chosen_modules_have_C_B_and_the_others_keep_B(adapter, projection, tmp_path):
    out = applied(tmp_path / "out", adapter, projection, modules=5)
    names = set(json.loads((out / ApplySpec.CHOSEN).read_text()))
    before, after, projected = (
        load_file(path)
        for path in (
            adapter / "adapter_model.safetensors",
            out / "adapter_model.safetensors",
            projection / ProjectSpec.PROJECTED,
        )
    )
    for module, lora in read_adapter(adapter).modules.items():
        name_a, name_b = lora.lora_A, lora.lora_B
        assert torch.equal(after[name_a], before[name_a])
        assert torch.equal(after[name_b], projected[module] if module in names else before[name_b])


def test_peft_loads_an_applied_adapter_and_merges_C_B_into_the_weights(
    pair, adapter, projection, tmp_path
):
    out = applied(tmp_path / "out", adapter, projection, modules=14)
    model = AutoModelForCausalLM.from_pretrained(pair.aligned)
    ids = torch.tensor([[1, 8, 9, 10]])
    plain = model(ids).logits
    with_b = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair.aligned), adapter)(
        ids
    ).logits
    loaded = PeftModel.from_pretrained(model, out)
    whole = loaded.merge_and_unload()
    projected = load_file(projection / ProjectSpec.PROJECTED)
    modules, tensors = (
        read_adapter(adapter).modules,
        load_file(adapter / "adapter_model.safetensors"),
    )
    aligned = load_file(pair.aligned / "model.safetensors")
    for module, lora in modules.items():
        weight, a, cb = aligned[f"{module}.weight"], tensors[lora.lora_A], projected[module]
        expected = weight.double() + 2.0 * cb.double() @ a.double()
        within(whole.state_dict()[f"{module}.weight"], expected, merged(weight, a, cb, 2.0))
    with_cb = whole(ids).logits
    assert not torch.allclose(with_cb, with_b, atol=1e-3) and not torch.allclose(
        with_cb, plain, atol=1e-3
    )


def test_more_modules_than_there_are_is_an_error(adapter, projection, tmp_path):
    with pytest.raises(
        ProjectionError, match="15 modules are to be projected, but the adapter has 14 with a cos"
    ):
        applied(tmp_path / "out", adapter, projection, modules=15)


def test_a_projection_of_another_adapter_is_an_error(pair, adapter, projection, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pair.aligned),
        LoraConfig(r=4, target_modules=["q_proj"]),
    )
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(ProjectionError, match="which the adapter in .* does not have"):
        applied(tmp_path / "out", tmp_path / "small", projection, modules=14)


def edited(
    folder: Path,
    adapter: Path,
    config: dict | None = None,
    drop: str | None = None,
    rename: tuple[str, str] | None = None,
) -> Path:
    """A copy of an adapter with changes of its configuration and its tensors."""
    out = fresh(folder)
    old = json.loads((adapter / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**old, **(config or {})}))
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {
        (name.replace(*rename) if rename else name): t
        for name, t in tensors.items()
        if drop is None or drop not in name
    }
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"config": {"use_dora": True}}, r"is DoRA .* \(`use_dora` in"),
        ({"config": {"peft_type": "IA3"}}, "is an adapter of type IA3"),
        ({"drop": "layers.1.mlp.up_proj.lora_B"}, "has no .*lora_B.weight; the adapter is damaged"),
        ({"drop": "lora_"}, "holds no LoRA matrices"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_an_error_with_its_reason(
    adapter, tmp_path, change, reason
):
    with pytest.raises(ModelError, match=reason):
        read_adapter(edited(tmp_path / "bad", adapter, **change))


def test_an_adapter_with_modules_that_the_model_lacks_is_an_error_that_names_the_tensor(
    pair, adapter, tmp_path
):
    bad = edited(tmp_path / "bad", adapter, rename=("layers.1", "layers.9"))
    with pytest.raises(ModelError, match=r"layers\.9\..* fits no adapter parameter of"):
        run_project(
            ProjectSpec(),
            {"adapter": bad, "base": pair.base, "aligned": pair.aligned},
            fresh(tmp_path / "out"),
            context(tmp_path / "c"),
        )


def test_a_truncated_file_is_an_error_that_names_it(pair, adapter, tmp_path):
    bad = edited(tmp_path / "bad", adapter)
    weights = bad / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ModelError, match=r"adapter_model\.safetensors cannot be read .* is the download complete"
    ):
        read_adapter(bad)
    with pytest.raises(ModelError, match="no model.safetensors and no index"):
        Checkpoint(fresh(tmp_path / "empty")).read("lm_head.weight")


def test_two_equal_models_are_an_error_not_an_unchanged_adapter(pair, adapter, tmp_path):
    with pytest.raises(ProjectionError, match="base and aligned are equal in every module"):
        run_project(
            ProjectSpec(),
            {"adapter": adapter, "base": pair.aligned, "aligned": pair.aligned},
            fresh(tmp_path / "o"),
            context(tmp_path / "c"),
        )
