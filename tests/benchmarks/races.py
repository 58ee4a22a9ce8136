"""Races on a surface by formula: a point is measured block by block, and stopped as a study stops
it. Also the least cost at which a search that knew every result would have its frontier.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebbline.sweeps.dominance import hypervolume, non_dominated
from ebbline.sweeps.state.races.racing import Rivals
from ebbline.sweeps.study.points import Point, Result
from tests.benchmarks.surfaces import Made, everything

BLOCK, ERROR = 50, 0.01
RACE = {"race": {"block": BLOCK, "error": ERROR}}


@dataclass(frozen=True)
class Measured:
    """A measured point: the prompts that each suite was asked, and the cost of each stage."""

    result: Result
    asked: int
    stages: dict[str, float]


class Races:
    """Measures the points of one run. Suites are raced side by side, as in a study."""

    def __init__(self, surface: Made) -> None:
        self._surface, self._rivals = surface, Rivals(surface.study)
        self._sizes = dict.fromkeys(surface.study.suites, surface.n)

    def measure(self, number: int, point: Point) -> Measured:
        surface, beaten = self._surface, self._rivals.before(number, point)
        stages = dict(surface.stages(point))
        cost = stages.pop(surface.measured(point))
        for asked in range(BLOCK, surface.n + 1, BLOCK):
            stages[f"{surface.measured(point)} {asked}"] = cost * BLOCK / surface.n
            metrics = surface.part(point, asked)
            if beaten(metrics, self._sizes):
                break
        result = Result(number, point, "done", metrics)
        self._rivals.add(result)
        return Measured(result, asked, stages)


def frontier(surface: Made) -> set[Point]:
    """The points that no other point dominates when all are measured whole."""
    points = everything(surface)
    kept = non_dominated(_values(surface, points))
    return {point for point, own in zip(points, kept, strict=True) if own}


def raced_grid(surface: Made) -> dict[str, Any]:
    """The whole space in the order of the file, raced."""
    races, front = Races(surface), frontier(surface)
    spent: dict[str, float] = {}
    whole: dict[str, float] = {}
    seen: set[str] = set()
    asked, lost = [], 0
    for number, point in enumerate(everything(surface)):
        whole |= surface.stages(point)
        found = races.measure(number, point)
        spent |= found.stages
        lost += found.asked < surface.n and point in front
        asked += [] if surface.measured(point) in seen else [found.asked / surface.n]
        seen.add(surface.measured(point))
    return {
        "surface": "formula",
        "sampler": "grid, raced",
        "seeds": 1,
        "asked": float(np.mean(asked)),
        "lost": [lost, len(front)],
        "whole_cost": sum(spent.values()) / sum(whole.values()),
    }


def least_cost(surface: Made, share: float) -> float:
    """The least cost of masks of one adapter with `share` of the whole space's hypervolume.

    On this surface no set of points is cheaper: three points of the frontier have less (the
    benchmark checks this), and so have all points together without the largest trainings.
    """
    points = everything(surface)
    values = {
        point: tuple(row) for point, row in zip(points, _values(surface, points), strict=True)
    }
    enough = share * hypervolume(np.array(list(values.values())))
    by_adapter: dict[str, dict[tuple[float, ...], Point]] = {}
    for point in points:
        train = next(name for name in surface.stages(point) if name.startswith("train "))
        by_adapter.setdefault(train, {})[values[point]] = point
    best = math.inf
    for own in by_adapter.values():
        if hypervolume(np.array(list(own))) < enough:
            continue
        for size in range(1, 5):
            sets = itertools.combinations(own, size)
            if any(hypervolume(np.array(each)) >= enough for each in sets):
                stages = surface.stages(next(iter(own.values())))
                measure = stages[surface.measured(next(iter(own.values())))]
                best = min(best, sum(stages.values()) + (size - 1) * measure)
                break
    front = np.unique(np.array([values[point] for point in frontier(surface)]), axis=0)
    few = max(
        hypervolume(front[list(each)]) for each in itertools.combinations(range(len(front)), 3)
    )
    if few >= enough:
        raise AssertionError("three points are enough, so another set may be cheaper")
    return best


def _values(surface: Made, points: Sequence[Point]) -> np.ndarray[Any, np.dtype[np.float64]]:
    found = [surface.metrics(point) for point in points]
    return np.array([[each[name].value for name in surface.study.objectives] for each in found])
