"""The frontier against a brute-force implementation of its definition, and its invariances."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ebbline.analysis.results.frontier import (
    front,
    frontier,
    frontier_by_model,
    frontier_hypervolume,
    hypervolume,
)
from ebbline.sweeps.dominance import reference_corner
from ebbline.sweeps.study.points import Result
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.metrics import Direction, Metric
from tests.analysis.conftest import OVER, REFUSAL, TASK, failed, result

Case = tuple[NDArray[np.float64], list[Direction]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few distinct values, so that ties and duplicates are common."""
    rows, columns = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    rates = st.integers(0, 5).map(lambda step: step / 5)
    values = draw(
        st.lists(st.lists(rates, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    )
    way: st.SearchStrategy[Direction] = st.sampled_from(["maximise", "minimise"])
    ways = draw(st.lists(way, min_size=columns, max_size=columns))
    return np.array(values, dtype=np.float64).reshape(rows, columns), ways


def brute_force(values_NM: NDArray[np.float64], directions: list[Direction]) -> list[bool]:
    gains = values_NM * [1 if way == "maximise" else -1 for way in directions]
    return [
        not any((other >= own).all() and (other > own).any() for other in gains) for own in gains
    ]


@given(cases())
def test_the_front_is_the_rows_that_no_row_dominates(case: Case) -> None:
    assert front(*case).tolist() == brute_force(*case)


@given(cases(), st.integers(0, 99))
def test_the_order_of_results_does_not_matter(case: Case, seed: int) -> None:
    values, directions = case
    order = np.random.default_rng(seed).permutation(len(values))
    assert front(values[order], directions).tolist() == front(values, directions)[order].tolist()


@given(cases())
def test_reflecting_an_objective_reverses_its_direction(case: Case) -> None:
    values, directions = case
    turned: list[Direction] = [
        "minimise" if way == "maximise" else "maximise" for way in directions
    ]
    assert front(1 - values, turned).tolist() == front(values, directions).tolist()
    assert math.isclose(
        hypervolume(1 - values, turned), hypervolume(values, directions), abs_tol=1e-12
    )


@given(cases())
def test_duplicate_rows_are_both_on_the_front_or_both_off_it(case: Case) -> None:
    values, directions = case
    once = front(values, directions).tolist()
    assert front(np.vstack([values, values]), directions).tolist() == once + once


@given(cases())
def test_the_hypervolume_is_a_share_that_dominated_results_do_not_change(case: Case) -> None:
    values, directions = case
    whole = hypervolume(values, directions)
    assert 0.0 <= whole <= 1.0
    assert math.isclose(
        whole, hypervolume(values[front(values, directions)], directions), abs_tol=1e-12
    )


def test_the_reference_is_the_worst_corner() -> None:
    assert reference_corner(2, [True, False]) == (0.0, 1.0)
    assert hypervolume(np.array([[0.5, 0.2]]), ["maximise", "minimise"]) == pytest.approx(0.4)
    assert hypervolume(
        np.array([[0.5, 0.2]]), ["maximise", "minimise"], (0.25, 1.0)
    ) == pytest.approx(0.2)


def test_nan_is_an_error_and_not_the_worst_value() -> None:
    with pytest.raises(EvaluationError, match="objective 1 of result 0 is NaN"):
        front(np.array([[0.5, math.nan], [0.1, 0.1]]), ["maximise", "maximise"])


def test_values_that_do_not_fit_the_objectives_are_an_error() -> None:
    with pytest.raises(EvaluationError, match="do not fit"):
        front(np.zeros((3, 2)), ["maximise"])


def test_a_finished_result_without_an_objective_is_an_error_that_names_it() -> None:
    with pytest.raises(EvaluationError, match=r"point 4 .*mmlu\.acc"):
        frontier([result(4)], [REFUSAL, "mmlu.acc"])


def test_no_results_and_only_failed_ones_give_an_empty_frontier() -> None:
    for results in ([], [failed(0), failed(1)]):
        assert frontier(results, [REFUSAL, TASK]) == []
        assert frontier_by_model(results, [REFUSAL, TASK]) == {}
        assert frontier_hypervolume(results, [REFUSAL, TASK]) == 0.0


def test_one_finished_point_is_the_frontier() -> None:
    assert [found.number for found in frontier([failed(0), result(1)], [REFUSAL, TASK])] == [1]


def test_a_duplicate_point_is_not_on_the_frontier() -> None:
    rows = [result(0), replace(result(1), same_as=0)]
    assert [found.number for found in frontier(rows, [REFUSAL, TASK])] == [0]


def test_a_lower_over_refusal_rate_is_better() -> None:
    worse = result(0)
    better = Result(1, worse.point, "done", {**worse.metrics, OVER: Metric(OVER, 1, 200)})
    assert [found.number for found in frontier([worse, better], [REFUSAL, OVER])] == [1]


def test_a_model_that_another_model_dominates_keeps_its_own_frontier() -> None:
    results = [result(0, "7b", 0.2, 0.2), result(1, "13b", 0.9, 0.9), result(2, "7b", 0.1, 0.1)]
    own = frontier_by_model(results, [REFUSAL, TASK])
    assert {model: [found.number for found in chosen] for model, chosen in own.items()} == {
        "7b": [0],
        "13b": [1],
    }
    assert list(own) == ["7b", "13b"]
    assert [found.number for found in frontier(results, [REFUSAL, TASK])] == [1]
