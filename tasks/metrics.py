"""Metrics: what a number means, which way it points, and how sure it is.

A metric carries its own direction and no study can flip it: refusing requests of the refused domain is good, refusing
harmless ones is bad. All metrics here are rates over samples, so counts add up across seeds and intervals are Wilson's.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from scipy.stats import binomtest

from tasks.errors import EvaluationError

METRICS = "metrics.json"
Direction = Literal["maximise", "minimise"]

DIRECTIONS: dict[str, Direction] = {
    "refusal_rate": "maximise",
    "over_refusal_rate": "minimise",
    "task_accuracy": "maximise",
    "acc": "maximise",
    "acc_norm": "maximise",
}


@dataclass(frozen=True)
class Metric:
    """A rate in [0, 1] over `n` samples with its 95% Wilson interval.

    `undecided` counts samples among n that a scorer could not judge (they count as not successful). `seeds` keeps each
    replicate's value: their spread is another thing than the sampling interval.
    """

    name: str
    successes: int
    n: int
    undecided: int = 0
    seeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise EvaluationError(f"{self.name} was measured on no samples; an empty set is an error, not a rate of 0")
        if not 0 <= self.successes <= self.n:
            raise EvaluationError(f"{self.name} counts {self.successes} of {self.n} samples")
        direction(self.name)

    @property
    def value(self) -> float:
        return self.successes / self.n

    @property
    def direction(self) -> Direction:
        return direction(self.name)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson score interval (Wilson 1927)."""
        found = binomtest(self.successes, self.n).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


def direction(name: str) -> Direction:
    """Which way a metric points, from the last part of its full name (`mmlu.acc` -> `acc`)."""
    metric = name.rpartition(".")[2]
    if metric not in DIRECTIONS:
        raise EvaluationError(f"no metric {metric!r}; ebbline measures {sorted(DIRECTIONS)}")
    return DIRECTIONS[metric]


def pooled(replicates: Sequence[Metric]) -> Metric:
    """One metric over the seeds of a point: counts added, each seed's value kept. Raises on different names or none."""
    if len({metric.name for metric in replicates}) != 1:
        raise EvaluationError(f"cannot pool {sorted({metric.name for metric in replicates}) or 'no metrics'}")
    return Metric(
        name=replicates[0].name,
        successes=sum(metric.successes for metric in replicates),
        n=sum(metric.n for metric in replicates),
        undecided=sum(metric.undecided for metric in replicates),
        seeds=tuple(metric.value for metric in replicates),
    )


def write_metrics(folder: Path, metrics: Sequence[Metric]) -> None:
    (folder / METRICS).write_text(json.dumps([asdict(metric) for metric in metrics], indent=1))


def read_metrics(folder: Path) -> list[Metric]:
    """What `write_metrics` wrote; raises EvaluationError when the file is missing, truncated or of another shape."""
    try:
        return [Metric(**{**row, "seeds": tuple(row["seeds"])}) for row in json.loads((folder / METRICS).read_text())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EvaluationError(f"{folder / METRICS} cannot be read ({type(error).__name__}: {error})") from error
