"""What may be said about two measurements, and which results may be compared.

Invariant: "higher" and "lower" need a paired test on the same prompts, or, where the samples are
not at hand, 95% intervals that do not overlap; anything less is "not distinguishable".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ebbline.analysis.results.floors import Floor, pick
from ebbline.analysis.results.statistics import (
    SHARES,
    Agreement,
    Paired,
    Replicates,
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
"""Model -> metric name -> what the aligned model measured before it was fine-tuned."""

Move = Literal["higher", "lower", "not distinguishable"]

USEFULNESS = ("task_accuracy", "rouge_l", "acc_norm", "acc")
LEVEL = 0.05

Subject = Result | str
"""What was measured: a point, or by its name a model as it was before fine-tuning."""


class Evidence(Protocol):
    """What stands behind the metrics: each sample by suite, and what the scorers of a suite said of
    the same completions.
    """

    def samples(self, subject: Subject, suite: str) -> Replicates:
        """By training seed; an aligned model has one replicate, under 0. Empty when nothing is at
        hand.
        """

    def agreement(self, subject: Subject, suite: str) -> Agreement | None:
        """None when the suite has one scorer or nothing is at hand."""


class NoEvidence:
    """Where there are metrics alone."""

    def samples(self, subject: Subject, suite: str) -> Replicates:
        return {}

    def agreement(self, subject: Subject, suite: str) -> Agreement | None:
        return None


NO_EVIDENCE = NoEvidence()


@dataclass(frozen=True)
class Measurement:
    """A metric, with the samples behind it when it is a share of them and they are at hand."""

    metric: Metric
    replicates: Replicates = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Two measurements and where the second lies; `paired` is None where intervals had to
    decide.
    """

    before: Metric
    after: Metric
    move: Move
    paired: Paired | None = None

    @property
    def difference(self) -> float:
        """The second less the first."""
        return (
            self.after.value - self.before.value if self.paired is None else self.paired.difference
        )

    @property
    def interval(self) -> tuple[float, float]:
        """95%, of the difference: the bootstrap's over prompts where paired, else from both
        intervals as for independent samples.
        """
        return apart(self.before, self.after) if self.paired is None else self.paired.interval


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
    """Each result against the aligned model of its size."""
    return compared(pairs_with_aligned(model, aligned, results, name, evidence))


def pairs_with_aligned(
    model: str,
    aligned: Metric,
    results: Sequence[Result],
    name: str,
    evidence: Evidence = NO_EVIDENCE,
) -> list[tuple[Measurement, Measurement]]:
    """The pairs for `compared`: the aligned model, which was measured once and so is paired with
    every seed, and each result.
    """
    suite, _, metric = name.rpartition(".")
    once = list(evidence.samples(model, suite).values()) if metric in SHARES else []
    after = [measurement(result, name, evidence) for result in results]
    return [
        (Measurement(aligned, dict.fromkeys(each.replicates, once[0]) if once else {}), each)
        for each in after
    ]


def compared(pairs: Sequence[tuple[Measurement, Measurement]]) -> list[Comparison]:
    """Each pair's second measurement against its first. The pairs are those that one sentence tells
    together.

    A paired difference counts when its 95% interval leaves out 0 and its p-value, corrected for the
    number of such pairs, is below 0.05.
    """
    tests = [
        paired_replicates(before.replicates, after.replicates)
        if same_prompts(before.replicates, after.replicates)
        else None
        for before, after in pairs
    ]
    p_values = iter(corrected([test.p_value for test in tests if test is not None]))
    return [
        Comparison(before.metric, after.metric, moved(before.metric, after.metric))
        if test is None
        else Comparison(before.metric, after.metric, _moved_in_pairs(test, next(p_values)), test)
        for (before, after), test in zip(pairs, tests, strict=True)
    ]


def _moved_in_pairs(test: Paired, p_value: float) -> Move:
    low, high = test.interval
    if p_value >= LEVEL or low <= 0 <= high:
        return "not distinguishable"
    return "higher" if low > 0 else "lower"


def moved(before: Metric, after: Metric) -> Move:
    """Where `after` lies from `before` by their intervals. For shared prompts this is stricter than
    a paired test.
    """
    (before_low, before_high), (after_low, after_high) = before.interval, after.interval
    return (
        "higher"
        if after_low > before_high
        else "lower"
        if after_high < before_low
        else "not distinguishable"
    )


def apart(before: Metric, after: Metric) -> tuple[float, float]:
    """The 95% interval of a difference of two independent measurements, from theirs:
    square-and-add, Newcombe (1998), method 10.

    With the difference d and the intervals (l, u): d - sqrt((after - l_after)^2 + (u_before -
    before)^2), and above likewise.
    """
    (before_low, before_high), (after_low, after_high) = before.interval, after.interval
    difference = after.value - before.value
    below = math.hypot(after.value - after_low, before_high - before.value)
    above = math.hypot(after_high - after.value, before.value - before_low)
    return max(-1.0, difference - below), min(1.0, difference + above)


def is_projected(result: Result) -> bool:
    """Whether the defence changed any module: a setting of its knobs may leave all as they were
    trained.
    """
    return bool(result.changed_share)


def unprojected(done: Sequence[Result]) -> dict[Point, Result]:
    """One result for each training, with its adapters as they were trained: the lowest number."""
    plain = sorted(filter(is_as_trained, done), key=lambda result: -result.number)
    return {training_of(result.point): result for result in plain}


def partners(done: Sequence[Result]) -> dict[Point, Result]:
    """What a projected result may be paired with, by its point without the defence: the two differ
    by projection alone. Of several the lowest number.
    """
    plain = sorted(
        (result for result in done if not is_projected(result)), key=lambda result: -result.number
    )
    return {without_defence(result.point): result for result in plain}


def refusal_metric(study: Study) -> str | None:
    return study.refusal_metric


def operating_point(
    study: Study, results: Sequence[Result], refusal: str
) -> tuple[Result, bool] | None:
    """The projected result to ship, and whether it holds the refusal floor: the most useful of
    those that do, or the nearest to it.

    None when nothing is projected. What `ebbline pick` names may need no projection: see
    ebbline.analysis.results.floors.pick, whose rule this is.
    """
    found = pick(
        [r for r in results if is_projected(r)],
        [Floor(refusal, study.refusal_floor)],
        usefulness_metric(study),
    )
    return None if found is None else (found.result, found.holds)


def better_unprojected(study: Study, results: Sequence[Result], refusal: str) -> Result | None:
    """What `ebbline pick` names among these where it needs no projection and holds the refusal
    floor.
    """
    found = pick(results, [Floor(refusal, study.refusal_floor)], usefulness_metric(study))
    return None if found is None or not found.holds or is_projected(found.result) else found.result


def usefulness_metric(study: Study) -> str | None:
    """The first objective that says how useful a model is."""
    return next((name for name in study.objectives if name.rpartition(".")[2] in USEFULNESS), None)
