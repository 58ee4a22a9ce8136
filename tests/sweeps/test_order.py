"""The order in which points end, and the state that a killed driver leaves: as they land no point
waits for another, in turn each waits for the earlier ones.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ebbline.analysis.results.collect import collect
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.search.searcher import StudySearcher, all_points, space
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.state.trials import Trials
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import DataError, TrainingError
from ebbline.tasks.kinds import parsed_spec
from ebbline.tasks.specs import DataSpec, TrainSpec
from tests.sweeps.made import study, written
from tests.sweeps.pretended import Pretended, changes, small

LARGE_FIRST = [{"model": "70b", "train.rank": 8, "apply.threshold": None}]
SEARCH = {"sampler": "tpe", "points": 12, "first": LARGE_FIRST, "seed": 1}


def slow_gangs(request):
    return 1000.0 if request.kind == "train" and request.gpus > 1 else 10.0


def rows(results):
    return [
        (r.number, r.point, r.status, r.reason, dict(r.metrics), dict(r.keys), r.same_as)
        for r in results
    ]


@pytest.mark.slow
def test_no_point_waits_for_a_slow_gang_when_points_land_as_they_end(tmp_path):
    found, home = study(tmp_path, changes(tmp_path, search=SEARCH)), Home(tmp_path / "home")
    progress = drive(StudyView(found, home), lambda: Pretended(home.store, seconds=slow_gangs))
    landed = [result.number for result in progress.results]
    sizes = [result.point.model for result in progress.results]
    assert sorted(landed) == list(range(12)) and sizes.index("70b") == sizes.count("7b") >= 6
    assert [result.number for result in collect(StudyView(found, home))] == list(range(12))


@pytest.mark.slow
def test_in_turn_a_point_lands_after_all_earlier_points(tmp_path):
    found, home = (
        study(tmp_path, changes(tmp_path, search={**SEARCH, "order": "in_turn", "window": 3})),
        Home(tmp_path / "home"),
    )
    most = []
    progress = drive(
        StudyView(found, home),
        lambda: Pretended(home.store, seconds=slow_gangs),
        lambda p: most.append(len(p.in_flight)),
    )
    assert [result.number for result in progress.results] == list(range(12)) and max(most) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("window", "least", "most"), [(None, 4, 16), (2, 2, 2)])
def test_the_number_of_points_in_flight_follows_the_size_of_the_cluster(
    tmp_path, window, least, most
):
    search = {"sampler": "grid", "window": window}
    axes = {"train.rank": list(range(1, 13)), "apply.threshold": [None]}
    found, home = (
        study(tmp_path, changes(tmp_path, search=search, axes=axes)),
        Home(tmp_path / "home"),
    )
    in_flight = []
    drive(
        StudyView(found, home),
        lambda: Pretended(home.store, gpus=4),
        lambda p: in_flight.append(len(p.in_flight)),
    )
    assert least <= max(in_flight) <= most


DRIVER = """
import os, signal, sys
from pathlib import Path
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import parse
from ebbline.sweeps.study.view import StudyView
from tests.sweeps.pretended import Pretended
from tests.sweeps.test_order import slow_gangs
home, moment = Home(Path(sys.argv[2])), int(sys.argv[3])
def ended(committed):
    if committed == moment:
        os.kill(os.getpid(), signal.SIGKILL)
drive(
    StudyView(parse(Path(sys.argv[1])), home),
    lambda: Pretended(home.store, seconds=slow_gangs, ended=ended),
)
"""


def records(home):
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in home.store.root.rglob("record.json")
    }


@pytest.mark.process
@pytest.mark.parametrize("order", ["as_they_land", "in_turn"])
def test_a_driver_that_was_killed_loses_no_point_and_repeats_no_stage(tmp_path, order):
    search = (
        {**SEARCH, "order": order} if order == "in_turn" else {"sampler": "grid"}
    )  # a grid is the same in any order
    path, home = written(tmp_path, changes(tmp_path, search=search)), Home(tmp_path / "home")
    before = {}
    for moment in (7, 11):
        command = [sys.executable, "-c", DRIVER, str(path), str(home.root), str(moment)]
        driver = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True
        )
        assert driver.returncode == -signal.SIGKILL, driver.stderr
        assert len(records(home)) >= len(before) + moment
        before = records(home)
    found = parse(path)
    drive(StudyView(found, home), lambda: Pretended(home.store, seconds=slow_gangs))
    after = records(home)
    assert {path: stamp for path, stamp in after.items() if path in before} == before, (
        "a finished stage was run again"
    )
    free = Home(tmp_path / "free")
    drive(StudyView(found, free), lambda: Pretended(free.store, seconds=slow_gangs))
    assert rows(collect(StudyView(found, home))) == rows(collect(StudyView(found, free)))
    assert {state for _, _, state, _ in all_points(found, home.database("tiny"))} == {"done"}


def test_rows_name_failed_and_invalid_points_and_duplicates(tmp_path):
    def fails(request):
        spec = parsed_spec(request)
        if isinstance(spec, DataSpec) and spec.size == 64:
            return f"{DataError.__name__}: 64 rows were asked of 32", DataError.__name__
        if isinstance(spec, TrainSpec) and spec.rank == 4:
            return f"{TrainingError.__name__}: the loss became nan", TrainingError.__name__
        return None

    # 0.05 projects no module, as none does: no cosine is below it. 0.9 and 1.0 project all modules.
    axes = {"train.rank": [2, 4], "data.size": [16, 64], "apply.threshold": [None, 0.05, 0.9, 1.0]}
    one_size = changes(tmp_path)
    models = {"7b": one_size["models"]["7b"]}
    found, home = (
        study(tmp_path, {**one_size, "models": models, "axes": axes}),
        Home(tmp_path / "home"),
    )
    progress = drive(StudyView(found, home), lambda: Pretended(home.store, fails=fails))
    by_settings = {
        tuple(dict(r.point.values)[axis] for axis in axes): r
        for r in collect(StudyView(found, home))
    }
    assert len(by_settings) == 16
    for (rank, size, threshold), result in by_settings.items():
        expected = "invalid" if size == 64 else "failed" if rank == 4 else "done"
        assert result.status == expected, (rank, size, threshold, result.reason)
        assert (result.reason == "") == (expected == "done")
    assert all(
        "64 rows were asked of 32" in r.reason
        for r in by_settings.values()
        if r.status == "invalid"
    )
    same = {threshold: by_settings[2, 16, threshold] for threshold in axes["apply.threshold"]}
    assert [same[t].same_as for t in (None, 0.9)] == [None, None]
    assert same[0.05].same_as == same[None].number and same[1.0].same_as == same[0.9].number
    assert sorted((r.number, r.status) for r in progress.results) == sorted(
        (r.number, r.status) for r in by_settings.values()
    )


def test_settings_that_conflict_are_an_invalid_row_and_do_not_end_the_study(tmp_path):
    axes = {
        "train.rank": [2],
        "data.mix_share": [0.0, 0.5],
        "apply.threshold": [None],
    }  # there is no second set to mix in
    found, home = (
        study(
            tmp_path, changes(tmp_path, axes=axes, models={"7b": changes(tmp_path)["models"]["7b"]})
        ),
        Home(tmp_path / "home"),
    )
    drive(StudyView(found, home), lambda: Pretended(home.store))
    (good, bad) = collect(StudyView(found, home))
    assert (good.status, bad.status) == (
        "done",
        "invalid",
    ) and "data.mix names no second set" in bad.reason


def test_a_reason_that_an_earlier_version_stored_is_read_as_this_version_writes_it(tmp_path):
    found, home = study(tmp_path, changes(tmp_path)), Home(tmp_path / "home")
    trials = Trials(found, home.database("tiny"))
    stored = (
        "refused: DataError: 64 rows of 32",
        "the loss became nan (to see it again: python -m tasks a/log/request.json)",
        "no room (to see it again: python -m cluster.again s3://b/log/request.json)",
    )
    for point, reason in zip(space(found), stored, strict=False):
        trials.fail(trials.add(point), reason)
    assert [(r.status, r.reason) for r in collect(StudyView(found, home))] == [
        ("invalid", "invalid: DataError: 64 rows of 32"),
        ("failed", "the loss became nan (to see it again: ebbline rerun a/log/request.json)"),
        ("failed", "no room (to see it again: ebbline rerun s3://b/log/request.json)"),
    ]


@pytest.mark.slow
def test_a_budget_of_points_ends_the_run_and_a_higher_one_continues_it(tmp_path):
    plain = changes(tmp_path, search={"sampler": "grid"})
    home = Home(tmp_path / "home")
    few = study(tmp_path, {**plain, "budget": {"points": 5}})
    progress = drive(StudyView(few, home), lambda: Pretended(home.store))
    assert (
        progress.by == "budget"
        and "the budget of 5 points is used up. Raise budget.points" in progress.stopped
    )
    assert [r.status for r in collect(StudyView(few, home))] == ["done"] * 5
    more = drive(StudyView(study(tmp_path, plain), home), lambda: Pretended(home.store))
    assert (more.by, more.completed, len(more.results)) == ("", 12, 7)


@pytest.mark.slow
def test_a_grid_that_gets_a_budget_later_stays_a_grid(tmp_path):
    plain = changes(tmp_path, search={"window": 2})
    home, completed = Home(tmp_path / "home"), [0]
    drive(
        StudyView(study(tmp_path, plain), home),
        lambda: Pretended(home.store),
        lambda p: completed.append(p.completed),
        lambda: completed[-1] >= 3,
    )
    later = study(tmp_path, {**plain, "budget": {"gpu_hours": 100.0}})
    assert 0 < len(all_points(later, home.database("tiny"))) < 12 and later.sampler == "stage_aware"
    drive(StudyView(later, home), lambda: Pretended(home.store))
    assert [point for _, point, _, _ in all_points(later, home.database("tiny"))] == list(
        space(later)
    )


@pytest.mark.slow
def test_points_beyond_the_budget_are_skipped_rows_until_it_is_raised(tmp_path):
    plain = changes(tmp_path, search={"sampler": "grid", "window": 3})
    home = Home(tmp_path / "home")
    poor = study(tmp_path, {**plain, "budget": {"gpu_hours": 1e-6}})
    progress = drive(StudyView(poor, home), lambda: Pretended(home.store))
    assert progress.by == "budget"
    found = collect(StudyView(poor, home))
    assert (
        found
        and {r.status for r in found} == {"skipped"}
        and {r.reason for r in found} == {progress.stopped}
    )
    drive(StudyView(study(tmp_path, plain), home), lambda: Pretended(home.store))
    assert [r.status for r in collect(StudyView(poor, home))] == ["done"] * 12


@pytest.mark.slow
@pytest.mark.parametrize("search", [{"sampler": "gp"}, {"sampler": "stage_aware"}])
def test_in_turn_a_budget_of_points_does_not_change_later_points(tmp_path, search):
    axes = {"train.rank": [2, 4, 8, 16], "apply.threshold": [None, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]}
    plain = changes(
        tmp_path, axes=axes, search={**search, "points": 11, "order": "in_turn", "window": 3}
    )
    free, home = Home(tmp_path / "free"), Home(tmp_path / "home")
    drive(StudyView(study(tmp_path, plain), free), lambda: Pretended(free.store))
    wanted = all_points(study(tmp_path, plain), free.database("tiny"))
    assert len(wanted) == 11
    for points in (2, 7, 7, 9):
        few = study(tmp_path, {**plain, "budget": {"points": points}})
        progress = drive(StudyView(few, home), lambda: Pretended(home.store))
        assert (
            progress.by == "budget"
            and f"the budget of {points} points is used up" in progress.stopped
        )
        assert [result.status for result in collect(StudyView(few, home))] == ["done"] * points
        assert read_spent(home.folder("tiny")).stopped.by == "budget"
    whole = study(tmp_path, plain)
    assert drive(StudyView(whole, home), lambda: Pretended(home.store)).by == ""
    assert all_points(whole, home.database("tiny")) == wanted
    assert rows(collect(StudyView(whole, home))) == rows(collect(StudyView(whole, free)))


@pytest.mark.parametrize(
    ("search", "others", "most"),
    [
        ({"sampler": "grid", "window": 6}, {}, 6),
        ({"sampler": "grid", "window": 4}, {}, 4),
        ({"sampler": "random", "points": 6, "window": 6}, {}, 2),
        ({"sampler": "grid", "window": 6}, {"budget": {"gpu_hours": 100.0}}, 4),
    ],
)
def test_a_grid_fills_its_window_where_no_result_decides_what_comes(tmp_path, search, others, most):
    """Other points wait while two stages are in the queue of the only GPU."""
    home, in_flight = Home(tmp_path / "home"), []
    drive(
        StudyView(small(tmp_path, search=search, **others), home),
        lambda: Pretended(home.store, gpus=1),
        lambda progress: in_flight.append(len(progress.in_flight)),
    )
    assert max(in_flight) <= 6 and next(filter(None, in_flight)) == most


def test_workers_begin_while_the_rest_of_a_window_is_asked_for(tmp_path, monkeypatch):
    """A grid asks for its whole window before the first turn of the loop."""
    found = small(tmp_path, search={"sampler": "grid", "window": 6})
    home = Home(tmp_path / "home")
    executor, busy, ask = Pretended(home.store), list[bool](), StudySearcher.ask

    def noted(searcher, knowledge):
        busy.append(bool(executor.requests))
        return ask(searcher, knowledge)

    monkeypatch.setattr(StudySearcher, "ask", noted)
    drive(StudyView(found, home), lambda: executor)
    assert busy[:6] == [False, *[True] * 5]
