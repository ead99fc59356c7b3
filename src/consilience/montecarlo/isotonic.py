"""Isotonic regression: the rising function that is closest to the data."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]


def isotonic(x: ArrayLike, y: ArrayLike, weight: ArrayLike | None = None) -> tuple[Float, Float]:
    """The nondecreasing function f that minimises the sum of ``weight (y - f(x))^2``, by pool-adjacent-violators.

    Observations of one x are averaged first; then neighbours that fall are pooled into their weighted mean until
    none does. Returns knots, strictly rising, and values, nondecreasing, float64 [knots] each: ``numpy.interp`` of
    them is f at every given x, constant over each pool, linear between two pools, constant outside.

    x, y: float [observations], finite, at least one; weight: float [observations], positive (default: all 1).
    Raises ``ValueError`` on anything else. Source: Ayer et al. 1955 (Ann. Math. Stat. 26); for calibration, Zadrozny
    and Elkan 2002 (KDD).
    """
    at, seen = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    mass = np.ones_like(at) if weight is None else np.asarray(weight, dtype=np.float64)
    if at.ndim != 1 or not len(at) or not at.shape == seen.shape == mass.shape:
        raise ValueError(f"x, y and weight must be [observations] each, got {at.shape}, {seen.shape}, {mass.shape}")
    if not (np.isfinite(at).all() and np.isfinite(seen).all() and np.isfinite(mass).all() and (mass > 0).all()):
        raise ValueError("x and y must be finite, weight finite and positive")
    places, group = np.unique(at, return_inverse=True)
    masses: Float = np.bincount(group, mass).astype(np.float64)
    means = np.bincount(group, mass * seen) / masses
    first, values = _pool(means, masses)
    last = np.append(first[1:], len(places)) - 1
    knots = np.stack([first, last], axis=1).ravel()
    keep = np.append(True, knots[1:] > knots[:-1])
    return places[knots[keep]], np.repeat(values, 2)[keep]


def _pool(means: Float, masses: Float) -> tuple[NDArray[np.intp], Float]:
    """The pools of values in order: index of the first one of each, and their weighted mean."""
    first: list[int] = []
    mean: list[float] = []
    mass: list[float] = []
    for place, (value, own) in enumerate(zip(means.tolist(), masses.tolist(), strict=True)):
        start = place
        while mean and mean[-1] >= value:
            start, before, held = first.pop(), mean.pop(), mass.pop()
            value = (before * held + value * own) / (held + own)
            own += held
        first.append(start)
        mean.append(value)
        mass.append(own)
    return np.array(first, np.intp), np.array(mean)
