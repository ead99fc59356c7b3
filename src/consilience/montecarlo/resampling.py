"""Resampling whole problems: bootstrap intervals within strata, and tests of two policies on the same problems.

A *problem* is the unit that was sampled from the population. Whatever was measured on it (draws, orders, both
policies) is resampled together, so that only differences between problems make the interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from consilience.montecarlo.estimators import proportion_interval

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Statistic = Callable[[Float], ArrayLike]

CELLS = 4_000_000
"""Resampled weights that are held at once: bounds the memory."""

EXACT_FLIPS = 20
"""`paired_permutation_test` goes through all 2^m signs up to this many problems with a difference."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its interval; float64 arrays of one shape, [] for a single number."""

    estimate: Float
    low: Float
    high: Float


@dataclass(frozen=True, slots=True)
class PairedTest:
    """difference: mean of the first policy minus the second; p_value: two-sided; exact: no Monte Carlo in it."""

    difference: float
    p_value: float
    exact: bool


# -------------------------------------------------------------------------------------------------- bootstrap


def bootstrap_interval(
    values: ArrayLike,
    generator: np.random.Generator,
    *,
    statistic: Statistic | None = None,
    strata: ArrayLike | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
    method: Literal["percentile", "bca"] = "percentile",
) -> Interval:
    """Interval for a statistic of the problems, by resampling problems with replacement within their strata.

    values: float [problems, ...], the first axis is resampled; columns share the resamples, so that comparisons
    between them are paired. statistic: from values [problems, ...] to a number or array, default the mean over
    problems. strata: [problems], a label each (data set, kind, level): every resample has as many problems of each as
    the data. ``bca`` corrects for bias and skewness, by the jackknife within the strata. Costs one evaluation of the
    statistic per resample (the mean: one matrix product). A small stratum varies too little: the variance within a
    stratum of m problems comes out (m - 1) / m of what it is.

    Raises ValueError on nan, no problem, strata that do not fit, resamples < 1 and levels outside (0, 1).

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 and 14 (BCa); strata as in
    Davison and Hinkley 1997, Bootstrap Methods and their Application, sections 3.2 and 5.3.
    """
    table, groups = _checked(values, strata)
    if not 0 < level < 1 or resamples < 1 or method not in ("percentile", "bca"):
        raise ValueError('level must be between 0 and 1, resamples at least 1, method "percentile" or "bca"')
    estimate = _evaluate(table, statistic)
    flat = _replicates(table, groups, generator, resamples, statistic).reshape(resamples, -1)
    tails = np.tile([(1 - level) / 2, (1 + level) / 2], (flat.shape[1], 1))
    if method == "bca":
        influence = _influence(table, groups, statistic).reshape(len(table), -1)
        tails = _bca_tails(flat, estimate.ravel(), influence, groups, level)
    bounds = np.array([np.quantile(column, tail) for column, tail in zip(flat.T, tails, strict=True)])
    low, high = bounds.reshape(*estimate.shape, 2)[..., 0], bounds.reshape(*estimate.shape, 2)[..., 1]
    return Interval(estimate, low, high)


def _checked(values: ArrayLike, strata: ArrayLike | None) -> tuple[Float, Int]:
    """The values, and the stratum of each problem as 0, 1, ...; int64 [problems]."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim < 1 or len(table) == 0 or np.isnan(table).any():
        raise ValueError("values must be [problems, ...] with at least one problem, without nan")
    if strata is None:
        return table, np.zeros(len(table), np.int64)
    labels = np.asarray(strata)
    if labels.shape != (len(table),):
        raise ValueError(f"strata must be [problems], one label for each of {len(table)}, got shape {labels.shape}")
    return table, np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _evaluate(table: Float, statistic: Statistic | None) -> Float:
    return np.asarray(table.mean(axis=0) if statistic is None else statistic(table), dtype=np.float64)


def _replicates(
    table: Float, groups: Int, generator: np.random.Generator, resamples: int, statistic: Statistic | None
) -> Float:
    """The statistic of each resample; float64 [resamples, ...]."""
    parts = []
    step = max(1, CELLS // len(table))
    for start in range(0, resamples, step):
        times = _multiplicities(groups, generator, min(step, resamples - start))
        if statistic is None:
            flat = times @ table.reshape(len(table), -1) / len(table)
            parts.append(flat.reshape(len(times), *table.shape[1:]))
        else:
            parts.append(np.array([_evaluate(np.repeat(table, row, axis=0), statistic) for row in times]))
    return np.concatenate(parts)


def _multiplicities(groups: Int, generator: np.random.Generator, resamples: int) -> Int:
    """How often each problem is drawn; int64 [resamples, problems]."""
    times = np.empty((resamples, len(groups)), np.int64)
    for group in range(int(groups.max()) + 1):
        mine = np.flatnonzero(groups == group)
        times[:, mine] = generator.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), size=resamples)
    return times


def _influence(table: Float, groups: Int, statistic: Statistic | None) -> Float:
    """The influence of each problem on the statistic, over the size of its stratum; float64 [problems, ...]."""
    means = np.stack([table[groups == group].mean(axis=0) for group in range(int(groups.max()) + 1)])
    if statistic is None:
        return (table - means[groups]) / len(table)
    without = np.array([_evaluate(np.delete(table, place, axis=0), statistic) for place in range(len(table))])
    size = np.bincount(groups)[groups].reshape(-1, *(1,) * (without.ndim - 1))
    centre = np.stack([without[groups == group].mean(axis=0) for group in range(int(groups.max()) + 1)])
    return (size - 1) * (centre[groups] - without) / size


def _bca_tails(flat: Float, estimate: Float, influence: Float, groups: Int, level: float) -> Float:
    """The tail probabilities of BCa; float64 [columns, 2]."""
    from scipy.special import ndtr, ndtri  # type: ignore[import-untyped,unused-ignore]

    below = (flat < estimate).mean(axis=0) + (flat == estimate).mean(axis=0) / 2
    edge = 0.5 / len(flat)
    bias = ndtri(below.clip(edge, 1 - edge))
    squares = (influence**2).sum(axis=0)
    skew = np.where(squares > 0, (influence**3).sum(axis=0) / (6 * np.where(squares > 0, squares, 1.0) ** 1.5), 0.0)
    z = bias[:, None] + ndtri([(1 - level) / 2, (1 + level) / 2])
    room = 1 - skew[:, None] * z
    shifted = ndtr(bias[:, None] + z / np.where(room > 0, room, np.nan))
    return np.where(np.isnan(shifted), [[(1 - level) / 2, (1 + level) / 2]], shifted)


# ----------------------------------------------------------------------------------- two policies, same problems


def difference_interval(first: ArrayLike, second: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Interval for the difference of the mean shares of two policies on the same problems, without resampling.

    Each share's own interval (`estimators.proportion_interval`), joined with the correlation r of the two over the
    problems: the lower distance is the root of ``d1^2 - 2 r d1 e2 + e2^2``, with d1 from the first mean down to its
    lower bound and e2 from the second up to its upper one. Holds also where no problem differs. first, second: float
    [problems] in [0, 1]. Raises ValueError on shapes that differ, nan, values outside [0, 1].

    Source: Newcombe 1998 (Stat. Med. 17, 2635: paired shares from score intervals), in the general form of Zou and
    Donner 2008 (Stat. Med. 27, 1693).
    """
    a, b = _pair(first, second)
    (low_a, high_a), (low_b, high_b) = proportion_interval(a, level), proportion_interval(b, level)
    if len(a) == 0:
        return -1.0, 1.0
    spread = float(a.std() * b.std())
    r = float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread > 1e-12 else 0.0
    p, q = float(a.mean()), float(b.mean())
    down = _joined(p - low_a, high_b - q, r)
    up = _joined(high_a - p, q - low_b, r)
    return max(-1.0, p - q - down), min(1.0, p - q + up)


def _joined(one: float, other: float, r: float) -> float:
    return float(np.sqrt(max(one**2 - 2 * r * one * other + other**2, 0.0)))


def sign_test(first: ArrayLike, second: ArrayLike) -> PairedTest:
    """Exact two-sided sign test: among the problems where the policies differ, is each ahead equally often?

    The p-value is that of a fair coin, ``min(1, 2 P(Bin(m, 1/2) <= min(wins, losses)))``; without a difference 1. For
    verdicts right or wrong it is McNemar's exact test. It looks at who is ahead, not by how much. first, second:
    float [problems]. Raises ValueError on shapes that differ and nan.

    Source: McNemar 1947 (Psychometrika 12); the exact form as in Fay 2010 (R Journal 2).
    """
    from scipy.special import bdtr  # type: ignore[import-untyped,unused-ignore]

    a, b = _pair(first, second)
    wins, losses = int((a > b).sum()), int((a < b).sum())
    tail = float(bdtr(min(wins, losses), wins + losses, 0.5)) if wins + losses else 1.0
    return PairedTest(_mean(a - b), min(1.0, 2 * tail), True)


def paired_permutation_test(
    first: ArrayLike,
    second: ArrayLike,
    generator: np.random.Generator | None = None,
    *,
    resamples: int = 100_000,
) -> PairedTest:
    """Two-sided test of the mean difference: swap the two policies within problems at random.

    Under the hypothesis that the two are exchangeable on every problem each sign of its difference is equally likely.
    The p-value is the share of sign patterns whose total is at least as large as the observed one in absolute value:
    all 2^m of them for up to `EXACT_FLIPS` problems with a difference, else ``(1 + hits) / (1 + resamples)`` over
    random ones, which is valid for any number of resamples. first, second: float [problems].

    Raises ValueError on shapes that differ, nan, and where random patterns lack a generator.

    Source: Fisher 1935, The Design of Experiments, section 21; the added 1 as in Phipson and Smyth 2010, arXiv
    1603.05766.
    """
    a, b = _pair(first, second)
    gains = a - b
    moving = np.abs(gains[gains != 0])
    bound = abs(float(gains.sum())) - 1e-9 * float(moving.sum())
    if len(moving) <= EXACT_FLIPS:
        totals = np.zeros(1)
        for gain in moving:
            totals = np.concatenate([totals - gain, totals + gain])
        return PairedTest(_mean(gains), float((np.abs(totals) >= bound).mean()), True)
    if generator is None or resamples < 1:
        raise ValueError(f"more than {EXACT_FLIPS} problems differ: pass a generator, and resamples of at least 1")
    hits, done = 0, 0
    while done < resamples:
        size = min(resamples - done, max(1, CELLS // len(moving)))
        signs = generator.integers(0, 2, size=(size, len(moving)), dtype=np.int8)
        hits += int((np.abs(2 * (signs @ moving) - moving.sum()) >= bound).sum())
        done += size
    return PairedTest(_mean(gains), (1 + hits) / (1 + resamples), False)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    generator: np.random.Generator,
    *,
    strata: ArrayLike | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
    method: Literal["percentile", "bca"] = "percentile",
) -> Interval:
    """Bootstrap interval for the mean of ``first - second``, both [problems, ...], problems resampled whole.

    Arguments, errors and source as `bootstrap_interval`. With few problems that differ it is too narrow, and empty of
    meaning where none does: see `difference_interval`.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"first and second must have one shape, got {a.shape} and {b.shape}")
    return bootstrap_interval(a - b, generator, strata=strata, resamples=resamples, level=level, method=method)


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Float, Float]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or np.isnan(a).any() or np.isnan(b).any():
        raise ValueError(f"first and second must be [problems] both, without nan, got {a.shape} and {b.shape}")
    return a, b


def _mean(values: Float) -> float:
    return float(values.mean()) if len(values) else float("nan")
