"""A mixture of two Weibull distributions, fitted by maximum likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]

START = (0.5, 1.0, 1.0, 1.5, 2.0)
"""Initial weight, shape, scale, shape, scale."""

BOUNDS = ((0.2, 0.8), (0.01, None), (0.01, None), (0.01, None), (0.01, None))
"""Bounds of weight, shape, scale, shape, scale: neither component may vanish."""

LEAST = 5
"""Fewer distinct values than parameters are not fitted."""

_LARGEST = 500.0
"""Exponents are cut here: exp stays finite, and no likelihood that matters is that small."""


@dataclass(frozen=True, slots=True)
class WeibullMixture:
    """Two Weibull distributions, the one of the larger mean first: weights, shapes and scales, [2] each."""

    weights: tuple[float, float]
    shapes: tuple[float, float]
    scales: tuple[float, float]

    def log_densities(self, x: ArrayLike) -> Float:
        """log(weight x density) of each component at x > 0; float64 [2, ...]."""
        values = np.asarray(x, dtype=np.float64)
        parts = [
            np.log(w) + _log_density(values, k, s)[0]
            for w, k, s in zip(self.weights, self.shapes, self.scales, strict=True)
        ]
        return np.stack(parts)

    def low_is_likelier(self, x: ArrayLike) -> NDArray[np.bool_]:
        """Whether x > 0 more likely comes from the component of the smaller mean; bool [...]."""
        high, low = self.log_densities(x)
        return np.asarray(low > high)


def fit_weibull_mixture(sample: ArrayLike) -> WeibullMixture | None:
    """The mixture of two Weibull distributions that makes ``sample`` (positive floats [n]) most likely.

    A local maximum: L-BFGS-B with the gradient, from `START` within `BOUNDS`, which are meant for values of the order
    of 1. None where there is nothing to fit (fewer than `LEAST` distinct values) or the search fails, as it can: the
    likelihood has no upper bound when one component closes in on a repeated value. Raises ValueError on values that
    are not positive and finite.

    Source: the path probabilities of Zhou et al. 2025, arXiv 2502.00511; start and bounds as in the authors' code.
    """
    from scipy.optimize import minimize  # type: ignore[import-untyped,unused-ignore]

    values = np.asarray(sample, dtype=np.float64).ravel()
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError("sample must be positive and finite")
    if len(np.unique(values)) < LEAST:
        return None
    found = minimize(_negative_log_likelihood, START, args=(values,), jac=True, method="L-BFGS-B", bounds=BOUNDS)
    if not (found.success and np.isfinite(found.x).all() and np.isfinite(found.fun)):
        return None
    return _ordered(*map(float, found.x))


def _ordered(w: float, k1: float, s1: float, k2: float, s2: float) -> WeibullMixture:
    """The components by decreasing mean."""
    if _log_mean(k1, s1) >= _log_mean(k2, s2):
        return WeibullMixture((w, 1 - w), (k1, k2), (s1, s2))
    return WeibullMixture((1 - w, w), (k2, k1), (s2, s1))


def _log_mean(shape: float, scale: float) -> float:
    from scipy.special import gammaln  # type: ignore[import-untyped,unused-ignore]

    return float(np.log(scale) + gammaln(1 + 1 / shape))


def _log_density(x: Float, shape: float, scale: float) -> tuple[Float, Float, Float]:
    """Log-density of a Weibull distribution at x [n] and its derivatives by shape and by scale, float64 [n] each."""
    logs = np.log(x / scale)
    power = np.exp(np.minimum(shape * logs, _LARGEST))
    density = np.log(shape / scale) + (shape - 1) * logs - power
    return density, 1 / shape + logs * (1 - power), shape / scale * (power - 1)


def _negative_log_likelihood(parameters: Float, x: Float) -> tuple[float, Float]:
    """Minus the log-likelihood of x [n] under the mixture, and its gradient, float64 [5]."""
    w, k1, s1, k2, s2 = parameters
    f1, by_k1, by_s1 = _log_density(x, k1, s1)
    f2, by_k2, by_s2 = _log_density(x, k2, s2)
    both = np.logaddexp(np.log(w) + f1, np.log1p(-w) + f2)
    first = np.exp(np.log(w) + f1 - both)
    second = 1 - first
    gradient = [
        (first / w - second / (1 - w)).sum(),
        (first * by_k1).sum(),
        (first * by_s1).sum(),
        (second * by_k2).sum(),
        (second * by_s2).sum(),
    ]
    return -float(both.sum()), -np.array(gradient)
