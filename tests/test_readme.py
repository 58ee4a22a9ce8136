"""The README: it is short, its study is valid, and its Python example runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ebbline.cli import app
from tests.pages import DOCS, Block, blocks
from tests.tiny import Pair, conversations

README = DOCS.parent / "README.md"
PROMPTS = [turns[0]["content"] for turns in conversations(8, seed=4)]


def block(language: str) -> Block:
    (found,) = [block for block in blocks(README) if block.language == language]
    return found


def command(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def folder(pair: Pair, tmp_path: Path) -> Path:
    """A reader's folder: the two models, an adapter and the prompt and data files that the
    README names.
    """
    mine = tmp_path / "mine"
    shutil.copytree(pair.base, mine / "base")
    shutil.copytree(pair.aligned, mine / "aligned")
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), config).save_pretrained(
        mine / "adapter"
    )
    (mine / "train.jsonl").write_text(
        "".join(json.dumps({"messages": turns}) + "\n" for turns in conversations(100))
    )
    for name in ("refuse.csv", "answer.csv"):
        (mine / name).write_text("\n".join(["prompt", *PROMPTS]) + "\n")
    (mine / "task.jsonl").write_text(
        "".join(json.dumps({"prompt": text, "answer": "word1"}) + "\n" for text in PROMPTS)
    )
    return mine


def test_readme_has_at_most_120_lines_of_at_most_100_characters() -> None:
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 100] == []


def test_the_commands_write_check_and_plan_a_study(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EBBLINE_HOME", str(tmp_path / "runs"))
    (found,) = [block for block in blocks(README) if "ebbline new" in block.text]
    lines = [line.partition("#")[0].split() for line in found.text.splitlines()]
    new, validate, plan, run = [line[1:] for line in lines]
    assert "wrote study.yaml" in command(*new)
    assert command(*validate).startswith(
        "aligned is valid: 1 model, axes train.rank, apply.threshold, 2 suites"
    )
    assert "8 points are known; the search will choose 0 more." in command(*plan, "--gpus", "1")
    assert run == ["run", "study.yaml"]


def test_the_python_example_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    exec(compile(block("python").text, str(README), "exec"), {})
    first, *rates = capsys.readouterr().out.splitlines()
    assert first.endswith("of 14 modules projected")
    assert [line.split()[0] for line in rates] == ["model", "adapter", "safer"]
