"""Rates corrected for the errors of their scorer, which a person's labels of a random sample show.

Two verdicts: the estimate of Rogan and Gladen (1978, Am. J. Epidemiol. 107), and the interval of
Lang and Reiczigel (2014, Prev. Vet. Med. 113). Se is the share of a person's positives that the
scorer calls positive, Sp that of the negatives that it calls negative. With the scorer's rate p

    true rate = (p + Sp - 1) / (Se + Sp - 1), within [0, 1]

which holds no information where Se + Sp <= 1: then there is none. More verdicts: the shares that
the confusion matrix explains best.

Invariant: a correction carries the errors of Se and Sp in its interval, and is None with a reason
where the labels do not determine it.

Arrays: `confusion_KV` is the share of verdict V among the completions that a person calls K.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

RESAMPLES = 1000
_STEPS = 300


@dataclass(frozen=True)
class Labelled:
    """One completion: a person's label, the scorer's verdict, and the completions that it stands
    for: those of its arm, over the labelled ones of its arm.
    """

    label: str
    verdict: str
    weight: float = 1.0


@dataclass(frozen=True)
class Accuracy:
    """How often a scorer is right, by a person's labels. `positives` and `negatives` are the
    effective numbers of labels behind `sensitivity` and `specificity`.
    """

    sensitivity: float
    specificity: float
    positives: float
    negatives: float


@dataclass(frozen=True)
class Corrected:
    """A share with its 95% interval."""

    value: float
    interval: tuple[float, float]


def accuracy(
    rows: Sequence[Labelled], true: frozenset[str], counted: frozenset[str]
) -> Accuracy | None:
    """Sensitivity and specificity: labels in `true` are positive, verdicts in `counted` are. None
    without a positive or a negative label.

    Weighted, if the rows are. The effective number is (sum w)^2 / sum w^2 (Kish 1965).
    """
    sides = [[row for row in rows if (row.label in true) == side] for side in (True, False)]
    if not all(sides):
        return None
    right = [
        _share(side, [(row.verdict in counted) == is_positive for row in side])
        for side, is_positive in zip(sides, (True, False), strict=True)
    ]
    return Accuracy(*right, *map(_effective, sides))


def _share(rows: Sequence[Labelled], hits: Sequence[bool]) -> float:
    total = math.fsum(row.weight for row in rows)
    return math.fsum(row.weight for row, hit in zip(rows, hits, strict=True) if hit) / total


def _effective(rows: Sequence[Labelled]) -> float:
    weights = [row.weight for row in rows]
    return math.fsum(weights) ** 2 / math.fsum(weight * weight for weight in weights)


def rogan_gladen(rate: float, n: float, scorer: Accuracy) -> Corrected | None:
    """The true rate behind a scorer's `rate` over n completions; None where Se + Sp <= 1."""
    power = scorer.sensitivity + scorer.specificity - 1
    if power <= 0:
        return None
    value = _within((rate + scorer.specificity - 1) / power)
    # Lang and Reiczigel: pseudo-counts keep an error where a share is 0 or 1.
    z = float(ndtri(0.975))
    rate_a = (n * rate + z * z / 2) / (n + z * z)
    se, n_se = (
        (scorer.positives * scorer.sensitivity + 1) / (scorer.positives + 2),
        scorer.positives,
    )
    sp, n_sp = (
        (scorer.negatives * scorer.specificity + 1) / (scorer.negatives + 2),
        scorer.negatives,
    )
    n_se, n_sp, power = n_se + 2, n_sp + 2, se + sp - 1
    if power <= 0:
        return Corrected(value, (0.0, 1.0))
    true = _within((rate_a + sp - 1) / power)
    of_se, of_sp = se * (1 - se) / n_se, sp * (1 - sp) / n_sp
    shift = 2 * z * z * (true * of_se - (1 - true) * of_sp)
    error = math.sqrt(
        rate_a * (1 - rate_a) / (n + z * z) + true**2 * of_se + (1 - true) ** 2 * of_sp
    )
    low, high = (_within(true + shift + side * z * error / power) for side in (-1, 1))
    return Corrected(value, (min(low, value), max(high, value)))


def _within(share: float) -> float:
    return min(1.0, max(0.0, share))


def shares(
    rows: Sequence[Labelled], verdicts: Mapping[str, int], n: float, seed: int = 0
) -> dict[str, Corrected] | None:
    """Label -> its true share behind a scorer's counts of verdicts; None where two labels have the
    same verdicts, or a verdict was never labelled.

    The shares maximise the likelihood of the counts given the confusion matrix (by expectation
    maximisation, so they are in [0, 1] and add up to 1). The interval is a percentile bootstrap of
    the labels and of the counts over n completions, with a fixed seed.
    """
    labels = sorted({row.label for row in rows})
    names = sorted({*verdicts, *(row.verdict for row in rows)})
    counts_V = np.array([verdicts.get(name, 0) for name in names], dtype=float)
    cells_N = np.array([labels.index(r.label) * len(names) + names.index(r.verdict) for r in rows])
    weights_N = np.array([row.weight for row in rows])
    shape = (len(labels), len(names))
    confusion_KV = _confusions(cells_N[None], weights_N[None], shape)[0]
    seen_V = confusion_KV.sum(axis=0) > 0
    if np.linalg.matrix_rank(confusion_KV) < len(labels) or counts_V[~seen_V].any():
        return None
    observed_V = counts_V / counts_V.sum()
    found_K = _true_shares(confusion_KV[None], observed_V[None])[0]
    rng = np.random.default_rng(seed)
    drawn_RN = rng.integers(len(rows), size=(RESAMPLES, len(rows)))
    confusions_RKV = _confusions(cells_N[drawn_RN], weights_N[drawn_RN], shape)
    # A label that a resample misses keeps its verdicts: the resample says nothing of it.
    missed_RK = confusions_RKV.sum(axis=2) == 0
    confusions_RKV = np.where(missed_RK[:, :, None], confusion_KV, confusions_RKV)
    draws = max(1, round(n))
    observed_RV = rng.multinomial(draws, observed_V, size=RESAMPLES) / draws
    spread_RK = _true_shares(confusions_RKV, observed_RV)
    low_K, high_K = np.percentile(spread_RK, [2.5, 97.5], axis=0)
    return {
        label: Corrected(
            float(found_K[k]), (float(min(low_K[k], found_K[k])), float(max(high_K[k], found_K[k])))
        )
        for k, label in enumerate(labels)
    }


def _confusions(
    cells_RN: NDArray[Any], weights_RN: NDArray[Any], shape: tuple[int, int]
) -> NDArray[Any]:
    """(R, K, V): each label's shares of verdicts, of the weighted rows in these cells."""
    rows, (k, v) = len(cells_RN), shape
    places_RN = cells_RN + np.arange(rows)[:, None] * k * v
    flat = np.bincount(places_RN.ravel(), weights_RN.ravel(), minlength=rows * k * v)
    sums_RKV = flat.reshape(rows, k, v)
    totals_RK1 = sums_RKV.sum(axis=2, keepdims=True)
    found: NDArray[Any] = sums_RKV / np.where(totals_RK1 == 0, 1, totals_RK1)
    return found


def _true_shares(confusion_RKV: NDArray[Any], observed_RV: NDArray[Any]) -> NDArray[Any]:
    """(R, K): the shares of labels that explain each row of observed shares best."""
    true_RK = np.full(confusion_RKV.shape[:2], 1 / confusion_RKV.shape[1])
    for _ in range(_STEPS):
        joint_RKV = true_RK[:, :, None] * confusion_RKV
        expected_RV = joint_RKV.sum(axis=1)
        ratio_RV = observed_RV / np.where(expected_RV > 0, expected_RV, 1)
        true_RK = (joint_RKV * ratio_RV[:, None, :]).sum(axis=2)
        true_RK /= np.maximum(true_RK.sum(axis=1, keepdims=True), 1e-300)
    return true_RK
