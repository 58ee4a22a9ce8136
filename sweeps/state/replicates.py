"""Replicates: how many of a study's seeds each point needs to decide which points of its size are
dominated.

Invariant: the answer is a function of the finished points and of the values and failures of their
seeds, in any order. So a study that is killed and continued ends with the same replicates, and a
table can recompute why a seed was run.

The objectives of a point are means over its seeds, with normal errors. The chance that another
point dominates it is the product over the objectives of Phi(difference / standard error of the
difference). A point is *certain* at confidence c when one rival dominates it with a chance of at
least c, or when no rival does with a chance above 1 - c. The rivals of a dominated point are the
non-dominated points.

The standard error over k seeds is s / sqrt(k). Each objective of a size has one s: the standard
deviation between the seeds of a point, pooled over all points with several seeds. PRIOR degrees of
freedom with the sampling error of the prompts are pooled too. Without them, two seeds that agree by
chance would decide every comparison.

Arrays: `values_NM` has N points and M objectives, all maximised; `errors_NM` has their standard
errors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from ebbline.sweeps.dominance import non_dominated
from ebbline.sweeps.study.points import Result, distinct, own_seeds
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric

PRIOR = 2.0
Array = NDArray[np.float64]


def seeds_needed(
    study: Study, results: Sequence[Result], most: Mapping[int, int] | None = None
) -> dict[int, int]:
    """Number -> the number of seeds that each finished point needs, from the start of the study's
    list.

    The caller repeats the call when the additional seeds are measured. Duplicates of an earlier
    point (ebbline.sweeps.state.outcome.Duplicates) need only the first seeds. `most` has the
    largest number of seeds of points of which a further seed failed; no other point waits for
    these.
    """
    most = most or {}
    done = [result for result in results if result.status == "done"]
    possible = {each.number: len(own_seeds(study.seeds, each.point)) for each in done}
    needed = {number: min(study.first_seeds, seeds) for number, seeds in possible.items()}
    if study.replicates.policy == "all":
        return needed
    for model in sorted({result.point.model for result in done}):
        own = distinct([result for result in done if result.point.model == model])
        for seeds in range(study.first_seeds, len(study.seeds)):
            # Each level uses the seeds that all points had at that level, so later seeds do not
            # change earlier decisions.
            open_points = _undecided(study, own, needed)
            more = [
                number
                for number in open_points
                if needed[number] == seeds and seeds < most.get(number, possible[number])
            ]
            have = {result.number: seeds_of(result) for result in own}
            needed |= dict.fromkeys(more, seeds + 1)
            if any(have[number] < needed[number] for number in more):
                break
    return needed


def seeds_of(result: Result) -> int:
    """The number of seeds that a finished point's metrics are pooled over."""
    return min((max(1, len(metric.seeds)) for metric in result.metrics.values()), default=0)


def error_of(metric: Metric) -> float:
    """The standard error of a point's mean over its seeds, from this point only."""
    return pooled_noise([_seed_values(metric, max(1, len(metric.seeds)))]) / math.sqrt(
        max(1, len(metric.seeds))
    )


@dataclass(frozen=True)
class SeedValues:
    """The values of an objective over a point's first seeds, and the standard error from the
    sampling of its prompts. Undecided samples, which the values count against the model, widen it.
    """

    seeds: tuple[float, ...]
    sampling: float


def pooled_noise(by_point: Sequence[SeedValues]) -> float:
    """The standard deviation between the seeds of a point, pooled over the points, with PRIOR
    degrees of freedom of sampling error.
    """
    squares = sum(
        sum((value - sum(each.seeds) / len(each.seeds)) ** 2 for value in each.seeds)
        for each in by_point
    )
    freedom = sum(len(each.seeds) - 1 for each in by_point)
    sampling = sum(each.sampling**2 for each in by_point) / len(by_point)
    return math.sqrt((squares + PRIOR * sampling) / (freedom + PRIOR))


def chance_dominated(values_NM: Array, errors_NM: Array, value_M: Array, error_M: Array) -> Array:
    """The chance that each of N points is better than one point in every objective, as (N,)."""
    spread_NM = np.sqrt(errors_NM**2 + error_M**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        z_NM = np.where(
            spread_NM > 0, (values_NM - value_M) / spread_NM, np.inf * np.sign(values_NM - value_M)
        )
    chance_N: Array = np.prod(ndtr(np.where(np.isnan(z_NM), 0.0, z_NM)), axis=1)
    return chance_N


def undecided(values_NM: Array, errors_NM: Array, confidence: float) -> NDArray[np.bool_]:
    """Which points are neither certainly dominated nor certainly non-dominated, as (N,)."""
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
    by_point = {
        name: [_seed_values(result.metrics[name], levels[result.number]) for result in own]
        for name in study.objectives
    }
    up = {name: own[0].metrics[name].direction == "maximise" for name in study.objectives}
    means = [
        [sum(each.seeds) / len(each.seeds) * (1 if up[name] else -1) for each in by_point[name]]
        for name in study.objectives
    ]
    noise = [
        [pooled_noise(by_point[name]) / math.sqrt(len(each.seeds)) for each in by_point[name]]
        for name in study.objectives
    ]
    open_N = undecided(np.array(means).T, np.array(noise).T, study.replicates.confidence)
    return [result.number for result, is_open in zip(own, open_N, strict=True) if is_open]


def _seed_values(metric: Metric, seeds: int) -> SeedValues:
    values = (metric.seeds or (metric.value,))[:seeds]
    # The largest variance of scores in [0, 1] with this mean. One success and one failure are
    # added, because a rate of 0 or 1 has an error too (Agresti and Coull 1998).
    share = (metric.items * sum(values) / len(values) + 1) / (metric.items + 2)
    unknown = metric.undecided / metric.n
    return SeedValues(values, math.hypot(math.sqrt(share * (1 - share) / metric.items), unknown))
