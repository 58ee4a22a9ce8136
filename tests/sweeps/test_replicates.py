"""More seeds only near the frontier: which claims are certain, and that the answer depends on no order."""

import random
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from analysis.results import collect
from analysis.tables import results_frame
from sweeps.drive import drive
from sweeps.home import Home
from sweeps.points import Point, Result
from sweeps.policies import Replicates
from sweeps.replicates import chance_dominated, error_of, seeds_needed, seeds_of, undecided
from sweeps.search import OptunaSearcher
from sweeps.study_file import parse
from tasks.metrics import Metric, pooled
from tests.sweeps.made import study, written
from tests.sweeps.pretended import ITEMS, Pretended, changes

CLOSE = Replicates(policy="near_frontier", confidence=0.9)
NEAR = {"seeds": [0, 1, 2, 3], "replicates": {"policy": "near_frontier", "confidence": 0.9}}


def result(number, refusals, tasks, model="7b"):
    """A point with as many seeds as there are counts out of 100."""

    def metric(name, counts):
        return pooled([Metric(name, count, 100) for count in counts])

    metrics = {"refusal.refusal_rate": metric("refusal_rate", refusals), "task.task_accuracy": metric("task_accuracy", tasks)}
    return Result(number, Point.of(model, {"train.rank": number + 1}), "done", metrics)


def test_a_point_that_is_surely_worse_and_one_that_is_surely_better_need_no_second_seed(tmp_path):
    found = study(tmp_path, NEAR)
    assert seeds_needed(found, [result(0, [90], [90]), result(1, [20], [20])]) == {0: 1, 1: 1}


def test_points_too_near_to_tell_get_one_more_seed_each_and_no_more_before_it_is_there(tmp_path):
    found = study(tmp_path, NEAR)
    near = [result(0, [60], [60]), result(1, [58], [59]), result(2, [5], [5])]
    assert seeds_needed(found, near) == {0: 2, 1: 2, 2: 1}
    # Two seeds that agree well settle it; two that do not ask for a third.
    assert seeds_needed(found, [result(0, [80, 81], [80, 80]), result(1, [58, 58], [59, 58]), near[2]])[0] <= 2
    assert seeds_needed(found, [result(0, [60, 70], [60, 75]), result(1, [58, 74], [59, 66]), near[2]]) == {0: 3, 1: 3, 2: 1}


def test_sizes_are_compared_with_themselves_only_and_duplicates_with_nothing(tmp_path):
    found = study(tmp_path, NEAR)
    apart = [result(0, [60], [60]), result(1, [58], [59], model="70b")]
    assert seeds_needed(found, apart) == {0: 1, 1: 1}
    same = result(1, [60], [60])
    assert seeds_needed(found, [result(0, [60], [60]), Result(**{**vars(same), "same_as": 0})]) == {0: 1, 1: 1}


def test_all_seeds_for_all_points_is_what_a_study_has_that_says_nothing(tmp_path):
    assert seeds_needed(study(tmp_path, {"seeds": [0, 1, 2]}), [result(0, [60] * 3, [60] * 3)]) == {0: 3}


counts = st.lists(st.integers(0, 100), min_size=4, max_size=4)


@given(st.lists(st.tuples(counts, counts, st.integers(1, 4)), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_answer_depends_on_no_order_and_seeds_that_came_later_change_no_earlier_answer(rows, rng):
    found = SimpleNamespace(seeds=(0, 1, 2, 3), first_seeds=1, replicates=CLOSE, objectives=("refusal.refusal_rate", "task.task_accuracy"))
    whole = [result(number, refusals, tasks) for number, (refusals, tasks, _) in enumerate(rows)]
    wanted = seeds_needed(found, whole)
    shuffled = list(whole)
    rng.shuffle(shuffled)
    assert seeds_needed(found, shuffled) == wanted
    # Driven: start with one seed each, give whatever is asked for, in any order; it ends where the whole knowledge does.
    seeds = dict.fromkeys(wanted, 1)
    for _ in range(100):
        known = [result(number, refusals[: seeds[number]], tasks[: seeds[number]]) for number, (refusals, tasks, _) in enumerate(rows)]
        more = [number for number, needed in seeds_needed(found, known).items() if needed > seeds[number]]
        if not more:
            break
        seeds[rng.choice(more)] += 1
    trimmed = {number: min(seeds[number], needed) for number, needed in seeds_needed(found, known).items()}
    assert trimmed == wanted


@given(st.integers(0, 10_000))
def test_the_chance_to_be_dominated_is_that_of_drawing_it(seed):
    rng = np.random.default_rng(seed)
    values, errors = rng.uniform(0, 1, (3, 2)), rng.uniform(0.01, 0.3, (3, 2))
    value, error = rng.uniform(0, 1, 2), rng.uniform(0.01, 0.3, 2)
    drawn = rng.normal(values, errors, (4000, 3, 2)) > rng.normal(value, error, (4000, 1, 2))
    assert np.abs(drawn.all(axis=2).mean(axis=0) - chance_dominated(values, errors, value, error)).max() < 0.05


def test_without_noise_every_claim_but_a_tie_is_certain():
    values = np.array([[0.5, 0.5], [0.4, 0.4], [0.6, 0.3]])
    assert not undecided(values, np.zeros((3, 2)), 0.9).any()
    assert undecided(np.array([[0.5, 0.5], [0.5, 0.5]]), np.zeros((2, 2)), 0.9).all()


def test_noise_comes_down_with_seeds_and_is_never_nothing():
    rng = random.Random(0)
    spread = [Metric("refusal_rate", 50 + rng.randint(-10, 10), 100) for _ in range(40)]
    few, many = error_of(pooled(spread[:3])), error_of(pooled(spread))
    assert many < few / 2 and error_of(pooled([Metric("refusal_rate", 100, 100)] * 2)) > 0
    assert 0.03 < many * 40**0.5 < 0.09  # a standard deviation of 6 of 100


def near_frontier(tmp_path, order):
    axes = {"train.rank": [2, 4, 8, 16, 32], "apply.threshold": [None, 0.3, 0.5]}
    given = changes(tmp_path, axes=axes, search={"sampler": "grid", "order": order}, **NEAR)
    return parse(written(tmp_path, {**given, "models": {"7b": given["models"]["7b"]}}))


def test_a_study_ends_with_more_seeds_where_it_is_close_and_the_same_in_either_order(tmp_path, monkeypatch):
    amended = []
    monkeypatch.setattr(OptunaSearcher, "amend", lambda self, number, result: amended.append((number, seeds_of(result))))
    tables = []
    for order in ("as_they_land", "in_turn"):
        home = Home(tmp_path / order)
        found = near_frontier(tmp_path, order)
        drive(found, home, lambda home=home: Pretended(home.store))
        results = collect(found, home)
        assert seeds_needed(found, results) == {r.number: seeds_of(r) for r in results}
        tables.append(results_frame(results, found.objectives).drop(columns=["seconds"]))
        assert {1} < {seeds_of(r) for r in results} and all(m.n == ITEMS * seeds_of(r) for r in results for m in r.metrics.values())
        trained = len(list(home.store.all("train")))
        assert len(list(home.store.all("score"))) < 4 * 2 * 15
        again = drive(found, home, lambda home=home: Pretended(home.store))
        assert again.results == [] and len(list(home.store.all("train"))) == trained
    assert tables[0].equals(tables[1])
    assert amended and all(seeds > 1 for _, seeds in amended)
