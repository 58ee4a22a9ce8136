"""More seeds only near the frontier: which comparisons are certain, in any order of results."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.tables import results_frame
from ebbline.sweeps.drive import further_seeds
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.search.searcher import StudySearcher
from ebbline.sweeps.state.outcome import Duplicates
from ebbline.sweeps.state.replicates import (
    chance_dominated,
    error_of,
    seeds_needed,
    seeds_of,
    undecided,
)
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.policies import Replicates
from ebbline.sweeps.study.study_file import parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import TrainingError
from ebbline.tasks.kinds import parsed_spec
from ebbline.tasks.measuring.metrics import Metric, pooled
from ebbline.tasks.specs import ApplySpec, TrainSpec
from tests.sweeps.made import study, written
from tests.sweeps.pretended import ITEMS, Pretended, changes

CLOSE = Replicates(policy="near_frontier", confidence=0.9)
NEAR = {"seeds": [0, 1, 2, 3], "replicates": {"policy": "near_frontier", "confidence": 0.9}}


def result(number, refusals, tasks, model="7b"):
    """A point with one seed for each count out of 100."""

    def metric(name, counts):
        return pooled([Metric(name, count, 100) for count in counts])

    metrics = {
        "refusal.refusal_rate": metric("refusal_rate", refusals),
        "task.task_accuracy": metric("task_accuracy", tasks),
    }
    return Result(number, Point.of(model, {"train.rank": number + 1}), "done", metrics)


def test_a_point_that_is_surely_worse_and_one_that_is_surely_better_need_no_second_seed(tmp_path):
    found = study(tmp_path, NEAR)
    assert seeds_needed(found, [result(0, [90], [90]), result(1, [20], [20])]) == {0: 1, 1: 1}


def test_undecided_points_get_one_more_seed_each_and_wait_for_its_result(tmp_path):
    found = study(tmp_path, NEAR)
    near = [result(0, [60], [60]), result(1, [58], [59]), result(2, [5], [5])]
    assert seeds_needed(found, near) == {0: 2, 1: 2, 2: 1}
    # Two seeds that agree decide it; two that disagree need a third.
    assert (
        seeds_needed(
            found, [result(0, [80, 81], [80, 80]), result(1, [58, 58], [59, 58]), near[2]]
        )[0]
        <= 2
    )
    assert seeds_needed(
        found, [result(0, [60, 70], [60, 75]), result(1, [58, 74], [59, 66]), near[2]]
    ) == {0: 3, 1: 3, 2: 1}


def test_points_are_compared_within_their_size_and_duplicates_not_at_all(tmp_path):
    found = study(tmp_path, NEAR)
    apart = [result(0, [60], [60]), result(1, [58], [59], model="70b")]
    assert seeds_needed(found, apart) == {0: 1, 1: 1}
    same = result(1, [60], [60])
    assert seeds_needed(found, [result(0, [60], [60]), replace(same, same_as=0)]) == {
        0: 1,
        1: 1,
    }


def test_by_default_every_point_has_all_seeds(tmp_path):
    assert seeds_needed(study(tmp_path, {"seeds": [0, 1, 2]}), [result(0, [60] * 3, [60] * 3)]) == {
        0: 3
    }


def test_a_point_without_further_seeds_does_not_hold_back_other_points(tmp_path):
    found = study(tmp_path, NEAR)
    rows = [result(0, [60, 70], [60, 75]), result(1, [58, 74], [59, 66]), result(2, [59], [61])]
    assert seeds_needed(found, rows) == {0: 2, 1: 2, 2: 2}
    assert seeds_needed(found, rows, {2: 1}) == {0: 3, 1: 3, 2: 1}
    assert seeds_needed(found, rows[:2], {0: 2}) == {0: 2, 1: 3}


def test_duplicates_are_found_by_number_in_any_order_of_results(
    tmp_path,
):
    duplicates = Duplicates(study(tmp_path, NEAR))
    keyed = [
        replace(result(n, [60], [60]), keys={"refusal[seed=0]": "a" if n < 3 else "b"})
        for n in range(4)
    ]
    failed = Result(4, keyed[0].point, "failed", reason="TrainingError: the loss became nan")
    for each in (keyed[2], failed, keyed[3], keyed[1], keyed[0]):
        duplicates.add(each)
    assert [duplicates.marked(each).same_as for each in (*keyed, failed)] == [
        None,
        0,
        0,
        None,
        None,
    ]


counts = st.lists(st.integers(0, 100), min_size=4, max_size=4)


@given(
    st.lists(st.tuples(counts, counts, st.integers(1, 4)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_the_answer_depends_on_no_order_and_seeds_that_came_later_change_no_earlier_answer(
    rows, rng
):
    found = SimpleNamespace(
        seeds=(0, 1, 2, 3),
        first_seeds=1,
        replicates=CLOSE,
        objectives=("refusal.refusal_rate", "task.task_accuracy"),
    )
    whole = [result(number, refusals, tasks) for number, (refusals, tasks, _) in enumerate(rows)]
    wanted = seeds_needed(found, whole)
    shuffled = list(whole)
    rng.shuffle(shuffled)
    assert seeds_needed(found, shuffled) == wanted
    # Driven: start with one seed each, give whatever is asked for, in any order; it ends where the
    # whole knowledge does.
    seeds = dict.fromkeys(wanted, 1)
    for _ in range(100):
        known = [
            result(number, refusals[: seeds[number]], tasks[: seeds[number]])
            for number, (refusals, tasks, _) in enumerate(rows)
        ]
        more = [
            number
            for number, needed in seeds_needed(found, known).items()
            if needed > seeds[number]
        ]
        if not more:
            break
        seeds[rng.choice(more)] += 1
    trimmed = {
        number: min(seeds[number], needed) for number, needed in seeds_needed(found, known).items()
    }
    assert trimmed == wanted


@given(st.integers(0, 10_000))
def test_the_chance_to_be_dominated_is_that_of_drawing_it(seed):
    rng = np.random.default_rng(seed)
    values, errors = rng.uniform(0, 1, (3, 2)), rng.uniform(0.01, 0.3, (3, 2))
    value, error = rng.uniform(0, 1, 2), rng.uniform(0.01, 0.3, 2)
    drawn = rng.normal(values, errors, (4000, 3, 2)) > rng.normal(value, error, (4000, 1, 2))
    assert (
        np.abs(
            drawn.all(axis=2).mean(axis=0) - chance_dominated(values, errors, value, error)
        ).max()
        < 0.05
    )


def test_without_noise_every_comparison_but_a_tie_is_certain():
    values = np.array([[0.5, 0.5], [0.4, 0.4], [0.6, 0.3]])
    assert not undecided(values, np.zeros((3, 2)), 0.9).any()
    assert undecided(np.array([[0.5, 0.5], [0.5, 0.5]]), np.zeros((2, 2)), 0.9).all()


def test_noise_falls_with_the_number_of_seeds_and_is_never_zero():
    rng = random.Random(0)
    spread = [Metric("refusal_rate", 50 + rng.randint(-10, 10), 100) for _ in range(40)]
    few, many = error_of(pooled(spread[:3])), error_of(pooled(spread))
    assert many < few / 2 and error_of(pooled([Metric("refusal_rate", 100, 100)] * 2)) > 0
    assert 0.03 < many * 40**0.5 < 0.09  # a standard deviation of 6 of 100


AXES = {"train.rank": [2, 4, 8, 16, 32], "apply.threshold": [None, 0.3, 0.5]}


def near_frontier(tmp_path, order, axes=AXES, **others):
    given = changes(
        tmp_path, axes=axes, search={"sampler": "grid", "order": order}, **NEAR, **others
    )
    return parse(written(tmp_path, {**given, "models": {"7b": given["models"]["7b"]}}))


@pytest.mark.slow
def test_a_study_ends_with_more_seeds_where_it_is_close_and_the_same_in_either_order(
    tmp_path, monkeypatch
):
    amended = []
    monkeypatch.setattr(
        StudySearcher,
        "amend",
        lambda self, number, result: amended.append((number, seeds_of(result))),
    )
    tables = []
    for order in ("as_they_land", "in_turn"):
        home = Home(tmp_path / order)
        found = near_frontier(tmp_path, order)
        drive(StudyView(found, home), lambda home=home: Pretended(home.store))
        results = collect(StudyView(found, home))
        assert seeds_needed(found, results) == {r.number: seeds_of(r) for r in results}
        tables.append(results_frame(results, found.objectives).drop(columns=["seconds"]))
        assert {1} < {seeds_of(r) for r in results} and all(
            m.n == ITEMS * seeds_of(r) for r in results for m in r.metrics.values()
        )
        trained = len(list(home.store.all("train")))
        assert len(list(home.store.all("score"))) < 4 * 2 * 15
        again = drive(StudyView(found, home), lambda home=home: Pretended(home.store))
        assert again.results == [] and len(list(home.store.all("train"))) == trained
    assert tables[0].equals(tables[1])
    assert amended and all(seeds > 1 for _, seeds in amended)


def driven(found, home, **pretended):
    """Drive a study; return its table, the number of seeds of each row, and the stages that ran."""
    executors = []
    progress = drive(
        StudyView(found, home),
        lambda: executors.append(Pretended(home.store, **pretended)) or executors[-1],
    )
    results = collect(StudyView(found, home))
    return (
        progress,
        results,
        {each.number: seeds_of(each) for each in results},
        executors[0].requests,
    )


def first_mask_last(request):
    """Duplicates land before the point that they duplicate."""
    spec = parsed_spec(request)
    return 500.0 if isinstance(spec, ApplySpec) and spec.threshold in (None, 0.9) else 10.0


@pytest.mark.slow
@pytest.mark.parametrize("order", ["as_they_land", "in_turn"])
def test_a_rerun_of_a_finished_study_with_duplicates_trains_nothing(tmp_path, order):
    # 0.05 projects no module, as none does: no cosine is below it. 0.9 and 1.0 project all modules.
    axes = {"train.rank": [2, 4, 8], "apply.threshold": [None, 0.05, 0.3, 0.9, 1.0]}
    found, home = near_frontier(tmp_path, order, axes), Home(tmp_path / "home")
    _, results, seeds, ran = driven(found, home, seconds=first_mask_last)
    assert ran and seeds_needed(found, results) == seeds and max(seeds.values()) > 1
    same = {each.number: each.same_as for each in results if each.same_as is not None}
    assert same == {n: n - 1 for n in range(15) if n % 5 in (1, 4)} and {
        seeds[n] for n in same
    } == {1}
    trained = {artifact.key for artifact in home.store.all("train")}
    for _ in range(2):
        _, again, counted, ran = driven(found, home)
        assert (counted, ran) == (seeds, {}) and {r.number: r.same_as for r in again} == {
            r.number: r.same_as for r in results
        }
    assert {artifact.key for artifact in home.store.all("train")} == trained


@pytest.mark.slow
@pytest.mark.parametrize("order", ["as_they_land", "in_turn"])
def test_a_failed_further_seed_is_final_and_affects_neither_its_point_nor_others(tmp_path, order):
    free = Home(tmp_path / "free")
    found = near_frontier(tmp_path, order)
    _, results, needed, _ = driven(found, free)
    most = max(needed.values()) - 1
    rank = next(
        dict(each.point.values)["train.rank"] for each in results if needed[each.number] > most
    )

    def fails(request):
        spec = parsed_spec(request)
        failing = isinstance(spec, TrainSpec) and (spec.rank, spec.seed) == (
            rank,
            found.seeds[most],
        )
        return (
            (f"{TrainingError.__name__}: the loss became nan", TrainingError.__name__)
            if failing
            else None
        )

    home = Home(tmp_path / "home")
    _, results, seeds, _ = driven(found, home, fails=fails)
    assert {each.status for each in results} == {"done"}
    cut = {each.number: seeds[each.number] for each in results if each.reason}
    assert cut and set(cut.values()) == {most} and seeds_needed(found, results, cut) == seeds
    assert {dict(each.point.values)["train.rank"] for each in results if each.reason} == {rank}
    assert all(each.reason.startswith("a further seed failed: ") for each in results if each.reason)
    _, again, counted, ran = driven(found, home)
    assert (counted, ran) == (seeds, {}) and [each.reason for each in again] == [
        each.reason for each in results
    ]


@pytest.mark.slow
def test_after_the_last_point_seeds_are_decided_level_by_level(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        further_seeds, "seeds_needed", lambda *given: calls.append(given) or seeds_needed(*given)
    )
    found, home = near_frontier(tmp_path, "in_turn"), Home(tmp_path / "home")
    _, results, seeds, _ = driven(
        found, home, seconds=lambda request: 1.0 + int(request.key[:2], 16)
    )
    assert seeds_needed(found, results) == seeds and max(seeds.values()) > 1
    assert 1 <= len([given for given in calls if given[1]]) <= len(found.seeds)


@pytest.mark.slow
def test_in_turn_a_budget_of_points_ends_with_all_needed_seeds(tmp_path):
    free, home = Home(tmp_path / "free"), Home(tmp_path / "home")
    progress, results, seeds, _ = driven(
        near_frontier(tmp_path, "in_turn", budget={"points": 9}), home
    )
    assert (
        progress.by == "budget"
        and len(results) == 9
        and {each.status for each in results} == {"done"}
    )
    assert seeds_needed(progress.study, results) == seeds and max(seeds.values()) > 1
    whole = near_frontier(tmp_path, "in_turn")
    tables = [
        results_frame(driven(whole, each)[1], whole.objectives).drop(columns=["seconds"])
        for each in (home, free)
    ]
    assert tables[0].equals(tables[1])


def test_undecided_samples_widen_the_error_of_a_point():
    decided = pooled([Metric("refusal_rate", 80, 100)] * 2)
    undecided = pooled([Metric("refusal_rate", 80, 100, 20)] * 2)
    assert decided.value == undecided.value and error_of(undecided) > 2 * error_of(decided)
