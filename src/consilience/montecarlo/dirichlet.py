"""Which share of a Dirichlet distribution is the largest: by quadrature, and exactly.

With independent G_i ~ Gamma(c_i + 1, 1), the shares G_i / sum G are Dirichlet(c + 1), so the first share is the
largest with probability ``Int g_1(x) prod_i P(G_i <= x) dx`` over the others: one dimension, whatever their number.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from math import factorial, prod, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]

NODES = 16
"""Gauss-Legendre nodes per panel."""

CELLS = 200_000
"""States times nodes that are worked on together."""


def largest_share(counts: ArrayLike) -> Float:
    """P(the first share is the largest) under Dirichlet(counts + 1), float64 [states]; counts: int [states, classes].

    Absolute error below 1e-12. A class of zero count is a class like any other: leave out what is not meant. Raises
    ValueError for negative counts or no class.
    """
    table = np.asarray(counts)
    if table.ndim != 2 or not table.shape[1] or (table < 0).any():
        raise ValueError("counts must be [states, classes], at least one class, not negative")
    from scipy.special import gammainc, gammaln  # type: ignore[import-untyped,unused-ignore]

    points, weights = _nodes(int(table.max(initial=0)).bit_length())
    values, where = np.unique(table, return_inverse=True)
    where = where.reshape(table.shape)
    below = gammainc(values[:, None] + 1.0, points)
    density = np.exp(values[:, None] * np.log(points) - points - gammaln(values[:, None] + 1.0)) * weights
    result = np.empty(len(table))
    step = max(1, CELLS // len(points))
    for start in range(0, len(table), step):
        part = where[start : start + step]
        product = density[part[:, 0]]
        for column in part[:, 1:].T:
            product *= below[column]
        result[start : start + step] = product.sum(1)
    return result


@lru_cache(maxsize=16)
def _nodes(bits: int) -> tuple[Float, Float]:
    """Nodes and weights on [0, X] for counts below 2**bits, with panels no wider than the densities there."""
    most = float(2**bits)
    edges = [0.0]
    while edges[-1] < most + 12 * sqrt(most) + 40:
        edges.append(edges[-1] + max(4.0, sqrt(edges[-1])))
    low, high = np.array(edges[:-1])[:, None], np.array(edges[1:])[:, None]
    unit, weight = np.polynomial.legendre.leggauss(NODES)
    points = (low + high) / 2 + (high - low) / 2 * unit
    return points.ravel(), ((high - low) / 2 * weight).ravel()


def largest_share_exact(counts: ArrayLike) -> Fraction:
    """`largest_share` of one state (int [classes]) as a fraction, by inclusion and exclusion over the other classes.

    P(G <= x) = 1 - exp(-x) sum_{j <= c} x^j / j!, so every term is a polynomial times an exponential. Costs
    O(2^classes x total^2) integer operations. Raises ValueError for negative counts or no class.
    """
    first, *rest = [int(count) for count in np.asarray(counts).ravel()] or [-1]
    if min([first, *rest]) < 0:
        raise ValueError("counts must hold at least one class and no negative number")
    total = Fraction(0)
    for size in range(len(rest) + 1):
        for chosen in combinations(rest, size):
            for power, coefficient in enumerate(_product(chosen)):
                rate = Fraction(prod(range(first + 1, first + power + 1)), (1 + size) ** (first + power + 1))
                total += (-1) ** size * coefficient * rate
    return total


def _product(counts: tuple[int, ...]) -> list[Fraction]:
    """Coefficients of the product of the sums ``sum_{j <= c} x^j / j!``."""
    result = [Fraction(1)]
    for count in counts:
        longer = [Fraction(0)] * (len(result) + count)
        for i, a in enumerate(result):
            for j in range(count + 1):
                longer[i + j] += a / factorial(j)
        result = longer
    return result
