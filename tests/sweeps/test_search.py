"""Search: a study's proposals are a function of its file, whatever is killed in between."""

import itertools
import shutil
from dataclasses import replace

import optuna
import pytest

from ebbline.sweeps.forecast.expected import expected_points
from ebbline.sweeps.search import samplers
from ebbline.sweeps.search.samplers import Shadow
from ebbline.sweeps.search.searcher import (
    NOT_A_POINT,
    WAIT,
    StudySearcher,
    all_points,
    limit,
    space,
)
from ebbline.sweeps.state.trials import Entry, read
from ebbline.sweeps.study.database import PointDatabase
from ebbline.sweeps.study.points import Point, Result
from ebbline.tasks.errors import StudyError
from ebbline.tasks.measuring.metrics import Metric
from tests.sweeps.made import Imagined, outcome, study

WINDOW = 3
KNOWLEDGE = Imagined()
AXES = {
    "axes": {"train.rank": [2, 4, 8], "data.size": [16, 32], "apply.threshold": [None, 0.3, 0.5]}
}


def searched(tmp_path, sampler="tpe", points=12, **changes):
    changes = {
        **AXES,
        "search": {
            "sampler": sampler,
            "window": WINDOW,
            "order": "in_turn",
            **({"points": points} if points else {}),
        },
        **changes,
    }
    return study(tmp_path, changes)


@pytest.fixture
def url(tmp_path, empty_storage):
    return fresh_url(tmp_path / "optuna.db", empty_storage)


@pytest.fixture(scope="session")
def empty_storage(tmp_path_factory):
    """An Optuna storage with tables and no study: creating the tables is slower than a search."""
    path = tmp_path_factory.mktemp("storage") / "empty.db"
    optuna.storages.RDBStorage(f"sqlite:///{path}")
    return path


def fresh_url(path, empty_storage):
    shutil.copyfile(empty_storage, path)
    return PointDatabase(f"sqlite:///{path}", "tiny")


def steps(points):
    """The driver's protocol: keep a window in flight, and tell the oldest result.

    True asks, False tells.
    """
    in_flight = asks = 0
    while asks < points or in_flight:
        if in_flight < WINDOW and asks < points:
            in_flight, asks = in_flight + 1, asks + 1
            yield True
        else:
            in_flight -= 1
            yield False


def follow(study, url):
    """Drive a search from the state of its storage to its end; returns all points in order."""
    searcher = StudySearcher(study, url)
    in_flight = list(searcher.in_flight())
    exhausted = False
    while True:
        while not exhausted and len(in_flight) < WINDOW:
            found = searcher.ask(KNOWLEDGE)
            exhausted = found is None
            if found is WAIT:
                break
            if found is not None:
                in_flight.append(found)
        if not in_flight:
            break
        number, point = in_flight.pop(0)
        searcher.tell(number, outcome(number, point))
    return [point for _, point, _, _ in all_points(study, url)]


SAMPLERS = ["tpe", "nsga2", "random", "gp", "stage_aware"]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_searches_of_one_study_propose_the_same_points(tmp_path, empty_storage, sampler):
    found = searched(tmp_path, sampler, points=8)
    runs = [follow(found, fresh_url(tmp_path / f"{n}.db", empty_storage)) for n in range(2)]
    assert runs[0] == runs[1] and len(runs[0]) == 8
    assert len({point.id for point in runs[0]}) == 8
    other = searched(
        tmp_path,
        sampler,
        search={
            "sampler": sampler,
            "points": 8,
            "window": WINDOW,
            "order": "in_turn",
            "seed": 1,
        },
    )
    assert follow(other, fresh_url(tmp_path / "other.db", empty_storage)) != runs[0]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_stopped_after_any_step_continues_to_the_same_points(
    tmp_path, empty_storage, sampler
):
    found = searched(tmp_path, sampler, points=8)
    undisturbed = follow(found, fresh_url(tmp_path / "undisturbed.db", empty_storage))
    for stop in (1, 5, 8, 13):
        url = fresh_url(tmp_path / f"{stop}.db", empty_storage)
        searcher, in_flight = StudySearcher(found, url), []
        for asks in itertools.islice(steps(8), stop):
            if asks:
                in_flight.append(searcher.ask(KNOWLEDGE))
            else:
                number, point = in_flight.pop(0)
                searcher.tell(number, outcome(number, point))
        del searcher
        assert StudySearcher(found, url).in_flight() == in_flight
        assert follow(found, url) == undisturbed, stop


class Killed(BaseException):
    pass


WRITES = (
    "create_new_trial",
    "set_trial_param",
    "set_trial_state_values",
    "set_study_user_attr",
    "set_trial_system_attr",
    "set_trial_user_attr",
)


def die_at(monkeypatch, number):
    """Let the process die before its write number `number` to the storage."""
    written = itertools.count()
    real = {name: getattr(optuna.storages.RDBStorage, name) for name in WRITES}

    def dying(name):
        def write(*args, **kwargs):
            if next(written) == number:
                raise Killed
            return real[name](*args, **kwargs)

        return write

    for name in WRITES:
        monkeypatch.setattr(optuna.storages.RDBStorage, name, dying(name))
    return written


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "grid", "gp"])
def test_a_search_killed_at_any_write_continues_to_the_same_points(
    tmp_path, empty_storage, sampler
):
    """All eight points of the space are proposed, so samplers draw duplicates, and the last points
    come from the remaining ones.
    """
    axes = {"axes": {"train.rank": [2, 4], "data.size": [16, 32], "apply.threshold": [None, 0.3]}}
    found = searched(tmp_path, sampler, points=None if sampler == "grid" else 8, **axes)
    with pytest.MonkeyPatch.context() as patch:
        written = die_at(patch, -1)
        undisturbed = follow(found, fresh_url(tmp_path / "undisturbed.db", empty_storage))
        writes = next(written)
    assert len({point.id for point in undisturbed}) == len(undisturbed) == 8
    assert writes > 15
    for number in range(SAMPLERS.index(sampler) if sampler in SAMPLERS else 3, writes, 7):
        url = fresh_url(tmp_path / f"{number}.db", empty_storage)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            die_at(patch, number)
            follow(found, url)
        assert follow(found, url) == undisturbed, f"killed at write {number} of {writes}"
        states = [
            trial.state for trial in optuna.load_study(study_name="tiny", storage=url.url).trials
        ]
        assert optuna.trial.TrialState.RUNNING not in states, (
            f"killed at write {number} of {writes}"
        )


def test_an_incomplete_trial_is_dropped_and_the_search_proposes_the_same_points(
    tmp_path, url, empty_storage
):
    found = searched(tmp_path, points=6)
    undisturbed = follow(found, fresh_url(tmp_path / "undisturbed.db", empty_storage))
    searcher = StudySearcher(found, url)
    first = [searcher.ask(KNOWLEDGE) for _ in range(2)]
    # Killed here: a RUNNING trial with one parameter
    searcher.trials._optuna.ask().suggest_categorical("model", ['"7b"'])
    restarted = StudySearcher(found, url)
    assert restarted.in_flight() == first
    assert [number for number, _ in first] == [0, 1]
    assert follow(found, url) == undisturbed


def test_a_dropped_proposal_that_is_still_running_is_closed(tmp_path, url):
    # A RUNNING trial is invisible to the searcher, but the sampler would avoid its place forever
    found = searched(tmp_path)
    searcher = StudySearcher(found, url)
    first = searcher.ask(KNOWLEDGE)
    trial = searcher.trials._optuna.ask()
    # Killed here, before the trial's state became FAIL
    searcher.trials._optuna.set_user_attr(f"{NOT_A_POINT}:{trial.number}", "the same as 0")
    assert StudySearcher(found, url).in_flight() == [first]
    assert (
        optuna.load_study(study_name="tiny", storage=url.url).trials[trial.number].state
        == optuna.trial.TrialState.FAIL
    )


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "gp"])
def test_a_search_for_more_points_than_the_space_has_proposes_each_once(tmp_path, url, sampler):
    found = searched(tmp_path, sampler, points=500)
    assert limit(found) == 18
    points = follow(found, url)
    assert {point.id for point in points} == {point.id for point in space(found)} and len(
        points
    ) == 18


def test_a_grid_has_every_combination_in_the_order_of_the_file(tmp_path, url):
    found = searched(tmp_path, "grid", points=None)
    points = follow(found, url)
    assert points == list(space(found)) and len(points) == 18
    assert dict(points[1].values) == {"train.rank": 2, "data.size": 16, "apply.threshold": 0.3}


def test_a_grid_with_fewer_points_is_its_beginning(tmp_path, url):
    found = searched(tmp_path, "grid", points=5)
    assert follow(found, url) == list(space(found))[:5]
    assert not expected_points(found, url).to_come and len(all_points(found, url)) == 5


ROWS = [
    {"model": "7b", "train.rank": 8, "apply.threshold": None},
    {"model": "7b", "train.rank": 2, "apply.threshold": 0.4},
]


def test_a_list_runs_in_its_order_even_with_values_outside_the_axes(tmp_path, url):
    found = study(
        tmp_path,
        {
            "search": {"sampler": "list", "list": ROWS, "window": WINDOW},
            "axes/apply.threshold": [None, 0.4],
        },
    )
    assert follow(found, url) == [
        Point.of("7b", {k: v for k, v in row.items() if k != "model"}) for row in ROWS
    ]


def test_a_list_with_a_duplicate_or_incomplete_point_is_an_error(tmp_path, url):
    twice = study(tmp_path, {"search": {"sampler": "list", "list": [ROWS[0], ROWS[0]]}})
    searcher = StudySearcher(twice, url)
    searcher.ask(KNOWLEDGE)
    with pytest.raises(StudyError, match="twice"):
        searcher.ask(KNOWLEDGE)
    for row in ({"model": "7b", "train.rank": 8}, {**ROWS[0], "model": "8b"}):
        part = study(
            tmp_path, {"search": {"sampler": "list", "list": [row]}, "study": f"part{len(row)}"}
        )
        with pytest.raises(StudyError, match=r"search\.list\[0\] must give `model`"):
            StudySearcher(part, replace(url, name=part.study)).ask(KNOWLEDGE)


@pytest.mark.slow
def test_a_failed_point_is_recorded_with_its_reason(tmp_path, url):
    found = searched(tmp_path)
    searcher = StudySearcher(found, url)
    number, point = searcher.ask(KNOWLEDGE)
    searcher.tell(
        number, Result(number, point, "failed", reason="TrainingError: the loss became nan")
    )
    assert all_points(found, url) == [(0, point, "failed", "TrainingError: the loss became nan")]
    assert searcher.completed() == 1 and searcher.in_flight() == []
    (trial,) = optuna.load_study(study_name="tiny", storage=url.url).trials
    assert trial.state == optuna.trial.TrialState.FAIL
    assert searcher.ask(KNOWLEDGE)[1] != point


def test_objectives_are_stored_in_their_order_with_their_own_direction(tmp_path, url):
    over = {"prompts": {"language": "over_refusal.jsonl"}, "measure": {"kind": "over_refusal"}}
    found = searched(
        tmp_path, **{"suites/over": over, "objectives": ["task_accuracy", "over_refusal_rate"]}
    )
    searcher = StudySearcher(found, url)
    number, point = searcher.ask(KNOWLEDGE)
    metrics = {
        "task.task_accuracy": Metric("task_accuracy", 3, 4),
        "over.over_refusal_rate": Metric("over_refusal_rate", 1, 4),
    }
    searcher.tell(number, Result(number, point, "done", metrics))
    stored = optuna.load_study(study_name="tiny", storage=url.url)
    assert stored.trials[0].values == [0.75, 0.25]
    assert [str(direction.name) for direction in stored.directions] == ["MAXIMIZE", "MINIMIZE"]


def two_sizes(tmp_path, **search):
    from tests.sweeps.made import WHOLE

    narrowed = {
        **WHOLE["models"]["7b"],
        "axes": {"train.rank": [8], "apply.threshold": [None, 0.9]},
    }
    return study(tmp_path, {"models/70b": narrowed, "search": {"window": WINDOW, **search}})


@pytest.mark.parametrize(
    "search",
    [{"sampler": "grid"}, {"sampler": "tpe", "points": 11}, {"sampler": "random", "points": 11}],
)
def test_a_model_with_its_own_axis_values_gets_only_these(tmp_path, url, search):
    found = two_sizes(tmp_path, **search)
    points = follow(found, url)
    assert len(points) == len({point.id for point in points}) == limit(found) == 9 + 2
    large = [dict(point.values) for point in points if point.model == "70b"]
    assert sorted(large, key=str) == sorted(
        ({"train.rank": 8, "apply.threshold": value} for value in (None, 0.9)), key=str
    )
    assert {dict(point.values)["apply.threshold"] for point in points if point.model == "7b"} == {
        None,
        0.3,
        0.5,
    }


def test_values_of_ranges_lie_within_their_edges_and_integer_ranges_give_integers(tmp_path, url):
    found = searched(
        tmp_path,
        "tpe",
        10,
        axes={
            "train.rank": {"low": 2, "high": 32, "step": 2},
            "train.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
            "apply.threshold": {"low": 0.1, "high": 0.9},
        },
    )
    assert limit(found) == 10
    points = follow(found, url)
    assert len(points) == 10
    for point in points:
        values = dict(point.values)
        assert type(values["train.rank"]) is int and values["train.rank"] in range(2, 33, 2)
        assert (
            1e-5 <= values["train.learning_rate"] <= 1e-3
            and 0.1 <= values["apply.threshold"] <= 0.9
        )


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_point_of_ranges_with_steps_is_proposed_once(tmp_path, url, sampler):
    axes = {
        "train.rank": {"low": 2, "high": 8, "step": 2},
        "train.dropout": {"low": 0.0, "high": 0.3, "step": 0.1},
        "apply.threshold": [None],
    }
    found = searched(tmp_path, sampler, points=500, axes=axes)
    points = follow(found, url)
    assert limit(found) == 16 == len(points) and {point.id for point in points} == {
        point.id for point in space(found)
    }
    expected = expected_points(found, url)
    assert not expected.chosen and not expected.drawn, "more points expected than the space has"


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_a_sampler_that_draws_only_duplicates_gets_other_points_of_a_continuous_space(
    tmp_path, empty_storage, monkeypatch, sampler
):
    monkeypatch.setattr(samplers, "REDRAWS", 0)
    axes = {
        "train.rank": [2, 4],
        "train.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
        "apply.threshold": [None],
    }
    found = searched(tmp_path, sampler, points=6, axes=axes)
    points = follow(found, fresh_url(tmp_path / "1.db", empty_storage))
    assert len({point.id for point in points}) == 6
    assert follow(found, fresh_url(tmp_path / "2.db", empty_storage)) == points


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_sampler_uses_the_amended_metrics_of_a_point(tmp_path, url, monkeypatch, sampler):
    found = searched(tmp_path, sampler, points=18)
    searcher, seen = StudySearcher(found, url), []
    real = Shadow.draw
    monkeypatch.setattr(
        Shadow,
        "draw",
        lambda self, drawer: (
            seen.extend(t.values for t in self._optuna.trials[:1]) or real(self, drawer)
        ),
    )
    for _ in range(3):
        number, point = searcher.ask(KNOWLEDGE)
        metrics = {
            "refusal.refusal_rate": Metric("refusal_rate", 50, 100),
            "task.task_accuracy": Metric("task_accuracy", 20, 100),
        }
        searcher.tell(number, Result(number, point, "done", metrics))
    searcher.amend(
        0,
        Result(
            0, point, "done", {**metrics, "task.task_accuracy": Metric("task_accuracy", 100, 200)}
        ),
    )
    assert searcher.ask(KNOWLEDGE)[0] == 3
    assert [0.5, 0.2] in seen and seen[-1] == [0.5, 0.5]


def test_points_that_miss_a_constraint_rank_behind_all_feasible_ones(tmp_path):
    point = Point.of("7b", {})
    entries = [
        Entry(0, point, "done", (0.9, 0.9), misses=(("refusal_floor", 0.1),)),
        Entry(1, point, "done", (0.4, 0.4)),
        Entry(2, point, "done", (0.5, 0.5), misses=(("refusal_floor", 0.0),)),
    ]
    assert [entry.feasible for entry in entries] == [False, True, True], "a miss of 0 is feasible"
    assert samplers.ranks_of(searched(tmp_path), entries).argsort().tolist() == [2, 1, 0]


def test_a_wider_axis_gives_an_exhausted_search_more_points(tmp_path, url):
    found = searched(tmp_path)
    StudySearcher(found, url).trials.exhaust()
    wider = searched(tmp_path, axes={**AXES["axes"], "train.rank": [2, 4, 8, 16]})
    assert [read(each, url)[1] for each in (found, wider)] == [True, False]


def test_choices_that_are_equal_in_python_stay_distinct(tmp_path, url):
    found = study(tmp_path, {"axes": {"apply.threshold": [None, 0.0, 1.0], "train.rank": [1, 2]}})
    points = follow(found, url)
    assert len({point.id for point in points}) == 6
    assert {type(dict(point.values)["train.rank"]) for point in points} == {int}


def test_readers_see_no_points_before_the_first_driver_and_their_states_after(tmp_path, url):
    found = searched(tmp_path)
    assert all_points(found, url) == []
    searcher = StudySearcher(found, url)
    in_flight = [searcher.ask(KNOWLEDGE) for _ in range(2)]
    searcher.tell(0, outcome(0, in_flight[0][1]))
    states = [(number, point, state) for number, point, state, _ in all_points(found, url)]
    assert states[1] == (1, in_flight[1][1], "running") and states[0][2] in ("done", "failed")
    assert len(expected_points(found, url).drawn) == 10
