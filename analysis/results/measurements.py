"""Comparisons of two measurements, and the choice of the results that are compared.

Invariant: "higher" and "lower" need a paired test on the same prompts. Where samples are missing,
they need 95% intervals that do not overlap. Every other pair is "not distinguishable". Undecided
samples count against both words: each holds whatever those samples were.

Invariant: with three seeds or more the words are about a setting, and need the test over the seeds
as well. With fewer they are about the adapters that were measured.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args

from ebbline.analysis.results.claims.between_seeds import (
    BetweenSeeds,
    over_paired_seeds,
    over_separate_seeds,
)
from ebbline.analysis.results.picks.floors import Floor, Pick, pick
from ebbline.analysis.results.statistics import (
    SHARES,
    Agreement,
    Paired,
    SamplesBySeed,
    corrected,
    paired_replicates,
    same_prompts,
)
from ebbline.sweeps.study.points import (
    Point,
    Result,
    is_as_trained,
    training_of,
    without_defence,
)
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric

Baselines = Mapping[str, Mapping[str, Metric]]
"""Model -> metric name -> metric of the aligned model, before fine-tuning."""

Move = Literal["higher", "lower", "not distinguishable"]
MOVES: tuple[Move, ...] = get_args(Move)

LEVEL = 0.05

Subject = Result | str
"""What was measured: a point's result, or the name of an aligned model before fine-tuning."""


class Evidence(Protocol):
    """The data behind the metrics: the samples of a suite, and the agreement of its scorers."""

    def samples(self, subject: Subject, suite: str) -> SamplesBySeed:
        """Training seed -> samples; an aligned model has one replicate, under 0.

        Empty where samples are missing.
        """

    def agreement(self, subject: Subject, suite: str) -> Agreement | None:
        """None when the suite has one scorer or its verdicts are missing."""


class NoEvidence:
    """Evidence of a study that has metrics and no samples."""

    def samples(self, subject: Subject, suite: str) -> SamplesBySeed:
        return {}

    def agreement(self, subject: Subject, suite: str) -> Agreement | None:
        return None


NO_EVIDENCE = NoEvidence()


@dataclass(frozen=True)
class Measurement:
    """A metric and its samples.

    `replicates` is empty where samples are missing, or where the metric is not a share of them.
    With `fixed` it is no training of the study: a model before fine-tuning, equal for all seeds.
    `seed_of` maps the number of a replicate to its training seed, where several have one seed, such
    as the draws of a control; empty where each has its own.
    With `other_seeds` its seeds are not those of the other side, so only prompts are pairs.
    """

    metric: Metric
    replicates: SamplesBySeed = field(default_factory=dict)
    fixed: bool = False
    seed_of: Mapping[int, int] = field(default_factory=dict)
    other_seeds: bool = False


@dataclass(frozen=True)
class Comparison:
    """Two metrics and the verdict on the second; `paired` is None where the intervals decided.

    `between` is the difference over training seeds; None where too few seeds support a verdict
    about the setting. `p_value` is the larger one of the tests over prompts and over seeds, before
    any correction; None where there was no test.
    """

    before: Metric
    after: Metric
    move: Move
    paired: Paired | None = None
    between: BetweenSeeds | None = None
    p_value: float | None = None

    @property
    def difference(self) -> float:
        """The second metric minus the first."""
        return (
            self.after.value - self.before.value if self.paired is None else self.paired.difference
        )

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the difference.

        Over prompts it is a bootstrap where paired, else derived from the two intervals as for
        independent samples. Over seeds it is a t interval. Where both are known this is the wider
        end of each.
        """
        low, high = (
            difference_interval(self.before, self.after)
            if self.paired is None
            else self.paired.interval
        )
        if self.between is not None:
            low, high = min(low, self.between.interval[0]), max(high, self.between.interval[1])
        return low, high

    @property
    def is_about_setting(self) -> bool:
        """Whether the verdict is about the setting, rather than about the measured adapters."""
        return self.between is not None


def measurement(result: Result, name: str, evidence: Evidence) -> Measurement:
    suite, _, metric = name.rpartition(".")
    return Measurement(
        result.metrics[name], evidence.samples(result, suite) if metric in SHARES else {}
    )


def compared_with_aligned(
    model: str,
    aligned: Metric,
    results: Sequence[Result],
    name: str,
    evidence: Evidence = NO_EVIDENCE,
) -> list[Comparison]:
    """Each result compared with the aligned model that it was trained from."""
    return compared(pairs_with_aligned(model, aligned, results, name, evidence))


def pairs_with_aligned(
    model: str,
    aligned: Metric,
    results: Sequence[Result],
    name: str,
    evidence: Evidence = NO_EVIDENCE,
) -> list[tuple[Measurement, Measurement]]:
    """(aligned model, result) for each result, as `compared` reads them.

    The aligned model was measured once; its samples are repeated for every seed.
    """
    suite, _, metric = name.rpartition(".")
    once = list(evidence.samples(model, suite).values()) if metric in SHARES else []
    after = [measurement(result, name, evidence) for result in results]
    return [
        (
            Measurement(aligned, dict.fromkeys(each.replicates, once[0]) if once else {}, True),
            each,
        )
        for each in after
    ]


def compared(pairs: Sequence[tuple[Measurement, Measurement]]) -> list[Comparison]:
    """Each pair's second measurement compared with its first.

    The pairs must be all that one sentence reports, since their p-values are corrected together. A
    difference counts when its 95% interval excludes 0 and its corrected p-value is below 0.05. The
    p-value is the larger one of the paired test over prompts and of the t test over seeds, as far
    as there are samples and seeds for them.
    """
    tests = [
        paired_replicates(before.replicates, after.replicates, after.metric.direction)
        if same_prompts(before.replicates, after.replicates)
        else None
        for before, after in pairs
    ]
    between = [
        over_seeds(before, after, test) for (before, after), test in zip(pairs, tests, strict=True)
    ]
    largest = [
        max(each.p_value for each in both if each is not None) if any(both) else None
        for both in zip(tests, between, strict=True)
    ]
    p_values = iter(corrected([p_value for p_value in largest if p_value is not None]))
    return [
        judged(
            Comparison(before.metric, after.metric, "not distinguishable", test, seeds, p_value),
            None if p_value is None else next(p_values),
        )
        for (before, after), test, seeds, p_value in zip(
            pairs, tests, between, largest, strict=True
        )
    ]


def judged(found: Comparison, corrected_p: float | None) -> Comparison:
    """The comparison with its verdict, by its interval and its corrected p-value."""
    if corrected_p is not None and corrected_p >= LEVEL:
        return replace(found, move="not distinguishable")
    return replace(found, move=_move_of(found))


def over_seeds(before: Measurement, after: Measurement, test: Paired | None) -> BetweenSeeds | None:
    """The difference over training seeds; None where a side has too few.

    It is paired where the test over prompts is, unless the sides have other seeds.
    """
    if test is not None and not (before.other_seeds or after.other_seeds):
        return over_paired_seeds(
            *(_by_seed(values, after) for values in (test.least_S, test.most_S))
        )
    first = (before.metric.value,) if before.fixed else _by_seed(before.metric.seeds, before)
    return over_separate_seeds(first, _by_seed(after.metric.seeds, after), before.fixed)


def _by_seed(values: Sequence[float], of: Measurement) -> list[float]:
    """A value for each training seed: the mean over its replicates. `values` has one for each
    replicate, in the order of their numbers.
    """
    if not of.seed_of or not values:
        return list(values)
    own: dict[int, list[float]] = {}
    for number, value in zip(sorted(of.seed_of), values, strict=True):
        own.setdefault(of.seed_of[number], []).append(value)
    return [statistics.fmean(each) for each in own.values()]


def _move_of(found: Comparison) -> Move:
    """The verdict by the interval of the difference; without a test over prompts also by the two
    intervals, which must not overlap.
    """
    low, high = found.interval
    move: Move = "higher" if low > 0 else "lower" if high < 0 else "not distinguishable"
    apart = moved(found.before, found.after)
    return move if found.paired is not None or move == apart else "not distinguishable"


def moved(before: Metric, after: Metric) -> Move:
    """The verdict on `after` from the two intervals alone.

    For shared prompts this is stricter than a paired test.
    """
    (before_low, before_high), (after_low, after_high) = before.interval, after.interval
    return (
        "higher"
        if after_low > before_high
        else "lower"
        if after_high < before_low
        else "not distinguishable"
    )


def difference_interval(before: Metric, after: Metric) -> tuple[float, float]:
    """The 95% interval of the difference of two independent measurements, from their own intervals.

    Square-and-add, Newcombe (1998), method 10. With the difference d and the intervals (l, u), the
    lower end is d - sqrt((after - l_after)^2 + (u_before - before)^2). The upper end is its mirror.
    """
    (before_low, before_high), (after_low, after_high) = before.interval, after.interval
    difference = after.value - before.value
    below = math.hypot(after.value - after_low, before_high - before.value)
    above = math.hypot(after_high - after.value, before.value - before_low)
    return max(-1.0, difference - below), min(1.0, difference + above)


def is_defended(result: Result) -> bool:
    """Whether the defence changed any module; some settings of its knobs change none."""
    return bool(result.changed_share)


def undefended(done: Sequence[Result]) -> dict[Point, Result]:
    """Training -> its result with unchanged adapters; of several, the lowest number."""
    plain = sorted(filter(is_as_trained, done), key=lambda result: -result.number)
    return {training_of(result.point): result for result in plain}


def partners(done: Sequence[Result]) -> dict[Point, Result]:
    """Point without the defence -> the undefended result that a defended one is compared with.

    The two differ by the defence alone. Of several results, the one with the lowest number.
    """
    plain = sorted(
        (result for result in done if not is_defended(result)), key=lambda result: -result.number
    )
    return {without_defence(result.point): result for result in plain}


def refusal_metric(study: Study) -> str | None:
    return study.refusal_metric


def operating_point(study: Study, results: Sequence[Result], refusal: str) -> Pick | None:
    """The defended result to report, by the claim about its setting.

    It follows ebbline.analysis.results.picks.floors.pick, restricted to defended results:
    `ebbline pick` itself may name an undefended one. None where nothing is defended.
    """
    return pick(
        [r for r in results if is_defended(r)],
        [Floor(refusal, study.refusal_floor)],
        usefulness_metric(study),
        claim="setting",
    )


def better_undefended(study: Study, results: Sequence[Result], refusal: str) -> Pick | None:
    """The pick among `results`, if it is undefended and meets the refusal floor; else None."""
    found = pick(
        results, [Floor(refusal, study.refusal_floor)], usefulness_metric(study), claim="setting"
    )
    return None if found is None or not found.meets or is_defended(found.result) else found


def usefulness_metric(study: Study) -> str | None:
    """The first objective that measures usefulness; None if no objective does."""
    return study.usefulness_metric
