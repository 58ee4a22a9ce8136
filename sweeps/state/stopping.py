"""The stopping rule `search.stop`: stop when the hypervolume grows too slowly.

Invariant: the decision depends only on the results and their order, and not on the speed of a
machine.

The best of many noisy points looks better than it is, so a frontier of the values would grow for
ever. The rule therefore takes each value towards the mean of all points, by the share of their
variance that the sampling of prompts and the spread between training seeds explain (James and Stein
1961). Points that differ by no more than that share one place, and further ones add nothing.

Arrays: `values_NM` and `errors_NM` have N points and M objectives: their values, all maximised, and
their standard errors.
"""

import math
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.dominance import hypervolume
from ebbline.sweeps.state.spending import Stopped
from ebbline.sweeps.study.changes import lasting
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import digest
from ebbline.tasks.measuring.metrics import Metric


class Gains:
    """The cost and the hypervolume after each result. `since` is the number of points before the
    rule counts: the points of a study that met the rule before it was extended.
    """

    def __init__(self, study: Study, profile: Profile, since: int = 0) -> None:
        self._rule, self._profile, self._since = study.search.stop, profile, since
        self._objectives = study.objectives
        self._seen: set[str] = set()
        self._cost = Cost()
        self._spent: list[float] = []  # after each result
        self._measured: list[list[tuple[float, float]]] = []  # of each result, its value and error

    @property
    def points(self) -> int:
        """The number of results so far."""
        return len(self._measured)

    def add(self, result: Result) -> None:
        """Add the next result, of any status. Raises StudyError for GPUs without a price when the
        rule is in dollars.
        """
        by_cost = self._rule is not None and self._rule.per_points is None
        for key, cost in result.costs.items() if by_cost else ():
            if key not in self._seen:
                self._seen.add(key)
                self._cost += cost
        self._spent.append(self._measure(len(self._spent) + 1))
        self._measured.append(
            [self._up(result, name) for name in self._objectives] if result.status == "done" else []
        )

    def met(self) -> str:
        """A message when the rule is met, else the empty string."""
        if self._rule is None or not self._spent:
            return ""
        per = self._rule.per_usd or self._rule.per_gpu_hour or self._rule.per_points or 0
        before = bisect_right(self._spent, self._spent[-1] - per)
        if before <= self._since or before == 0:
            return ""  # not enough was spent yet
        now, then = self._hypervolume(len(self._measured)), self._hypervolume(before)
        if now - then >= self._rule.gain * then and now > 0:
            return ""
        return (
            f"the hypervolume, corrected for noise, grew from {then:.4g} to {now:.4g} over the "
            f"last {len(self._measured) - before} points, by less than"
            f" {self._rule}. Change search.stop in the study file, and the same command continues"
        )

    def _measure(self, points: int) -> float:
        if self._rule is None or self._rule.per_points is not None:
            return float(points)
        if self._rule.per_gpu_hour is not None:
            return self._cost.gpu_hours
        usd = self._cost.usd(self._profile)
        if usd is None:
            missing = ", ".join(
                f"{name}: {{usd_per_hour: ...}}"
                for name in self._cost.unpriced(self._profile) or ["other"]
            )
            raise StudyError(
                "search.stop.per_usd is given, but cluster.yaml in the home has no price; "
                f"add `gpus: {{{missing}}}` there"
            )
        return usd

    def _up(self, result: Result, name: str) -> tuple[float, float]:
        metric = result.metrics[name]
        value = metric.value if metric.direction == "maximise" else 1.0 - metric.value
        return value, noise(metric)

    def _hypervolume(self, count: int) -> float:
        """The hypervolume of the first `count` results, with values as `shrunken` gives them."""
        done = [bool(measured) for measured in self._measured]
        found = np.array([measured for measured in self._measured if measured])
        found = found.reshape(-1, len(self._objectives), 2)
        return hypervolume(shrunken(found[..., 0], found[..., 1])[: sum(done[:count])])


def noise(metric: Metric) -> float:
    """The standard error of a point's value: that of its prompts, and of the mean over its training
    seeds where it has several.
    """
    spread = metric.between_seeds
    return math.hypot(metric.stderr, 0.0 if spread is None else spread / len(metric.seeds) ** 0.5)


def shrunken(values_NM: NDArray[np.float64], errors_NM: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values, each taken towards its objective's mean by the share of the variance that the
    errors explain.
    """
    mean_M, kept_M = shrinkage(values_NM, errors_NM)
    found: NDArray[np.float64] = mean_M + kept_M * (values_NM - mean_M)
    return found


def shrinkage(
    values_NM: NDArray[np.float64], errors_NM: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean, kept share of the distance to it) of each objective, both (M,). A single point is kept
    whole.
    """
    if len(values_NM) < 2:
        return np.zeros(values_NM.shape[1]), np.ones(values_NM.shape[1])
    mean_M, variance_M = values_NM.mean(axis=0), values_NM.var(axis=0, ddof=1)
    noise_M = (errors_NM**2).mean(axis=0)
    kept_M = np.where(
        variance_M > noise_M, 1 - noise_M / np.where(variance_M > 0, variance_M, 1), 0.0
    )
    return mean_M, kept_M


def still_met(study: Study, before: Stopped | None) -> Stopped | None:
    """`before`, the last time that the rule was met, if the study still has the same rule."""
    return (
        before
        if before is not None and study.search.stop is not None and before.rule == rule_of(study)
        else None
    )


def rule_of(study: Study) -> str:
    """A digest of the rule and the study: a changed rule or an extension continues the study."""
    rule = None if study.search.stop is None else study.search.stop.model_dump(mode="json")
    return digest({"stop": rule, "study": lasting(study.model_dump(mode="json"))})
