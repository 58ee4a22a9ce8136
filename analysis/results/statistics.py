"""Statistics over samples: paired tests on the same prompts, rates by category, correction for many
tests, agreement of scorers.

Invariants: the unit is a prompt; the answers of several training seeds to one prompt never count as
independent. An empty set is an error. This module does not read the store, and samples hold no
text.

Arrays: `before_NS`, `after_NS` tell whether each of N prompts was a success with each of S seeds;
`net_N` is each prompt's gain, summed over its seeds.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, false_discovery_control

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.metrics import Metric, Sample, pooled
from ebbline.tasks.measuring.scorers import agreement

SamplesBySeed = Mapping[int, Sequence[Sample]]
"""Training seed -> the samples measured with it."""

SHARES = ("refusal_rate", "over_refusal_rate", "task_accuracy", "acc")
"""The metrics that are a share of successful samples; samples do not determine the others."""

RESAMPLES = 9999
_BATCH = 4_000_000  # resampled values held at once


@dataclass(frozen=True)
class Paired:
    """One set of prompts before and after.

    `n` is the number of pairs, one for each prompt and seed; `items` is the number of prompts.
    `difference` is the success rate after minus the one before, with its 95% `interval`. `p_value`
    is two-sided and uncorrected.
    """

    n: int
    items: int
    both: int
    only_before: int
    only_after: int
    neither: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def paired(before: Sequence[Sample], after: Sequence[Sample]) -> Paired:
    """Match samples by id and compare them by the exact McNemar test (McNemar 1947).

    Raises EvaluationError as `paired_replicates` does.
    """
    return paired_replicates({0: before}, {0: after})


def paired_replicates(before: SamplesBySeed, after: SamplesBySeed) -> Paired:
    """Match samples by seed and id and compare; a prompt is one draw, however many seeds it has.

    The interval is a percentile bootstrap over prompts (Efron 1979) with a fixed seed. The p-value
    is that of the exact sign test on the prompts whose seeds together gained or lost. With one seed
    this is the exact McNemar test.

    Raises EvaluationError without seeds or samples, on a duplicate id, and where the two sides
    differ in their seeds or ids.
    """
    if before.keys() != after.keys():
        raise EvaluationError(f"seeds {sorted(before)} cannot be paired with seeds {sorted(after)}")
    sides = [[_by_id(side[seed]) for seed in sorted(side)] for side in (before, after)]
    ids = _shared_ids([found for side in sides for found in side])
    before_NS, after_NS = (
        np.array([[found[item] for found in side] for item in ids], dtype=bool) for side in sides
    )
    net_N = after_NS.sum(axis=1) - before_NS.sum(axis=1)
    gained, lost, seeds = int((net_N > 0).sum()), int((net_N < 0).sum()), before_NS.shape[1]
    low, high = _interval(net_N, seeds)
    return Paired(
        n=before_NS.size,
        items=len(ids),
        both=int((before_NS & after_NS).sum()),
        only_before=int((before_NS & ~after_NS).sum()),
        only_after=int((~before_NS & after_NS).sum()),
        neither=int((~before_NS & ~after_NS).sum()),
        difference=float(net_N.mean()) / seeds,
        interval=(low, high),
        p_value=float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    )


def same_prompts(before: SamplesBySeed, after: SamplesBySeed) -> bool:
    """Whether both sides have the same seeds and the same prompt ids, without duplicates."""
    if not before or before.keys() != after.keys():
        return False
    sets = [
        [sample.id for sample in samples] for side in (before, after) for samples in side.values()
    ]
    return (
        bool(sets[0])
        and len({frozenset(ids) for ids in sets}) == 1
        and all(len(set(ids)) == len(ids) for ids in sets)
    )


def _by_id(samples: Sequence[Sample]) -> dict[str, bool]:
    found = {sample.id: sample.success for sample in samples}
    if len(found) != len(samples):
        raise EvaluationError(
            f"{len(samples) - len(found)} of {len(samples)} samples repeat the id of "
            "another; they cannot be paired"
        )
    return found


def _shared_ids(sets: Sequence[Mapping[str, bool]]) -> list[str]:
    every = set().union(*sets)
    if not every:
        raise EvaluationError("no samples: an empty set cannot be compared")
    apart = sum(any(item not in found for found in sets) for item in every)
    if apart:
        raise EvaluationError(
            f"{apart} of {len(every)} ids are not in every set; only measurements on the "
            "same prompts can be paired"
        )
    return sorted(every)


def _interval(net_N: NDArray[Any], seeds: int) -> tuple[float, float]:
    """The 95% interval of the mean gain of a pair.

    The bootstrap of prompts that all gained the same, c, has no spread, so that case uses Wilson's
    bound. The share of prompts that gain another amount was 0 of N; such a prompt gains between -1
    and 1.
    """
    if (net_N == net_N[0]).all():
        other = float(binomtest(0, len(net_N)).proportion_ci(0.95, method="wilson").high)
        gain = float(net_N[0]) / seeds
        return gain - other * (1 + gain), gain + other * (1 - gain)
    rng, batch = np.random.default_rng(0), max(1, _BATCH // len(net_N))
    found = bootstrap(
        (net_N,), np.mean, n_resamples=RESAMPLES, batch=batch, method="percentile", rng=rng
    ).confidence_interval
    return float(found.low) / seeds, float(found.high) / seeds


def corrected(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values over comparisons that are reported together (Benjamini and Hochberg 1995).

    They control the false discovery rate, because a sentence such as "higher at 9 of 12 points"
    counts discoveries. At most 5% of the points that it calls higher or lower are expected to be
    neither.
    """
    return [float(p) for p in false_discovery_control(p_values, method="bh")] if p_values else []


def by_category(name: str, replicates: SamplesBySeed) -> dict[str, Metric]:
    """Category -> its success rate with interval, categories sorted.

    Samples without a category are under "". `name` is one of SHARES, or a full name that ends in
    one. Raises EvaluationError for another metric, and without samples.
    """
    if name.rpartition(".")[2] not in SHARES:
        raise EvaluationError(
            f"{name} is not a share of successful samples, so it has no rate by category; "
            f"metrics that are: {list(SHARES)}"
        )
    found: dict[str, list[Metric]] = defaultdict(list)
    for seed in sorted(replicates):
        groups: dict[str, list[Sample]] = defaultdict(list)
        for sample in replicates[seed]:
            groups[sample.category].append(sample)
        for category, samples in groups.items():
            undecided = sum(sample.verdict == "undecided" for sample in samples)
            found[category].append(
                Metric(name, sum(sample.success for sample in samples), len(samples), undecided)
            )
    if not found:
        raise EvaluationError(f"{name} has no samples: an empty set has no categories")
    return {category: pooled(found[category]) for category in sorted(found)}


@dataclass(frozen=True)
class PairAgreement:
    """The agreement of two scorers on n completions.

    `agree` is the share with equal verdicts. `kappa` is Cohen's; None where the agreement expected
    by chance is 1. `confusion[a][b]` counts the completions that `one` calls a and `other` calls b.
    """

    one: str
    other: str
    n: int
    agree: float
    kappa: float | None
    confusion: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Agreement:
    """The verdicts of several scorers on the same completions.

    `counts[scorer][verdict]` also has the number of completions, under `n`. `pairs` has the
    agreement of each two scorers.
    """

    counts: Mapping[str, Mapping[str, int]]
    pairs: tuple[PairAgreement, ...]


def pooled_agreement(stored: Sequence[Mapping[str, Any]]) -> Agreement:
    """The agreement over the seeds of a point, from the files that the stage `score` wrote.

    Counts and confusions are summed; kappa is that of the sums. Raises EvaluationError without
    files.
    """
    if not stored:
        raise EvaluationError("no agreement was stored, so there is none to add up")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    confusions: dict[tuple[str, str], Counter[tuple[str, str]]] = defaultdict(Counter)
    for each in stored:
        for scorer, verdicts in each["scorers"].items():
            counts[scorer].update(verdicts)
        for pair in each["pairs"]:
            cells = {
                (left, right): count
                for left, row in pair["confusion"].items()
                for right, count in row.items()
            }
            confusions[pair["one"], pair["other"]].update(cells)
    pairs = []
    for (one, other), cells in confusions.items():
        verdicts = list(Counter(cells).elements())
        pairs.append(
            PairAgreement(
                one,
                other,
                **agreement([left for left, _ in verdicts], [right for _, right in verdicts]),
            )
        )
    return Agreement({scorer: dict(found) for scorer, found in counts.items()}, tuple(pairs))
