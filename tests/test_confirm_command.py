"""`ebbline confirm` on a small real study: from nominated points to claims, and to an export that
needs no `--accept-unsure`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from typer.testing import Result as CommandResult

from ebbline.analysis.results.collect import collect
from ebbline.cli import app
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.identity import content_digest
from tests.sweeps.made import study as made_study
from tests.tiny import Pair, write_chats, write_lines


def pinned(path: Path) -> dict[str, Any]:
    return {"path": {"path": str(path), "sha256": content_digest(path)}}


def prompts(folder: Path, name: str, first: int) -> dict[str, Any]:
    rows = [{"prompt": f"May I open {number}?"} for number in range(first, first + 4)]
    return pinned(write_lines(folder / name, rows))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> tuple[Path, Home]:
    """A study of one seed that was run to its end. Every rate is 0, and so is its floor."""
    folder = tmp_path_factory.mktemp("confirm")
    changes = {
        "models": {
            "7b": {
                "base": pinned(pair.base),
                "aligned": pinned(pair.aligned),
                "quantisation": "none",
                "dtype": "float32",
            }
        },
        "data": {"pool": pinned(write_chats(folder / "chats.jsonl", 32)), "settings": {"size": 8}},
        "train": {"steps": 1, "global_batch": 8, "rank": 2, "max_tokens": 64},
        "axes": {"apply.threshold": [None, 1.0]},
        "suites": {
            "refusal": {
                "prompts": prompts(folder, "asked.jsonl", 0),
                "measure": {"kind": "refusal", "max_new_tokens": 4},
            }
        },
        "objectives": ["refusal_rate"],
        "search": {"sampler": "grid", "window": 2},
        "refusal_floor": 0.0,
        "confirm": {
            "suites": {"refusal": prompts(folder, "other.jsonl", 100)},
            "seeds": [7, 8, 9],
        },
    }
    study, home = made_study(folder, changes), Home(folder / "home")
    progress = drive(StudyView(study, home), InlineExecutor)
    assert [found.status for found in progress.results] == ["done"] * 2
    return folder / "study.yaml", home


def run(*arguments: object) -> CommandResult:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_candidate_is_confirmed_and_then_exported_without_a_further_option(
    searched: tuple[Path, Home], tmp_path: Path
) -> None:
    """Only this shows the whole way: the study of the confirmation, its fresh trainings, and the
    claims that every output then makes.
    """
    file, home = searched
    pick = ("pick", file, "--home", home.root, "--point", 1)
    assert run(*pick, "--export", tmp_path / "early").exit_code == 1
    found = run(
        "confirm", file, "--home", home.root, "--point", 1, "--executor", "inline", "--no-wandb"
    )
    assert found.exit_code == 0, found.output
    assert "this adapter (seed 0) holds refusal rate at least 0.0%" in found.output
    assert re.search(r"this setting holds refusal rate .* and 3 fresh seeds", found.output)
    assert "1 of 1 confirmed setting hold the floor" in found.output
    view = StudyView.begun(home.root, str(file))
    plain, projected = collect(view)
    assert plain.confirmed is None and projected.confirmed is not None
    assert projected.confirmed.seeds == (7, 8, 9) and list(projected.confirmed.adapters) == [0]
    own = json.loads(run(*pick, "--json").stdout)["picks"][0]
    assert (own["standing"], own["standing_of_setting"]) == ("holds", "holds")
    done = run(*pick, "--export", tmp_path / "out")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "this setting holds refusal rate" in card and "--accept-unsure" not in card
    report = (home.path("tiny") / "report.html").read_text()
    assert "Confirmed: the setting holds the floor." in report
    options = ("--executor", "inline", "--no-wandb", "--json")
    again = run("confirm", file, "--home", home.root, "--point", 0, *options)
    assert again.exit_code == 0, again.output
    rows = json.loads(again.stdout)["confirmed"]
    assert {row["number"]: row["standing"]["setting"] for row in rows} == {0: "holds", 1: "holds"}
