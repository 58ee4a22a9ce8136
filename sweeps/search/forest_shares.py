"""The share of a random forest's variance that each axis explains alone: functional ANOVA.

A tree is a partition of the space into boxes with a value each. The marginal of an axis is the mean
of the tree over all other axes. Its variance over that of the tree is the share of the axis
(Hutter, Hoos and Leyton-Brown 2014). A forest's share is the mean over its trees. All trees of a
forest are computed at once; the numbers are those of Optuna's evaluator, which walks through each
tree for each value.

Arrays: T trees, N nodes or leaves of all trees, F columns of the forest, P points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sklearn.ensemble import RandomForestRegressor

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Column:
    """The values of an axis, one for each point.

    Numbers lie between `low` and `high`. With `choices`, values are numbers of categories, and the
    forest gets a column of zeros and ones for each.
    """

    values: Sequence[float]
    low: float
    high: float
    choices: int = 0

    def encoded(self, rows: Sequence[int]) -> Array:
        """The columns of the forest for these points, shape (P, 1) or (P, choices)."""
        values_P1: Array = np.asarray(self.values, dtype=float)[list(rows)][:, None]
        if not self.choices:
            return values_P1
        return np.asarray(values_P1 == np.arange(self.choices), dtype=float)


@dataclass(frozen=True)
class _Leaves:
    """The leaves of all trees: each one's tree, its value less the tree's mean, and its box."""

    tree_N: Indices
    value_N: Array
    low_NF: Array
    high_NF: Array


def forest_shares(
    columns: Mapping[str, Column], values: Sequence[float], rows: Sequence[int], trees: int
) -> dict[str, float] | None:
    """The share of each axis, in [0, 1], from the points `rows`; None when no tree has a split."""
    from sklearn.ensemble import RandomForestRegressor  # slow; a finished study may not need it

    names = sorted(columns)  # the order of Optuna's evaluator, which the forest's seed depends on
    encoded = [columns[name].encoded(rows) for name in names]
    forest = RandomForestRegressor(trees, max_depth=64, random_state=0)
    forest.fit(np.hstack(encoded), np.asarray(values, dtype=float)[list(rows)])
    bounds_F2 = np.array(
        [
            (0.0, 1.0) if columns[name].choices else (columns[name].low, columns[name].high)
            for name, each in zip(names, encoded, strict=True)
            for _ in range(each.shape[1])
        ]
    )
    leaves, volume_N = _leaves(forest, bounds_F2)
    total_T = np.bincount(leaves.tree_N, volume_N * leaves.value_N**2, trees)
    split_T = total_T > 0
    if not split_T.any():
        return None
    found, first = {}, 0
    for name, each in zip(names, encoded, strict=True):
        own = slice(first, first + each.shape[1])
        low_NG, high_NG = leaves.low_NF[:, own], leaves.high_NF[:, own]
        weight_N = volume_N / (high_NG - low_NG).prod(axis=1) * leaves.value_N
        marginal = _over_categories if columns[name].choices else _over_numbers
        variance_T = marginal(leaves.tree_N, weight_N, low_NG, high_NG, trees)
        found[name] = float((variance_T[split_T].clip(0.0) / total_T[split_T]).mean())
        first = own.stop
    return {name: found[name] for name in columns}


def _leaves(forest: "RandomForestRegressor", bounds_F2: Array) -> tuple[_Leaves, Array]:
    """The leaves of a forest, and each one's share of the space's volume.

    Numbers of a column are scaled to [0, 1].
    """
    trees = [each.tree_ for each in forest.estimators_]
    sizes = [tree.node_count for tree in trees]
    starts = np.cumsum([0, *sizes[:-1]])
    feature_N = np.concatenate([tree.feature for tree in trees])
    threshold_N = np.concatenate([tree.threshold for tree in trees])
    left_N, right_N = (
        np.concatenate([getattr(tree, side) + at for tree, at in zip(trees, starts, strict=True)])
        for side in ("children_left", "children_right")
    )
    value_N = np.concatenate([tree.value.reshape(-1) for tree in trees])
    low_F, range_F = bounds_F2[:, 0], bounds_F2[:, 1] - bounds_F2[:, 0]
    low_NF, high_NF = (np.full((sum(sizes), len(bounds_F2)), end) for end in (0.0, 1.0))
    level = starts
    while len(level := level[feature_N[level] >= 0]):  # all trees, from the roots downwards
        split = feature_N[level]
        at = (threshold_N[level] - low_F[split]) / range_F[split]
        for child, ends in ((left_N[level], high_NF), (right_N[level], low_NF)):
            low_NF[child], high_NF[child] = low_NF[level], high_NF[level]
            ends[child, split] = at
        level = np.concatenate([left_N[level], right_N[level]])
    leaf_N = feature_N < 0
    tree_N = np.repeat(np.arange(len(trees)), sizes)[leaf_N]
    low_NF, high_NF, value_N = low_NF[leaf_N], high_NF[leaf_N], value_N[leaf_N]
    volume_N = (high_NF - low_NF).prod(axis=1)
    mean_T = np.bincount(tree_N, volume_N * value_N) / np.bincount(tree_N, volume_N)
    return _Leaves(tree_N, value_N - mean_T[tree_N], low_NF, high_NF), volume_N


def _over_numbers(
    tree_N: Indices, weight_N: Array, low_N1: Array, high_N1: Array, trees: int
) -> Array:
    """The variance of the marginal over one column: a step function for each tree, whose steps are
    the ends of the leaves.
    """
    tree_E = np.concatenate([tree_N, tree_N])
    at_E = np.concatenate([low_N1[:, 0], high_N1[:, 0]])
    order = np.lexsort((at_E, tree_E))
    tree_E, at_E = tree_E[order], at_E[order]
    level_E = np.cumsum(np.concatenate([weight_N, -weight_N])[order])
    width_E = np.where(tree_E[1:] == tree_E[:-1], at_E[1:] - at_E[:-1], 0.0)
    return np.asarray(np.bincount(tree_E[:-1], width_E * level_E[:-1] ** 2, trees), dtype=float)


def _over_categories(
    tree_N: Indices, weight_N: Array, low_NG: Array, high_NG: Array, trees: int
) -> Array:
    """The variance of the marginal over the columns of an axis with categories: over all pairs of
    different boxes, the product of their values times the volume that they share.
    """
    boxes_BG, box_N = np.unique(np.hstack([low_NG, high_NG]), axis=0, return_inverse=True)
    low_BG, high_BG = np.hsplit(boxes_BG, 2)
    common_BBG = np.minimum(high_BG[:, None], high_BG) - np.maximum(low_BG[:, None], low_BG)
    common_BB = common_BBG.clip(0.0).prod(axis=2)
    sum_TB = np.zeros((trees, len(boxes_BG)))
    np.add.at(sum_TB, (tree_N, box_N.reshape(-1)), weight_N)
    variance_T: Array = ((sum_TB @ common_BB) * sum_TB).sum(axis=1)
    return variance_T
