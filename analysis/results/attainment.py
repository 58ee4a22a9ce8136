"""How a frontier depends on the training seed: the surfaces that some, half and all seeds attain.

Each seed has its own frontier and attains what that frontier dominates. The empirical attainment
function counts the seeds that attain a place (Fonseca, Guerreiro, Lopez-Ibanez and Paquete 2011;
computed by moocore).

Invariants: only points measured with the largest number of seeds count, since a seed with fewer
points would attain less. One seed has no band.

Arrays: `values_NM` has the N points of a surface and the M = 2 objectives, as measured.
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
from ebbline.sweeps.study.points import Result, distinct
from ebbline.tasks.measuring.metrics import direction

Level = Literal["some", "half", "all"]
PERCENTILES: dict[Level, float] = {"some": 0.0, "half": 50.0, "all": 100.0}
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Attainment:
    """One model's surfaces: attained by at least one seed, by half of the seeds, and by all seeds.

    The surfaces come from the `points` points that all `seeds` seeds measured; `left_out` is the
    number of other points. `by_seed` has the values of each seed.
    """

    seeds: int
    points: int
    left_out: int
    surfaces: Mapping[Level, Array]
    by_seed: tuple[Array, ...]


def attainments(results: Sequence[Result], objectives: Sequence[str]) -> dict[str, Attainment]:
    """Model -> its surfaces over the first two objectives.

    Models with one seed are omitted. The result is empty for a study with one objective.
    """
    drawn, found = objectives[:2], dict[str, Attainment]()
    if len(drawn) < 2:
        return found
    for model in sorted({result.point.model for result in finished(results)}, key=natural):
        own = distinct([result for result in finished(results) if result.point.model == model])
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
    )  # moocore minimises
    sets = np.repeat(np.arange(len(by_seed)), [len(values) for values in by_seed])
    levels = moocore.eaf(
        np.concatenate(by_seed) * signs_M, sets, percentiles=list(PERCENTILES.values())
    )
    return {
        level: levels[levels[:, 2] == percentile][:, :2] * signs_M
        for level, percentile in PERCENTILES.items()
    }


def staircase(values_NM: Array, objectives: Sequence[str]) -> tuple[Array, Array]:
    """The border of the area that a surface's points dominate, as x and y of its corners.

    It starts at the worst value of the first objective (0 or 1) and ends at the worst value of the
    second.
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
