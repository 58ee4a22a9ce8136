"""The surrogate of the search: a Gaussian process for each objective and each constrained metric.

It is scikit-learn's, with a Matern 5/2 kernel that has one length for each feature. The measured
standard errors are its noise. Points in flight count as measured with their own prediction (a
constant liar).

Invariant: the kernel is a function of the results, never of a driver's past. It is refitted when
the number of results has grown by a third, to the results present at that number.

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
MAX_FITTED, MAX_RESULTS = 64, 160  # results for fitting the kernel, and for a prediction
GROWTH, FIRST_FIT = 4 / 3, 5
PRIOR_MEAN, PRIOR_SD = 0.5, 0.3
STEPS = 15


@dataclass(frozen=True)
class Belief:
    """A joint normal prediction for C candidates: means as (C,), covariances as (C, C)."""

    mean_C: Array
    covariance_CC: Array

    @property
    def sd_C(self) -> Array:
        found: Array = np.sqrt(np.maximum(np.diag(self.covariance_CC), 1e-12))
        return found


def fitted(x_NF: Array, y_N: Array, noise_N: Array) -> Kernel:
    """The kernel fitted to a metric's results; a default kernel for fewer than FIRST_FIT."""
    features = x_NF.shape[1]
    kernel = ConstantKernel(1.0, (0.2, 10.0)) * Matern(
        np.full(features, 0.7), (0.1, 10.0), nu=2.5
    ) + WhiteKernel(0.02, (1e-4, 0.5))
    if len(y_N) < FIRST_FIT:
        return kernel
    mean, sd = centre(y_N)
    model = GaussianProcessRegressor(kernel, alpha=1e-6 + noise_N / sd**2, optimizer=_few_steps)
    with warnings.catch_warnings():
        # An irrelevant feature leaves its length at the bound, which scikit-learn warns about
        warnings.simplefilter("ignore")
        model.fit(x_NF, (y_N - mean) / sd)
    return model.kernel_


def believed(
    kernel: Kernel, x_NF: Array, y_N: Array, noise_N: Array, candidates_CF: Array
) -> Belief:
    """The prediction for the candidates from the results, without measurement noise."""
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
    """Mean and standard deviation to standardise by.

    Few results are shrunk towards the prior of a rate (PRIOR_MEAN, PRIOR_SD).
    """
    weight = 2.0
    mean = (y_N.sum() + weight * PRIOR_MEAN) / (len(y_N) + weight)
    spread = (((y_N - mean) ** 2).sum() + weight * PRIOR_SD**2) / (len(y_N) + weight)
    return float(mean), max(float(np.sqrt(spread)), 0.02)


def fit_at(results: int) -> int:
    """The number of results at the last fit, when there are `results` now; 0 before the first."""
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
