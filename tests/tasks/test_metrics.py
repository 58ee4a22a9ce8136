"""Metrics: sums add up over seeds, errors equal numpy's, and an empty set is an error.

Sources: Wilson's interval (Wilson 1927; reference values from statsmodels 0.15, proportion_confint,
method="wilson"); the standard error s / sqrt(n) with divisor n - 1, as lm-eval's mean_stderr.
"""

import json
import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.metrics import (
    METRICS,
    SAMPLES,
    Metric,
    Sample,
    joined,
    pooled,
    read_metrics,
    read_samples,
    write_metrics,
    write_samples,
)

scores = st.lists(st.floats(0.0, 1.0, width=16), min_size=1, max_size=60)
verdicts = st.lists(st.booleans().map(float), min_size=1, max_size=60)
ROUGE, RATE = "task.rouge_l", "refusal.refusal_rate"


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (50, 100, 0.403832, 0.596168),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (515, 520, 0.977691, 0.995886),
    ],
)
def test_a_rate_has_wilsons_interval(successes: int, n: int, low: float, high: float) -> None:
    assert Metric(RATE, successes, n).interval == pytest.approx((low, high), abs=1e-6)


@given(verdicts)
def test_a_rates_interval_contains_it_and_lies_in_the_unit_range(found: list[float]) -> None:
    metric = Metric.of(RATE, found)
    low, high = metric.interval
    assert -1e-12 <= low <= metric.value + 1e-12
    assert metric.value - 1e-12 <= high <= 1 + 1e-12


@given(scores.filter(lambda found: len(found) > 1))
def test_the_stderr_equals_numpys(found: list[float]) -> None:
    assert Metric.of("rouge_l", found).stderr == pytest.approx(
        np.std(found, ddof=1) / np.sqrt(len(found)), abs=1e-7
    )


@given(verdicts.filter(lambda found: len(found) > 1))
def test_the_stderr_of_a_rate_needs_no_squares(found: list[float]) -> None:
    metric = Metric.of(RATE, found)
    assert metric.squares is None
    assert metric.stderr == pytest.approx(np.std(found, ddof=1) / np.sqrt(len(found)), abs=1e-9)


@given(st.floats(0.0, 1.0), st.integers(1, 500))
def test_the_stderr_of_equal_scores_is_zero(score: float, n: int) -> None:
    assert Metric.of("rouge_l", [score] * n).stderr == pytest.approx(0.0, abs=1e-7)


@given(st.lists(scores, min_size=1, max_size=5))
def test_joined_means_equal_the_mean_of_all_scores(parts: list[list[float]]) -> None:
    whole, found = (
        Metric.of("rouge_l", list(chain(*parts))),
        joined([Metric.of("rouge_l", each) for each in parts]),
    )
    assert (found.n, found.value, found.seeds) == (whole.n, pytest.approx(whole.value), ())
    assert found.stderr == pytest.approx(whole.stderr, abs=1e-7)
    assert found.interval == pytest.approx(whole.interval, abs=1e-6)
    assert pooled([Metric.of("rouge_l", each) for each in parts]).seeds == tuple(
        pytest.approx(np.mean(each)) for each in parts
    )


def test_a_rate_that_is_joined_with_a_mean_keeps_its_squares() -> None:
    parts = [[0.0, 1.0, 1.0], [0.5, 0.25]]
    whole = Metric.of("task_accuracy", list(chain(*parts)))
    found = joined([Metric.of("task_accuracy", each) for each in parts])
    assert found.squares == whole.squares and found.stderr == pytest.approx(whole.stderr)


@given(st.lists(verdicts, min_size=1, max_size=5))
def test_joined_rates_add_their_counts(parts: list[list[float]]) -> None:
    whole, found = (
        Metric.of(RATE, list(chain(*parts))),
        joined([Metric.of(RATE, each) for each in parts]),
    )
    assert (found.n, found.successes, found.squares, found.interval) == (
        whole.n,
        whole.successes,
        None,
        whole.interval,
    )


@given(verdicts.filter(lambda found: len(found) > 1), st.integers(2, 5))
def test_equal_answers_from_more_seeds_do_not_narrow_the_interval(
    found: list[float], seeds: int
) -> None:
    one = Metric.of(RATE, found)
    several = pooled([one] * seeds)
    assert several.n == one.n * seeds and several.items == one.items
    assert several.interval == pytest.approx(one.interval) and several.stderr == pytest.approx(
        one.stderr
    )


@given(
    st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.sampled_from([0.8, 0.95, 0.99]),
)
def test_the_interval_of_a_rate_equals_scipys_wilson_interval(
    counts: tuple[int, int], confidence: float
) -> None:
    expected = binomtest(*counts).proportion_ci(confidence, method="wilson")
    assert Metric(RATE, *counts).interval_at(confidence) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_one_seed_has_no_spread_and_several_have_numpys() -> None:
    one, other = Metric(RATE, 88, 100, undecided=1), Metric(RATE, 92, 100, undecided=2)
    assert pooled([one]).between_seeds is None
    both = pooled([one, other])
    assert both.between_seeds == pytest.approx(np.std([0.88, 0.92], ddof=1))
    assert both.undecided == 3


def test_a_fractional_score_makes_a_mean_and_rouge_is_always_a_mean() -> None:
    assert Metric.of("task_accuracy", [0.0, 1.0]).squares is None
    assert Metric.of("task_accuracy", [0.0, 0.5]).squares == 0.25
    assert Metric.of("rouge_l", [0.0, 1.0]).squares == 1.0


def test_a_mean_has_the_normal_interval_clipped_to_the_unit_range() -> None:
    metric = Metric.of("rouge_l", [0.9, 1.0, 1.0, 0.8])
    low, high = metric.interval
    assert low == pytest.approx(metric.value - 1.959964 * metric.stderr, abs=1e-6)
    assert high == 1.0


def test_the_stderr_of_one_sample_is_zero() -> None:
    assert Metric.of("rouge_l", [0.4]).stderr == 0.0


@pytest.mark.parametrize("name", ["refusal_rate", "rouge_l"])
def test_an_empty_set_is_an_error_and_not_a_score(name: str) -> None:
    with pytest.raises(EvaluationError, match="no samples"):
        Metric.of(name, [])


@pytest.mark.parametrize("successes", [-1, 11])
def test_impossible_counts_are_an_error(successes: int) -> None:
    with pytest.raises(EvaluationError, match="of 10 samples"):
        Metric(RATE, successes, 10)


def test_different_metrics_cannot_be_pooled() -> None:
    for replicates in ([], [Metric(RATE, 1, 2), Metric("task.acc", 1, 2)]):
        with pytest.raises(EvaluationError, match="cannot pool"):
            pooled(replicates)


def test_an_unknown_metric_has_no_direction() -> None:
    with pytest.raises(EvaluationError, match="no metric 'vibe'"):
        Metric("refusal.vibe", 1, 2)


def test_metrics_are_read_back_as_written(tmp_path: Path) -> None:
    metrics = [Metric(RATE, 3, 4, 1, (0.5, 1.0)), Metric.of(ROUGE, [0.25, 0.5])]
    write_metrics(tmp_path, metrics)
    assert read_metrics(tmp_path) == metrics


def test_samples_with_line_separators_in_their_names_are_read_back(tmp_path: Path) -> None:
    samples = [
        Sample("a", "line\u2028separator", "refused", "prefix:1", True),
        Sample("b", "two\nlines\x85", "undecided", "empty", False),
    ]
    write_samples(tmp_path, samples)
    assert read_samples(tmp_path) == samples


@pytest.mark.parametrize(
    "content", ["{", '[{"name": "acc"}]', '[{"name": "acc", "successes": 1, "n": 2}]', "[1]"]
)
def test_a_damaged_metrics_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / METRICS).write_text(content)
    with pytest.raises(EvaluationError, match="metrics.json cannot be read"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"id": "a"', json.dumps({"id": "a"}), json.dumps({"id": "a", "prompt": "x"}), "1"]
)
def test_a_damaged_samples_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / SAMPLES).write_text(content + "\n")
    with pytest.raises(EvaluationError, match="samples.jsonl cannot be read"):
        read_samples(tmp_path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    for read in (read_metrics, read_samples):
        with pytest.raises(EvaluationError, match="cannot be read"):
            read(tmp_path)


@given(st.floats(0.0, 1.0, width=16), st.integers(1, 60), st.integers(1, 3))
def test_equal_scores_have_an_interval_with_a_width(score, items, seeds):
    one = Metric.of("rouge_l", [score] * items)
    for metric in (one, pooled([one] * seeds)):
        low, high = metric.interval
        assert 0 <= low <= metric.value + 1e-9 and metric.value - 1e-9 <= high <= 1
        assert high - low > 0.9 * 3.84 / (items + 3.84)


def test_outcomes_of_one_item_are_not_independent():
    """Outcomes that always agree within an item tell no more than one for each item."""
    one = [[True], [False], [True], [True]]
    threefold = [each * 3 for each in one]
    alone, clustered = (
        Metric.clustered("inst_level_strict_acc", each) for each in (one, threefold)
    )
    assert alone.value == clustered.value == 0.75
    assert clustered.stderr == pytest.approx(alone.stderr)
    assert alone.stderr == pytest.approx(Metric.of("acc", [1.0, 0.0, 1.0, 1.0]).stderr)
    uneven = Metric.clustered("inst_level_strict_acc", [[True, False, True], [False], [True]])
    assert uneven.value == 0.6 and uneven.n == 3
    deviations = np.array([2 - 0.6 * 3, 0 - 0.6, 1 - 0.6]) / (5 / 3)
    assert uneven.stderr == pytest.approx(math.sqrt((deviations**2).mean() / 2))
    with pytest.raises(EvaluationError, match="without a single outcome"):
        Metric.clustered("inst_level_strict_acc", [[True], []])
