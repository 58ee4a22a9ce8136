"""Floors and the operating point: the most useful point that holds all floors, and the confidence
that it holds them.

Invariants: a floor follows its metric's direction; for a metric that is better when lower it is a
ceiling. The confidence in a picked point is always corrected for the number of points.

The confidence comes from the exact one-sided binomial test and its bound (Clopper and Pearson
1934), over the prompts of one seed. A prompt that seeds answered differently counts by its share of
successes. The total is rounded to the worse whole number. The scores of a metric that is a mean are
treated likewise, since their spread is at most that of a rate. An undecided sample is a failure
here, at a floor and at a ceiling: a metric's value counts it so.

A pick among m points is corrected by Bonferroni's inequality: the p-value is m times that of the
point alone. The inequality holds for any dependence between the points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from scipy.stats import binom, binomtest

from ebbline.analysis.results.picks.simplest import simplest
from ebbline.analysis.results.wording import metric_label, percent
from ebbline.sweeps.study.points import Result, distinct
from ebbline.tasks.errors import StudyError
from ebbline.tasks.measuring.metrics import Metric, direction

CONFIDENCE = 0.95
METHOD = (
    "one-sided exact binomial (Clopper-Pearson); the pick allowed for by Bonferroni over the "
    "points that it chose from"
)
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Floor:
    """The limit of a metric: at least `value` where higher is better, at most where lower is."""

    metric: str
    value: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.value <= 1.0:
            raise StudyError(
                f"a floor is a share from 0 to 1; {self.metric}={self.value:g} is not (95% is 0.95)"
            )

    @property
    def up(self) -> bool:
        return direction(self.metric) == "maximise"

    def margin(self, value: float) -> float:
        """The distance of `value` to the floor; negative where the floor is missed."""
        return value - self.value if self.up else self.value - value

    def __str__(self) -> str:
        return (
            f"{metric_label(self.metric)} {'at least' if self.up else 'at most'} "
            f"{percent(self.value)}"
        )


def bound(metric: Metric, among: int = 1, confidence: float = CONFIDENCE) -> float:
    """The one-sided bound of the metric at this confidence, for a pick among `among` points.

    It is a lower bound where higher is better, an upper bound where lower is.
    """
    worst = _upper_bound(*_bad_of(metric), (1 - confidence) / among)
    return 1 - worst if metric.direction == "maximise" else worst


@lru_cache(maxsize=4096)  # points share n and alpha, so few arguments differ
def _upper_bound(bad: int, n: int, alpha: float) -> float:
    exact = binomtest(bad, n, alternative="less").proportion_ci(1 - alpha, method="exact")
    return float(exact.high)


def floor_confidence(metric: Metric, floor: Floor, among: int = 1) -> float:
    """1 - p, where p tests the hypothesis that the metric misses the floor, for a pick among
    `among` points. It is not the probability that the model is safe.
    """
    bad, n = _bad_of(metric)
    allowed = 1 - floor.value if floor.up else floor.value
    # The probability of so good a result for a metric exactly at the floor.
    p = float(binom.cdf(bad, n, allowed))
    return max(0.0, 1 - among * p)


def _bad_of(metric: Metric) -> tuple[int, int]:
    """The number of a seed's failed prompts, rounded up, and the number of its prompts."""
    n = max(1, math.floor(metric.items + _ROUNDING))
    share = 1 - metric.value if metric.direction == "maximise" else metric.value
    return min(n, math.ceil(share * n - _ROUNDING)), n


@dataclass(frozen=True)
class Pick:
    """A point picked among `among` different points.

    It `holds` all floors, or is the nearest to holding them. With `by_hand` the user named it by
    its number, whether or not it is the best or the nearest. `instead_of` is the point with the
    highest `maximised`, where one with a simpler defence was within `margin` of it.
    """

    result: Result
    holds: bool
    among: int
    floors: tuple[Floor, ...]
    maximised: str | None
    by_hand: bool = False
    margin: float | None = None
    instead_of: Result | None = None


def pick(
    results: Sequence[Result],
    floors: Sequence[Floor],
    maximised: str | None,
    confidence: float | None = None,
    number: int | None = None,
    margin: float | None = None,
) -> Pick | None:
    """The finished result with the highest `maximised` among those that hold every floor.

    If no result holds them, it is the nearest: the one whose worst miss is the smallest. None
    without a finished result. Projected and unprojected points count alike. With `confidence` the
    bound must hold the floor, corrected for the pick. With `number` that point is picked, whatever
    its metrics are. With `margin`, of the results that hold and whose `maximised` is at most that
    much below the highest, only those with the simplest defence count.

    Raises StudyError for a `maximised` that is better when lower, and for a result that lacks a
    metric.
    """
    if maximised is not None and direction(maximised) != "maximise":
        raise StudyError(
            f"{maximised} is better when lower, so it cannot be maximised; give it "
            f"a ceiling (`--floor {maximised}=SHARE`)"
            " and maximise another metric"
        )
    done = [result for result in results if result.status == "done"]
    among = len(distinct(done))
    offered = [result for result in done if number in (None, result.number)]
    if not offered:
        return None

    for name in [*(floor.metric for floor in floors), *([maximised] if maximised else [])]:
        lacking = next((result for result in offered if name not in result.metrics), None)
        if lacking is not None:
            raise StudyError(
                f"point {lacking.number} is done but has no {name}; it has "
                f"{sorted(lacking.metrics)}"
            )

    def worth(result: Result) -> tuple[float, ...]:
        useful = () if maximised is None else (result.metrics[maximised].value,)
        return (
            *useful,
            *(floor.margin(result.metrics[floor.metric].value) for floor in floors),
            -result.number,
        )

    slacks = {result.number: slack(result, floors, among, confidence) for result in offered}
    holding = [result for result in offered if slacks[result.number] >= 0]
    best = (
        max(holding, key=worth)
        if holding
        else max(offered, key=lambda result: (slacks[result.number], -result.number))
    )
    preferred = best
    if holding and margin is not None and maximised is not None:
        least = best.metrics[maximised].value - margin - _ROUNDING
        near = [result for result in holding if result.metrics[maximised].value >= least]
        preferred = max(simplest(near), key=worth)
    return Pick(
        preferred,
        bool(holding),
        among,
        tuple(floors),
        maximised,
        number is not None,
        margin,
        best if preferred is not best else None,
    )


def slack(
    result: Result, floors: Sequence[Floor], among: int, confidence: float | None = None
) -> float:
    """The smallest margin of a result over its floors; negative where one is missed.

    With `confidence` the margins are those of the bounds.
    """
    metrics = [result.metrics[floor.metric] for floor in floors]
    values = [
        metric.value if confidence is None else bound(metric, among, confidence)
        for metric in metrics
    ]
    found = min(
        (floor.margin(value) for floor, value in zip(floors, values, strict=True)), default=0.0
    )
    return 0.0 if abs(found) < _ROUNDING else found


def of_seed(metric: Metric, index: int) -> Metric:
    """The metric of one seed alone: its value, count and `bound`.

    The spread of scores within a seed is not stored, so a mean has no valid interval
    (`spread_known`).
    """
    if len(metric.seeds) < 2:
        return metric
    items = round(metric.items)
    undecided = metric.seeds_undecided[index] if metric.seeds_undecided else 0
    counted = metric.seeds[index] * items  # with undecided samples where lower is better
    successes = counted - undecided if metric.direction == "minimise" else counted
    return Metric(metric.name, max(0.0, successes), items, undecided)


def spread_known(metric: Metric) -> bool:
    """Whether the result of `of_seed` has a valid interval.

    A rate has one, as its spread follows from its value; so has any metric with one seed.
    """
    return metric.squares is None or len(metric.seeds) < 2
