"""How far samples are from data: distances between two samples, spread and sharpness, and the error of a map.

Samples are tensors [n, ...], each row flattened; all sums are taken in float64. An unbiased estimate of a distance that
is 0 is negative half of the time: compare it with the same estimate between two samples of data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 2048


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased; 0 only between equal distributions (Szekely and Rizzo 2013).

    scipy's function of that name is for one dimension, keeps the pairs x = x', and takes the root. Raises ValueError
    unless x [n, ...] and y [m, ...] have rows of one shape, two at least.
    """
    x, y = _two(x, y)
    n, m = len(x), len(y)
    between = _pairs(x, y, lambda distance: distance) / (n * m)
    within = [_pairs(part, part, lambda distance: distance) / (k * (k - 1)) for part, k in ((x, n), (y, m))]
    return 2 * between - sum(within)


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None) -> float:
    """The squared maximum mean discrepancy under k(a, b) = exp(-|a - b|^2 / (2 h^2)), unbiased (Gretton et al. 2012).

    ``bandwidth`` h is by default the median distance in the two samples together (of at most 1000 rows of each). Give
    it when you compare several models: each would choose its own. Raises ValueError as `energy_distance` does, or for
    a bandwidth that is not positive.
    """
    x, y = _two(x, y)
    h = median_distance(x, y) if bandwidth is None else bandwidth
    if not h > 0:
        raise ValueError(f"the bandwidth must be positive, got {h}")

    def kernel(distance: Tensor) -> Tensor:
        return torch.exp(-(distance**2) / (2 * h * h))

    n, m = len(x), len(y)
    within = [(_pairs(part, part, kernel) - k) / (k * (k - 1)) for part, k in ((x, n), (y, m))]
    return sum(within) - 2 * _pairs(x, y, kernel) / (n * m)


def median_distance(x: Tensor, y: Tensor) -> float:
    """The median distance between different rows of the two samples together, of at most 1000 evenly taken of each."""
    x, y = _two(x, y)
    some = torch.cat([part[torch.linspace(0, len(part) - 1, min(len(part), 1000)).long()] for part in (x, y)])
    return float(torch.pdist(some).median())


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 256, generator: torch.Generator | None = None) -> float:
    """The root of the mean squared 2-Wasserstein distance along random directions, exact in each (Bonneel et al. 2015).

    Not unbiased: two samples of n rows of one distribution are about 1/sqrt(n) apart. Raises ValueError as
    `energy_distance` does.
    """
    x, y = _two(x, y)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    return math.sqrt(float(_wasserstein_squared(x @ directions, y @ directions).mean()))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """The squared 2-Wasserstein distance between normal distributions fitted to two samples of features, as in FID.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) on the features you give (Heusel et al., arXiv:1706.08500). It
    overestimates by about dim^2 / n: compare at equal n alone, and with the value between two samples of data.
    """
    x, y = _two(x, y)
    return frechet(x.mean(0), torch.cov(x.T).reshape(x.shape[1], -1), y.mean(0), torch.cov(y.T).reshape(x.shape[1], -1))


def frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """The same of given means [d] and covariances [d, d]."""
    first, second = covariance.double(), other_covariance.double()
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    apart = (mean.double() - other_mean.double()).square().sum()
    return float(apart + torch.trace(first) + torch.trace(second) - 2 * cross)


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[float, float]:
    """The share of ``made`` rows within the manifold of ``real`` ones, and of real ones within that of the made.

    The manifold of a sample is the union of balls about its rows, each reaching to the k-th nearest other row
    (Kynkaanniemi et al., arXiv:1904.06991, k = 3). Raises ValueError as `energy_distance` does, or unless k is below
    both sizes.
    """
    real, made = _two(real, made)
    if not 1 <= k < min(len(real), len(made)):
        raise ValueError(f"k must be at least 1 and below the sizes {len(real)} and {len(made)}, got {k}")
    return _covered(made, real, k), _covered(real, made, k)


def confidence(probabilities: Tensor) -> float:
    """The mean of a classifier's largest probability, of ``probabilities`` [n, classes]: are the samples sharp?"""
    return float(_rows_of_probabilities(probabilities).amax(1).mean())


def class_entropy(probabilities: Tensor) -> float:
    """The entropy, in nats, of the mean of ``probabilities`` [n, classes]: log(classes) where all are made alike."""
    return float(torch.special.entr(_rows_of_probabilities(probabilities).mean(0)).sum())


@dataclass(frozen=True, slots=True)
class MapError:
    """How far a map is from the exact one on the same noise, over samples.

    ``median`` and ``rmse`` are of the distances |x - exact|; ``switched`` is the share that ended in another mode. A
    few switched samples decide the RMSE: read the three together.
    """

    median: float
    rmse: float
    switched: float


def map_error(x: Tensor, exact: Tensor, mode: Callable[[Tensor], Tensor]) -> MapError:
    """The error of ``x`` [n, ...] against the exact map's ``exact`` of the same noise.

    ``mode(samples)`` gives the mode of each as an integer tensor [n]: for a `GaussianMixture` m,
    ``lambda s: m.responsibilities(s, 0.0).argmax(1)``. Raises ValueError where the shapes differ.
    """
    if x.shape != exact.shape or len(x) == 0:
        raise ValueError(f"x and exact must be of one shape [n, ...], got {tuple(x.shape)} and {tuple(exact.shape)}")
    distance = (x.double() - exact.double()).flatten(1).norm(dim=1)
    switched = (mode(x) != mode(exact)).double().mean()
    return MapError(float(distance.median()), float(distance.square().mean().sqrt()), float(switched))


# ------------------------------------------------------------------------------------------------------- internals


def _two(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim < 1 or y.ndim < 1 or x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"need two samples [n, ...] and [m, ...] with at least 2 rows of one shape, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return x.detach().double().cpu().reshape(len(x), -1), y.detach().double().cpu().reshape(len(y), -1)


def _pairs(x: Tensor, y: Tensor, function: Callable[[Tensor], Tensor]) -> float:
    """The sum of a function of the distances over all pairs of rows."""
    mode = "donot_use_mm_for_euclid_dist"  # differences, not inner products: a row is at distance 0 from itself
    return math.fsum(float(function(torch.cdist(part, y, compute_mode=mode)).sum()) for part in torch.split(x, _ROWS))


def _wasserstein_squared(x: Tensor, y: Tensor) -> Tensor:
    """Per column of x [n, p] and y [m, p]: the integral of the squared difference of the quantile functions, [p]."""
    n, m = len(x), len(y)
    both = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n])  # in units of 1 / (n m)
    cuts = both.sort().values  # a cut that comes twice has width 0
    widths = torch.diff(cuts, prepend=torch.zeros(1, dtype=cuts.dtype)).double() / (n * m)
    x, y = x.sort(0).values[(cuts - 1) // m], y.sort(0).values[(cuts - 1) // n]
    return widths @ (x - y) ** 2


def _covered(points: Tensor, sample: Tensor, k: int) -> float:
    """The share of the points that lie in a ball of the sample."""
    mode = "donot_use_mm_for_euclid_dist"
    radii = [
        torch.cdist(part, sample, compute_mode=mode).kthvalue(k + 1, 1).values for part in torch.split(sample, _ROWS)
    ]
    radius = torch.cat(radii)
    inside = [(torch.cdist(part, sample, compute_mode=mode) <= radius).any(1) for part in torch.split(points, _ROWS)]
    return float(torch.cat(inside).double().mean())


def _rows_of_probabilities(probabilities: Tensor) -> Tensor:
    values = probabilities.detach().double()
    if values.ndim != 2 or len(values) == 0 or bool((values < 0).any()):
        raise ValueError(f"need probabilities [n, classes], got shape {tuple(values.shape)} or a negative one")
    if not torch.allclose(values.sum(1), torch.ones(len(values), dtype=torch.float64, device=values.device), atol=1e-3):
        raise ValueError("each row of probabilities must sum to 1: apply softmax to a classifier's output first")
    return values
