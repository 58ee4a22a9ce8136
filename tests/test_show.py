"""What a person sees of a run: the screen while it goes on, status and plans afterwards."""

import io
import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from analysis.frontier import frontier_hypervolume
from analysis.results import StoredEvidence, baselines, collect, costs_before
from cluster.executor import Capacity, Host
from ebbline import planning, running, show
from ebbline.running import run_study
from ebbline.show import Screen, print_status
from sweeps import forecast as forecasts
from sweeps.drive import drive
from sweeps.home import Home
from sweeps.prediction import NAME
from sweeps.progress import Progress
from sweeps.study import Study
from tests.sweeps.made import study
from tests.sweeps.pretended import Pretended, changes

RANKS = {"train.rank": [2, 4], "apply.threshold": [None, 0.2, 0.4]}
MASKS = {"train.rank": [2], "apply.threshold": {"low": 0.0, "high": 1.0}}


class Closed(dict[str, Any]):
    """Stages by lineage: one may be looked up, but not all of them."""

    def __iter__(self) -> Any:
        raise AssertionError("all stages were looked at")

    keys = values = items = __iter__  # type: ignore[assignment]


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def small(tmp_path, **others) -> Study:
    plain = changes(tmp_path, **{"axes": RANKS, "search": {"sampler": "grid"}, **others})
    plain["models"].pop("70b")
    return study(tmp_path, plain)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=200)


@pytest.mark.parametrize("console", [terminal(), Console(file=io.StringIO())])
def test_no_heartbeat_looks_at_more_than_what_is_under_way(tmp_path, home, monkeypatch, console):
    monkeypatch.setattr(show, "PICTURE_EVERY_S", 0.0)
    monkeypatch.setattr(show, "PLAIN_EVERY_S", 0.0)
    screen = Screen(console)

    def watch(progress: Progress) -> None:
        if not isinstance(progress.runner.nodes, Closed):
            progress.runner.nodes = Closed(dict.items(progress.runner.nodes))
        screen(progress)

    with screen:
        progress = drive(small(tmp_path, budget={"gpu_hours": 1e6}), home, lambda: Pretended(home.store), watch)
    assert progress.told == 6 and len(progress.results) == 6
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tiny: 6/6 points" in said if console.is_terminal else "points 6/6" in said


def test_the_screen_keeps_the_frontier_and_the_last_reasons_of_what_landed(tmp_path, home):
    fails = {8: ("the loss became nan", "TrainingError")}

    def fault(request):
        return fails.get(request.spec["rank"]) if request.kind == "train" else None

    found = small(tmp_path, axes={**RANKS, "train.rank": [2, 4, 8]})
    screen = Screen(terminal())
    progress = drive(found, home, lambda: Pretended(home.store, fails=fault), screen._look)
    screen._look(progress)
    assert Counter(result.status for result in progress.results) == {"done": 6, "failed": 3}
    assert len(screen._reasons) == 3 and all("the loss became nan" in reason for reason in screen._reasons)
    own, all_of_them = (frontier_hypervolume(results, found.objectives) for results in (screen._frontier, progress.results))
    assert own == pytest.approx(all_of_them) and len(screen._frontier) <= 6


def test_a_terminal_is_drawn_a_few_times_a_second_however_often_the_driver_turns(tmp_path, home, monkeypatch):
    drawn = []
    monkeypatch.setattr(Screen, "_picture", lambda self, progress: drawn.append(progress.told) or "")
    turns = []
    screen = Screen(terminal())
    monkeypatch.setattr(show, "time", SimpleNamespace(monotonic=lambda: 0.1 * len(turns)))
    drive(small(tmp_path), home, lambda: Pretended(home.store), lambda progress: turns.append(progress.told) or screen(progress))
    assert len(turns) > 7 and 2 <= len(drawn) <= 1 + len(turns) // 4


def status(found: Study, home: Home, capsys: pytest.CaptureFixture[str]) -> str:
    evidence = StoredEvidence(found, home)
    print_status(found, home, collect(found, home), baselines(found, home), costs_before(found, home), evidence, False)
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("driver: "))


def test_status_says_whether_a_run_would_go_on(tmp_path, home, capsys):
    grid = small(tmp_path)
    drive(small(tmp_path, budget={"points": 2}), home, lambda: Pretended(home.store))
    assert status(grid, home, capsys) == "driver: none; `ebbline run` continues it"
    drive(grid, home, lambda: Pretended(home.store))
    assert status(grid, home, capsys) == "driver: none; all its points are there"


def test_status_and_plan_say_that_a_search_has_nothing_more_to_propose(tmp_path, home, capsys):
    found = small(tmp_path, axes=MASKS, search={"sampler": "stage_aware", "points": 30, "window": 4})
    drive(found, home, lambda: Pretended(home.store))
    assert status(found, home, capsys) == "driver: none; it has ended: the search has nothing more to propose"
    planning.plan_study(found, home, Capacity((Host("here", 8, 8),)), 0, as_json=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "No further point is asked for: the search has nothing more to propose." in said
    assert "0 misses; a run would find all of them in the store." in said


def test_a_plan_that_looked_at_a_part_of_the_points_does_not_speak_for_all(tmp_path, home, capsys, monkeypatch):
    found = small(tmp_path)
    drive(found, home, lambda: Pretended(home.store))
    monkeypatch.setattr(forecasts, "EXACT", 5)
    monkeypatch.setattr(forecasts, "SAMPLE", 4)
    planning.plan_study(found, home, Capacity((Host("here", 8, 8),)), 0, as_json=False)
    assert "0 misses among the 4 of 6 points that were looked up; a run looks at all of them." in " ".join(capsys.readouterr().out.split())


def lines(home: Home) -> list[str]:
    """The first word of each line of the study's predictions."""
    return [next(iter(json.loads(line))) for line in (home.folder("tiny") / NAME).read_text().splitlines()]


def test_only_a_run_to_the_study_s_end_that_ran_something_is_compared_with_its_prediction(tmp_path, home, capsys, monkeypatch):
    monkeypatch.setattr(running, "_executor", lambda *arguments: Pretended(home.store))
    monkeypatch.setattr(running, "write_outputs", lambda *arguments: {})
    masks = {"axes": MASKS, "search": {"sampler": "stage_aware", "points": 30, "window": 4}}

    def ran(**others: Any) -> tuple[int, str]:
        code = run_study(small(tmp_path, **masks, **others), "tiny", home, "inline", "local", None, wandb=False)
        return code, capsys.readouterr().out

    assert ran(budget={"points": 2})[0] == 5 and lines(home) == ["wall_s"]
    code, said = ran()
    assert code == 0 and "; took " in said and lines(home) == ["wall_s", "wall_s", "begun_s"]
    code, said = ran()
    assert code == 0 and "; took " not in said and len(lines(home)) == 3
