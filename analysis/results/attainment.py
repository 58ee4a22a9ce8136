"""How much of a frontier is luck of the seed: the surfaces that some, half and all of the training
seeds attain.

Each seed has a frontier of its own. A seed attains what its frontier dominates; the empirical
attainment function says of every place how many seeds attain it (Fonseca, Guerreiro, Lopez-Ibanez
and Paquete 2011; computed by moocore).

Invariants: only points measured with every one of the most seeds enter, as a seed with fewer points
would attain less; one seed has no band. Arrays: `values_NM` has the N points of a surface and the M
= 2 objectives, as measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import moocore
import numpy as np
from numpy.typing import NDArray

from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.wording import natural
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.study.points import Result
from ebbline.tasks.measuring.metrics import direction

Level = Literal["some", "half", "all"]
PERCENTILES: dict[Level, float] = {"some": 0.0, "half": 50.0, "all": 100.0}
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Attainment:
    """One size's surfaces by level: what at least one seed attains, what half of them do, what all
    do.

    `points` were measured with all `seeds` and make the surfaces; `left_out` others were not.
    `by_seed` has each seed's values.
    """

    seeds: int
    points: int
    left_out: int
    surfaces: Mapping[Level, Array]
    by_seed: tuple[Array, ...]


def attainments(results: Sequence[Result], objectives: Sequence[str]) -> dict[str, Attainment]:
    """By size, over the first two objectives; sizes without a second seed are left out, and so is
    all with one objective.
    """
    drawn, found = objectives[:2], dict[str, Attainment]()
    if len(drawn) < 2:
        return found
    for model in sorted({result.point.model for result in finished(results)}, key=natural):
        own = [
            result
            for result in finished(results)
            if result.point.model == model and result.same_as is None
        ]
        seeds = max(map(seeds_of, own), default=0)
        whole = [result for result in own if seeds_of(result) == seeds]
        if seeds > 1:
            by_seed = tuple(
                np.array([[result.metrics[name].seeds[seed] for name in drawn] for result in whole])
                for seed in range(seeds)
            )
            found[model] = Attainment(
                seeds, len(whole), len(own) - len(whole), _surfaces(by_seed, drawn), by_seed
            )
    return found


def _surfaces(by_seed: Sequence[Array], drawn: Sequence[str]) -> dict[Level, Array]:
    signs_M = np.array(
        [-1.0 if direction(name) == "maximise" else 1.0 for name in drawn]
    )  # moocore's least is best
    sets = np.repeat(np.arange(len(by_seed)), [len(values) for values in by_seed])
    levels = moocore.eaf(
        np.concatenate(by_seed) * signs_M, sets, percentiles=list(PERCENTILES.values())
    )
    return {
        level: levels[levels[:, 2] == percentile][:, :2] * signs_M
        for level, percentile in PERCENTILES.items()
    }


def staircase(values_NM: Array, objectives: Sequence[str]) -> tuple[Array, Array]:
    """The border of what a surface's points dominate, as x and y of its corners, from the first
    objective's worst end (0 or 1) to where the surface ends and down to the second's worst end.
    """
    ways = [direction(name) for name in objectives[:2]]
    worst_x, worst_y = (0.0 if way == "maximise" else 1.0 for way in ways)
    ordered = values_NM[
        np.argsort(values_NM[:, 0] if ways[0] == "maximise" else -values_NM[:, 0], kind="stable")
    ]
    xs, ys = [worst_x], []
    for x, y in ordered:
        xs += [x, x]
        ys += [y, y]
    return np.array(xs), np.array([*ys, worst_y])
