"""What a person sees of a run: the screen while it goes on, status and plans afterwards."""

import io
import json
import time
from typing import Any

import pytest
from rich.console import Console

from ebbline import show
from ebbline.analysis.results.collect import StoredEvidence, baselines, collect, costs_before
from ebbline.analysis.results.frontier import frontier, frontier_hypervolume
from ebbline.cluster.executors.executor import Capacity, Host
from ebbline.commands import plan as planning
from ebbline.commands import run as running
from ebbline.commands.run import Place, run_study
from ebbline.commands.status import print_status
from ebbline.plot import FrontierSoFar
from ebbline.show import Picture, Screen, left
from ebbline.sweeps.drive import snapshot
from ebbline.sweeps.drive.live import Expected, Live
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.drive.progress import Progress
from ebbline.sweeps.forecast import forecast as forecasts
from ebbline.sweeps.forecast.prediction import NAME
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.measuring.metrics import Metric
from tests.sweeps.pretended import RANKS, Pretended, small

MASKS = {"train.rank": [2], "apply.threshold": {"low": 0.0, "high": 1.0}}


class Closed(dict[str, Any]):
    """Stages by lineage: one may be looked up, but not all of them."""

    def __iter__(self) -> Any:
        raise AssertionError("all stages were looked at")

    keys = values = items = __iter__  # type: ignore[assignment]


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=200)


@pytest.mark.parametrize("console", [terminal(), Console(file=io.StringIO())])
def test_no_heartbeat_looks_at_more_than_what_is_under_way(tmp_path, home, monkeypatch, console):
    monkeypatch.setattr(show, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(snapshot, "EVERY_S", 0.0)
    found = small(tmp_path, budget={"gpu_hours": 1e6})
    screen = Screen(found, console)

    def watch(progress: Progress) -> None:
        if not isinstance(progress.runner.nodes, Closed):
            progress.runner.nodes = Closed(dict.items(progress.runner.nodes))
        screen(progress)

    with screen:
        progress = drive(StudyView(found, home), lambda: Pretended(home.store), watch)
    assert progress.completed == 6 and len(progress.results) == 6
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tiny: 6/6 points" in printed if console.is_terminal else "6/6 points" in printed


def nan_at_rank_8(request):
    return (
        ("the loss became nan", "TrainingError")
        if request.kind == "train" and request.spec["rank"] == 8
        else None
    )


def drawn(picture: Picture, width: int = 160) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, height=80, color_system=None
    )
    console.print(picture)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 160])
def test_a_picture_shows_stages_gpus_what_is_spent_and_left_the_frontier_and_failures(
    tmp_path, home, monkeypatch, width
):
    monkeypatch.setattr(snapshot, "EVERY_S", 0.0)
    search = {"sampler": "grid", "window": 2}
    found = small(
        tmp_path,
        axes={**RANKS, "train.rank": [8, 2, 4]},
        budget={"gpu_hours": 100.0, "points": 30},
        search=search,
    )
    screen = Screen(found, terminal())
    half_way = []

    def watch(progress: Progress) -> None:
        screen(progress)
        if progress.live.gpus.busy and progress.live.failures and screen.picture.frontier.fronts:
            half_way.append(drawn(screen.picture, width))

    progress = drive(
        StudyView(found, home), lambda: Pretended(home.store, gpus=1, fails=nan_at_rank_8), watch
    )
    printed = " ".join(half_way[0].split())
    assert (
        "/9 points, " in printed
        and "1 of 1 GPUs busy" in printed
        and "logical GPU-hours spent" in printed
    )
    assert (
        "of 100 GPU-hours" in printed
        and "of 30 points" in printed
        and " stages, " in printed
        and "failed; now " in printed
        and " left" in printed
    )
    assert all(word in printed for word in ("reused", "running", "waiting", "train", "generate"))
    assert "failed: train 7b " in printed and "the loss became nan" in printed
    assert "".join(progress.live.failures[0].command.split()) in "".join(printed.split())
    assert (
        "task accuracy, higher is better" in printed
        and "● 7b" in printed
        and "★ before fine-tuning" in printed
        and "median 95% interval" in printed
    )


def test_the_frontier_is_of_all_runs_and_keeps_what_no_other_point_of_its_size_dominates(
    tmp_path, home
):
    found = small(tmp_path, axes={**RANKS, "train.rank": [2, 4, 8]})
    drive(
        StudyView(
            small(tmp_path, axes={**RANKS, "train.rank": [2, 4, 8]}, budget={"points": 4}), home
        ),
        lambda: Pretended(home.store),
    )
    screen = Screen(found, terminal())
    progress = drive(StudyView(found, home), lambda: Pretended(home.store), screen)
    screen.look(progress)
    assert len(progress.results) == 5 and len(progress.history) == 9
    results = collect(StudyView(found, home))
    assert screen.picture.frontier.hypervolume == pytest.approx(
        frontier_hypervolume(results, found.objectives)
    )
    assert set(screen.picture.frontier.aligned) == {"7b"}


@pytest.mark.slow
def test_a_further_seed_replaces_what_its_point_was_while_the_run_goes_on(
    tmp_path, home, monkeypatch
):
    monkeypatch.setattr(snapshot, "EVERY_S", 0.0)
    close = {"seeds": [0, 1, 2, 3], "replicates": {"policy": "near_frontier", "confidence": 0.9}}
    found = small(tmp_path, axes={**RANKS, "train.rank": [2, 4, 8, 16]}, **close)
    screen = Screen(found, terminal())
    progress = drive(StudyView(found, home), lambda: Pretended(home.store), screen)
    screen.look(progress)
    results = {each.number: each for each in collect(StudyView(found, home))}
    assert max(seeds_of(each) for each in results.values()) > 1
    assert (
        progress.amended == progress.live.points.amended == len(progress.history) - len(results) > 0
    )
    shown = screen.picture.frontier
    assert all(each.metrics == results[each.number].metrics for each in shown.results)
    best = frontier(list(results.values()), found.objectives)
    assert [each.number for each in shown.results] == [each.number for each in best]
    assert shown.hypervolume == pytest.approx(frontier_hypervolume(best, found.objectives))


def test_a_point_that_a_further_seed_makes_worse_no_longer_hides_another():
    found = FrontierSoFar(["refusal.refusal_rate", "task.task_accuracy"])

    def landed(number: int, refused: int, right: int, n: int = 100) -> Result:
        metrics = {
            "refusal.refusal_rate": Metric("refusal_rate", refused, n),
            "task.task_accuracy": Metric("task_accuracy", right, n),
        }
        return Result(number, Point.of("7b", {"train.rank": number + 1}), "done", metrics)

    found.take([landed(0, 80, 80), landed(1, 70, 70)])
    assert [each.number for each in found.results] == [0]
    found.take([landed(0, 120, 120, 200)])
    assert [each.number for each in found.results] == [1] and found.hypervolume == pytest.approx(
        0.49
    )
    found.take([landed(1, 100, 100, 200)])
    assert [each.number for each in found.results] == [0] and found.hypervolume == pytest.approx(
        0.36
    )


def test_a_terminal_s_frontier_is_drawn_only_when_points_have_landed(tmp_path, home, monkeypatch):
    calls = []
    monkeypatch.setattr(snapshot, "EVERY_S", 0.0)
    monkeypatch.setattr(Picture, "draw", lambda self, console: calls.append(1))
    found, turns = small(tmp_path), []
    with Screen(found, terminal()) as screen:
        drive(
            StudyView(found, home),
            lambda: Pretended(home.store),
            lambda progress: turns.append(1) or screen(progress),
        )
    assert 1 <= len(calls) <= 7 and len(turns) > len(calls)


def test_plain_lines_name_each_failure_once_with_its_command_and_come_when_something_changed(
    tmp_path, home, monkeypatch
):
    monkeypatch.setattr(show, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(snapshot, "EVERY_S", 0.0)
    found = small(tmp_path, axes={**RANKS, "train.rank": [2, 8]})
    console = Console(file=io.StringIO())
    screen = Screen(found, console)
    progress = drive(
        StudyView(found, home), lambda: Pretended(home.store, fails=nan_at_rank_8), screen
    )
    for _ in range(3):
        screen.lines.write(progress.live)
    lines = console.file.getvalue().splitlines()
    assert sum(line.startswith("failed: train 7b ") for line in lines) == 1
    assert (
        sum(line == f"  to see it again: {progress.live.failures[0].command}" for line in lines)
        == 1
    )
    news = [line.split("] ", 1)[1] for line in lines if line.startswith("[")]
    assert len(news) > 2 and len(news) == len(set(news)) and "\x1b" not in console.file.getvalue()


@pytest.mark.parametrize("objectives", [["refusal_rate"], ["refusal_rate", "task_accuracy"]])
def test_a_frontier_is_drawn_in_plain_letters_where_a_terminal_has_no_others(tmp_path, objectives):
    found = FrontierSoFar([f"{name.partition('_')[0]}.{name}" for name in objectives])
    assert "no frontier yet" in found.text().plain
    for number, (refusal, accuracy) in enumerate(
        [(0.9, 0.1), (0.5, 0.5), (0.1, 0.9), (0.1, 0.1), (0.5, 0.5)]
    ):
        rates = {"refusal_rate": refusal, "task_accuracy": accuracy}
        metrics = {
            f"{name.partition('_')[0]}.{name}": Metric(name, 100 * rate, 100)
            for name, rate in rates.items()
        }
        found.take([Result(number, Point.of("7b", {"train.rank": number}), "done", metrics)])
    text = found.text(unicode=False).plain
    assert text.replace("±", "").isascii()
    plot = [line.partition("|")[2] for line in text.splitlines() if "|" in line]
    assert sum(row.count("o") for row in plot) == (3 if len(objectives) == 2 else 1) and any(
        "." in row for row in plot
    )
    if len(objectives) == 2:
        columns = [row.index("o") for row in plot if "o" in row]
        assert columns == sorted(columns), (
            "up is better accuracy, right is better refusal: the frontier falls from left to right"
        )
    assert len(found.results) == (3 if len(objectives) == 2 else 1)


def status(found: Study, home: Home, capsys: pytest.CaptureFixture[str]) -> str:
    evidence = StoredEvidence(StudyView(found, home))
    print_status(
        found,
        home,
        collect(StudyView(found, home)),
        baselines(StudyView(found, home)),
        costs_before(StudyView(found, home)),
        evidence,
        False,
    )
    return next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("driver: ")
    )


def test_status_says_whether_a_run_would_go_on(tmp_path, home, capsys):
    grid = small(tmp_path)
    drive(StudyView(small(tmp_path, budget={"points": 2}), home), lambda: Pretended(home.store))
    assert status(grid, home, capsys) == "driver: none; `ebbline run` continues it"
    drive(StudyView(grid, home), lambda: Pretended(home.store))
    assert status(grid, home, capsys) == "driver: none; all its points are done"


def test_status_and_plan_say_that_a_search_has_nothing_more_to_propose(tmp_path, home, capsys):
    found = small(
        tmp_path, axes=MASKS, search={"sampler": "stage_aware", "points": 30, "window": 4}
    )
    drive(StudyView(found, home), lambda: Pretended(home.store))
    assert (
        status(found, home, capsys)
        == "driver: none; it has ended: the search has nothing more to propose"
    )
    planning.plan_study(StudyView(found, home), Capacity((Host("here", 8, 8),)), 0, as_json=False)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "The search asks for no further point: the search has nothing more to propose." in printed
    )
    assert "0 misses; a run finds every stage in the store." in printed


def test_a_plan_that_looked_at_a_part_of_the_points_does_not_speak_for_all(
    tmp_path, home, capsys, monkeypatch
):
    found = small(tmp_path)
    drive(StudyView(found, home), lambda: Pretended(home.store))
    monkeypatch.setattr(forecasts, "EXACT", 5)
    monkeypatch.setattr(forecasts, "SAMPLE", 4)
    planning.plan_study(StudyView(found, home), Capacity((Host("here", 8, 8),)), 0, as_json=False)
    assert (
        "0 misses among the 4 of 6 points that were looked up; a run looks up all of them."
        in " ".join(capsys.readouterr().out.split())
    )


def lines(home: Home) -> list[str]:
    """The first word of each line of the study's predictions."""
    return [
        next(iter(json.loads(line)))
        for line in (home.folder("tiny") / NAME).read_text().splitlines()
    ]


@pytest.mark.slow
def test_only_a_run_to_the_study_s_end_that_ran_something_is_compared_with_its_prediction(
    tmp_path, home, capsys, monkeypatch
):
    monkeypatch.setattr(running, "OnDemand", lambda kind, wanted: Pretended(home.store))
    monkeypatch.setattr(running, "write_outputs", lambda *arguments: {})
    monkeypatch.setattr(running, "require_checked", lambda *arguments: [])  # no real models
    masks = {"axes": MASKS, "search": {"sampler": "stage_aware", "points": 30, "window": 4}}

    def ran(**others: Any) -> tuple[int, str]:
        code = run_study(
            StudyView(
                small(tmp_path, **masks, **others), home, source=str(tmp_path / "study.yaml")
            ),
            Place("inline", "local"),
            wandb=False,
        )
        return code, capsys.readouterr().out

    assert ran(budget={"points": 2})[0] == 5 and lines(home) == ["wall_s"]
    code, printed = ran()
    assert code == 0 and "; took " in printed and lines(home) == ["wall_s", "wall_s", "begun_s"]
    code, printed = ran()
    assert code == 0 and "; took " not in printed and len(lines(home)) == 3


def test_the_time_left_follows_the_pace_of_the_run_and_names_it():
    now = time.time()
    live = Live.model_construct(
        started=now - 60,
        at=now,
        ended=None,
        predicted=Expected(wall_s=120, gpu_hours=1.0, usd=None),
        left_s=10.0,
        pace=1.0,
    )
    assert left(live) == "about 1:00 left"
    slower = live.model_copy(update={"pace": 2.0})
    assert left(slower) == "about 3:00 left (stages take 2.0 times as long as earlier ones did)"
