"""Verdicts about settings: they count training seeds, and the prompts are a floor for their width.

Sources: the t tests are scipy's `ttest_rel` and Welch's `ttest_ind`; Satterthwaite's degrees of
freedom are those that scipy reports.
"""

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from ebbline.analysis.report.answer import meaning
from ebbline.analysis.results.claims.between_seeds import (
    crossed_spreads,
    over_paired_seeds,
    over_separate_seeds,
    satterthwaite,
    setting_interval,
)
from ebbline.analysis.results.measurements import Comparison, Measurement, compared
from ebbline.analysis.results.statistics import SamplesBySeed
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.metrics import Metric, pooled
from tests.analysis.conftest import REFUSAL, share

BEFORE, AFTER = (0.9, 0.85, 0.8, 0.95), (0.7, 0.4, 0.75, 0.6)


def trained(*successes: int, n: int = 200) -> Measurement:
    """A point whose seeds have so many successes among the same `n` prompts."""
    replicates: SamplesBySeed = {seed: share(count, n) for seed, count in enumerate(successes)}
    return Measurement(pooled([Metric(REFUSAL, count, n) for count in successes]), replicates)


def without_samples(*successes: int, n: int = 200) -> Measurement:
    return Measurement(trained(*successes, n=n).metric)


def test_paired_seeds_are_the_paired_t_test() -> None:
    gain_S = np.subtract(AFTER, BEFORE)
    found, expected = over_paired_seeds(gain_S, gain_S), ttest_rel(AFTER, BEFORE)
    assert found is not None and (found.seeds, found.freedom) == (4, 3)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval()))


def test_separate_seeds_are_welchs_test_with_satterthwaites_freedom() -> None:
    found, expected = (
        over_separate_seeds(BEFORE[:3], AFTER),
        ttest_ind(AFTER, BEFORE[:3], equal_var=False),
    )
    assert found is not None and found.seeds == 3
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.freedom == pytest.approx(expected.df)
    assert satterthwaite([2.0, 2.0], [3, 3]) == pytest.approx(6)


def test_a_model_before_fine_tuning_has_no_variance_between_seeds() -> None:
    found = over_separate_seeds((0.9,), AFTER, before_is_fixed=True)
    assert found is not None
    assert found.p_value == pytest.approx(ttest_1samp(AFTER, 0.9).pvalue)
    assert over_separate_seeds((0.9,), AFTER) is None, "one seed of a training is not enough"


def test_a_difference_that_one_seed_makes_is_none_of_the_setting() -> None:
    """The quickstart's own case: five seeds of one setting, against a model that refuses all."""
    tuned = trained(193, 178, 113, 22, 58)
    (about_setting,) = compared([(trained(*[160] * 5), tuned)])
    assert about_setting.paired is not None and about_setting.paired.p_value < 1e-6
    assert about_setting.move == "not distinguishable" and about_setting.is_about_setting


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_are_about_these_adapters(seeds: int) -> None:
    (found,) = compared([(trained(*[160] * seeds), trained(*[60] * seeds))])
    assert found.move == "lower" and not found.is_about_setting
    assert "about the adapters that were measured, not about their settings" in meaning([found])


def test_seeds_that_agree_show_a_setting_and_the_prompts_bound_its_interval() -> None:
    (found,) = compared([(trained(160, 160, 160), trained(60, 60, 60))])
    assert found.move == "lower" and found.is_about_setting
    assert found.between is not None and found.between.interval == (-0.5, -0.5)
    assert found.paired is not None and found.interval == found.paired.interval
    assert "With 3 seeds they are about the setting" in meaning([found])


def test_without_samples_the_seeds_and_both_intervals_decide() -> None:
    agreeing = without_samples(160, 158, 162), without_samples(60, 61, 59)
    apart = without_samples(160, 158, 162), without_samples(190, 10, 40)
    first, second = (compared([pair])[0] for pair in (agreeing, apart))
    assert (first.move, second.move) == ("lower", "not distinguishable")
    assert second.paired is None and second.is_about_setting
    fixed = Measurement(Metric(REFUSAL, 160, 200), fixed=True)
    (one,) = compared([(fixed, agreeing[1])])
    assert one.move == "lower" and one.is_about_setting


def test_undecided_samples_cannot_make_a_gain_of_a_setting() -> None:
    least, most = (-0.01, 0.02, 0.0), (0.3, 0.31, 0.32)
    found = over_paired_seeds(least, most)
    assert found is not None and found.interval[0] < 0 < found.interval[1]
    lost = over_paired_seeds((-0.3, -0.31, -0.32), most)
    assert lost is not None and lost.p_value == 1.0


def test_the_interval_of_a_setting_covers_seeds_and_prompts() -> None:
    steady, spread = (
        pooled([Metric(REFUSAL, n, 200) for n in counts])
        for counts in ((180, 180, 180), (199, 140, 190))
    )
    assert setting_interval(steady) == pytest.approx(steady.interval)
    low, high = setting_interval(spread)
    assert low < spread.interval[0] and high == 1.0
    with pytest.raises(EvaluationError, match="has 2 training seeds; a setting needs 3 or more"):
        setting_interval(pooled([Metric(REFUSAL, 1, 2)] * 2))


def calls(gains: np.ndarray) -> float:
    """The share of repetitions in which the seeds of equal settings are called different."""
    said = [over_paired_seeds(gain_S, gain_S) for gain_S in gains]
    return sum(each is not None and each.p_value < 0.05 for each in said) / len(said)


@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_settings_are_called_different_in_at_most_seven_per_cent(seeds: int) -> None:
    """`make bench-calibration` has all cells with the prompts; this is the part over seeds."""
    rng = np.random.default_rng(seeds)
    assert calls(0.2 * rng.normal(size=(1000, seeds))) <= 0.07
    assert calls(0.6 + 0.05 * rng.normal(size=(200, seeds))) > 0.9


def test_a_comparison_has_the_wider_end_of_both_intervals() -> None:
    (found,) = compared([(trained(160, 150, 170), trained(60, 40, 80))])
    assert isinstance(found, Comparison) and found.paired and found.between
    assert found.interval[0] == min(found.paired.interval[0], found.between.interval[0])
    assert found.interval[1] == max(found.paired.interval[1], found.between.interval[1])


def test_the_spreads_of_trainings_and_of_subsets_are_told_apart() -> None:
    """Additive effects, so nothing is left: +-10 points of the training, +-2 of the subset."""
    found = crossed_spreads([0.5, 0.54, 0.7, 0.74], subsets=2)
    assert found is not None and found.rest == pytest.approx(0, abs=1e-9)
    assert found.training == pytest.approx(0.2 / np.sqrt(2))
    assert found.data == pytest.approx(0.04 / np.sqrt(2))
    assert crossed_spreads([0.5, 0.54], subsets=2) is None, "one training"
    assert crossed_spreads([0.5, 0.54, 0.7], subsets=1) is None, "one subset"


def test_the_estimates_of_crossed_spreads_have_no_bias() -> None:
    rng = np.random.default_rng(0)
    squares = []
    for _ in range(400):
        training, data = 0.1 * rng.normal(size=(4, 1)), 0.05 * rng.normal(size=(1, 4))
        cell = 0.5 + training + data + 0.02 * rng.normal(size=(4, 4))
        found = crossed_spreads(cell.ravel().tolist(), subsets=4)
        assert found is not None
        squares.append((found.training**2, found.data**2, found.rest**2))
    assert np.sqrt(np.mean(squares, axis=0)) == pytest.approx((0.1, 0.05, 0.02), rel=0.1)
