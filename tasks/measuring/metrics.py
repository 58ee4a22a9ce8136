"""Metrics: what a number means, which way it points, and how sure it is.

A metric carries its own direction and no study can flip it: refusing requests of the refused domain
is good, refusing harmless ones is bad. Metrics are rates or means over samples, so their sums add
up across seeds and across groups.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from scipy.stats import norm

from ebbline.tasks.errors import EvaluationError

METRICS = "metrics.json"
SAMPLES = "samples.jsonl"
Direction = Literal["maximise", "minimise"]

DIRECTIONS: dict[str, Direction] = {
    "refusal_rate": "maximise",
    "over_refusal_rate": "minimise",
    "full_refusal_rate": "minimise",
    "partial_refusal_rate": "minimise",
    "task_accuracy": "maximise",
    "rouge_l": "maximise",
    "acc": "maximise",
    "acc_norm": "maximise",
}


@dataclass(frozen=True)
class Metric:
    """A rate over `n` samples with its 95% Wilson interval, or the mean of scores in [0, 1] with
    its 95% normal interval.

    `successes` is the sum of the samples' scores, of ones for a rate; a mean also keeps the sum of
    `squares`, which a rate does without. `undecided` counts samples among n that a scorer could not
    judge (they count as not successful). `seeds` keeps each replicate's value: their spread is
    another thing than the sampling interval. What several seeds said to one item is not
    independent, so intervals and the standard error are those of `items`, the samples of one seed.
    """

    name: str
    successes: float
    n: int
    undecided: int = 0
    seeds: tuple[float, ...] = ()
    squares: float | None = None

    @staticmethod
    def of(name: str, scores: Sequence[float]) -> "Metric":
        """A rate when every score is 0 or 1, else a mean."""
        rate = all(score in (0.0, 1.0) for score in scores) and name.rpartition(".")[2] != "rouge_l"
        return Metric(
            name,
            sum(scores),
            len(scores),
            squares=None if rate else sum(score * score for score in scores),
        )

    def __post_init__(self) -> None:
        if self.n < 1:
            raise EvaluationError(
                f"{self.name} was measured on no samples; an empty set is an error, not a rate of 0"
            )
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
        """95%: Wilson's score interval for a rate (Wilson 1927), the normal one for a mean, cut to
        [0, 1].
        """
        return self.interval_at(0.95)

    def interval_at(self, confidence: float) -> tuple[float, float]:
        """The same interval at another confidence."""
        if self.squares is not None:
            reach = float(norm.ppf(0.5 + confidence / 2)) * self.stderr
            return max(0.0, self.value - reach), min(1.0, self.value + reach)
        # Written out, as scipy takes whole successes only, and a mean over seeds has none.
        z, n, share = float(norm.ppf(0.5 + confidence / 2)), self.items, self.value
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, min(share, centre - reach)), min(
            1.0, max(share, centre + reach)
        )  # at 0 and 1 it rounds past them

    @property
    def items(self) -> float:
        """How many different samples there are: those of one seed."""
        return self.n / max(1, len(self.seeds))

    @property
    def stderr(self) -> float:
        """The standard error of the mean over items, sd (n - 1) / sqrt(n), as lm-eval has it; 0 for
        one item.
        """
        if self.items <= 1:
            return 0.0
        squares = self.successes if self.squares is None else self.squares
        return math.sqrt(max(0.0, squares / self.n - self.value**2) / (self.items - 1))

    @property
    def between_seeds(self) -> float | None:
        """The standard deviation between the seeds' values: what training again would change. None
        for one seed.
        """
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None


@dataclass(frozen=True)
class Sample:
    """One scored item. It holds no text of prompt or completion, so that it may go where they must
    not.
    """

    id: str
    category: str
    verdict: str
    reason: str
    success: bool


def direction(name: str) -> Direction:
    """Which way a metric points, from the last part of its full name (`mmlu.acc` -> `acc`)."""
    metric = name.rpartition(".")[2]
    if metric not in DIRECTIONS:
        raise EvaluationError(f"no metric {metric!r}; ebbline measures {sorted(DIRECTIONS)}")
    return DIRECTIONS[metric]


def joined(parts: Sequence[Metric]) -> Metric:
    """One metric over parts that are different samples (blocks, subjects): sums added. Raises on
    different names or none.
    """
    found = pooled(parts)
    return replace(found, seeds=())


def pooled(replicates: Sequence[Metric]) -> Metric:
    """One metric over the seeds of a point: counts added, each seed's value kept. Raises on
    different names or none.
    """
    if len({metric.name for metric in replicates}) != 1:
        raise EvaluationError(
            f"cannot pool {sorted({metric.name for metric in replicates}) or 'no metrics'}"
        )
    return Metric(
        name=replicates[0].name,
        successes=sum(metric.successes for metric in replicates),
        n=sum(metric.n for metric in replicates),
        undecided=sum(metric.undecided for metric in replicates),
        seeds=tuple(metric.value for metric in replicates),
        squares=None
        if all(metric.squares is None for metric in replicates)
        else math.fsum(
            metric.successes if metric.squares is None else metric.squares for metric in replicates
        ),
    )


def write_metrics(folder: Path, metrics: Sequence[Metric]) -> None:
    (folder / METRICS).write_text(json.dumps([asdict(metric) for metric in metrics], indent=1))


def read_metrics(folder: Path) -> list[Metric]:
    """What `write_metrics` wrote; raises EvaluationError when the file is missing, truncated or of
    another shape.
    """
    try:
        return [
            Metric(**{**row, "seeds": tuple(row["seeds"])})
            for row in json.loads((folder / METRICS).read_text())
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EvaluationError(
            f"{folder / METRICS} cannot be read ({type(error).__name__}: {error})"
        ) from error


def write_samples(folder: Path, samples: Iterable[Sample]) -> None:
    with (folder / SAMPLES).open("w", encoding="utf-8") as handle:
        for sample in samples:
            handle.write(json.dumps(asdict(sample)) + "\n")


def read_samples(folder: Path) -> list[Sample]:
    """What `write_samples` wrote; raises EvaluationError when the file is missing, truncated or of
    another shape.
    """
    try:
        return [
            Sample(**json.loads(line))
            for line in (folder / SAMPLES).read_text("utf-8").split("\n")
            if line
        ]
    except (OSError, ValueError, TypeError) as error:
        raise EvaluationError(
            f"{folder / SAMPLES} cannot be read ({type(error).__name__}: {error})"
        ) from error
