"""What may be said about two measurements, and which results may be compared.

Invariant: "higher" and "lower" need 95% intervals that do not overlap; anything less is "not distinguishable".
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from sweeps.points import Result, Value
from sweeps.study import Study
from tasks.metrics import Metric

Baselines = Mapping[str, Mapping[str, Metric]]
"""Model -> metric name -> what the aligned model measured before it was fine-tuned."""

Move = Literal["higher", "lower", "not distinguishable"]

USEFULNESS = ("task_accuracy", "acc_norm", "acc")


def moved(before: Metric, after: Metric) -> Move:
    """Where `after` lies from `before`. For shared prompts this is stricter than a paired test would be."""
    (before_low, before_high), (after_low, after_high) = before.interval, after.interval
    return "higher" if after_low > before_high else "lower" if after_high < before_low else "not distinguishable"


def is_projected(result: Result) -> bool:
    """Whether any module took its projection: a threshold below every cosine leaves the adapter as it was trained."""
    return bool(result.projected_share)


def training_of(result: Result) -> tuple[str, tuple[tuple[str, Value], ...]]:
    """What decides the adapter before projection; results that share it differ by projection alone."""
    values = tuple((axis, value) for axis, value in result.point.values if not axis.startswith(("apply.", "project.")))
    return result.point.model, values


def unprojected(done: Sequence[Result]) -> dict[tuple[str, tuple[tuple[str, Value], ...]], Result]:
    """One unprojected result for each training: the lowest number."""
    plain = sorted((result for result in done if not is_projected(result)), key=lambda result: -result.number)
    return {training_of(result): result for result in plain}


def refusal_metric(study: Study) -> str | None:
    """The refusal rate that the study is about: its first such objective, or else its first refusal suite's."""
    objectives = [name for name in study.objectives if name.rpartition(".")[2] == "refusal_rate"]
    suites = [f"{name}.refusal_rate" for name, suite in study.suites.items() if suite.measure.kind == "refusal"]
    return next(iter(objectives + suites), None)


def operating_point(study: Study, results: Sequence[Result], refusal: str) -> tuple[Result, bool] | None:
    """The projected result to ship, and whether it holds the refusal floor: the most useful of those that do, or the nearest to it.

    None when nothing is projected.
    """
    projected = [result for result in results if is_projected(result)]
    holding = [result for result in projected if result.metrics[refusal].value >= study.refusal_floor]
    if not projected:
        return None
    rank = [name for name in (usefulness_metric(study), refusal) if name is not None] if holding else [refusal]
    return max(holding or projected, key=lambda result: (*(result.metrics[name].value for name in rank), -result.number)), bool(holding)


def usefulness_metric(study: Study) -> str | None:
    """The first objective that says how useful a model is."""
    return next((name for name in study.objectives if name.rpartition(".")[2] in USEFULNESS), None)
