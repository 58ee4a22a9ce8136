"""A small real study with two defences, their controls and a penalty, to its report."""

from html import unescape
from pathlib import Path
from typing import Any

import pytest

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.controls.means import collect_controls
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.outputs import write_outputs
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.identity import content_digest
from tests.sweeps.made import study as made_study
from tests.tiny import Pair, conversations, write_chats, write_lines


def pinned(path: Path) -> dict[str, Any]:
    return {"path": {"path": str(path), "sha256": content_digest(path)}}


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> StudyView:
    """Trained with AsFT's penalty and a moving average, then defended; random models."""
    folder = tmp_path_factory.mktemp("defences")
    asked = [
        {"prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for turns in conversations(6, 3)
    ]
    prompts = pinned(write_lines(folder / "prompts.jsonl", asked))
    suite = {"prompts": prompts, "measure": {"kind": "refusal", "max_new_tokens": 4}}
    task = {"prompts": prompts, "measure": {"kind": "task", "max_new_tokens": 4}}
    changes = {
        "models": {
            "7b": {
                "base": pinned(pair.base),
                "aligned": pinned(pair.aligned),
                "quantisation": "none",
                "dtype": "float32",
            }
        },
        "data": {"pool": pinned(write_chats(folder / "chats.jsonl", 32)), "settings": {"size": 16}},
        "train": {
            "rank": 2,
            "steps": 2,
            "global_batch": 8,
            "learning_rate": 1e-2,
            "max_tokens": 64,
            "ema_decay": 0.3,
        },
        "axes": {"train.penalty": ["asft", "norm"]},
        "defences": {"safe_lora": {"threshold": [0.1, 1.0]}, "scale": {"factor": [0.5]}},
        "controls": {"settings": 1, "draws": 2},
        "suites": {"refusal": suite, "task": task},
        "objectives": ["refusal_rate", "task_accuracy"],
        "refusal_floor": 0.0,  # models of random weights refuse nothing
    }
    study = made_study(folder, changes)
    found = StudyView(study, Home(folder / "home"))
    drive(found, InlineExecutor)
    return found


def test_a_study_with_controls_says_first_how_its_defences_compare(view: StudyView) -> None:
    """Only this test takes defences, controls and penalties from a study file to the report."""
    results = collect(view)
    assert {result.status for result in results} == {"done"}
    controls = collect_controls(view, results)
    assert {each.of.control for each in controls} == {
        "shrink_matched",
        "random_subspace",
        "random_modules",
    }
    paths = write_outputs(view, results)
    text = paths["report"].read_text("utf-8")
    answer = unescape(text[text.index('id="answer"') :])
    # Models of random weights answer nothing right: no usefulness at which to compare refusals
    first = "At Safe LoRA's operating point against shrinking to the same length refusal rate is"
    assert answer.index(first) < 300
    assert "shrinking to the same length" in answer
    assert "a defence did not measurably raise them" in answer and "<td>defended</td>" in answer
    assert "scale has no control" in text
    assert (view.folder / "defences.png").exists() and (view.folder / "controls.csv").exists()
    assert "What each defence did to the modules that it changed" in text
    assert "7b, Safe LoRA, point" in text and "The approximate C is no projector" in text
    header = paths["results"].read_text("utf-8").splitlines()[0]
    assert {"defence", "train.penalty", "scale.factor"} <= set(header.split(","))
