"""The best value that a partly measured suite may have over its whole prompt set.

The prompts of a race are asked in random order, each once. So the bounds hold for any model and any
prompts: nothing but that order is left to chance. A suite that was measured whole has no error.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from ebbline.tasks.measuring.metrics import Metric

Array = NDArray[np.float64]


def best_whole(metric: Metric, of: int, error: float) -> float:
    """The best value that a metric may have over all `of` prompts. The chance that it has a better
    one is at most `error`.

    Undecided samples count as the better outcome. The bound of a rate over one seed is exact, by
    the hypergeometric distribution. Means, and rates over several seeds, have the inequality of
    Serfling (1974, corollary 1.1), which holds for any scores in [0, 1].
    """
    up = metric.direction == "maximise"
    good = metric.successes + metric.undecided if up else metric.n - metric.successes
    share, n = good / metric.n, round(metric.items)
    if n >= of:
        count, whole = float(good), float(metric.n)
    elif metric.squares is None and len(metric.seeds) <= 1:
        count, whole = float(_most_of(round(good), n, of, error)), float(of)
    else:
        beyond = math.sqrt((1 - (n - 1) / of) * math.log(1 / error) / (2 * n))
        count, whole = min(1.0, share + beyond), 1.0
    # Of a minimised metric the bad ones are divided, so that equal rates are equal numbers
    return count / whole if up else (whole - count) / whole


@lru_cache(maxsize=4096)
def _most_of(good: int, n: int, of: int, error: float) -> int:
    """The largest number of good ones among `of` with which a sample of n has at most `good` of
    them with a chance above `error`.
    """
    low, high = good, of - (n - good)
    while low < high:  # the chance falls with the number
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _at_most(good, n, of, middle) > error else (low, middle - 1)
    return low


def _at_most(good: int, n: int, of: int, all_good: int) -> float:
    """The chance that a sample of n from `of`, `all_good` of which are good, has at most `good`."""
    least = max(0, n - (of - all_good))
    count_G = np.arange(least, min(good, all_good) + 1, dtype=np.float64)
    log_G = (
        _log_choose(all_good, count_G)
        + _log_choose(of - all_good, n - count_G)
        - _log_choose(of, np.array([float(n)]))
    )
    return float(np.exp(log_G).sum())


def _log_choose(items: int, chosen_G: Array) -> Array:
    found: Array = gammaln(items + 1.0) - gammaln(chosen_G + 1) - gammaln(items - chosen_G + 1)
    return found
