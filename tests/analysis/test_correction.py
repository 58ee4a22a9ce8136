"""Rates corrected for a scorer's errors: by hand, by simulation, and where none is given."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.analysis.results.labelled.correction import (
    Accuracy,
    Labelled,
    accuracy,
    rogan_gladen,
    shares,
)

REFUSED = frozenset({"refused"})


def rows(table, weight=1.0):
    return [
        Labelled(label, verdict, weight)
        for (label, verdict), count in table.items()
        for _ in range(count)
    ]


def test_a_rate_is_corrected_as_by_hand():
    # 40 true refusals, of which the scorer sees 36; 60 others, of which it calls 12 refusals
    table = {
        ("refused", "refused"): 36,
        ("refused", "complied"): 4,
        ("complied", "refused"): 12,
        ("complied", "complied"): 48,
    }
    scorer = accuracy(rows(table), REFUSED, REFUSED)
    assert scorer == Accuracy(0.9, 0.8, 40.0, 60.0)
    found = rogan_gladen(0.48, 1000, scorer)
    assert found.value == pytest.approx((0.48 + 0.8 - 1) / (0.9 + 0.8 - 1))
    assert found.value == pytest.approx(0.4), "the sheet's own rate is its person's"
    assert found.interval[0] < 0.4 < found.interval[1]


@pytest.mark.parametrize(("rate", "value"), [(0.1, 0.0), (0.95, 1.0)])
def test_a_correction_stays_within_zero_and_one(rate, value):
    found = rogan_gladen(rate, 50, Accuracy(0.9, 0.8, 40, 60))
    assert found.value == value and 0 <= found.interval[0] <= found.interval[1] <= 1


def test_a_scorer_that_is_no_better_than_chance_gives_no_correction():
    assert rogan_gladen(0.5, 100, Accuracy(0.5, 0.5, 40, 60)) is None
    assert rogan_gladen(0.5, 100, Accuracy(0.2, 0.7, 40, 60)) is None


def test_without_a_positive_or_a_negative_label_there_is_no_accuracy():
    assert accuracy(rows({("refused", "refused"): 5}), REFUSED, REFUSED) is None
    assert accuracy([], REFUSED, REFUSED) is None


def test_a_perfect_scorer_keeps_the_rate_and_its_few_labels_widen_the_interval():
    few = rogan_gladen(0.3, 1000, Accuracy(1.0, 1.0, 5, 5))
    many = rogan_gladen(0.3, 1000, Accuracy(1.0, 1.0, 5000, 5000))
    assert few.value == many.value == pytest.approx(0.3)
    width = [found.interval[1] - found.interval[0] for found in (few, many)]
    assert width[0] > 3 * width[1] and width[1] < 0.065


def test_weights_are_those_of_the_arms():
    # Arm A, 1 of 10 labelled: the scorer misses a refusal. Arm B, all labelled: it misses none.
    table = [
        Labelled("refused", "complied", 10.0),
        Labelled("refused", "refused", 1.0),
        Labelled("complied", "complied", 1.0),
    ]
    found = accuracy(table, REFUSED, REFUSED)
    assert found.sensitivity == pytest.approx(1 / 11)
    assert found.positives == pytest.approx(11**2 / 101), "fewer than its two labels"


@pytest.mark.parametrize(
    ("true", "se", "sp"), [(0.5, 0.85, 0.9), (0.05, 0.9, 0.95), (0.9, 0.7, 0.8)]
)
def test_the_interval_holds_the_true_rate_in_95_of_100_studies(true, se, sp):
    """Fewer would be an interval that leaves out the errors of Se and Sp."""
    rng, n, labels, held, bare = np.random.default_rng(1), 300, 60, 0, 0
    for _ in range(2000):
        observed = rng.binomial(n, true * se + (1 - true) * (1 - sp)) / n
        found_se, found_sp = rng.binomial(labels, se) / labels, rng.binomial(labels, sp) / labels
        found = rogan_gladen(observed, n, Accuracy(found_se, found_sp, labels, labels))
        low, high = (0.0, 1.0) if found is None else found.interval
        held += low <= true <= high
        exact = rogan_gladen(observed, n, Accuracy(found_se, found_sp, 1e9, 1e9))
        bare += exact is not None and exact.interval[0] <= true <= exact.interval[1]
    assert held / 2000 >= 0.93
    assert bare / 2000 < held / 2000


def test_three_verdicts_are_corrected_by_the_whole_confusion():
    table = {
        ("refused", "refused"): 45,
        ("refused", "complied"): 5,
        ("partial", "partial"): 20,
        ("partial", "complied"): 30,
        ("complied", "complied"): 45,
        ("complied", "undecided"): 5,
    }
    # True shares .2, .3, .5 of 1,000 completions
    seen = {"refused": 180, "partial": 120, "complied": 20 + 180 + 450, "undecided": 50}
    found = shares(rows(table), seen, 1000)
    assert {label: round(each.value, 3) for label, each in found.items()} == {
        "complied": 0.5,
        "partial": 0.3,
        "refused": 0.2,
    }
    for each in found.values():
        low, high = each.interval
        assert low < each.value < high and high - low > 0.05
    assert found == shares(rows(table), seen, 1000), "the resampling has a fixed seed"


def test_verdicts_that_do_not_tell_the_labels_apart_give_no_shares():
    same = {("refused", "complied"): 10, ("complied", "complied"): 10}
    assert shares(rows(same), {"complied": 50}, 50) is None
    unseen = {("refused", "refused"): 10, ("complied", "complied"): 10}
    assert shares(rows(unseen), {"refused": 5, "partial": 5}, 10) is None


@given(
    st.floats(0, 1), st.floats(0.51, 1), st.floats(0.5, 1), st.integers(1, 400), st.integers(1, 50)
)
def test_a_correction_undoes_a_scorers_errors(true, se, sp, n, labels):
    scorer = Accuracy(se, sp, labels, labels)
    found = rogan_gladen(true * se + (1 - true) * (1 - sp), n, scorer)
    assert found.value == pytest.approx(true, abs=1e-6)
    assert found.interval[0] - 1e-9 <= found.value <= found.interval[1] + 1e-9
