"""Differences between settings, from the values of their training seeds.

A setting (a rank, a size, a threshold, a defence, a model) is judged by what its trainings give, so
its unit is a training seed. The intervals are t intervals over the seeds' values: paired with
n - 1 degrees of freedom where both settings have the same seeds, else by Welch (1947) with the
degrees of freedom of Satterthwaite (1946). The sampling of prompts is not in them. So a claim about
a setting also needs the test over prompts (ebbline.analysis.results.measurements.compared), whose
interval is a floor for the width of this one.

Invariant: fewer than FEWEST_SEEDS seeds support no claim about a setting.

Arrays: `before_S` and `after_S` have a value for each of S seeds. `least_S` and `most_S` are the
gains of S seeds with the undecided samples at their worst and at their best.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.metrics import Metric

FEWEST_SEEDS = 3
CONFIDENCE = 0.95
_ROUNDING = 1e-12


@dataclass(frozen=True)
class BetweenSeeds:
    """A difference of two settings over their seeds, with its 95% t interval.

    `seeds` is the number of pairs, or of the smaller side. `p_value` is two-sided and uncorrected.
    `freedom` are the degrees of freedom.
    """

    seeds: int
    difference: float
    interval: tuple[float, float]
    p_value: float
    freedom: float
    paired: bool


def over_paired_seeds(
    least_S: Sequence[float] | NDArray[np.float64], most_S: Sequence[float] | NDArray[np.float64]
) -> BetweenSeeds | None:
    """The gains of the same seeds; None with fewer than FEWEST_SEEDS.

    The interval covers both extremes of the undecided samples, and the p-value is the larger one.
    It is 1 where they may turn a gain into a loss.
    """
    if len(least_S) < FEWEST_SEEDS:
        return None
    freedom = len(least_S) - 1
    found = [
        _test(float(np.mean(gain_S)), _squared_error(gain_S), freedom)
        for gain_S in (least_S, most_S)
    ]
    return _widest(found, len(least_S), freedom, paired=True)


def over_separate_seeds(
    before_S: Sequence[float], after_S: Sequence[float], before_is_fixed: bool = False
) -> BetweenSeeds | None:
    """Settings whose seeds are not paired; None with fewer than FEWEST_SEEDS on a side.

    With `before_is_fixed` the first side is no training of the study, such as the model before
    fine-tuning: it has one value and no variance between seeds.
    """
    sides = [after_S] if before_is_fixed else [before_S, after_S]
    if min(map(len, sides)) < FEWEST_SEEDS:
        return None
    errors = [_squared_error(values_S) for values_S in sides]
    freedom = satterthwaite(errors, [len(values_S) - 1 for values_S in sides])
    difference = float(np.mean(after_S)) - float(np.mean(before_S))
    found = [_test(difference, sum(errors), freedom)]
    return _widest(found, min(map(len, sides)), freedom, paired=False)


def satterthwaite(variances: Sequence[float], freedoms: Sequence[float]) -> float:
    """The degrees of freedom of a sum of independent variances (Satterthwaite 1946):
    (sum of v)^2 / sum of (v^2 / its own degrees of freedom). Without variance, their sum.
    """
    total = sum(variances)
    if total <= 0:
        return float(sum(freedoms))
    parts = (v**2 / own for v, own in zip(variances, freedoms, strict=True))
    return total**2 / sum(parts)


def setting_interval(metric: Metric, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a setting's mean: the wider end of the t interval over its seeds and of the
    interval over the prompts of one seed.

    Raises EvaluationError with fewer than FEWEST_SEEDS seeds.
    """
    mean, error = _mean_and_error(metric)
    reach = float(student.ppf(0.5 + confidence / 2, len(metric.seeds) - 1)) * error
    low, high = metric.interval_at(confidence)
    return max(0.0, min(low, mean - reach)), min(1.0, max(high, mean + reach))


def setting_bound(metric: Metric, alpha: float) -> float:
    """The one-sided t bound of a setting's mean over its seeds, which errs with chance `alpha`: a
    lower bound where higher is better, an upper bound where lower is. Clipped to [0, 1].

    It does not cover the sampling of prompts. Raises EvaluationError as `setting_interval` does.
    """
    mean, error = _mean_and_error(metric)
    reach = float(student.ppf(1 - alpha, len(metric.seeds) - 1)) * error
    return max(0.0, mean - reach) if metric.direction == "maximise" else min(1.0, mean + reach)


def _mean_and_error(metric: Metric) -> tuple[float, float]:
    values_S = metric.seeds
    if len(values_S) < FEWEST_SEEDS:
        raise EvaluationError(
            f"{metric.name} has {max(1, len(values_S))} training seeds; a setting needs "
            f"{FEWEST_SEEDS} or more"
        )
    return float(np.mean(values_S)), math.sqrt(_squared_error(values_S))


@dataclass(frozen=True)
class Spreads:
    """Standard deviations of a crossed design: between trainings, between subsets of the data, and
    what is left (their interaction, and the sampling of the answers).
    """

    training: float
    data: float
    rest: float


def crossed_spreads(values_S: Sequence[float], subsets: int) -> Spreads | None:
    """The spreads of values whose seeds cross trainings with `subsets` subsets, training by
    training; None without two of each.

    The variances are the moment estimates of the two-way random-effects model with one value for
    each cell (Searle 1971); a negative one is 0.
    """
    if subsets < 2 or len(values_S) % subsets or len(values_S) // subsets < 2:
        return None
    values_TD = np.asarray(values_S, dtype=np.float64).reshape(-1, subsets)
    trainings = len(values_TD)
    mean_T, mean_D = values_TD.mean(axis=1), values_TD.mean(axis=0)
    rest_TD = values_TD - mean_T[:, None] - mean_D[None, :] + values_TD.mean()
    rest = float((rest_TD**2).sum()) / ((trainings - 1) * (subsets - 1))
    training = max(0.0, float(np.var(mean_T, ddof=1)) - rest / subsets)
    data = max(0.0, float(np.var(mean_D, ddof=1)) - rest / trainings)
    return Spreads(math.sqrt(training), math.sqrt(data), math.sqrt(rest))


def _squared_error(values_S: Sequence[float] | NDArray[np.float64]) -> float:
    """The squared standard error of the mean over seeds."""
    return float(np.var(values_S, ddof=1)) / len(values_S)


@dataclass(frozen=True)
class _Test:
    difference: float
    interval: tuple[float, float]
    p_value: float


def _test(difference: float, squared_error: float, freedom: float) -> _Test:
    error = math.sqrt(squared_error)
    if error <= _ROUNDING:  # equal seeds: only the prompts can vary
        moved = abs(difference) > _ROUNDING
        return _Test(difference, (difference, difference), 0.0 if moved else 1.0)
    reach = float(student.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
    p_value = 2 * float(student.sf(abs(difference) / error, freedom))
    return _Test(difference, (difference - reach, difference + reach), p_value)


def _widest(found: Sequence[_Test], seeds: int, freedom: float, paired: bool) -> BetweenSeeds:
    sides = {np.sign(each.difference) for each in found}
    return BetweenSeeds(
        seeds,
        sum(each.difference for each in found) / len(found),
        (
            max(-1.0, min(each.interval[0] for each in found)),
            min(1.0, max(each.interval[1] for each in found)),
        ),
        max(each.p_value for each in found) if len(sides) == 1 else 1.0,
        freedom,
        paired,
    )
