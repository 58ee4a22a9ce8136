"""Bounds on a suite over its whole prompt set hold with the stated chance, for any set."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from ebbline.sweeps.state.races.whole_set import best_whole
from ebbline.tasks.measuring.metrics import Metric

ROUNDING = 1e-9


@given(st.integers(1, 60), st.data(), st.sampled_from([0.001, 0.01, 0.2]))
def test_the_bound_of_a_rate_is_exact(of, data, error):
    n = data.draw(st.integers(1, of))
    whole = data.draw(st.integers(0, of))
    missed = sum(
        hypergeom.pmf(found, of, whole, n)
        for found in range(max(0, n - of + whole), min(n, whole) + 1)
        if best_whole(Metric("refusal_rate", found, n), of, error) < whole / of - ROUNDING
    )
    assert missed <= error + ROUNDING
    found = data.draw(st.integers(0, n))
    most = round(best_whole(Metric("refusal_rate", found, n), of, error) * of)
    assert n == of or hypergeom.cdf(found, of, most, n) > error - ROUNDING
    assert most == of - (n - found) or hypergeom.cdf(found, of, most + 1, n) <= error + ROUNDING


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=8), st.data())
def test_the_bound_of_a_mean_is_missed_with_at_most_its_chance(scores, data):
    n, error = data.draw(st.integers(1, len(scores))), 0.1
    draws = list(itertools.combinations(scores, n))
    missed = sum(
        best_whole(Metric.of("rouge_l", draw), len(scores), error)
        < sum(scores) / len(scores) - ROUNDING
        for draw in draws
    )
    assert missed / len(draws) <= error


@given(st.integers(0, 20), st.integers(0, 20))
def test_a_minimised_rate_has_the_mirrored_bound_and_undecided_samples_count_as_good(bad, unsure):
    unsure = min(unsure, 20 - bad)
    lowest = best_whole(Metric("over_refusal_rate", bad, 20, unsure), 50, 0.01)
    assert abs(lowest - (1 - best_whole(Metric("refusal_rate", 20 - bad, 20), 50, 0.01))) < ROUNDING
    whole = Metric("over_refusal_rate", bad, 50)
    assert best_whole(whole, 50, 0.01) == whole.value, "an equal rate is an equal number"
    undecided = best_whole(Metric("refusal_rate", bad, 20, unsure), 50, 0.01)
    assert undecided == best_whole(Metric("refusal_rate", bad + unsure, 20), 50, 0.01)


def test_a_suite_measured_whole_has_no_error():
    assert best_whole(Metric("refusal_rate", 25, 50), 50, 1e-6) == 0.5
    assert best_whole(Metric("rouge_l", 25.0, 50, squares=20.0), 50, 1e-6) == 0.5
