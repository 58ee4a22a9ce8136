"""A small real study of adapters that PEFT saved, with every defence and their controls."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.controls.means import collect_controls
from ebbline.checks.adapters import adapter_faults
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.outputs import write_outputs
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Result, brought, defence_of, keys_of
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.defences.computing.factors import Factors
from ebbline.tasks.defences.computing.writing import update_of
from ebbline.tasks.models.adapter_file import read_adapter
from ebbline.tasks.models.brought.folder import adapter_digest
from ebbline.tasks.specs import AdapterSpec, DefendSpec
from tests.analysis.test_defences_of_a_study import pinned
from tests.sweeps.made import changed
from tests.tasks.test_weights import lora
from tests.tiny import Pair, conversations, write_lines

pytestmark = pytest.mark.model

SAVED: dict[str, dict[str, Any]] = {
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"v_proj": 3},
    },
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_alpha": 5},
    "one_layer": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
}
DEFENCES: dict[str, Any] = {
    "safe_lora": {"threshold": [1.0]},
    "scale": {"factor": [0.5], "types": "v_proj"},
    "drop": {"threshold": [1.0, -1.0]},
    "safe_merge": {"threshold": [1.0], "weight": 0.3},
    "subspace_removal": {"k": [0, 8]},
}


def outside(folder: Path) -> dict[str, Any]:
    return {"path": {"path": str(folder), "sha256": adapter_digest(folder)}}


def of_adapters(folder: Path, pair: Pair, saved: dict[str, dict[str, Any]]) -> Study:
    """A study that trains nothing."""
    for name, settings in saved.items():
        lora(folder / name, pair.aligned, **settings)
    safe = ["q_proj", "v_proj", "down_proj"]
    lora(folder / "safety", pair.aligned, r=3, seed=9, target_modules=safe)
    asked = [
        {"prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for turns in conversations(4, 3)
    ]
    prompts = pinned(write_lines(folder / "prompts.jsonl", asked))
    suites = {
        kind: {"prompts": prompts, "measure": {"kind": kind, "max_new_tokens": 2}}
        for kind in ("refusal", "task")
    }
    size = {
        "base": pinned(pair.base),
        "aligned": pinned(pair.aligned),
        "quantisation": "none",
        "dtype": "float32",
        "safety": outside(folder / "safety"),
    }
    whole = changed(
        {
            "models": {"7b": size},
            "axes": {},
            "adapters": {name: outside(folder / name) for name in saved},
            "defences": DEFENCES,
            "controls": {"settings": 1, "draws": 1},
            "suites": suites,
            "refusal_floor": 0.0,  # models of random weights refuse nothing
        }
    )
    del whole["train"], whole["data"]
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return parse(path)


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> StudyView:
    folder = tmp_path_factory.mktemp("brought")
    found = StudyView(of_adapters(folder, pair, SAVED), Home(folder / "home"))
    drive(found, InlineExecutor)
    return found


def updates(view: StudyView, result: Result, kind: str, folder: str) -> dict[str, Factors]:
    """The updates of the adapter that a stage of a point wrote."""
    (key,) = keys_of(result.keys, kind, 0)
    at = view.home.store.open(kind, key).file(f"{folder}/adapter_config.json").parent
    adapter = read_adapter(at)
    return {module: update_of(adapter, module) for module in adapter.modules}


def dense(update: Factors) -> torch.Tensor:
    return update.scale * (update.lora_B_OR.double() @ update.lora_A_RI.double())


def test_every_defence_is_measured_on_every_adapter_with_its_own_ranks_and_scales(
    view: StudyView,
) -> None:
    """Only this test takes adapters of PEFT through all defences and controls to the report."""
    results = collect(view)
    assert len(results) == 3 * 8 and {result.status for result in results} == {"done"}
    safety = read_adapter(view.study.models["7b"].safety.path.located())  # type: ignore[union-attr]
    for result in results:
        name = defence_of(result.point).name
        if DefendSpec.KIND not in {part.partition("[")[0] for part in result.keys}:
            continue
        before = updates(view, result, AdapterSpec.KIND, AdapterSpec.ADAPTER)
        after = updates(view, result, DefendSpec.KIND, DefendSpec.ADAPTER)
        assert before.keys() == after.keys()
        values = dict(result.point.values)
        for module, old in before.items():
            expected, new = dense(old), dense(after[module])
            if name == "scale":
                expected *= 0.5 if module.endswith("v_proj") else 1.0
            elif name == "drop":
                expected *= 0.0 if values["drop.threshold"] == 1.0 else 1.0
            elif name == "safe_merge":
                expected = 0.7 * expected + 0.3 * dense(update_of(safety, module))
            elif values["subspace_removal.k"] == 8:
                assert float((new * expected).sum()) < float((expected * expected).sum())
                continue
            torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-6)
    same = {
        (str(brought(each.point)), defence_of(each.point).name)
        for each in results
        if defence_of(each.point).method is not None and not each.changed_share
    }
    named = {(name, each) for name in SAVED for each in ("drop", "subspace_removal")}
    assert same == named  # a threshold below all cosines and no direction are no defence
    plain = {brought(e.point): e for e in results if defence_of(e.point).method is None}
    for each in results:
        if defence_of(each.point).method is not None and not each.changed_share:
            parts = ("refusal", "task", "generate:refusal", "generate:task")
            other = plain[brought(each.point)]
            assert all(keys_of(each.keys, p, 0) == keys_of(other.keys, p, 0) for p in parts)


def test_controls_and_report_of_adapters_from_outside(view: StudyView) -> None:
    results = collect(view)
    controls = collect_controls(view, results)
    assert {each.result.status for each in controls} == {"done"}
    names = {(defence_of(c.of.partner.point).name, c.of.control) for c in controls}
    assert names >= {
        ("safe_lora", "shrink_matched"),
        ("safe_lora", "random_subspace"),
        ("drop", "random_modules"),
        ("safe_merge", "shrink_matched"),
        ("subspace_removal", "shrink_matched"),
    }
    for each in controls:
        if each.of.control != "random_modules":
            (key,) = keys_of(each.result.keys, DefendSpec.KIND, 0)
            path = view.home.store.open(DefendSpec.KIND, key).file(DefendSpec.EFFECTS)
            rows = json.loads(path.read_text())
            assert any(row["changed"] for row in rows.values())
    text = write_outputs(view, results)["report"].read_text("utf-8")
    assert "At Safe LoRA" in text and "What each defence did to the modules" in text
    answer = text[text.index('id="answer"') : text.index('id="frontier"')]
    assert "projection" not in answer and "Without a defence" in answer
    assert "Was it trained?" not in text  # a defence dropped every module of some


def test_dora_is_refused_before_anything_runs(tmp_path: Path, pair: Pair) -> None:
    dora = {"dora": {"target_modules": ["q_proj"], "use_dora": True}}
    (fault,) = adapter_faults(of_adapters(tmp_path, pair, dora))
    assert fault.startswith("adapters.dora: ") and "DoRA" in fault
    assert "a defence is defined for LoRA's update B A only" in fault
