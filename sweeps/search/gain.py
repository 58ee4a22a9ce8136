"""Expected hypervolume gain of candidates over a frontier.

Objectives are rates. Here all of them are in [0, 1] and maximised (`gains_of`); the reference point
is 0. Predictions are independent and normal. The expected gain is an integral over the part of the
unit cube that the frontier does not dominate (Emmerich et al. 2006):

    E[HV(F + y) - HV(F)] = integral of prod_m P(Y_m >= u_m) du

It is computed exactly, box by box.

Arrays: `front_NM` has N points and M objectives, `mean_CM` and `sd_CM` have C candidates,
`lower_BM` and `upper_BM` have the corners of B boxes.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats.qmc import Sobol

from ebbline.sweeps.dominance import distinct_front
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import direction

Array = NDArray[np.float64]
EXACT_UP_TO = 3  # objectives; with more there are too many boxes, so the frontier is thinned
THINNED = 12  # points of a thinned frontier


def gains_of(study: Study, values: Sequence[Sequence[float]]) -> Array:
    """Objective values as (N, M), with minimised ones replaced by 1 - value."""
    found = np.array(values, dtype=np.float64).reshape(len(values), len(study.objectives))
    down = [direction(name) == "minimise" for name in study.objectives]
    return np.where(down, 1.0 - found, found)


def undominated(front_NM: Array) -> tuple[Array, Array]:
    """The part of the unit cube that a frontier does not dominate, as disjoint boxes (lower_BM,
    upper_BM).
    """
    objectives = front_NM.shape[1]
    front_NM = distinct_front(np.clip(front_NM, 0.0, 1.0))
    if objectives > EXACT_UP_TO and len(front_NM) > THINNED:
        front_NM = front_NM[
            np.unique(np.linspace(0, len(front_NM) - 1, THINNED).round().astype(int))
        ]
    boxes = list(_boxes(front_NM, objectives))
    return np.array([low for low, _ in boxes]).reshape(-1, objectives), np.array(
        [high for _, high in boxes]
    ).reshape(-1, objectives)


def _boxes(front_NM: Array, objectives: int) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Boxes, slab by slab of the last objective. In a slab, the points that reach its top count."""
    if objectives == 1:
        top = float(front_NM[:, 0].max()) if len(front_NM) else 0.0
        return [((top,), (1.0,))] if top < 1.0 else []
    edges = np.unique(np.concatenate([[0.0, 1.0], front_NM[:, -1]]))
    found = []
    for low, high in itertools.pairwise(edges):
        inside = _boxes(front_NM[front_NM[:, -1] >= high][:, :-1], objectives - 1)
        found += [((*lower, float(low)), (*upper, float(high))) for lower, upper in inside]
    return found


def expected_gain(mean_CM: Array, sd_CM: Array, boxes: tuple[Array, Array]) -> Array:
    """The expected hypervolume gain of each single candidate, as (C,)."""
    lower_BM, upper_BM = boxes
    mean_C1M, sd_C1M = mean_CM[:, None, :], np.maximum(sd_CM, 1e-9)[:, None, :]
    sides_CBM = _below(upper_BM[None], mean_C1M, sd_C1M) - _below(lower_BM[None], mean_C1M, sd_C1M)
    gain_C: Array = np.prod(np.maximum(sides_CBM, 0.0), axis=2).sum(axis=1)
    return gain_C


def _below(edge: Array, mean: Array, sd: Array) -> Array:
    """The integral of P(Y >= u) up to `edge`, plus a constant: E[min(Y, edge)]."""
    z = (edge - mean) / sd
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    found: Array = edge + (mean - edge) * ndtr(z) - sd * density
    return found


def spread(boxes: tuple[Array, Array], count: int) -> tuple[Array, float]:
    """`count` points spread evenly over boxes, as (U, M), and the volume for each point.

    The points are from an unscrambled Sobol sequence, so they are deterministic.
    """
    lower_BM, upper_BM = boxes
    volumes_B = np.prod(upper_BM - lower_BM, axis=1)
    if volumes_B.sum() <= 0:
        return np.zeros((0, lower_BM.shape[1])), 0.0
    unit_UM = Sobol(lower_BM.shape[1] + 1, scramble=False).random(count)
    edges_B = np.cumsum(volumes_B) / volumes_B.sum()
    box_U = np.minimum(np.searchsorted(edges_B, unit_UM[:, 0], side="right"), len(edges_B) - 1)
    found: Array = lower_BM[box_U] + unit_UM[:, 1:] * (upper_BM - lower_BM)[box_U]
    return found, float(volumes_B.sum()) / count


def expected_joint_gains(samples_SCM: Array, points_UM: Array, volume: float) -> Array:
    """The expected gain of the first 1, 2, ..., C candidates measured together, as (C,).

    `samples_SCM` are S joint samples of the candidates; `points_UM` and `volume` are from `spread`.
    """
    reached_SU = np.zeros((samples_SCM.shape[0], points_UM.shape[0]), dtype=bool)
    gain_C = np.zeros(samples_SCM.shape[1])
    for candidate in range(samples_SCM.shape[1]):
        new_SU = samples_SCM[:, candidate, None, 0] >= points_UM[None, :, 0]
        for objective in range(1, samples_SCM.shape[2]):
            new_SU &= samples_SCM[:, candidate, None, objective] >= points_UM[None, :, objective]
        reached_SU |= new_SU
        gain_C[candidate] = reached_SU.mean(axis=0).sum() * volume
    return gain_C
