"""`run --extend`: allowed additions lose and repeat nothing; other changes are errors that name
their path.
"""

import copy

import pytest

from ebbline.analysis.results.collect import collect
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.forecast.expected import expected_points
from ebbline.sweeps.search.searcher import StudySearcher, all_points
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from tests.sweeps.made import study, written
from tests.sweeps.pretended import Pretended, changes

AXES = {"train.rank": [2, 4], "apply.threshold": [None, 0.3]}
RANGE = {"low": 2, "high": 8, "step": 2}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            {"axes": AXES},
            {"axes": {**AXES, "train.rank": [4, 8]}},
            "axes.train.rank: 2 is missing; existing points may have it",
        ),
        (
            {"axes": AXES},
            {"axes": {"train.rank": [2, 4]}},
            "axes.apply.threshold: an axis cannot be removed",
        ),
        (
            {"axes": AXES},
            {"axes": {**AXES, "data.size": [8, 16]}},
            "axes.data.size: an axis cannot be added",
        ),
        (
            {"axes": {"train.rank": RANGE}},
            {"axes": {"train.rank": {**RANGE, "high": 6}}},
            "does not contain",
        ),
        (
            {"axes": {"train.rank": RANGE}},
            {"axes": {"train.rank": {**RANGE, "low": 1}}},
            "is not a whole number of steps",
        ),
        (
            {"axes": {"train.rank": RANGE}},
            {"axes": {"train.rank": [2, 4, 6, 8]}},
            "a list cannot become a range, nor a range a list",
        ),
        ({"seeds": [0, 1]}, {"seeds": [1, 0]}, r"seeds: must begin with \[0, 1\]"),
        (
            {},
            {"train": {"epochs": 2}},
            "train.epochs: 1.0 -> 2.0; this would change the meaning of existing points",
        ),
        (
            {},
            {"suites/refusal/measure": {"kind": "refusal", "limit": 5}},
            "suites.refusal.measure.limit: null -> 5",
        ),
        ({}, {"objectives": ["refusal_rate"]}, "objectives: "),
        ({}, {"models/7b/quantisation": "none"}, 'models.7b.quantisation: "nf4" -> "none"'),
        ({}, {"models/7b/axes": {"train.rank": [2]}}, "models.7b.axes.train.rank: 4 is missing"),
        (
            {"search": {"sampler": "tpe", "points": 9}},
            {"search": {"sampler": "tpe", "points": 8}},
            "search.points: 8 is fewer than 9",
        ),
        (
            {"seeds": [0, 1]},
            {"seeds": [0, 1], "replicates": {"policy": "near_frontier"}},
            "replicates: existing points have every seed",
        ),
    ],
)
def test_a_change_of_existing_points_is_an_error_with_its_path(tmp_path, before, after, message):
    home = Home(tmp_path / "home")
    space = {"search": {"sampler": "random", "points": 9}}
    StudyView(study(tmp_path, {**space, **before}), home).freeze()
    with pytest.raises(StudyError, match=message):
        StudyView(study(tmp_path, {**space, **after}), home, extend=True).freeze()


def test_an_addition_is_accepted_and_without_the_option_the_error_names_the_option(tmp_path):
    home = Home(tmp_path / "home")
    StudyView(study(tmp_path, {"axes": AXES}), home).freeze()
    sizes = {
        "70b": copy.deepcopy(
            study(tmp_path).model_dump(mode="json", exclude_none=True)["models"]["7b"]
        )
    }
    wide = {
        "axes": {**AXES, "train.rank": [8, 4, 2]},
        "seeds": [0, 1],
        "question": "How much further?",
        "models/70b": sizes["70b"],
    }
    wider = study(tmp_path, wide)
    with pytest.raises(StudyError, match="`--extend` continues the study"):
        StudyView(wider, home).freeze()
    StudyView(wider, home, extend=True).freeze()
    StudyView(wider, home).freeze()
    with pytest.raises(StudyError, match="models.70b: removed"):
        StudyView(study(tmp_path, {"axes": AXES}), home).freeze()


def rows(results):
    return {r.point: (r.status, dict(r.metrics), dict(r.keys)) for r in results}


@pytest.mark.slow
@pytest.mark.parametrize("search", [{"sampler": "grid"}, {"sampler": "tpe", "points": 6}])
def test_an_extended_finished_study_keeps_its_points_and_runs_only_new_ones(tmp_path, search):
    plain = changes(tmp_path, axes=AXES, search=search)
    large = plain["models"].pop("70b")
    home = Home(tmp_path / "home")
    narrow = parse(written(tmp_path, plain))
    drive(StudyView(narrow, home), lambda: Pretended(home.store))
    before, numbers = (
        rows(collect(StudyView(narrow, home))),
        [r.point for r in collect(StudyView(narrow, home))],
    )
    records = {path: path.stat().st_mtime_ns for path in home.store.root.rglob("record.json")}

    assert len(before) == 4 and records
    more = {**search, "points": 16} if "points" in search else search
    axes = {"train.rank": [8, 2, 4], "apply.threshold": [0.5, None, 0.3]}
    wide = study(tmp_path, {**plain, "axes": axes, "models/70b": large, "search": more})
    with pytest.raises(StudyError, match="--extend"):
        drive(StudyView(wide, home), lambda: Pretended(home.store))
    points = expected_points(wide, home.database("tiny"))
    assert list(points.completed) == numbers and len(points.completed) + len(points.to_come) == 12
    drive(StudyView(wide, home, extend=True), lambda: Pretended(home.store))
    found = collect(StudyView(wide, home))
    assert [r.point for r in found][: len(numbers)] == numbers
    assert {point: rows(found)[point] for point in before} == before
    assert len(rows(found)) == len(found) == 12 and {r.status for r in found} == {"done"}
    assert {path: path.stat().st_mtime_ns for path in records} == records, (
        "a finished stage was run again"
    )
    assert drive(StudyView(wide, home), lambda: Pretended(home.store)).results == []


def test_added_seeds_run_for_existing_points(tmp_path):
    plain = changes(tmp_path, axes=AXES, search={"sampler": "grid"})
    plain["models"].pop("70b")
    home = Home(tmp_path / "home")
    drive(StudyView(study(tmp_path, plain), home), lambda: Pretended(home.store))
    trained = {artifact.key for artifact in home.store.all("train")}
    more = study(tmp_path, {**plain, "seeds": [0, 1]})
    drive(StudyView(more, home, extend=True), lambda: Pretended(home.store))
    found = collect(StudyView(more, home))
    assert [(r.status, seeds_of(r)) for r in found] == [("done", 2)] * 4
    after = {artifact.key for artifact in home.store.all("train")}
    assert trained < after and len(after) == 2 * len(trained)


BOTH, ONE = ["refusal_rate", "task_accuracy"], ["task_accuracy"]
FIRST = [
    {"model": "7b", "train.rank": rank, "apply.threshold": None} for rank in (16, 2)
]  # below the floor, and above it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "objectives"), [("tpe", BOTH), ("stage_aware", ONE), ("nsga2", BOTH)]
)
@pytest.mark.parametrize("order", ["as_they_land", "in_turn"])
def test_changed_constraints_apply_to_existing_points(
    tmp_path, monkeypatch, sampler, objectives, order
):
    axes = {"train.rank": [2, 4, 8, 16], "apply.threshold": [None, 0.3, 0.5]}
    plain = changes(tmp_path, axes=axes, objectives=objectives, refusal_floor=0.97)
    plain["models"].pop("70b")
    home, seen, real = Home(tmp_path / "home"), [], StudySearcher.ask

    def ask(self, known):
        if not seen:
            seen.extend(self.trials.entries)
        return real(self, known)

    def driven(points, constraints=None, until=99):
        search = {"sampler": sampler, "points": points, "order": order, "window": 3, "first": FIRST}
        search["constraints"] = constraints or {}
        found, watched = study(tmp_path, {**plain, "search": search}), []
        seen.clear()
        drive(
            StudyView(found, home, extend=True),
            lambda: Pretended(home.store),
            watched.append,
            lambda: watched[-1].completed >= until,
        )
        refusals = {
            r.point: r.metrics["refusal.refusal_rate"].value
            for r in collect(StudyView(found, home))
            if r.status == "done"
        }
        return found, refusals

    monkeypatch.setattr(StudySearcher, "ask", ask)
    found, _ = driven(6, until=3)
    states = [state for _, _, state, _ in all_points(found, home.database("tiny"))]
    assert "running" in states and states.count("done") >= 3

    found, refusals = driven(8, {"refusal_floor": True, "gpu_hours": 1000.0})
    assert len(refusals) == 8  # including the points that were in flight
    done = [entry for entry in seen if entry.state == "done"]
    assert len(done) >= 3
    for entry in done:
        misses = dict(entry.misses)
        assert (
            misses["refusal_floor"] == pytest.approx(found.refusal_floor - refusals[entry.point])
            and -1000 < misses["gpu_hours"] < 0
        )
        assert entry.feasible == (refusals[entry.point] >= found.refusal_floor)
    assert {entry.feasible for entry in done} == {True, False}

    driven(9, {"gpu_hours": 1e-9})
    assert seen and all(
        [*dict(entry.misses)] == ["gpu_hours"] and not entry.feasible
        for entry in seen
        if entry.state == "done"
    )
    driven(10)
    assert seen and all(entry.misses == () for entry in seen if entry.state == "done")


@pytest.mark.slow
def test_a_stopped_and_extended_stage_aware_study_keeps_points_in_flight_and_tries_new_values(
    tmp_path,
):
    axes = {"train.rank": [2, 4], "apply.threshold": {"low": 0.0, "high": 1.0}}
    search = {"sampler": "stage_aware", "points": 8, "window": 3}
    plain = changes(tmp_path, axes=axes, search=search)
    plain["models"].pop("70b")
    home, completed = Home(tmp_path / "home"), [0]
    narrow = study(tmp_path, plain)
    stopped = drive(
        StudyView(narrow, home),
        lambda: Pretended(home.store),
        lambda p: completed.append(p.completed),
        lambda: completed[-1] >= 3,
    )
    before = all_points(narrow, home.database("tiny"))
    in_flight = [(number, point) for number, point, state, _ in before if state == "running"]
    assert stopped.by == "request" and in_flight and stopped.results
    records = {path: path.stat().st_mtime_ns for path in home.store.root.rglob("record.json")}

    assert records
    wide = study(
        tmp_path,
        {**plain, "axes": {**axes, "train.rank": [2, 4, 64]}, "search": {**search, "points": 16}},
    )
    drive(StudyView(wide, home, extend=True), lambda: Pretended(home.store))
    found = collect(StudyView(wide, home))
    assert [(r.number, r.point) for r in found][: len(before)] == [
        (number, point) for number, point, _, _ in before
    ]
    assert [r.status for r in found] == ["done"] * 16 and {r.same_as for r in found} == {None}
    assert 64 in {dict(r.point.values)["train.rank"] for r in found[len(before) :]}
    assert {path: path.stat().st_mtime_ns for path in records} == records, (
        "a finished stage was run again"
    )
