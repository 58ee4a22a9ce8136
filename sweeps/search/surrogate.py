"""What the search believes of points that are not measured: a Gaussian process for each objective
and each constrained metric.

scikit-learn's, with a Matern 5/2 kernel that has a length for each feature, and the measured
standard errors as noise. Its lengths are fitted when the number of results has grown by a third, to
the results that were there then, so they are a function of the results and of no driver's past.
What is in flight counts as measured, with its own prediction (a constant liar that believes
itself).

Arrays: `x_NF` has N points and F features, `y_N` one objective of each, `noise_N` its variance.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel

Array = NDArray[np.float64]
FITTED_ON, KNOWS = (
    64,
    160,
)  # how many results the lengths are fitted on, and how many a prediction rests on
GROWTH, FIRST_FIT = 4 / 3, 5
PRIOR_MEAN, PRIOR_SD = 0.5, 0.3
STEPS = 15


@dataclass(frozen=True)
class Belief:
    """A normal belief about C candidates: means as (C,), covariances as (C, C)."""

    mean_C: Array
    covariance_CC: Array

    @property
    def sd_C(self) -> Array:
        found: Array = np.sqrt(np.maximum(np.diag(self.covariance_CC), 1e-12))
        return found


def fitted(x_NF: Array, y_N: Array, noise_N: Array) -> Kernel:
    """The kernel that a metric's results make likely; before there are enough of them, one that is
    as good as any.
    """
    features = x_NF.shape[1]
    kernel = ConstantKernel(1.0, (0.2, 10.0)) * Matern(
        np.full(features, 0.7), (0.1, 10.0), nu=2.5
    ) + WhiteKernel(0.02, (1e-4, 0.5))
    if len(y_N) < FIRST_FIT:
        return kernel
    mean, sd = centre(y_N)
    model = GaussianProcessRegressor(kernel, alpha=1e-6 + noise_N / sd**2, optimizer=_few_steps)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that a length is at its bound: a feature that says nothing
        model.fit(x_NF, (y_N - mean) / sd)
    return model.kernel_


def believed(
    kernel: Kernel, x_NF: Array, y_N: Array, noise_N: Array, candidates_CF: Array
) -> Belief:
    """What the results say about candidates, without the noise of measuring them."""
    mean, sd = centre(y_N)
    model = GaussianProcessRegressor(kernel, alpha=1e-6 + noise_N / sd**2, optimizer=None)
    noise = kernel.k2.noise_level
    if len(y_N):
        model.fit(x_NF, (y_N - mean) / sd)
        found: tuple[Any, Any] = model.predict(candidates_CF, return_cov=True)
        mean_C, covariance_CC = found
    else:
        mean_C, covariance_CC = np.zeros(len(candidates_CF)), kernel(candidates_CF)
    return Belief(mean + sd * mean_C, sd**2 * (covariance_CC - noise * np.eye(len(candidates_CF))))


def centre(y_N: Array) -> tuple[float, float]:
    """Mean and spread to standardise by, drawn towards those of a rate of which nothing is known
    while results are few.
    """
    weight = 2.0
    mean = (y_N.sum() + weight * PRIOR_MEAN) / (len(y_N) + weight)
    spread = (((y_N - mean) ** 2).sum() + weight * PRIOR_SD**2) / (len(y_N) + weight)
    return float(mean), max(float(np.sqrt(spread)), 0.02)


def fit_at(results: int) -> int:
    """After how many results the lengths in use were fitted."""
    at = FIRST_FIT
    while (after := max(at + 1, int(at * GROWTH))) <= results:
        at = after
    return at if results >= FIRST_FIT else 0


def _few_steps(
    objective: Any, start: Array, bounds: Sequence[tuple[float, float]]
) -> tuple[Array, float]:
    found = minimize(
        objective, start, method="L-BFGS-B", jac=True, bounds=bounds, options={"maxiter": STEPS}
    )
    return found.x, float(found.fun)
