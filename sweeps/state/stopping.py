"""The stopping rule `search.stop`: stop when the hypervolume grows too slowly.

Invariant: the decision depends only on the results and their order, and not on the speed of a
machine.
"""

from bisect import bisect_right

import numpy as np

from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.dominance import hypervolume
from ebbline.sweeps.state.spending import Stopped
from ebbline.sweeps.study.changes import lasting
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import digest


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
        self._gains: list[
            list[float]
        ] = []  # each result's objectives, all maximised; empty without metrics

    @property
    def points(self) -> int:
        """The number of results so far."""
        return len(self._gains)

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
        self._gains.append(
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
        now, then = self._hypervolume(len(self._gains)), self._hypervolume(before)
        if now - then >= self._rule.gain * then and now > 0:
            return ""
        return (
            f"the hypervolume grew from {then:.4g} to {now:.4g} over the last "
            f"{len(self._gains) - before} points, by less than"
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

    def _up(self, result: Result, name: str) -> float:
        metric = result.metrics[name]
        return metric.value if metric.direction == "maximise" else 1.0 - metric.value

    def _hypervolume(self, count: int) -> float:
        gains = [gains for gains in self._gains[:count] if gains]
        return hypervolume(np.array(gains).reshape(len(gains), len(self._objectives)))


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
