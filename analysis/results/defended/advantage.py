"""How much more of its refusals one set of adapters keeps than another, at equal usefulness.

The frontier of a set says how many refusals can be kept with at least some usefulness. With
R(u) = max {refusal rate : usefulness >= u} over the adapters of a set, an advantage is the mean
difference of two such R over all u that both sets reach. So it reads as points of refusal rate at
equal usefulness. Usefulness that only one set reaches is left out.

Invariants: both sets have equally many distinct adapters of each training, because the best of many
noisy adapters looks better than the best of few. Where one set has more, the mean over its subsets
counts. Draws of a random control each have a frontier; their values are averaged, and they are no
seeds. Sets are paired: every resample takes the same prompts and the same seeds for both.

Arrays: N adapters (settings of one training), S seeds, P prompts, R resamples or subsets.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ebbline.analysis.results.claims.between_seeds import BetweenSeeds, over_paired_seeds
from ebbline.analysis.results.measurements import LEVEL, Evidence, Move
from ebbline.analysis.results.statistics import SHARES, corrected
from ebbline.sweeps.study.points import Point, Result

RESAMPLES = 1000
SUBSETS = 1000
_ROUNDING = 1e-9
Array = NDArray[np.float64]
Draws = Sequence[Sequence[Result]]


@dataclass(frozen=True)
class Advantage:
    """The first set's mean refusal rate at equal usefulness, minus the second's.

    `interval` is the 95% percentile bootstrap over prompts and seeds, and where `between` is known
    the wider end of it and of the t interval over seeds; None where samples are missing. `adapters`
    is the number of each set's adapters over all trainings and seeds. `by_draw` has the difference
    to each draw of a random control, or the one difference. `p_value` is the larger of both tests,
    two-sided; `corrected_p` is it after the correction for the comparisons reported together.
    """

    difference: float
    interval: tuple[float, float] | None
    adapters: int
    trainings: int
    seeds: int
    by_draw: tuple[float, ...]
    p_value: float | None = None
    between: BetweenSeeds | None = None
    corrected_p: float | None = None

    @property
    def move(self) -> Move:
        """Whether the first set keeps more; a value without an interval shows nothing."""
        p_value = self.p_value if self.corrected_p is None else self.corrected_p
        if self.interval is None or (p_value is not None and p_value >= LEVEL):
            return "not distinguishable"
        low, high = self.interval
        return "higher" if low > 0 else "lower" if high < 0 else "not distinguishable"

    @property
    def is_about_setting(self) -> bool:
        """Whether it is about the settings, rather than about the measured adapters."""
        return self.between is not None


def together_corrected(found: Sequence[Advantage | None]) -> list[Advantage | None]:
    """The advantages with p-values that are corrected for being reported together."""
    known = [each.p_value for each in found if each is not None and each.p_value is not None]
    values = iter(corrected(known))
    return [
        each if each is None or each.p_value is None else replace(each, corrected_p=next(values))
        for each in found
    ]


def area_R(useful_NR: Array, refusal_NR: Array, *, reach: float = 1.0) -> Array:
    """The mean over u from 0 to `reach` of max {refusal : useful >= u}, for each of R columns; all
    in [0, 1].
    """
    useful_NR = np.minimum(useful_NR, reach)
    order_NR = np.argsort(-useful_NR, axis=0, kind="stable")
    useful_NR = np.take_along_axis(useful_NR, order_NR, axis=0)
    kept_NR = np.maximum.accumulate(np.take_along_axis(refusal_NR, order_NR, axis=0), axis=0)
    next_NR = np.vstack([useful_NR[1:], np.zeros((1, useful_NR.shape[1]))])
    total_R: Array = ((useful_NR - next_NR) * kept_NR).sum(axis=0) / reach
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
    draw. None without a common training in which both are useful at all.
    """
    reaches = {
        training: _reach([own, *second[training]], useful)
        for training, own in first.items()
        if own and any(second.get(training, ()))
    }
    trainings = [training for training, reach in reaches.items() if reach > _ROUNDING]
    if not trainings:
        return None
    sides = {training: _equal(first[training], second[training]) for training in trainings}
    draws = min(len(second[training]) for training in trainings)
    by_draw = tuple(
        float(
            np.mean(
                [
                    _value(first[training], sides[training], refusal, useful, reaches[training])
                    - _value(
                        second[training][draw], sides[training], refusal, useful, reaches[training]
                    )
                    for training in trainings
                ]
            )
        )
        for draw in range(draws)
    )
    seeds = [
        min(
            _seeds(result, refusal)
            for results in (first[training], *second[training])
            for result in results
        )
        for training in trainings
    ]
    tested = _tested(first, second, sides, reaches, refusal, useful, evidence)
    return Advantage(
        float(np.mean(by_draw)),
        None if tested is None else tested.interval,
        sum(sides[training] * own for training, own in zip(trainings, seeds, strict=True)),
        len(trainings),
        max(seeds),
        by_draw,
        None if tested is None else tested.p_value,
        None if tested is None else tested.between,
    )


def _reach(arms: Sequence[Sequence[Result]], useful: str) -> float:
    """The highest usefulness that every arm has."""
    return min(max(result.metrics[useful].value for result in arm) for arm in arms)


def _equal(first: Sequence[Result], second: Draws) -> int:
    """The number of adapters that every side of a training has."""
    return min(len(first), *(len(draw) for draw in second))


def _seeds(result: Result, name: str) -> int:
    return max(1, len(result.metrics[name].seeds))


def _value(results: Sequence[Result], size: int, refusal: str, useful: str, reach: float) -> float:
    """The mean area of the subsets of `size` results."""
    picks_NR = _subsets(len(results), size, SUBSETS, np.random.default_rng(0))
    columns = (
        np.array([result.metrics[name].value for result in results])[picks_NR]
        for name in (useful, refusal)
    )
    return float(area_R(*columns, reach=reach).mean())


def _subsets(n: int, size: int, most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Subsets of `size` of `n` as columns: all of them, or `most` random ones."""
    if math.comb(n, size) <= most:
        return np.array(list(itertools.combinations(range(n), size)), dtype=np.int64).T
    return np.argsort(rng.random((n, most)), axis=0)[:size]


@dataclass(frozen=True)
class _Tested:
    interval: tuple[float, float]
    p_value: float
    between: BetweenSeeds | None


def _tested(
    first: Mapping[Point, Sequence[Result]],
    second: Mapping[Point, Draws],
    sides: Mapping[Point, int],
    reaches: Mapping[Point, float],
    refusal: str,
    useful: str,
    evidence: Evidence,
) -> _Tested | None:
    """The interval and the test over prompts and seeds; None where samples are missing.

    The lower end takes undecided samples of the first set at their worst and those of the second
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
                    ),
                    reach=reaches[training],
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
    p_value = max(
        1 / RESAMPLES, min(1.0, 2 * min(float(np.mean(least_R <= 0)), float(np.mean(most_R >= 0))))
    )
    if high - low <= _ROUNDING:
        low, high = without_spread(low, min(prompts.values()))
        p_value = 1 / RESAMPLES if low > 0 or high < 0 else 1.0
    between = _between(arms, sides, reaches, (useful, refusal), found)
    if between is not None:
        low, high = min(low, between.interval[0]), max(high, between.interval[1])
        p_value = max(p_value, between.p_value)
    return _Tested((low, high), p_value, between)


def _between(
    arms: Mapping[Point, Sequence[Sequence[Result]]],
    sides: Mapping[Point, int],
    reaches: Mapping[Point, float],
    names: tuple[str, str],
    found: "_Successes",
) -> BetweenSeeds | None:
    """The difference over training seeds, each with the frontiers of its own adapters. A control's
    draws are averaged. None where trainings differ in their number of seeds, or have too few.
    """
    if len(set(found.seeds.values())) > 1:
        return None
    ends: list[Array] = []
    for mine, theirs in ((0, 1), (1, 0)):  # undecided samples at their worst, and at their best
        gains = []
        for training, size in sides.items():
            own, *others = (
                _by_seed(found, training, arm, names, undecided, size, reaches[training])
                for arm, undecided in enumerate([mine, *[theirs] * (len(arms[training]) - 1)])
            )
            gains.append(own - np.mean(others, axis=0))
        ends.append(np.mean(gains, axis=0))
    return over_paired_seeds(*ends)


def _by_seed(
    found: "_Successes",
    training: Point,
    arm: int,
    names: tuple[str, str],
    undecided: int,
    size: int,
    reach: float,
) -> Array:
    """The mean area of the subsets of `size` adapters, for each of S seeds."""
    useful_NS, refusal_NS = (
        found.arrays[training, arm, name][undecided].mean(axis=2) for name in names
    )
    picks_NR = _subsets(len(useful_NS), size, SUBSETS, np.random.default_rng(0))
    return np.array(
        [
            area_R(useful_NS[:, seed][picks_NR], refusal_NS[:, seed][picks_NR], reach=reach).mean()
            for seed in range(useful_NS.shape[1])
        ]
    )


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
