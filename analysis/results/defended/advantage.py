"""How much more of its refusals one set of adapters keeps than another, at equal usefulness.

The frontier of a set says how many refusals can be kept with at least some usefulness. With
R(u) = max {refusal rate : usefulness >= u} over the adapters of a set, its mean over all u from 0
to 1 is the area below the frontier: the hypervolume of the two. An advantage is the difference of
two such means, so it reads as points of refusal rate at equal usefulness.

Invariants: both sets have equally many distinct adapters of each training, because the best of many
noisy adapters looks better than the best of few. Where one set has more, the mean over its subsets
counts. Draws of a random control each have a frontier; their values are averaged. Sets are paired:
every resample takes the same prompts and the same seeds for both.

Arrays: N adapters (settings of one training), S seeds, P prompts, R resamples or subsets.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ebbline.analysis.results.measurements import Evidence, Move
from ebbline.analysis.results.statistics import SHARES
from ebbline.sweeps.study.points import Point, Result

RESAMPLES = 1000
SUBSETS = 1000
Array = NDArray[np.float64]
Draws = Sequence[Sequence[Result]]


@dataclass(frozen=True)
class Advantage:
    """The first set's mean refusal rate at equal usefulness, minus the second's.

    `interval` is the 95% percentile bootstrap over prompts and seeds; None where samples are
    missing. `adapters` is the number of each set's adapters over all trainings and seeds. `by_draw`
    has the difference to each draw of a random control, or the one difference.
    """

    difference: float
    interval: tuple[float, float] | None
    adapters: int
    trainings: int
    seeds: int
    by_draw: tuple[float, ...]

    @property
    def move(self) -> Move:
        """Whether the first set keeps more; a value without an interval shows nothing."""
        if self.interval is None:
            return "not distinguishable"
        low, high = self.interval
        return "higher" if low > 0 else "lower" if high < 0 else "not distinguishable"


def area_R(useful_NR: Array, refusal_NR: Array) -> Array:
    """The mean over u of max {refusal : useful >= u}, for each of R columns; both in [0, 1]."""
    order_NR = np.argsort(-useful_NR, axis=0, kind="stable")
    useful_NR = np.take_along_axis(useful_NR, order_NR, axis=0)
    kept_NR = np.maximum.accumulate(np.take_along_axis(refusal_NR, order_NR, axis=0), axis=0)
    next_NR = np.vstack([useful_NR[1:], np.zeros((1, useful_NR.shape[1]))])
    total_R: Array = ((useful_NR - next_NR) * kept_NR).sum(axis=0)
    return total_R


def advantage(
    first: Mapping[Point, Sequence[Result]],
    second: Mapping[Point, Draws],
    refusal: str,
    useful: str,
    evidence: Evidence,
) -> Advantage | None:
    """The advantage of `first` over `second`, over the trainings that both have.

    Each maps a training to its results with distinct adapters; `second` has such results for each
    draw. None without a common training.
    """
    trainings = [
        training for training in first if first[training] and any(second.get(training, ()))
    ]
    if not trainings:
        return None
    sides = {training: _equal(first[training], second[training]) for training in trainings}
    draws = min(len(second[training]) for training in trainings)
    by_draw = tuple(
        float(
            np.mean(
                [
                    _value(first[training], sides[training], refusal, useful)
                    - _value(second[training][draw], sides[training], refusal, useful)
                    for training in trainings
                ]
            )
        )
        for draw in range(draws)
    )
    seeds = [_seeds(first[training][0], refusal) for training in trainings]
    return Advantage(
        float(np.mean(by_draw)),
        _interval(first, second, sides, refusal, useful, evidence),
        sum(sides[training] * own for training, own in zip(trainings, seeds, strict=True)),
        len(trainings),
        max(seeds),
        by_draw,
    )


def _equal(first: Sequence[Result], second: Draws) -> int:
    """The number of adapters that every side of a training has."""
    return min(len(first), *(len(draw) for draw in second))


def _seeds(result: Result, name: str) -> int:
    return max(1, len(result.metrics[name].seeds))


def _value(results: Sequence[Result], size: int, refusal: str, useful: str) -> float:
    """The mean area of the subsets of `size` results."""
    picks_NR = _subsets(len(results), size, SUBSETS, np.random.default_rng(0))
    columns = (
        np.array([result.metrics[name].value for result in results])[picks_NR]
        for name in (useful, refusal)
    )
    return float(area_R(*columns).mean())


def _subsets(n: int, size: int, most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Subsets of `size` of `n` as columns: all of them, or `most` random ones."""
    if math.comb(n, size) <= most:
        return np.array(list(itertools.combinations(range(n), size)), dtype=np.int64).T
    return np.argsort(rng.random((n, most)), axis=0)[:size]


def _interval(
    first: Mapping[Point, Sequence[Result]],
    second: Mapping[Point, Draws],
    sides: Mapping[Point, int],
    refusal: str,
    useful: str,
    evidence: Evidence,
) -> tuple[float, float] | None:
    """The lower end takes undecided samples of the first set at their worst and those of the second
    at their best, the upper end the other way round.
    """
    arms = {
        training: [first[training], *second[training]] for training in sides
    }  # the first set, then each draw
    found = _successes(arms, (useful, refusal), evidence)
    if found is None:
        return None
    rng = np.random.default_rng(0)
    suites = {name: name.rpartition(".")[0] for name in (useful, refusal)}
    prompts = {suites[name]: found.prompts[name] for name in suites}
    weights = {
        suite: rng.multinomial(size, np.full(size, 1 / size), RESAMPLES).T / size
        for suite, size in prompts.items()
    }
    least_R, most_R = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for training, size in sides.items():
        seeds = found.seeds[training]
        seeds_SR = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES).T / seeds
        areas: list[tuple[Array, Array]] = []
        for arm in range(len(arms[training])):
            n = len(arms[training][arm])
            picks_NR = np.argsort(rng.random((n, RESAMPLES)), axis=0)[:size] if n > size else None
            worst, best = (
                area_R(
                    *(
                        _resampled(
                            found.arrays[training, arm, name][undecided],
                            weights[suites[name]],
                            seeds_SR,
                            picks_NR,
                        )
                        for name in (useful, refusal)
                    )
                )
                for undecided in (0, 1)
            )
            areas.append((worst, best))
        others = areas[1:]
        least_R += areas[0][0] - np.mean([best for _, best in others], axis=0)
        most_R += areas[0][1] - np.mean([worst for worst, _ in others], axis=0)
    low, high = (
        float(np.quantile(least_R, 0.025)) / len(sides),
        float(np.quantile(most_R, 0.975)) / len(sides),
    )
    return (low, high) if high > low else without_spread(low, min(prompts.values()))


def without_spread(difference: float, prompts: int) -> tuple[float, float]:
    """The interval of a difference that is the same in all resamples, which says nothing of other
    prompts: Wilson's bound on the share of prompts that differ, which was 0 of `prompts`. The same
    rule as for two adapters (ebbline.analysis.results.statistics).
    """
    other = float(binomtest(0, prompts).proportion_ci(0.95, method="wilson").high)
    return difference - other * (1 + difference), difference + other * (1 - difference)


def _resampled(
    successes_NSP: Array,
    weights_PR: Array,
    seeds_SR: Array,
    picks_NR: NDArray[np.int64] | None,
) -> Array:
    """Each adapter's rate in each resample, (N, R); of the picked adapters only."""
    n, seeds, prompts = successes_NSP.shape
    rates_NSR = (successes_NSP.reshape(n * seeds, prompts) @ weights_PR).reshape(n, seeds, -1)
    rates_NR: Array = (rates_NSR * seeds_SR).sum(axis=1)
    return rates_NR if picks_NR is None else np.take_along_axis(rates_NR, picks_NR, axis=0)


@dataclass(frozen=True)
class _Successes:
    """(training, arm, metric) -> successes with undecided samples at their worst and at their best,
    each (N, S, P); prompts of each metric, and seeds of each training.
    """

    arrays: Mapping[tuple[Point, int, str], tuple[Array, Array]]
    prompts: Mapping[str, int]
    seeds: Mapping[Point, int]


def _successes(
    arms: Mapping[Point, Sequence[Sequence[Result]]], names: Sequence[str], evidence: Evidence
) -> _Successes | None:
    """None where samples are missing, where prompts differ, or where a metric is not a share."""
    arrays: dict[tuple[Point, int, str], tuple[Array, Array]] = {}
    ids: dict[str, list[str]] = {}
    seeds: dict[Point, list[int]] = {}
    for training, sets in arms.items():
        for arm, results in enumerate(sets):
            for name in names:
                suite, _, metric = name.rpartition(".")
                if metric not in SHARES:
                    return None
                kept = [evidence.samples(result, suite) for result in results]
                own = seeds.setdefault(training, sorted(kept[0]))
                if not own or any(sorted(each) != own for each in kept):
                    return None
                rows = [
                    [{sample.id: sample for sample in each[seed]} for seed in own] for each in kept
                ]
                asked = ids.setdefault(name, sorted(rows[0][0]))
                if not asked or any(sorted(found) != asked for row in rows for found in row):
                    return None
                worst, best = (
                    np.array(
                        [
                            [[found[item].counted(undecided) for item in asked] for found in row]
                            for row in rows
                        ],
                        dtype=np.float64,
                    )
                    for undecided in (False, True)
                )
                arrays[training, arm, name] = worst, best
    return _Successes(
        arrays,
        {name: len(asked) for name, asked in ids.items()},
        {training: len(own) for training, own in seeds.items()},
    )
