"""Replicates: how many of a study's seeds each point needs, until it is certain which points of its
size are dominated.

Invariant: the answer is a function of the points that were told and of what their seeds measured,
or which of them failed, in whatever order that came; so a study that was killed and continued ends
with the same replicates, and a table needs no memory of why a seed was run.

A point's objectives are means over its seeds, with normal errors. Its chance to be dominated by
another is the product over the objectives of Phi(difference / standard error of the difference). It
is *certain* at confidence c when one rival dominates it with a chance of at least c, or none with
more than 1 - c. Rivals of a dominated point are those that no other point dominates.

The standard error over k seeds is s / sqrt(k). One s holds for an objective and a size: the
standard deviation between the seeds of a point, pooled over all points with several, together with
PRIOR degrees of freedom that say what the sampling of prompts would make (without it two seeds that
agree by chance would settle every claim).

Arrays: `values_NM` has N points and M objectives, all pointing up; `errors_NM` their standard
errors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from ebbline.sweeps.dominance import non_dominated
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric

PRIOR = 2.0
Array = NDArray[np.float64]


def seeds_needed(
    study: Study, results: Sequence[Result], most: Mapping[int, int] | None = None
) -> dict[int, int]:
    """Number -> how many seeds each finished point needs, the first ones of the study's.

    A point that needs more than `results` know of is to get them, and is then looked at again.
    Points that are the same as an earlier one (ebbline.sweeps.state.outcome.Duplicates) need no
    more than the first. `most` says of points of which a further seed failed how many they can
    have: these need no more, and keep no other point waiting.
    """
    most = most or {}
    done = [result for result in results if result.status == "done"]
    needed = {result.number: study.first_seeds for result in done}
    if study.replicates.policy == "all":
        return needed
    for model in sorted({result.point.model for result in done}):
        own = sorted(
            (r for r in done if r.point.model == model and r.same_as is None),
            key=lambda result: result.number,
        )
        for seeds in range(study.first_seeds, len(study.seeds)):
            # Level by level: who needs one more is decided by what all had at this level, so later
            # seeds do not change earlier answers.
            open_ones = _undecided(study, own, needed)
            more = [
                number
                for number in open_ones
                if needed[number] == seeds and seeds < most.get(number, len(study.seeds))
            ]
            known = {result.number: seeds_of(result) for result in own}
            needed |= dict.fromkeys(more, seeds + 1)
            if any(known[number] < needed[number] for number in more):
                break
    return needed


def seeds_of(result: Result) -> int:
    """How many seeds a finished point's metrics are pooled over."""
    return min((max(1, len(metric.seeds)) for metric in result.metrics.values()), default=0)


def error_of(metric: Metric) -> float:
    """The standard error of a point's mean over its seeds, from this point alone."""
    return pooled_noise([_taken(metric, max(1, len(metric.seeds)))]) / math.sqrt(
        max(1, len(metric.seeds))
    )


@dataclass(frozen=True)
class Taken:
    """An objective of a point over its first seeds: their values, and the standard error that its
    prompts alone would make.
    """

    seeds: tuple[float, ...]
    sampling: float


def pooled_noise(taken: Sequence[Taken]) -> float:
    """The standard deviation between the seeds of a point: squares pooled over the points, with
    PRIOR degrees of freedom of sampling.
    """
    squares = sum(
        sum((value - sum(each.seeds) / len(each.seeds)) ** 2 for value in each.seeds)
        for each in taken
    )
    freedom = sum(len(each.seeds) - 1 for each in taken)
    sampling = sum(each.sampling**2 for each in taken) / len(taken)
    return math.sqrt((squares + PRIOR * sampling) / (freedom + PRIOR))


def chance_dominated(values_NM: Array, errors_NM: Array, value_M: Array, error_M: Array) -> Array:
    """The chance that each of N points is better than one in every objective, as (N,)."""
    spread_NM = np.sqrt(errors_NM**2 + error_M**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        z_NM = np.where(
            spread_NM > 0, (values_NM - value_M) / spread_NM, np.inf * np.sign(values_NM - value_M)
        )
    chance_N: Array = np.prod(ndtr(np.where(np.isnan(z_NM), 0.0, z_NM)), axis=1)
    return chance_N


def undecided(values_NM: Array, errors_NM: Array, confidence: float) -> NDArray[np.bool_]:
    """Which points are neither surely dominated nor surely not, as (N,)."""
    found = np.zeros(len(values_NM), dtype=bool)
    if len(values_NM) < 2:
        return found
    front = non_dominated(values_NM)
    for index in range(len(values_NM)):
        rivals = np.ones(len(values_NM), dtype=bool) if front[index] else front.copy()
        rivals[index] = False
        most = float(
            chance_dominated(
                values_NM[rivals], errors_NM[rivals], values_NM[index], errors_NM[index]
            ).max(initial=0.0)
        )
        found[index] = 1 - confidence < most < confidence
    return found


def _undecided(study: Study, own: Sequence[Result], levels: Mapping[int, int]) -> list[int]:
    if not own:
        return []
    taken = {
        name: [_taken(result.metrics[name], levels[result.number]) for result in own]
        for name in study.objectives
    }
    up = {name: own[0].metrics[name].direction == "maximise" for name in study.objectives}
    means = [
        [sum(each.seeds) / len(each.seeds) * (1 if up[name] else -1) for each in taken[name]]
        for name in study.objectives
    ]
    noise = [
        [pooled_noise(taken[name]) / math.sqrt(len(each.seeds)) for each in taken[name]]
        for name in study.objectives
    ]
    open_N = undecided(np.array(means).T, np.array(noise).T, study.replicates.confidence)
    return [result.number for result, is_open in zip(own, open_N, strict=True) if is_open]


def _taken(metric: Metric, seeds: int) -> Taken:
    values = (metric.seeds or (metric.value,))[:seeds]
    # Of these seeds alone, by the largest variance that scores in [0, 1] of this mean have; one
    # success and one failure are added, as a rate of 0 or 1 is not without error (Agresti and Coull
    # 1998).
    share = (metric.items * sum(values) / len(values) + 1) / (metric.items + 2)
    return Taken(values, math.sqrt(share * (1 - share) / metric.items))
