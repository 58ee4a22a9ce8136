"""Adapters that another tool trained, as stages read them: which files, on which model, by which
tokenizer.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ebbline.checks.adapters import Fit, adapter_faults, base_notes, fault
from ebbline.sweeps.study.study_file import parse
from ebbline.tasks.defences.project import run_apply, run_project
from ebbline.tasks.errors import DataError, ModelError
from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ebbline.tasks.models.adapter_file import read_adapter
from ebbline.tasks.models.brought.adopt import run
from ebbline.tasks.models.brought.folder import (
    TOKENIZER_FILES,
    adapter_files,
    lora_shape,
    misfit,
)
from ebbline.tasks.models.brought.work import as_training
from ebbline.tasks.models.sizes import organism_shape
from ebbline.tasks.specs import AdapterSpec, ApplySpec, ProjectSpec
from tests.brought import BESIDE, adapter_folder, with_layout
from tests.sweeps.made import changed
from tests.sweeps.test_adapters import as_text, pinned
from tests.tiny import TEMPLATE, context, fresh, word_tokenizer

PAIR = {"q_proj": (64, 64), "v_proj": (64, 32)}  # (d_in, d_out) in the models of tests.tiny
OTHER_TEMPLATE = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}<system> word1 ")


def adopted(out: Path, adapter: Path, model: Path, **spec: object) -> Path:
    run(AdapterSpec(**spec), {"source": adapter, "model": model}, fresh(out), context(out))
    return out / AdapterSpec.ADAPTER


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "it has no adapter_config.json"),
        (lambda path: adapter_folder(path / "checkpoint-4"), "Its folders hold adapters: checkp"),
        (
            lambda path: (adapter_folder(path) / ADAPTER_WEIGHTS).rename(
                path / "adapter_model.bin"
            ),
            "reads safetensors only",
        ),
    ],
)
def test_a_folder_that_is_no_adapter_says_why(tmp_path, make, reason):
    make(tmp_path / "run")
    with pytest.raises(DataError, match=reason):
        adapter_files(tmp_path / "run")


def test_the_shapes_of_an_adapter_are_read_without_its_tensors(tmp_path):
    found = lora_shape(adapter_folder(tmp_path / "run", PAIR, rank=6))
    assert found.rank == 6 and found.target_modules == ("q_proj", "v_proj")
    assert as_training(str(tmp_path / "run")).rank == 6
    assert as_training("hub:model:a/b@0").rank == 16
    (tmp_path / "run" / ADAPTER_WEIGHTS).write_text("cut off")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        lora_shape(tmp_path / "run")


def test_an_adapter_of_another_size_differs_in_shape_or_in_layers(tmp_path):
    small, large = organism_shape("small"), organism_shape("large")
    adapter = lora_shape(adapter_folder(tmp_path / "run"))
    assert misfit(adapter, small, "7b") == ""
    assert "q_proj changes a weight of shape (64, 64), and 70b has (128, 128) there" in misfit(
        adapter, large, "70b"
    )
    deep = lora_shape(adapter_folder(tmp_path / "deep", layers=3))
    assert "layers.2.self_attn.q_proj is a layer that 7b does not have: it has 2 layers" in misfit(
        deep, small, "7b"
    )


def test_validate_names_the_adapter_and_both_shapes(tmp_path, pair, monkeypatch):
    """A model made by the study, a local one, and a config that names another base."""
    here = lambda fits: [found for found in map(fault, fits) if found]  # noqa: E731
    monkeypatch.setattr("ebbline.checks.adapters._compared", here)  # not in another process
    wrong = adapter_folder(tmp_path / "wrong", {"q_proj": (128, 128)})
    right = adapter_folder(tmp_path / "right", PAIR, base_model_name_or_path="org/other-chat")
    whole = changed({"adapters": {"mine": pinned(wrong)}})
    path = tmp_path / "study.yaml"
    path.write_text(as_text(whole))
    (message,) = adapter_faults(parse(path))
    assert re.search(r"adapters\.mine: .*\(128, 128\), and 7b has \(64, 64\)", message)
    local = {"path": {"path": str(pair.aligned), "sha256": "0" * 64}}
    whole["models"] = {"7b": {"base": local, "aligned": local}}
    path.write_text(as_text(whole))
    (message,) = adapter_faults(parse(path))
    assert re.search(r"adapters\.mine: .*\(4, 128\), and .* takes \(4, 64\)", message)
    whole["adapters"] = {"mine": pinned(right)}
    path.write_text(as_text(whole))
    assert adapter_faults(parse(path)) == []
    (note,) = base_notes(parse(path))
    assert note.startswith("adapters.mine: its adapter_config.json names the base org/other-chat")


@pytest.mark.parametrize("tool", BESIDE)
def test_the_files_that_a_tool_writes_are_read_and_nothing_beside_them(tmp_path, pair, tool):
    adapter = with_layout(adapter_folder(tmp_path / "run", PAIR), tool)
    out = adopted(tmp_path / "out", adapter, pair.aligned)
    assert {path.name for path in out.iterdir()} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    before, after = (load_file(folder / ADAPTER_WEIGHTS) for folder in (adapter, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_under_other_names_is_defended_under_those_of_the_model(tmp_path, pair):
    """`apply` reads the adapter that `project` measured; both see the model's names."""
    adapter = adapter_folder(tmp_path / "run", PAIR, prefix="base_model.model._orig_mod.")
    out = adopted(tmp_path / "adopted", adapter, pair.aligned)
    assert set(read_adapter(out).modules) == {
        f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in PAIR
    }
    models = {"adapter": out, "base": pair.base, "aligned": pair.aligned}
    projection, applied = fresh(tmp_path / "projection"), fresh(tmp_path / "applied")
    run_project(ProjectSpec(), models, projection, context(projection))
    inputs = {"adapter": out, "projection": projection}
    run_apply(ApplySpec(modules=2), inputs, applied, context(applied))
    assert len(json.loads((applied / ApplySpec.CHOSEN).read_text())) == 2
    changed_tensors = [
        name
        for name, tensor in load_file(applied / ADAPTER_WEIGHTS).items()
        if not torch.equal(tensor, load_file(out / ADAPTER_WEIGHTS)[name])
    ]
    assert len(changed_tensors) == 2 and all("lora_B" in name for name in changed_tensors)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "is DoRA"),
        ({"peft_type": "IA3"}, "an adapter of type IA3"),
        ({"target_modules": ["q_proj", "k_proj"]}, "fits no adapter parameter|lacks"),
    ],
)
def test_an_adapter_that_cannot_be_defended_is_an_error_of_its_stage_and_of_validate(
    tmp_path, pair, settings, reason
):
    adapter = adapter_folder(tmp_path / "run", PAIR, **settings)
    with pytest.raises(ModelError, match=reason):
        adopted(tmp_path / "out", adapter, pair.aligned)
    assert fault(Fit("adapters.mine", str(adapter), str(pair.aligned), None)).startswith(
        "adapters.mine: "
    )


def test_a_tokenizer_that_differs_is_an_error_until_one_of_the_two_is_chosen(tmp_path, pair):
    adapter = adapter_folder(tmp_path / "run", PAIR)
    word_tokenizer().save_pretrained(adapter)
    adopted(tmp_path / "equal", adapter, pair.aligned)
    word_tokenizer(OTHER_TEMPLATE).save_pretrained(adapter)
    with pytest.raises(ModelError, match="differs from the model's in chat template. Add `tokeni"):
        adopted(tmp_path / "differs", adapter, pair.aligned)
    assert not list(
        adopted(tmp_path / "model", adapter, pair.aligned, tokenizer="model").glob("t*")
    )
    out = adopted(tmp_path / "own", adapter, pair.aligned, tokenizer="adapter")
    assert (out / "chat_template.jinja").read_text() == OTHER_TEMPLATE
    projection, applied = fresh(tmp_path / "projection"), fresh(tmp_path / "applied")
    models = {"adapter": out, "base": pair.base, "aligned": pair.aligned}
    run_project(ProjectSpec(), models, projection, context(projection))
    inputs = {"adapter": out, "projection": projection}
    run_apply(ApplySpec(), inputs, applied, context(applied))
    assert {path.name for path in applied.iterdir()} & set(TOKENIZER_FILES) >= {
        "chat_template.jinja",
        "tokenizer.json",
    }
    for name in TOKENIZER_FILES:
        (adapter / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="holds neither a tokenizer nor"):
        adopted(tmp_path / "none", adapter, pair.aligned, tokenizer="adapter")
