"""What a terminal shows of a run: from the run itself, stopped once and twice, and from `status
--watch` from another process.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ebbline.analysis.results.collect import collect
from ebbline.cli import app
from ebbline.commands import run as running
from ebbline.commands import status
from ebbline.commands.run import Place, run_study
from ebbline.commands.status import watch_status
from ebbline.outputs import print_outputs
from ebbline.sweeps.drive.live import Live, read_live, read_timeline
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study import view as viewing
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StoreError
from ebbline.tasks.identity import content_digest
from tests.sweeps.made import changed, study
from tests.sweeps.pretended import Pretended, changes
from tests.tiny import Pair, conversations, write_chats, write_lines

EBBLINE = [sys.executable, "-m", "ebbline.cli"]
LONG = 100_000  # epochs: nobody waits for its end


def written(folder: Path, pair: Pair, epochs: float) -> Path:
    """A study of one training on the tiny pair, as a file."""

    def pinned(path: Path) -> dict[str, Any]:
        return {"path": {"path": str(path), "sha256": content_digest(path)}}

    prompts = [
        {"prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for turns in conversations(6, 3)
    ]
    asked = pinned(write_lines(folder / "prompts.jsonl", prompts))
    whole = changed(
        {
            "models": {
                "7b": {
                    "base": pinned(pair.base),
                    "aligned": pinned(pair.aligned),
                    "quantisation": "none",
                    "dtype": "float32",
                }
            },
            "data": {
                "pool": pinned(write_chats(folder / "chats.jsonl", 32)),
                "settings": {"size": 16},
            },
            "train": {
                "epochs": epochs,
                "global_batch": 8,
                "rank": 2,
                "learning_rate": 1e-2,
                "max_tokens": 64,
            },
            "axes": {"apply.threshold": [None, 0.999]},
            "suites": {
                name: {"prompts": asked, "measure": {"kind": name, "max_new_tokens": 4}}
                for name in ("refusal", "task")
            },
        }
    )
    path = folder / "tiny study.yaml"  # a shell needs it quoted
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


def run(file: Path, home: Path, *options: str) -> "subprocess.Popen[str]":
    command = [
        *EBBLINE,
        "run",
        str(file),
        "--home",
        str(home),
        "--executor",
        "inline",
        "--no-wandb",
        *options,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def resumed(file: Path, home: Path, *options: str) -> str:
    return "python -m ebbline.cli " + shlex.join(
        ["run", str(file), "--home", str(home), "--executor", "inline", "--no-wandb", *options]
    )


def until(condition: Callable[[], Any], process: "subprocess.Popen[str]", what: str) -> Any:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        if process.poll() is not None:
            raise AssertionError(f"it ended before {what}:\n{process.communicate()}")
        assert time.monotonic() < deadline, f"no {what} in 120 s"
        time.sleep(0.02)
    return found


def training(home: Path) -> Live | None:
    """The snapshot, once a training is under way that has written its first steps."""
    live = read_live(home / "studies" / "tiny")
    under_way = (
        live is not None
        and live.ended is None
        and any(each.kind == "train" for each in live.running)
    )
    return live if under_way and list(home.glob("store/train/*/*/log/progress.json")) else None


def trains(line: str) -> bool:
    live = json.loads(line)["live"]
    return live is not None and any(stage["kind"] == "train" for stage in live["running"])


@pytest.fixture(scope="module")
def drained(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> SimpleNamespace:
    """A run that was interrupted once during a training, and the output of two watchers."""
    folder = tmp_path_factory.mktemp("drained")
    file, home = written(folder, pair, epochs=120), folder / "home"
    driver = run(file, home, "--json")
    until(lambda: read_live(home / "studies" / "tiny"), driver, "a snapshot")
    command = [*EBBLINE, "status", "--watch", "tiny", "--home", str(home)]
    watchers = [
        subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True)
        for more in (["--json"], [])
    ]
    assert watchers[0].stdout is not None
    lines = [watchers[0].stdout.readline()]
    while not trains(lines[-1]):
        lines.append(watchers[0].stdout.readline())
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=240)
    lines += watchers[0].communicate(timeout=240)[0].splitlines()
    plain = watchers[1].communicate(timeout=240)[0]
    codes = (driver.returncode, *(watcher.returncode for watcher in watchers))
    return SimpleNamespace(
        file=file, home=home, out=out, err=err, lines=lines, plain=plain, codes=codes
    )


def test_an_interrupt_drains_and_says_how_to_resume_with_the_command_as_it_was_typed(
    drained: SimpleNamespace,
) -> None:
    """Starts the run with two watchers, which later tests read."""
    resume = resumed(drained.file, drained.home, "--json")
    assert (
        f"nothing new starts. Press Ctrl-C again to stop now. To continue later:\n  {resume}\n"
        in drained.err
    )
    assert f"to continue:\n  {resume}\n" in drained.err
    (trained,) = [
        line for line in read_timeline(drained.home / "studies" / "tiny") if line.kind == "train"
    ]
    assert trained.outcome == "done"
    last = read_live(drained.home / "studies" / "tiny")
    assert last is not None and last.ended == "request" and drained.codes[0] == 130


def test_run_as_json_prints_one_object_with_outcome_exit_code_and_outputs(
    drained: SimpleNamespace,
) -> None:
    printed = json.loads(drained.out)
    assert (printed["study"], printed["outcome"], printed["exit_code"]) == ("tiny", "stopped", 130)
    assert (
        printed["resume"] == resumed(drained.file, drained.home, "--json")
        and printed["stopped"] == "stopped on request"
    )
    assert (
        all(Path(path).stat().st_size > 0 for path in printed["outputs"].values())
        and "report" in printed["outputs"]
    )
    assert printed["live"]["ended"] == "request" and printed["points"]["done"] == 0
    assert "[0:" in drained.err and "points, " in drained.err, "progress goes to standard error"


def test_status_watches_a_run_from_another_process_and_ends_with_it(
    drained: SimpleNamespace,
) -> None:
    printed = [json.loads(line) for line in drained.lines]
    assert printed[0]["driver"].startswith("process ") and any(map(trains, drained.lines))
    assert printed[-1]["driver"] is None and printed[-1]["live"] is None
    moments = [line["live"]["at"] for line in printed if line["live"] is not None]
    assert moments == sorted(set(moments)), "a line for each change"
    assert drained.codes[1:] == (0, 0)
    assert (
        " stages; now " in drained.plain
        and "driver: none; `ebbline run` continues it" in drained.plain
    )


def test_a_second_interrupt_stops_now_and_says_how_to_resume(tmp_path: Path, pair: Pair) -> None:
    file, home = written(tmp_path, pair, LONG), tmp_path / "home"
    driver = run(file, home, "--json")
    until(lambda: training(home), driver, "a training")
    driver.send_signal(signal.SIGINT)
    assert driver.stderr is not None
    while "nothing new starts" not in (line := driver.stderr.readline()):
        assert line, "it ended without a message"
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=240)
    resume = resumed(file, home, "--json")
    assert (
        driver.returncode == 130 and f"To continue:\n  {resume}\n" in err and "Traceback" not in err
    )
    assert json.loads(out)["exit_code"] == 130 and json.loads(out)["resume"] == resume
    assert [
        line.outcome for line in read_timeline(home / "studies" / "tiny") if line.kind == "train"
    ] == ["lost"]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def small(tmp_path: Path, **others: Any) -> Study:
    axes = {"train.rank": [2, 4, 8], "apply.threshold": [None, 0.2]}
    plain = changes(tmp_path, **{"axes": axes, "search": {"sampler": "grid"}, **others})
    plain["models"].pop("70b")
    return study(tmp_path, plain)


def nan_at_rank_8(request: Any) -> tuple[str, str] | None:
    return (
        ("the loss became nan", "TrainingError")
        if request.kind == "train" and request.spec["rank"] == 8
        else None
    )


@pytest.fixture
def ran(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Any]:
    """Run a small study through the command's own function; the exit code and what it printed."""
    monkeypatch.setattr(
        running, "OnDemand", lambda kind, wanted: Pretended(home.store, fails=nan_at_rank_8)
    )
    monkeypatch.setattr(running, "write_outputs", lambda *arguments: {})
    monkeypatch.setattr(running, "require_checked", lambda *arguments: [])  # no real models

    def go(as_json: bool = False, **others: Any) -> tuple[int, str]:
        found = small(tmp_path, **others)
        code = run_study(
            StudyView(found, home, source=str(tmp_path / "study.yaml")),
            Place("inline", "local"),
            False,
            "ebbline run it",
            as_json,
        )
        return code, capsys.readouterr().out

    yield go


@pytest.mark.slow
def test_a_run_ends_with_each_reason_for_a_missing_result_once_and_the_command_that_shows_it(
    ran: Any,
) -> None:
    code, printed = ran()
    lines = [
        line
        for line in printed.splitlines()
        if line.startswith("failed: ") and "to see it again" in line
    ]
    assert (
        code == 3
        and len(lines) == 1
        and " and 1 more: " in lines[0]
        and "(to see it again: ebbline rerun " in lines[0]
    )


@pytest.mark.slow
def test_exit_codes_and_outcomes_as_json_belong_together(ran: Any) -> None:
    code, printed = ran(as_json=True, budget={"points": 2})
    assert (code, json.loads(printed)["exit_code"], json.loads(printed)["outcome"]) == (
        5,
        5,
        "out of budget",
    )
    assert json.loads(printed)["resume"] == "ebbline run it"
    code, printed = ran(as_json=True)
    found = json.loads(printed)
    assert (code, found["exit_code"], found["resume"]) == (3, 3, None)
    assert (
        found["points"]["done"] == 4 and found["points"]["failed"] == 2 and found["hypervolume"] > 0
    )
    assert len(found["live"]["failures"]) == 1 and all(
        "metrics" in point for point in found["frontier"]
    )


@pytest.mark.slow
def test_a_study_of_the_home_is_known_by_its_name_and_by_nothing_else(
    ran: Any, tmp_path: Path, home: Home
) -> None:
    assert home.named("tiny") == "tiny"
    ran()
    assert home.named("tiny") == str(tmp_path / "study.yaml")
    assert [home.named(name) for name in ("other", "some/where.yaml", "")] == [
        "other",
        "some/where.yaml",
        "",
    ]


@pytest.mark.slow
def test_watching_a_study_without_a_driver_ends_at_once(
    ran: Any, tmp_path: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    ran()
    watch_status(StudyView(small(tmp_path), home), as_json=False)
    assert "driver: none; all its points are done" in capsys.readouterr().out
    watch_status(StudyView(small(tmp_path), home), as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["driver"] is None and json.loads(line)["hypervolume"] > 0


def test_leaving_the_watch_leaves_the_run_alone(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        status, "time", SimpleNamespace(sleep=interrupted, monotonic=time.monotonic)
    )
    with home.driving("tiny"):
        watch_status(StudyView(small(tmp_path), home), as_json=False)
    printed = capsys.readouterr()
    assert "the run continues" in printed.err and f"process {os.getpid()} on " in printed.out


def test_the_snapshot_of_a_driver_that_was_killed_is_not_taken_for_another_s(
    tmp_path: Path, home: Home
) -> None:
    seen: list[Live] = []
    drive(
        StudyView(small(tmp_path), home),
        lambda: Pretended(home.store),
        lambda progress: seen.append(progress.live),
    )
    path = home.folder("tiny") / "live.json"
    path.write_text(seen[-2].model_dump_json())  # as a kill leaves it
    assert status.live_of(home, "tiny", None) is None
    assert (
        status.live_of(home, "tiny", "process 1 on another-host since 2001-01-01 00:00:00") is None
    )
    assert status.live_of(home, "tiny", seen[-2].driver) == seen[-2]


def test_commands_that_change_files_report_it_as_json(tmp_path: Path, home: Home) -> None:
    """`pin`, `report` and `store forget`; the other commands' own tests have theirs."""
    small(tmp_path)
    file, pinned = tmp_path / "study.yaml", tmp_path / "pinned.yaml"
    done = CliRunner().invoke(app, ["pin", str(file), "--to", str(pinned), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == {"wrote": str(pinned), "pins": []}
    drive(StudyView(small(tmp_path), home), lambda: Pretended(home.store))
    (artifact, *_) = home.store.all("train")
    done = CliRunner().invoke(
        app, ["store", "forget", "train", artifact.key, "--home", str(home.root), "--json"]
    )
    assert (
        json.loads(done.stdout)["artifact"] == f"train/{artifact.key}"
        and home.store.find("train", artifact.key) is None
    )


def test_the_outputs_of_a_report_are_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    print_outputs({"report": Path("runs/report.html")}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"report": "runs/report.html"}
    print_outputs({"report": Path("runs/report.html")})
    assert capsys.readouterr().out.split() == ["report", "runs/report.html"]


class Watching:
    """The clock of `_Watched`: each sleep advances it and calls `then` with the number of
    sleeps.
    """

    def __init__(self, step_s: float, then: Callable[[int], None]) -> None:
        self.now, self.slept, self.step_s, self.then = 0.0, 0, step_s, then

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now, self.slept = self.now + self.step_s, self.slept + 1
        self.then(self.slept)


def watched(
    found: Study,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    clock: Watching,
    amended: Callable[[], int] = lambda: 0,
) -> None:
    """Watch a study with a pretended driver until `clock` raises KeyboardInterrupt."""
    seen: list[Live] = []
    drive(
        StudyView(found, home),
        lambda: Pretended(home.store),
        lambda progress: seen.append(progress.live),
    )
    points = seen[-1].points

    def live(*arguments: Any) -> Live:
        return seen[-1].model_copy(
            update={"points": points.model_copy(update={"amended": amended()})}
        )

    monkeypatch.setattr(status, "time", clock)
    monkeypatch.setattr(status, "live_of", live)
    monkeypatch.setattr(Home, "holder", lambda self, study: "process 1")
    watch_status(StudyView(found, home), as_json=True)


@pytest.mark.slow
def test_a_run_makes_one_stage_graph_and_collects_once(
    ran: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, collected = [], []
    monkeypatch.setattr(
        viewing, "StageGraph", lambda *arguments: made.append(StageGraph(*arguments)) or made[-1]
    )
    monkeypatch.setattr(
        running, "collect", lambda study: collected.append(collect(study)) or collected[-1]
    )
    ran(budget={"points": 2})
    assert len(made) == len(collected) == 1 and len(collected[0]) == 2


def test_a_watch_survives_read_errors_for_a_while_and_prints_them_once(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads = []

    def collected(*arguments: Any) -> list[Any]:
        reads.append(1)
        if len(reads) < 4:
            raise StoreError("score/aaaa is being replaced")
        return []

    def then(slept: int) -> None:
        if slept == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(status, "collect", collected)
    watched(small(tmp_path), home, monkeypatch, Watching(1.0, then))
    printed = capsys.readouterr()
    assert (
        len(reads) == 4
        and printed.err.count("cannot be read now; retrying: score/aaaa is being replaced") == 1
    )
    assert "the run continues" in printed.err and len(printed.out.splitlines()) == 1


def test_a_watch_ends_with_an_error_when_read_errors_last(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collected(*arguments: Any) -> list[Any]:
        raise OSError("Stale file handle")

    clock = Watching(10.0, lambda slept: None)
    monkeypatch.setattr(status, "collect", collected)
    with pytest.raises(StoreError, match="'tiny' could not be read for 60 s: Stale file handle"):
        watched(small(tmp_path), home, monkeypatch, clock)
    assert clock.now == 60.0


def test_a_watch_reloads_when_a_point_got_a_further_seed(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    monkeypatch.setattr(status, "collect", lambda *arguments: reads.append(1) or [])

    def then(slept: int) -> None:
        if slept == 5:
            raise KeyboardInterrupt

    clock = Watching(1.0, then)
    watched(small(tmp_path), home, monkeypatch, clock, amended=lambda: clock.slept // 3)
    assert len(reads) == 2, "at first, and when one was amended"
