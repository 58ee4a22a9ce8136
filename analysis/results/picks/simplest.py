"""Which of two points has the simpler defence.

A simpler defence needs less and claims less: none, then those that read no model, then those that
need no safety adapter, then those with fewer controls to be told apart from.
"""

from collections.abc import Sequence

from ebbline.sweeps.study.points import Result, defence_of
from ebbline.tasks.defences.in_use import DEFENCES

MARGIN = 0.02
"""The usefulness that a simpler defence may lack to be preferred, unless a user gives another."""


def complexity(result: Result) -> tuple[int, bool, bool, int, int]:
    """A sort key of a point's defence; smaller is simpler. An unchanged adapter has no defence."""
    defence = defence_of(result.point)
    if defence.method is None or not result.changed_share:
        return (0, False, False, 0, 0)
    return (
        1,
        defence.reads_models,
        defence.method.reads_safety,
        len(defence.method.controls),
        list(DEFENCES).index(defence.name),
    )


def simplest(results: Sequence[Result]) -> list[Result]:
    """The results whose defence is the simplest of all."""
    least = min(map(complexity, results))
    return [result for result in results if complexity(result) == least]
