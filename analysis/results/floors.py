"""Floors, and the operating point: the most useful point that holds them, and how sure it is that
it does.

Invariants: a floor keeps to its metric's own direction, so that of a metric that is better when
lower it is a ceiling; a point that was picked as the best of many is never called sure without
allowing for that.

How sure: the exact one-sided binomial test and its bound (Clopper and Pearson 1934), over the
different prompts of one seed. Prompts that seeds answered differently count by their share, rounded
to the worse whole number; so do the scores of a metric that is a mean, whose spread is at most that
of a rate. A pick among m points is allowed for by Bonferroni's inequality, which holds however the
points depend on each other: its p-value is m times that of the point by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from scipy.stats import binom, binomtest

from ebbline.analysis.results.wording import metric_label, percent
from ebbline.sweeps.study.points import Result
from ebbline.tasks.errors import StudyError
from ebbline.tasks.measuring.metrics import Metric, direction

CONFIDENCE = 0.95
METHOD = (
    "one-sided exact binomial (Clopper-Pearson); the pick allowed for by Bonferroni over the "
    "points it was made among"
)
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Floor:
    """The worst that a metric may be: at least `value` where higher is better, at most `value`
    where lower is.
    """

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
        """How far a value is on the good side of the floor; negative where it misses."""
        return value - self.value if self.up else self.value - value

    def __str__(self) -> str:
        return (
            f"{metric_label(self.metric)} {'at least' if self.up else 'at most'} "
            f"{percent(self.value)}"
        )


def bound(metric: Metric, among: int = 1, confidence: float = CONFIDENCE) -> float:
    """What the metric is at least (at most, where lower is better) with this confidence, when it
    was picked among so many.
    """
    worst = _upper_bound(*_bad_of(metric), (1 - confidence) / among)
    return 1 - worst if metric.direction == "maximise" else worst


@lru_cache(maxsize=4096)  # a study's points share n and alpha, so few values differ
def _upper_bound(bad: int, n: int, alpha: float) -> float:
    exact = binomtest(bad, n, alternative="less").proportion_ci(1 - alpha, method="exact")
    return float(exact.high)


def sureness(metric: Metric, floor: Floor, among: int = 1) -> float:
    """1 - p of the test that the metric misses the floor, when it was picked among so many. It is
    no probability of being safe.
    """
    bad, n = _bad_of(metric)
    allowed = 1 - floor.value if floor.up else floor.value
    # The chance to look so good while just missing the floor.
    p = float(binom.cdf(bad, n, allowed))
    return max(0.0, 1 - among * p)


def _bad_of(metric: Metric) -> tuple[int, int]:
    """How many of a seed's prompts went the wrong way, rounded to the worse, and how many prompts
    there are.
    """
    n = max(1, math.floor(metric.items + _ROUNDING))
    share = 1 - metric.value if metric.direction == "maximise" else metric.value
    return min(n, math.ceil(share * n - _ROUNDING)), n


@dataclass(frozen=True)
class Pick:
    """A point picked among `among` different ones: it `holds` all floors, or else is the nearest to
    holding them.

    With `by_hand` it was asked for by its number, and is neither the best nor the nearest.
    """

    result: Result
    holds: bool
    among: int
    floors: tuple[Floor, ...]
    maximised: str | None
    by_hand: bool = False


def pick(
    results: Sequence[Result],
    floors: Sequence[Floor],
    maximised: str | None,
    confidence: float | None = None,
    number: int | None = None,
) -> Pick | None:
    """Of the finished results that hold every floor the one with most of `maximised`; or the
    nearest to it. None without any.

    Whether a point is projected plays no part: one that holds the floors without is as good. The
    nearest is the one whose worst miss is the smallest. With `confidence` a floor is held when the
    bound is on its good side, the pick allowed for. With `number` that point is taken, whatever it
    is worth. Raises StudyError for a `maximised` that is better when lower.
    """
    if maximised is not None and direction(maximised) != "maximise":
        raise StudyError(
            f"{maximised} is better when lower, and nothing turns a metric round; give it "
            f"a ceiling (`--floor {maximised}=SHARE`)"
            " and maximise another metric"
        )
    done = [result for result in results if result.status == "done"]
    among = sum(result.same_as is None for result in done)
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
    return Pick(best, bool(holding), among, tuple(floors), maximised, number is not None)


def slack(
    result: Result, floors: Sequence[Floor], among: int, confidence: float | None = None
) -> float:
    """How far the worst-held of its floors is held; negative where one is missed. Over bounds when
    `confidence` is given.
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
    """What one of a metric's seeds measured, as if it were alone.

    Its value, count and `bound` are that seed's. How its scores spread is not kept, so the interval
    of a mean is not (`spread_known`).
    """
    items = round(metric.items)
    return (
        metric if len(metric.seeds) < 2 else Metric(metric.name, metric.seeds[index] * items, items)
    )


def spread_known(metric: Metric) -> bool:
    """Whether `of_seed` has an interval: of a rate, whose spread follows from its value, or of what
    has one seed only.
    """
    return metric.squares is None or len(metric.seeds) < 2
