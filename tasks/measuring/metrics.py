"""Metrics: rates and means over samples, with their direction and their error.

Invariant: a metric has a fixed direction that no study can change. A refusal of a harmful request
is good, a refusal of a harmless one is bad. Metrics keep sums, so they can be added over seeds and
groups.

Invariant: an undecided sample counts against the model. The value takes it as a failure where
higher is better, and as a success where lower is better. Each end of an interval takes it as the
outcome that widens the interval, so no comparison gains from it.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from scipy.special import ndtri

from ebbline.tasks.errors import EvaluationError

METRICS = "metrics.json"
SAMPLES = "samples.jsonl"
UNDECIDED = "undecided"
Direction = Literal["maximise", "minimise"]
_ROUNDING = 1e-6

DIRECTIONS: dict[str, Direction] = {
    "refusal_rate": "maximise",
    "over_refusal_rate": "minimise",
    "full_refusal_rate": "minimise",
    "partial_refusal_rate": "minimise",
    "harm_score": "minimise",
    "harm_top_rate": "minimise",
    "task_accuracy": "maximise",
    "rouge_l": "maximise",
    "exact_match": "maximise",
    "exact_match_flexible": "maximise",
    "prompt_level_strict_acc": "maximise",
    "prompt_level_loose_acc": "maximise",
    "inst_level_strict_acc": "maximise",
    "inst_level_loose_acc": "maximise",
    "acc": "maximise",
    "acc_norm": "maximise",
}
ALWAYS_MEANS = ("rouge_l", "harm_score")  # also where every score happens to be 0 or 1


@lru_cache(64)
def _normal_quantile(share: float) -> float:
    return float(ndtri(share))


@dataclass(frozen=True, slots=True)
class Metric:
    """A rate over `n` samples with its 95% Wilson interval, or the mean of scores in [0, 1] with
    its 95% normal interval. No interval is a single value.

    `successes` is the sum of the decided samples' scores; `squares`, for a mean only, the sum of
    their squares. `undecided` counts the samples, among n, that a scorer could not judge: they are
    not in `successes`. `seeds` holds each replicate's value, and `seeds_undecided` its undecided
    samples. Completions of several seeds for one item are not independent. So intervals and
    standard error use `items`, the samples of one seed.
    """

    name: str
    successes: float
    n: int
    undecided: int = 0
    seeds: tuple[float, ...] = ()
    squares: float | None = None
    seeds_undecided: tuple[int, ...] = field(default=(), repr=False, compare=False)

    @staticmethod
    def of(name: str, scores: Sequence[float | None]) -> "Metric":
        """A rate when every score is 0 or 1, else a mean. A score of None is undecided."""
        decided = [score for score in scores if score is not None]
        rate = (
            all(score in (0.0, 1.0) for score in decided)
            and name.rpartition(".")[2] not in ALWAYS_MEANS
        )
        return Metric(
            name,
            sum(decided),
            len(scores),
            len(scores) - len(decided),
            squares=None if rate else sum(score * score for score in decided),
        )

    @staticmethod
    def clustered(name: str, outcomes: Sequence[Sequence[bool]]) -> "Metric":
        """The share of outcomes that are true, where each item has one or more (IFEval's
        instructions of a prompt). Outcomes of one item are not independent.

        So `n` counts items, and the standard error is that of a ratio of two sums over items,
        linearised (Cochran 1977, section 6.4): of item i with m_i outcomes, t_i of them true, and
        R = sum t / sum m, the deviation is (t_i - R m_i) / mean(m).

        Raises EvaluationError for an item without outcomes.
        """
        if not all(outcomes):
            raise EvaluationError(f"{name} has an item without a single outcome")
        sizes = [len(each) for each in outcomes]
        true = [sum(each) for each in outcomes]
        n = len(outcomes)
        share, size = sum(true) / max(1, sum(sizes)), sum(sizes) / max(1, n)
        spread = math.fsum(
            ((right - share * of) / size) ** 2 for right, of in zip(true, sizes, strict=True)
        )
        return Metric(name, share * n, n, squares=n * share**2 + spread)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise EvaluationError(
                f"{self.name} was measured on no samples; an empty set is an error, not a rate of 0"
            )
        if not 0 <= self.successes <= self.n:
            raise EvaluationError(f"{self.name} counts {self.successes} of {self.n} samples")
        if not 0 <= self.undecided <= self.n - self.successes + _ROUNDING:
            raise EvaluationError(
                f"{self.name} counts {self.successes} successes and {self.undecided} undecided "
                f"samples, together more than its {self.n} samples"
            )
        direction(self.name)

    @property
    def value(self) -> float:
        """The rate or mean with every undecided sample counted against the model."""
        return (self.successes + self._undecided_as_successes) / self.n

    @property
    def _undecided_as_successes(self) -> int:
        return self.undecided if self.direction == "minimise" else 0

    @property
    def direction(self) -> Direction:
        return direction(self.name)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval: Wilson's score interval for a rate (Wilson 1927), for a mean the normal
        interval clipped to [0, 1], and for equal scores Wilson's bound on scores that differ.

        The lower end counts every undecided sample as a failure, the upper end as a success.
        """
        return self.interval_at(0.95)

    def interval_at(self, confidence: float) -> tuple[float, float]:
        """`interval` at another confidence in (0, 1)."""
        return (
            self._interval_with(0, confidence)[0],
            self._interval_with(self.undecided, confidence)[1],
        )

    def _interval_with(self, more: int, confidence: float) -> tuple[float, float]:
        """The interval with `more` undecided samples as successes and the others as failures."""
        share = min(1.0, (self.successes + more) / self.n)
        z, n = _normal_quantile(0.5 + confidence / 2), self.items
        if self.squares is not None:
            reach = z * self._stderr_with(more)
            if reach > _ROUNDING:
                return max(0.0, share - reach), min(1.0, share + reach)
            # Equal scores have no spread. The share of other scores was 0 of n, and Wilson's bound
            # of that is `other`; such scores are between 0 and 1.
            other = z * z / (n + z * z)
            return share * (1 - other), share + (1 - share) * other
        # scipy accepts integer counts only. A mean over seeds has fractions.
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        # Rounding can move a bound past 0, 1 or the rate itself.
        return max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach))

    @property
    def items(self) -> float:
        """The number of independent samples: those of one seed."""
        return self.n / max(1, len(self.seeds))

    @property
    def stderr(self) -> float:
        """The standard error of the mean over items, as lm-eval computes it; 0 for one item.

        It is s / sqrt(n), with the sample standard deviation s (divisor n - 1).
        """
        return self._stderr_with(self._undecided_as_successes)

    def _stderr_with(self, more: int) -> float:
        if self.items <= 1:
            return 0.0
        squares = (self.successes if self.squares is None else self.squares) + more
        share = (self.successes + more) / self.n
        return math.sqrt(max(0.0, squares / self.n - share**2) / (self.items - 1))

    @property
    def between_seeds(self) -> float | None:
        """The standard deviation between the seeds' values; None for one seed.

        It estimates how much the value would change with another training.
        """
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None


@dataclass(frozen=True)
class Sample:
    """One scored item. It holds no text of prompt or completion, so it may leave the store.

    `success` is False for an undecided sample; `counted` decides what it counts as.
    """

    id: str
    category: str
    verdict: str
    reason: str
    success: bool

    @property
    def undecided(self) -> bool:
        return self.verdict == UNDECIDED

    def counted(self, undecided_as: bool) -> bool:
        """Whether the sample is a success, with `undecided_as` for an undecided one."""
        return undecided_as if self.undecided else self.success


def direction(name: str) -> Direction:
    """A metric's direction, by the last part of its full name (`mmlu.acc` -> `acc`).

    Raises EvaluationError for an unknown metric.
    """
    metric = name.rpartition(".")[2]
    if metric not in DIRECTIONS:
        raise EvaluationError(f"no metric {metric!r}; ebbline measures {sorted(DIRECTIONS)}")
    return DIRECTIONS[metric]


def joined(parts: Sequence[Metric]) -> Metric:
    """One metric over parts with different samples (blocks, subjects): the sums are added.

    Raises EvaluationError for different names or no parts.
    """
    pool = pooled(parts)
    return replace(pool, seeds=(), seeds_undecided=())


def pooled(replicates: Sequence[Metric]) -> Metric:
    """One metric over the seeds of a point: the sums are added, each seed's value is kept.

    Raises EvaluationError for different names or no replicates.
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
        seeds_undecided=tuple(metric.undecided for metric in replicates),
    )


def write_metrics(folder: Path, metrics: Sequence[Metric]) -> None:
    (folder / METRICS).write_text(json.dumps([asdict(metric) for metric in metrics], indent=1))


def read_metrics(folder: Path) -> list[Metric]:
    """The metrics in a folder. Raises EvaluationError for a missing, truncated or invalid file."""
    try:
        return [
            Metric(
                **{
                    **row,
                    "seeds": tuple(row["seeds"]),
                    "seeds_undecided": tuple(row.get("seeds_undecided", ())),
                }
            )
            for row in json.loads((folder / METRICS).read_text())
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EvaluationError(
            f"{folder / METRICS} cannot be read ({type(error).__name__}: {error})"
        ) from error


def write_samples(folder: Path, samples: Iterable[Sample]) -> None:
    with (folder / SAMPLES).open("w", encoding="utf-8") as handle:
        for sample in samples:
            handle.write(json.dumps(vars(sample)) + "\n")


def read_samples(folder: Path) -> list[Sample]:
    """The samples in a folder. Raises EvaluationError for a missing, truncated or invalid file."""
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
