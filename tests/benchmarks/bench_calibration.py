"""How often verdicts about settings err, and what they find: `make bench-calibration`.

Two settings are trained with the same training seeds and asked the same prompts. Each training's
success rate is drawn around its setting's mean, and each prompt has a difficulty of its own. Two
rules judge them: the one by prompts alone, which ebbline used up to version 0.2, and the one of
ebbline.analysis.results.measurements.compared, which also needs the t test over seeds. Without a
difference each should call one setting higher or lower in at most 5% of the repetitions. The same
repetitions with differences of 15 and 30 points show what the rules find.

A second table is about the operating point that a search chose: how often the interval covers its
true rate, for the interval of the numbers that chose it, and for that of `ebbline confirm`, on
other prompts and other training seeds.

"False holds" is how often a confirmation says that a setting holds a floor which lies just above
its true rate: the rule of ebbline.analysis.results.picks.floors should do so in at most 5%. Two
limits of it are measured and gate nothing. Where rates are cut off at 0 and 1 their distribution is
skewed. And where nine of ten seeds have a high rate and the tenth collapses, few seeds may not show
that: no rule can know.
"""

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from ebbline.analysis.results.claims.between_seeds import over_paired_seeds, setting_interval
from ebbline.analysis.results.picks.floors import Floor, standing
from ebbline.analysis.results.statistics import sign_test
from ebbline.sweeps.study.points import Confirmed, Point, Result
from ebbline.tasks.measuring.metrics import Metric, pooled
from tests.benchmarks.record import table, write

LEVEL, LARGEST, LEAST_COVERED = 0.05, 0.07, 0.92
REPETITIONS, RESAMPLES = 2000, 999
SPREADS = (0.0, 0.05, 0.1, 0.2, 0.4)  # standard deviations between seeds
SEEDS, PROMPTS, GAINS = (3, 5), (120, 520), (0.15, 0.3)
MEAN = 0.6
DIFFICULTY = 1.0  # the standard deviation of the prompts' difficulty, in logits
OF_SETTING = 0.5  # ... of the part that only one of the settings has
POINTS = 20  # that a search chose from
REFUSAL = "refusal.refusal_rate"
CUT_OFF = 0.4  # from this spread on, many rates are cut off at 0 and 1
ABOVE = 1e-6  # from a setting's true rate to the floor that it misses
# A setting whose seeds sometimes collapse, and a floor above its mean rate of 91.1%.
USUAL, COLLAPSED, COLLAPSES, COLLAPSING_FLOOR = 0.99, 0.2, 0.1, 0.92


@dataclass(frozen=True)
class Verdicts:
    """The shares of the repetitions in which a rule called a setting higher or lower."""

    by_prompts: float
    by_seeds: float


def successes_NS(
    rng: np.random.Generator, mean: float, spread: float, hard_N: NDArray[np.float64], seeds: int
) -> NDArray[np.bool_]:
    """One setting's answers: N prompts, S trainings."""
    rate_S = np.clip(mean + spread * rng.normal(size=seeds), 0.002, 0.998)
    # A logit's spread shrinks the mean rate towards a half; the factor takes that back.
    centre_S = logit(rate_S) * math.sqrt(1 + float(np.var(hard_N)) / 2.9)
    found: NDArray[np.bool_] = rng.random((len(hard_N), seeds)) < expit(hard_N[:, None] + centre_S)
    return found


def gains_NS(
    rng: np.random.Generator, gain: float, spread: float, seeds: int, prompts: int
) -> NDArray[np.int64]:
    """The gains of the second setting over the first."""
    hard_N = DIFFICULTY * rng.normal(size=prompts)
    sides = [
        successes_NS(rng, mean, spread, hard_N + OF_SETTING * rng.normal(size=prompts), seeds)
        for mean in (MEAN, MEAN - gain)
    ]
    found: NDArray[np.int64] = sides[1].astype(np.int64) - sides[0].astype(np.int64)
    return found


def verdicts(gain: float, spread: float, seeds: int, prompts: int, repetitions: int) -> Verdicts:
    rng = np.random.default_rng([seeds, prompts, round(100 * spread), round(100 * gain)])
    prompts_said = seeds_said = 0
    for _ in range(repetitions):
        found_NS = gains_NS(rng, gain, spread, seeds, prompts)
        net_N, gain_S = found_NS.sum(axis=1), found_NS.mean(axis=0)
        if sign_test(net_N, net_N) >= LEVEL or _covers_no_gain(rng, net_N):
            continue
        prompts_said += 1
        between = over_paired_seeds(gain_S, gain_S)
        seeds_said += between is not None and between.p_value < LEVEL
    return Verdicts(prompts_said / repetitions, seeds_said / repetitions)


def _covers_no_gain(rng: np.random.Generator, net_N: NDArray[np.int64]) -> bool:
    """Whether the percentile bootstrap over prompts holds 0. Resampled prompts are counts of their
    distinct gains, which is faster and equal in distribution to drawing them one by one.
    """
    values, counts = np.unique(net_N, return_counts=True)
    drawn = rng.multinomial(len(net_N), counts / len(net_N), size=RESAMPLES) @ values
    low, high = np.quantile(drawn, (0.025, 0.975))
    return bool(low <= 0 <= high)


def coverage(spread: float, seeds: int, prompts: int, repetitions: int) -> dict[str, float]:
    """How often the best of POINTS equal settings has its true rate in its interval."""
    rng = np.random.default_rng([seeds, prompts, round(100 * spread)])
    chosen = confirmed = 0
    shrunk = []
    for _ in range(repetitions):
        search, fresh = (
            [rng.binomial(prompts, _rates(rng, spread, seeds)) for _ in range(points)]
            for points in (POINTS, 1)
        )
        best, again = (_metric(max(found, key=sum), prompts) for found in (search, fresh))
        truth = _mean_rate(spread)
        low, high = best.interval
        chosen += low <= truth <= high
        low, high = setting_interval(again)
        confirmed += low <= truth <= high
        shrunk.append(best.value - again.value)
    return {
        "chosen": chosen / repetitions,
        "confirmed": confirmed / repetitions,
        "shrinkage": float(np.mean(shrunk)),
    }


def _rates(rng: np.random.Generator, spread: float, seeds: int) -> NDArray[np.float64]:
    return np.clip(MEAN + spread * rng.normal(size=seeds), 0.0, 1.0)


def _mean_rate(spread: float) -> float:
    """The mean of `_rates`, by many draws: clipping moves it at a large spread."""
    return float(_rates(np.random.default_rng(0), spread, 200_000).mean())


def _metric(successes_S: Sequence[int], prompts: int) -> Metric:
    return pooled([Metric(REFUSAL, int(each), prompts) for each in successes_S])


def false_holds(spread: float, seeds: int, prompts: int, repetitions: int) -> float:
    """How often a confirmation says that a setting holds a floor just above its true rate."""
    rng = np.random.default_rng([seeds, prompts, round(100 * spread), 1])
    floor = _mean_rate(spread) + ABOVE
    return _share_that_holds(
        (rng.binomial(prompts, _rates(rng, spread, seeds)) for _ in range(repetitions)),
        prompts,
        floor,
    )


def false_holds_of_collapsing(seeds: int, prompts: int, repetitions: int) -> float:
    """The same for seeds that sometimes collapse, and a floor above their mean rate."""
    rng = np.random.default_rng([seeds, prompts])
    rates = (np.where(rng.random(seeds) < COLLAPSES, COLLAPSED, USUAL) for _ in range(repetitions))
    return _share_that_holds(
        (rng.binomial(prompts, rate_S) for rate_S in rates), prompts, COLLAPSING_FLOOR
    )


def _share_that_holds(successes: Iterable[NDArray[np.int64]], prompts: int, floor: float) -> float:
    """The share of the confirmations, each with the successes of its seeds, that say "holds"."""
    held = [
        standing(_confirmed(_metric(each, prompts)), [Floor(REFUSAL, floor)], "setting") == "holds"
        for each in successes
    ]
    return sum(held) / len(held)


def _confirmed(setting: Metric) -> Result:
    """A point whose setting was measured again, as the only one."""
    found = Confirmed("again", 0, 1, {}, {REFUSAL: setting}, tuple(range(len(setting.seeds))))
    return Result(0, Point.of("model", {}), "done", {REFUSAL: setting}, confirmed=found)


def rows_of(repetitions: int) -> Iterator[dict[str, Any]]:
    for spread in SPREADS:
        for seeds in SEEDS:
            for prompts in PROMPTS:
                found = {
                    gain: verdicts(gain, spread, seeds, prompts, repetitions)
                    for gain in (0.0, *GAINS)
                }
                row: dict[str, Any] = {
                    "seed sd": spread,
                    "seeds": seeds,
                    "prompts": prompts,
                    "errs, prompts alone": found[0.0].by_prompts,
                    "errs": found[0.0].by_seeds,
                }
                for gain in GAINS:
                    row[f"finds {100 * gain:.0f}"] = found[gain].by_seeds
                held = coverage(spread, seeds, prompts, repetitions)
                row |= {
                    "covers, chosen": held["chosen"],
                    "covers, confirmed": held["confirmed"],
                    "shrinkage": held["shrinkage"],
                    "false holds": false_holds(spread, seeds, prompts, repetitions),
                }
                print(row, flush=True)
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    repetitions = parser.parse_args().repetitions
    rows = list(rows_of(repetitions))
    worst = {name: max(row[name] for row in rows) for name in ("errs, prompts alone", "errs")}
    worst["false holds"] = max(row["false holds"] for row in rows if row["seed sd"] < CUT_OFF)
    least = min(row["covers, confirmed"] for row in rows)
    collapsing = [
        {
            "collapsing seeds": seeds,
            "prompts": prompts,
            "false holds": false_holds_of_collapsing(seeds, prompts, repetitions),
        }
        for seeds in SEEDS
        for prompts in PROMPTS
    ]

    def points(share: float) -> str:
        return f"{100 * share:.1f}"

    shown = {name: (points if isinstance(rows[0][name], float) else str) for name in rows[0]}
    print(table(rows, shown))
    print(table(collapsing, {"collapsing seeds": str, "prompts": str, "false holds": points}))
    write(
        "calibration",
        f"python -m tests.benchmarks.bench_calibration --repetitions {repetitions}",
        ["numpy", "scipy"],
        [*rows, *collapsing],
        {
            "worst_error_prompts_alone_over_nominal": worst["errs, prompts alone"] / LEVEL,
            "worst_error_over_nominal": worst["errs"] / LEVEL,
            "worst_false_holds_over_nominal": worst["false holds"] / LEVEL,
            "least_coverage_confirmed": least,
        },
    )
    for name in ("errs", "false holds"):
        if worst[name] > LARGEST:
            raise SystemExit(
                f"the worst cell has {name!r} of {worst[name]:.1%}, over {LARGEST:.0%}"
            )
    if least < LEAST_COVERED:
        raise SystemExit(f"the worst cell covers in {least:.1%}, under {LEAST_COVERED:.0%}")


if __name__ == "__main__":
    main()
