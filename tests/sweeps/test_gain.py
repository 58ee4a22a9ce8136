"""Expected hypervolume gain, compared with moocore's hypervolume and with sampling."""

import moocore
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ebbline.sweeps.dominance import distinct_front, hypervolume
from ebbline.sweeps.search.gain import (
    expected_gain,
    expected_joint_gains,
    spread,
    undominated,
)

RATES = st.floats(0.0, 1.0).map(lambda rate: round(rate, 3))


def points(objectives, least=0, most=8):
    return st.integers(least, most).flatmap(
        lambda n: arrays(np.float64, (n, objectives), elements=RATES)
    )


def volume(front_NM):
    if len(front_NM) == 0:
        return 0.0
    return float(moocore.hypervolume(front_NM, ref=[0.0] * front_NM.shape[1], maximise=True))


@given(st.one_of(points(2), points(3, most=6)))
def test_the_boxes_cover_exactly_the_undominated_part_of_the_unit_cube(front_NM):
    lower_BM, upper_BM = undominated(front_NM)
    assert np.isclose(np.prod(upper_BM - lower_BM, axis=1).sum(), 1 - volume(front_NM), atol=1e-9)
    for lower, upper in zip(lower_BM, upper_BM, strict=True):
        middle = (lower + upper) / 2
        assert not any((middle < point).all() for point in front_NM)


@given(points(2), arrays(np.float64, (1, 2), elements=RATES))
def test_a_certain_prediction_gains_the_hypervolume_of_adding_it(front_NM, certain_1M):
    gain = expected_gain(certain_1M, np.full((1, 2), 1e-7), undominated(front_NM))[0]
    assert np.isclose(
        gain, volume(np.concatenate([front_NM, certain_1M])) - volume(front_NM), atol=1e-5
    )


@settings(max_examples=20)
@given(points(2, most=5), arrays(np.float64, (1, 2), elements=RATES), st.floats(0.02, 0.3))
def test_an_uncertain_prediction_gains_the_mean_over_its_samples(front_NM, mean_1M, sd):
    gain = expected_gain(mean_1M, np.full((1, 2), sd), undominated(front_NM))[0]
    drawn_SM = np.clip(np.random.default_rng(0).normal(mean_1M, sd, (600, 2)), 0.0, 1.0)
    gains = [volume(np.concatenate([front_NM, row[None]])) - volume(front_NM) for row in drawn_SM]
    # A gain that no sample has may still have a chance of 3 in their number
    unseen = 0.0 if any(gains) else 3 / len(gains) * (1 - volume(front_NM))
    error = 5 * np.std(gains) / np.sqrt(len(gains)) + unseen
    assert abs(gain - np.mean(gains)) < error + 1e-4


@settings(max_examples=20)
@given(points(2, least=1, most=4), arrays(np.float64, (3, 2), elements=RATES))
def test_the_joint_gain_is_that_of_adding_all_points_and_grows_with_each(front_NM, certain_CM):
    points_UM, each = spread(undominated(front_NM), 512)
    gain_C = expected_joint_gains(np.repeat(certain_CM[None], 2, axis=0), points_UM, each)
    assert (np.diff(gain_C) >= 0).all()
    exact = volume(np.concatenate([front_NM, certain_CM])) - volume(front_NM)
    assert abs(gain_C[-1] - exact) < 0.05


@given(points(2, least=1))
def test_a_frontier_keeps_the_hypervolume_and_drops_dominated_points(gains_NM):
    front_NM = distinct_front(gains_NM)
    assert np.isclose(hypervolume(front_NM), volume(gains_NM))
    assert len(distinct_front(front_NM)) == len(front_NM)


def test_with_one_objective_the_gain_is_the_expected_improvement():
    gain = expected_gain(
        np.array([[0.5], [0.2]]), np.array([[1e-7], [1e-7]]), undominated(np.array([[0.4]]))
    )
    assert np.allclose(gain, [0.1, 0.0], atol=1e-6)
