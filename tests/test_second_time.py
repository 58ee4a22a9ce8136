"""Every command on a study that has run, a second time; and a run whose outputs cannot be made."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import ebbline.commands.run as running
from ebbline.analysis.report import findings, report
from ebbline.analysis.results.collect import Follower, StoredEvidence
from ebbline.cli import app
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.view import StudyView
from tests.sweeps.made import changed
from tests.sweeps.pretended import Pretended, changes

BUDGET: dict[str, Any] = {"budget": {"hours": 100.0}, "axes": {"apply.threshold": [None, 0.4]}}


class Mine:
    """A study file with a budget and no search, its home, and the command line."""

    def __init__(self, folder: Path) -> None:
        self.home, self.file = Home(folder / "home"), folder / "mine.yaml"
        self.whole = changed(changes(folder, **BUDGET))
        self.whole["models"].pop("70b")
        self.whole.pop("search")
        self.write()

    def write(self) -> None:
        self.file.write_text(yaml.safe_dump(self.whole, sort_keys=False))

    def __call__(self, *arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(app, [*arguments, "--home", str(self.home.root)])
        assert done.exit_code == code, (arguments, done.output, done.exception)
        return done

    def run(self, *options: str, code: int = 0) -> Result:
        return self(
            "run", str(self.file), "--executor", "inline", "--no-wandb", *options, code=code
        )


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mine:
    found = Mine(tmp_path)
    monkeypatch.setattr(running, "OnDemand", lambda kind, wanted: Pretended(found.home.store))
    monkeypatch.setattr(running, "require_checked", lambda study, home, now: [])  # no real models
    monkeypatch.setattr(StoredEvidence, "samples", lambda self, subject, suite: {})
    return found


@pytest.mark.slow
def test_a_study_with_a_budget_and_no_search_continues_by_every_command(mine: Mine) -> None:
    """Every command on one home with a real driver, and once more after another study broke."""
    first = mine.run()
    table = mine.home.folder("tiny") / "results.csv"
    before = table.read_text()
    again = mine.run()
    assert "0 points in this run, 0 stages run" in again.output and table.read_text() == before
    assert "2 points in this run" in first.output
    for command in ("status", "plan"):
        mine(command, "tiny")
    mine("pick", "tiny", "--accept-unsure")
    mine("status", str(mine.file))
    mine("report", str(mine.file))
    mine("export", "tiny", "--style", "acl", "--to", str(mine.home.root.parent / "paper"))
    assert "2 points done" in mine("status", "tiny").output
    mine("compare", "tiny", str(mine.file), code=1)  # one study twice, which the message explains
    mine("store", "gc")
    mine("store", "du")
    assert len(Follower(StudyView.begun(mine.home.root, "tiny")).look()) == 2
    mine.whole |= {"study": "other", "search": {"warm_start": ["tiny"]}}
    mine.write()
    mine.run()
    mine("compare", "tiny", "other")
    # A broken study blocks no other, nor the home.
    broken = mine.home.folder("broken")
    (broken / "study.json").write_text('{"study": "broken"}')
    mine("status", "tiny")
    done = mine("store", "gc")
    assert "broken/study.json cannot be read" in done.output
    failed = mine("status", "broken", code=1)
    assert "broken/study.json cannot be read" in failed.output and "Traceback" not in failed.output


def written(folder: Path) -> dict[str, int]:
    """When each output was written, in ns. The plan's picture is drawn before the run."""
    kinds = (".png", ".pdf", ".csv", ".parquet", ".html")
    return {
        path.name: path.stat().st_mtime_ns
        for path in folder.iterdir()
        if path.suffix in kinds and path.stem != "plan"
    }


@pytest.mark.slow
def test_outputs_are_made_again_after_a_change_and_only_then(
    mine: Mine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole commands on one home: only here are the files on the disk compared before and after an
    edit by hand, a deletion, a changed file of the store, a pick, and a kill.
    """
    # A commit in the meantime is a change
    monkeypatch.setattr("ebbline.analysis.report.made.build", lambda: "ebbline")
    first = mine.run()
    folder = mine.home.folder("tiny")
    made, kept = written(folder), folder / "outputs.cache"
    assert {"report.html", "results.parquet", "frontier.png", "frontier.pdf"} <= made.keys()
    again = mine.run()
    printed = mine("report", "tiny").output
    assert written(folder) == made
    assert printed in first.output and printed in again.output

    def made_again(*arguments: str) -> None:
        nonlocal made
        before, made = made, (mine(*arguments), written(folder))[1]
        assert made.keys() == before.keys()
        assert all(made[name] > before[name] for name in before)
        assert (mine("report", "tiny"), written(folder))[1] == made

    (folder / "report.html").write_text("mine")  # edited by hand
    made_again("report", "tiny")
    assert (folder / "report.html").read_text() != "mine"
    (folder / "frontier.pdf").unlink()
    made_again("report", "tiny")
    read = next(Path(name) for name in json.loads(kept.read_text())["stamps"] if "/" in name)
    os.utime(read)  # a file of the store
    made_again("report", "tiny")
    mine("pick", "tiny", "--accept-unsure")
    made_again("report", "tiny")
    with monkeypatch.context() as patched:
        patched.setattr("ebbline.outputs.write_report", killed)
        (folder / "frontier.csv").unlink()
        mine("report", "tiny", code=130)
    assert not kept.exists()
    made_again("report", "tiny")


def killed(*arguments: Any) -> Any:
    raise KeyboardInterrupt


def fails(*arguments: Any, **named: Any) -> Any:
    raise IndexError("list index out of range")


@pytest.mark.slow
def test_outputs_that_fail_are_lines_and_an_exit_code_and_the_tables_are_there(
    mine: Mine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run whose outputs fail in many places: nothing else shows that the run is not lost."""
    figure, answer = findings.frontier_figure, report.answer
    for name in ("report.findings.frontier_figure", "report.report.answer"):
        monkeypatch.setattr(f"ebbline.analysis.{name}", fails)
    monkeypatch.setattr(running, "frontier_text", fails)
    monkeypatch.setattr(running.Screen, "__call__", fails)
    monkeypatch.setattr(running, "draw", fails)
    monkeypatch.setattr(Pretended, "close", fails)
    done = mine.run("--json", code=6)
    printed = json.loads(done.stdout)
    folder = mine.home.folder("tiny")
    assert printed["exit_code"] == 6 and printed["points"]["done"] == 2
    assert list(printed["not_made"]) == [
        "the picture of the plan",
        "the progress display",
        "the figure frontier",
        "the answer",
        "the table of the frontier",
    ]
    assert "could not make the answer: IndexError at test_second_time.py" in done.stderr
    assert (folder / "results.csv").stat().st_size and (folder / "report.html").stat().st_size
    assert "Traceback" in (folder / "log" / "outputs.log").read_text()
    with monkeypatch.context() as patched:
        patched.setattr("ebbline.analysis.report.findings.frontier_figure", figure)
        patched.setattr("ebbline.analysis.report.report.answer", answer)
        patched.setattr("ebbline.outputs.write_tables", fails)
        done = mine("report", "tiny", "--json", code=6)
    printed = json.loads(done.stdout)
    assert list(printed["failed"]) == ["the tables"] and Path(printed["report"]).is_file()
    monkeypatch.setattr("ebbline.analysis.paper.export.methods", fails)
    to = mine.home.root.parent / "paper"
    done = mine("export", "tiny", "--to", str(to), code=1)
    assert "could not make the export: IndexError at test_second_time.py" in done.output
    assert not to.exists()
    assert "need --retry" in mine("run", str(mine.file), "3", code=2).output
    message = mine.run("0", "--retry", code=1).output
    assert "--retry 0: only a point that failed can be tried again" in message
