"""Statistics over samples: paired tests on the same prompts, rates by category, correction for many
tests, agreement of scorers.

Invariants: the unit is a prompt; the answers of several training seeds to one prompt never count as
independent. An undecided sample counts against every claim: a gain is one whatever the undecided
samples were, and so is a loss. An empty set is an error. This module does not read the store, and
samples hold no text.

Arrays: `before_NS`, `after_NS` tell whether each of N prompts was a success with each of S seeds;
`net_N` is each prompt's gain, summed over its seeds. `least_N` and `most_N` are the gains if the
undecided samples were as bad, or as good, for a gain as they can be.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, false_discovery_control

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.metrics import Direction, Metric, Sample, pooled
from ebbline.tasks.measuring.scorers import agreement

SamplesBySeed = Mapping[int, Sequence[Sample]]
"""Training seed -> the samples measured with it."""

SHARES = (
    "refusal_rate",
    "over_refusal_rate",
    "harm_top_rate",
    "task_accuracy",
    "exact_match",
    "prompt_level_strict_acc",
    "acc",
)
"""The metrics that are a share of successful samples; samples do not determine the others."""

RESAMPLES = 9999
_BATCH = 4_000_000  # resampled values held at once


@dataclass(frozen=True)
class Paired:
    """One set of prompts before and after.

    `n` is the number of pairs, one for each prompt and seed; `items` is the number of prompts.
    `difference` is the success rate after minus the one before, with its 95% `interval`. `p_value`
    is two-sided and uncorrected. `undecided` counts the samples of both sides that a scorer could
    not judge. The counts and the difference take them as a Metric's value does. The interval is
    the widest, and the p-value the largest, over all that the undecided samples may have been.
    `least_S` and `most_S` are the gains of each seed, in the order of the seeds.
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
    undecided: int = 0
    least_S: tuple[float, ...] = ()
    most_S: tuple[float, ...] = ()


def paired(
    before: Sequence[Sample], after: Sequence[Sample], way: Direction = "maximise"
) -> Paired:
    """Match samples by id and compare them by the exact McNemar test (McNemar 1947).

    Raises EvaluationError as `paired_replicates` does.
    """
    return paired_replicates({0: before}, {0: after}, way)


def paired_replicates(
    before: SamplesBySeed, after: SamplesBySeed, way: Direction = "maximise"
) -> Paired:
    """Match samples by seed and id and compare; a prompt is one draw, however many seeds it has.
    `way` is the direction of the metric that the samples belong to.

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

    def successes_NS(side: int, undecided_as: bool) -> NDArray[np.bool_]:
        return np.array(
            [[found[item].counted(undecided_as) for found in sides[side]] for item in ids],
            dtype=bool,
        )

    def gains_NS(before_NS: NDArray[np.bool_], after_NS: NDArray[np.bool_]) -> NDArray[Any]:
        found_NS: NDArray[Any] = after_NS.astype(np.int64) - before_NS.astype(np.int64)
        return found_NS

    before_NS, after_NS = (successes_NS(side, way == "minimise") for side in (0, 1))
    least_NS = gains_NS(successes_NS(0, True), successes_NS(1, False))
    most_NS = gains_NS(successes_NS(0, False), successes_NS(1, True))
    least_N, most_N = least_NS.sum(axis=1), most_NS.sum(axis=1)
    seeds = before_NS.shape[1]
    return Paired(
        n=before_NS.size,
        items=len(ids),
        both=int((before_NS & after_NS).sum()),
        only_before=int((before_NS & ~after_NS).sum()),
        only_after=int((~before_NS & after_NS).sum()),
        neither=int((~before_NS & ~after_NS).sum()),
        difference=float(gains_NS(before_NS, after_NS).mean()),
        interval=_widest_interval(least_N, most_N, seeds),
        p_value=sign_test(least_N, most_N),
        undecided=sum(
            sample.undecided for side in sides for found in side for sample in found.values()
        ),
        least_S=tuple(map(float, least_NS.mean(axis=0))),
        most_S=tuple(map(float, most_NS.mean(axis=0))),
    )


def sign_test(least_N: NDArray[Any], most_N: NDArray[Any]) -> float:
    """The largest p-value of the exact sign test over what the undecided samples may have been.

    It is 1 where they may turn a gain into a loss.
    """
    for net_N in (least_N, -most_N):
        gained, lost = int((net_N > 0).sum()), int((net_N < 0).sum())
        if gained > lost:
            return float(binomtest(gained, gained + lost).pvalue)
    return 1.0


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


def _by_id(samples: Sequence[Sample]) -> dict[str, Sample]:
    found = {sample.id: sample for sample in samples}
    if len(found) != len(samples):
        raise EvaluationError(
            f"{len(samples) - len(found)} of {len(samples)} samples repeat the id of "
            "another; they cannot be paired"
        )
    return found


def _shared_ids(sets: Sequence[Mapping[str, Sample]]) -> list[str]:
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


def _widest_interval(
    least_N: NDArray[Any], most_N: NDArray[Any], seeds: int
) -> tuple[float, float]:
    """The interval that holds whatever the undecided samples were.

    The bootstrap grows with the gains, so its ends are those of the least and the most gains. Gains
    that are all equal have Wilson's bound, which may reach further: they are tried too.
    """
    equal = [
        np.full_like(least_N, gain) for gain in range(int(least_N.max()), int(most_N.min()) + 1)
    ]
    return (
        min(_interval(net_N, seeds)[0] for net_N in (least_N, *equal)),
        max(_interval(net_N, seeds)[1] for net_N in (most_N, *equal)),
    )


def _interval(net_N: NDArray[Any], seeds: int) -> tuple[float, float]:
    """The 95% interval of the mean gain of a pair. Tables, figures and report ask for the same
    ones, and a bootstrap takes milliseconds: so they are kept.
    """
    return _interval_of(net_N.tobytes(), net_N.dtype.str, seeds)


@lru_cache(maxsize=4096)
def _interval_of(net: bytes, dtype: str, seeds: int) -> tuple[float, float]:
    """The 95% interval of the mean gain of a pair, whose gains are the bytes `net`.

    The bootstrap of prompts that all gained the same, c, has no spread, so that case uses Wilson's
    bound. The share of prompts that gain another amount was 0 of N; such a prompt gains between -1
    and 1.
    """
    net_N = np.frombuffer(net, dtype)
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

    A report's comparisons are one family (ebbline.analysis.results.claims.family). The correction
    controls the false discovery rate, because a sentence such as "higher at 9 of 12 points" counts
    discoveries. At most 5% of the points that it calls higher or lower are expected to be neither.
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
            undecided = sum(sample.undecided for sample in samples)
            successes = sum(sample.counted(undecided_as=False) for sample in samples)
            found[category].append(Metric(name, successes, len(samples), undecided))
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
    agreement of each two scorers. `categories` has the same for the completions of each category;
    it is empty for a set without categories.
    """

    counts: Mapping[str, Mapping[str, int]]
    pairs: tuple[PairAgreement, ...]
    categories: Mapping[str, "Agreement"] = field(default_factory=dict)


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
    names = {name for each in stored for name in each.get("categories", {})}
    return Agreement(
        {scorer: dict(found) for scorer, found in counts.items()},
        tuple(pairs),
        {
            name: pooled_agreement(
                [each["categories"][name] for each in stored if name in each.get("categories", {})]
            )
            for name in sorted(names)
        },
    )
