"""Dominance and hypervolume of points in objective space, by moocore.

Invariants: equal points are both dominated or both non-dominated. Objectives are rates, so the
reference corner is the worst corner of the unit cube. Callers must exclude NaN.

Arrays: `values_NM` has N points and M objectives. `maximise` is one flag for all objectives or one
flag for each.
"""

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Up = bool | Sequence[bool]


def non_dominated(values_NM: Array, maximise: Up = True) -> NDArray[np.bool_]:
    """Which rows no other row dominates, as (N,)."""
    found = moocore.is_nondominated(values_NM, maximise=maximise, keep_weakly=True)
    return np.asarray(found, dtype=bool)


def distinct_front(values_NM: Array) -> Array:
    """The distinct non-dominated rows, all objectives maximised."""
    unique_NM: Array = np.unique(values_NM, axis=0)
    return unique_NM[non_dominated(unique_NM)]


def ranks(values_NM: Array) -> NDArray[np.int64]:
    """The non-domination rank of each row, from 0, all objectives maximised."""
    return np.asarray(moocore.pareto_rank(values_NM, maximise=True), dtype=np.int64)


def reference_corner(objectives: int, maximise: Up = True) -> tuple[float, ...]:
    ways = [maximise] * objectives if isinstance(maximise, bool) else maximise
    return tuple(0.0 if up else 1.0 for up in ways)


def hypervolume(
    values_NM: Array, maximise: Up = True, reference: Sequence[float] | None = None
) -> float:
    """The volume that the rows dominate, up to `reference` (by default the worst corner)."""
    corner = reference_corner(values_NM.shape[1], maximise) if reference is None else reference
    return float(moocore.hypervolume(values_NM, ref=list(corner), maximise=maximise))
