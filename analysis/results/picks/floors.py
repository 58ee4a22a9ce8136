"""Floors and the operating point: the one rule for "holds", and the most useful point by it.

A search looks at its points many times, so it only nominates: a point whose value meets the floor
is a *candidate*. `ebbline confirm` measures candidates on prompts and training seeds that chose
nothing, and only its numbers say that a floor *holds* (`standing`). There are two claims, never
mixed: that one adapter holds the floor, on fresh prompts, and that a setting does, on fresh prompts
and fresh training seeds.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from scipy.stats import binom, binomtest

from ebbline.analysis.results.claims.between_seeds import setting_bound
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


def fewest_prompts(floor: Floor, among: int = 1) -> float:
    """The fewest prompts with which `bound` can meet the floor, when none of them fails.

    It is the least n with (0.05 / among)^(1 / n) at or above the floor (Clopper and Pearson 1934),
    and infinite for a floor of 100%.
    """
    least = floor.value if floor.up else 1 - floor.value
    if not 0 < least < 1:
        return 1 if least <= 0 else math.inf
    return math.ceil(math.log((1 - CONFIDENCE) / among) / math.log(least) - _ROUNDING)


def _bad_of(metric: Metric) -> tuple[int, int]:
    """The number of a seed's failed prompts, rounded up, and the number of its prompts."""
    n = max(1, math.floor(metric.items + _ROUNDING))
    share = 1 - metric.value if metric.direction == "maximise" else metric.value
    return min(n, math.ceil(share * n - _ROUNDING)), n


Claim = Literal["adapter", "setting"]
Standing = Literal["missed", "candidate", "unsure", "holds"]
STANDINGS: tuple[Standing, ...] = get_args(Standing)


def standing(result: Result, floors: Sequence[Floor], claim: Claim) -> Standing:
    """How a point stands to its floors, as a claim about one of its adapters or about its setting.

    missed     a value is below its floor: the confirmed one, or the search's where there is none
    candidate  every value of the search meets its floor, and not all of them were confirmed
    unsure     every confirmed value meets its floor, and a bound does not
    holds      every confirmed bound meets its floor, corrected for the points that were confirmed

    An adapter from outside has no setting that was trained again: of a confirmed one, both claims
    are about the adapter.
    """
    if result.confirmed is not None and (claim == "adapter" or not result.confirmed.setting):
        seeds = result.confirmed.adapters
        found = [adapter_standing(result, floors, seed) for seed in seeds]
        return max(found, key=STANDINGS.index) if found else _worst(result, floors, {}, claim)
    confirmed = {} if result.confirmed is None else result.confirmed.setting
    return _worst(result, floors, confirmed, claim)


def adapter_standing(result: Result, floors: Sequence[Floor], seed: int) -> Standing:
    """The standing of the adapter of one training seed."""
    confirmed = {} if result.confirmed is None else result.confirmed.adapters.get(seed, {})
    return _worst(result, floors, confirmed, "adapter")


def _worst(
    result: Result, floors: Sequence[Floor], confirmed: Mapping[str, Metric], claim: Claim
) -> Standing:
    found = [_of_floor(result, floor, confirmed.get(floor.metric), claim) for floor in floors]
    return min(found, key=STANDINGS.index, default="candidate")


def _of_floor(result: Result, floor: Floor, metric: Metric | None, claim: Claim) -> Standing:
    if metric is None:
        return "candidate" if _meets(floor, result.metrics[floor.metric].value) else "missed"
    if not _meets(floor, metric.value):
        return "missed"
    return "holds" if _meets(floor, confirmed_bound(result, metric, claim)) else "unsure"


def _meets(floor: Floor, value: float) -> bool:
    return floor.margin(value) >= -_ROUNDING


def confirmed_bound(result: Result, metric: Metric, claim: Claim) -> float:
    """The one-sided 95% bound of a confirmed metric, corrected by Bonferroni for the points that
    were confirmed, and for an adapter also for the seeds from which it may be chosen.
    """
    if result.confirmed is None:
        raise StudyError(f"point {result.number} was not confirmed, so it has no confirmed bound")
    among = result.confirmed.among
    if claim == "adapter":
        return bound(metric, among * max(1, len(result.confirmed.adapters)))
    over_seeds, over_prompts = setting_bound(metric, (1 - CONFIDENCE) / among), bound(metric, among)
    worst = min if metric.direction == "maximise" else max
    return worst(over_seeds, over_prompts)


@dataclass(frozen=True)
class Pick:
    """A point picked among `among` different points, and how it stands to the floors.

    It `meets` all floors by its values, or is the nearest to them. Only a confirmed point `holds`
    them. With `by_hand` the user named it by its number, whether or not it is the best or the
    nearest. `instead_of` is the point with the highest `maximised`, where one with a simpler
    defence was within `margin` of it. `refuted` has the floors that its values in the search meet
    and its confirmed values do not.
    """

    result: Result
    standing: Standing
    among: int
    floors: tuple[Floor, ...]
    maximised: str | None
    by_hand: bool = False
    margin: float | None = None
    instead_of: Result | None = None
    refuted: tuple[Floor, ...] = ()

    @property
    def meets(self) -> bool:
        return self.standing != "missed"

    @property
    def holds(self) -> bool:
        return self.standing == "holds"


def pick(
    results: Sequence[Result],
    floors: Sequence[Floor],
    maximised: str | None,
    confidence: float | None = None,
    number: int | None = None,
    margin: float | None = None,
    claim: Claim = "adapter",
) -> Pick | None:
    """The finished result with the highest `maximised` among those that stand best to the floors.

    Confirmed points come first, then candidates. If none of them meets the floors, it is the
    nearest: the one whose worst miss is the smallest. None without a finished result. Defended and
    undefended points count alike. With `confidence` a candidate's bound must meet the floor,
    corrected for the pick. With `number` that point is picked, whatever its metrics are. With
    `margin`, of the results that stand best and whose `maximised` is at most that much below the
    highest, only those with the simplest defence count.

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

    def stands(result: Result) -> Standing:
        found = standing(result, floors, claim)
        return "missed" if found == "candidate" and slacks[result.number] < 0 else found

    standings = {result.number: stands(result) for result in offered}
    best_standing = max(standings.values(), key=STANDINGS.index)
    best = (
        max(offered, key=lambda result: (slacks[result.number], -result.number))
        if best_standing == "missed"
        else max((r for r in offered if standings[r.number] == best_standing), key=worth)
    )
    preferred = best
    if best_standing != "missed" and margin is not None and maximised is not None:
        least = best.metrics[maximised].value - margin - _ROUNDING
        near = [
            result
            for result in offered
            if standings[result.number] == best_standing
            and result.metrics[maximised].value >= least
        ]
        preferred = max(simplest(near), key=worth)
    return Pick(
        preferred,
        best_standing,
        among,
        tuple(floors),
        maximised,
        number is not None,
        margin,
        best if preferred is not best else None,
        tuple(floor for floor in floors if is_refuted(preferred, floor, claim)),
    )


def is_refuted(result: Result, floor: Floor, claim: Claim) -> bool:
    """Whether the value of the search meets the floor and the confirmed one does not."""
    meets = _meets(floor, result.metrics[floor.metric].value)
    return meets and standing(result, [floor], claim) == "missed"


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
