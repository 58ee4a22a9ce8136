"""The surrogate of the search: a Gaussian process for each objective and each constrained metric.

It is scikit-learn's: a linear trend, and around it a Matern 5/2 kernel that has one length for each
feature. Without the trend, predictions far from all results fall back to the mean, so cheap
trainings would teach nothing about expensive ones. The measured standard errors are its noise.
Points in flight count as measured with their own prediction (a constant liar).

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
from sklearn.gaussian_process.kernels import (
    ConstantKernel,
    DotProduct,
    Kernel,
    Matern,
    WhiteKernel,
)

Array = NDArray[np.float64]
MAX_FITTED, MAX_RESULTS = 64, 160  # results for fitting the kernel, and for a prediction
GROWTH, FIRST_FIT = 4 / 3, 5
PRIOR_MEAN, PRIOR_SD = 0.5, 0.3
SLOPE_VARIANCE = 0.3  # of the trend in each feature before the fit, for standardised results
STEPS = 15


@dataclass(frozen=True)
class Belief:
    """A joint normal prediction for C candidates: means as (C,), covariances as (C, C)."""

    mean_C: Array
    covariance_CC: Array


def fitted(x_NF: Array, y_N: Array, noise_N: Array) -> Kernel:
    """The kernel fitted to a metric's results; a default kernel for fewer than FIRST_FIT."""
    features = x_NF.shape[1]
    near = ConstantKernel(1.0, (0.2, 10.0)) * Matern(np.full(features, 0.7), (0.1, 10.0), nu=2.5)
    trend = ConstantKernel(SLOPE_VARIANCE, (0.01, 10.0)) * DotProduct(0.0, "fixed")
    kernel = near + trend + WhiteKernel(0.02, (1e-4, 0.5))
    if len(y_N) < FIRST_FIT:
        return kernel
    mean, sd = centre(y_N)
    model = GaussianProcessRegressor(kernel, alpha=1e-6 + noise_N / sd**2, optimizer=_few_steps)
    with warnings.catch_warnings():
        # An irrelevant feature leaves its length at the bound, which scikit-learn warns about
        warnings.simplefilter("ignore")
        model.fit(x_NF, (y_N - mean) / sd)
    return model.kernel_


class Prediction:
    """What the results of one metric predict for candidates, without measurement noise."""

    def __init__(self, kernel: Kernel, x_NF: Array, y_N: Array, noise_N: Array) -> None:
        self._kernel, self._mean_sd = kernel, centre(y_N)
        self._model: GaussianProcessRegressor | None = None
        if len(y_N):
            mean, sd = self._mean_sd
            alpha_N = 1e-6 + noise_N / sd**2
            self._model = GaussianProcessRegressor(kernel, alpha=alpha_N, optimizer=None)
            self._model.fit(x_NF, (y_N - mean) / sd)

    def apart(self, candidates_CF: Array) -> tuple[Array, Array]:
        """The mean and the standard deviation of each candidate, each as (C,)."""
        mean, sd = self._mean_sd
        if self._model is None:
            mean_C, sd_C = np.zeros(len(candidates_CF)), np.sqrt(self._kernel.diag(candidates_CF))
        else:
            mean_C, sd_C = self._model.predict(candidates_CF, return_std=True)
        variance_C = sd_C**2 - self._kernel.k2.noise_level
        return mean + sd * mean_C, np.sqrt(np.maximum(sd**2 * variance_C, 1e-12))

    def jointly(self, candidates_CF: Array) -> Belief:
        """The joint prediction. It costs the square of the number of candidates."""
        mean, sd = self._mean_sd
        if self._model is None:
            mean_C, covariance_CC = np.zeros(len(candidates_CF)), self._kernel(candidates_CF)
        else:
            mean_C, covariance_CC = self._model.predict(candidates_CF, return_cov=True)
        noise_CC = self._kernel.k2.noise_level * np.eye(len(candidates_CF))
        return Belief(mean + sd * mean_C, sd**2 * (covariance_CC - noise_CC))


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
