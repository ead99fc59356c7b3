"""Metrics against closed forms, scipy, plain loops and the laws they must obey; each statistical test says how often
it would fail by chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats
from torch import Tensor

from consilience.diffusion import GaussianMixture, metrics

torch.set_num_threads(1)


def normal(count: int, dim: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    made = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + scale * made


# --------------------------------------------------------------------------------------------- against other code


def test_energy_distance_is_the_plain_double_sum_and_scipys_without_the_diagonal():
    x, y = normal(7, 3, 0), normal(5, 3, 1, mean=0.5)
    between = np.mean([[float((a - b).norm()) for b in y] for a in x])
    within = [
        np.mean([float((a - b).norm()) for i, a in enumerate(part) for j, b in enumerate(part) if i != j])
        for part in (x, y)
    ]
    assert metrics.energy_distance(x, y) == pytest.approx(2 * between - sum(within), abs=1e-12)
    x, y = normal(40, 1, 2), normal(30, 1, 3, mean=1.0)
    own = [float(torch.pdist(part).mean()) for part in (x, y)]
    biased = metrics.energy_distance(x, y) + own[0] / 40 + own[1] / 30  # scipy's counts the zeros on the diagonal
    assert biased == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]) ** 2, abs=1e-12)


def test_mmd_is_the_plain_double_sum():
    x, y, h = normal(6, 2, 0), normal(9, 2, 1), 0.7
    kernel = [[[math.exp(-float((a - b) @ (a - b)) / (2 * h * h)) for b in q] for a in p] for p, q in ((x, x), (y, y))]
    within = [(np.sum(k) - len(k)) / (len(k) * (len(k) - 1)) for k in kernel]
    cross = np.mean([[math.exp(-float((a - b) @ (a - b)) / (2 * h * h)) for b in y] for a in x])
    assert metrics.mmd(x, y, h) == pytest.approx(sum(within) - 2 * cross, abs=1e-12)
    assert metrics.median_distance(x, y) == pytest.approx(float(torch.pdist(torch.cat([x, y])).median()))


@pytest.mark.parametrize(("n", "m"), [(8, 8), (6, 9), (5, 7), (64, 3)])
def test_wasserstein_in_one_dimension_is_exact_for_any_sizes(n: int, m: int):
    """Against the optimal plan of the n x m transport problem, with every row split into equal parts."""
    x, y = normal(n, 1, n), normal(m, 1, 100 + m, mean=0.3, scale=2.0)
    whole = math.lcm(n, m)
    a, b = (np.sort(np.repeat(part[:, 0].numpy(), whole // len(part))) for part in (x, y))
    assert metrics.sliced_wasserstein(x, y, 3) == pytest.approx(math.sqrt(np.mean((a - b) ** 2)), rel=1e-12)


def test_frechet_distance_is_scipys_matrix_root_and_the_closed_form_of_axes():
    x, y = normal(50, 4, 0), normal(60, 4, 1, scale=1.5) @ torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0]).double())
    first, second = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = linalg.sqrtm(first @ second).real
    apart = np.sum((x.mean(0) - y.mean(0)).numpy() ** 2)
    assert metrics.frechet_distance(x, y) == pytest.approx(apart + np.trace(first + second - 2 * root), rel=1e-9)
    scales, others = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 2.0, 1.0])
    mean, other = torch.zeros(3), torch.tensor([1.0, -1.0, 2.0])
    found = metrics.frechet(mean, torch.diag(scales**2), other, torch.diag(others**2))
    assert found == pytest.approx(6.0 + 4.0 + 0.0 + 1.0, rel=1e-6)


def test_frechet_distance_of_one_feature():
    x, y = normal(20, 1, 0), normal(30, 1, 1, mean=2.0)
    expected = float((x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


# ------------------------------------------------------------------------------------- closed forms, unbiasedness


def repeated(statistic, shift: float, repeats: int = 400, count: int = 12, dim: int = 2) -> tuple[float, float]:
    values = [statistic(normal(count, dim, 2 * r), normal(count, dim, 2 * r + 1, mean=shift)) for r in range(repeats)]
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(repeats))


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_energy_distance_is_unbiased(shift: float):
    """|z| > 4 by chance once in 16,000. E|N(m, 2 I)| in two dimensions is a Rice mean, 0.5 the Laguerre function."""
    length = math.sqrt(2) * shift
    apart = math.sqrt(2) * math.sqrt(math.pi / 2) * _laguerre(-(length**2) / 4)
    alike = math.sqrt(2) * math.sqrt(math.pi / 2)
    mean, error = repeated(metrics.energy_distance, shift)
    assert abs(mean - 2 * (apart - alike)) < 4 * error


def _laguerre(x: float) -> float:
    from scipy.special import i0, i1

    return math.exp(x / 2) * ((1 - x) * i0(-x / 2) - x * i1(-x / 2))


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_mmd_is_unbiased(shift: float):
    """|z| > 4 by chance once in 16,000. The kernel's mean between N(a, I) and N(b, I) is a Gaussian integral."""
    h, dim = 1.3, 2

    def mean_kernel(squared: float) -> float:
        return (h * h / (h * h + 2)) ** (dim / 2) * math.exp(-squared / (2 * (h * h + 2)))

    mean, error = repeated(lambda x, y: metrics.mmd(x, y, h), shift)
    assert abs(mean - 2 * (mean_kernel(0.0) - mean_kernel(dim * shift**2))) < 4 * error


def test_sliced_wasserstein_of_a_shift_and_of_a_scaling():
    """Shifting a sample by v moves each projection by v.u: the mean of its square is |v|^2 / d (error of 4000
    directions: 4 standard errors)."""
    x = normal(500, 3, 0)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = metrics.sliced_wasserstein(x, x + shift, 4000, torch.Generator().manual_seed(0)) ** 2
    squared = float(shift @ shift)
    spread = math.sqrt(squared**2 * (3 / 15 - 1 / 9) / 4000)
    assert abs(found - squared / 3) < 4 * spread
    assert metrics.sliced_wasserstein(x, x.flip(0)) == pytest.approx(0.0, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------- laws


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 9), st.integers(1, 3))
def test_laws(seed: int, n: int, m: int, dim: int):
    """The order of rows, a common rotation or shift, and the roles of x and y do not matter; the scale does as it
    should."""
    x, y = normal(n, dim, seed), normal(m, dim, seed + 1, mean=0.4)
    shuffled = x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    turn = torch.linalg.qr(normal(dim, dim, seed + 2)).Q
    for distance in (metrics.energy_distance, metrics.frechet_distance, lambda a, b: metrics.mmd(a, b, 1.1)):
        value = distance(x, y)
        assert distance(shuffled, y) == pytest.approx(value, abs=1e-7)
        assert distance(y, x) == pytest.approx(value, abs=1e-7)
        assert distance(x @ turn + 3.0, y @ turn + 3.0) == pytest.approx(value, abs=1e-6)
    assert metrics.energy_distance(3 * x, 3 * y) == pytest.approx(3 * metrics.energy_distance(x, y), abs=1e-9)
    assert metrics.mmd(3 * x, 3 * y, 3.3) == pytest.approx(metrics.mmd(x, y, 1.1), abs=1e-9)
    assert metrics.mmd(3 * x, 3 * y) == pytest.approx(metrics.mmd(x, y), abs=1e-9)


@pytest.mark.parametrize("statistic", [metrics.energy_distance, metrics.mmd, metrics.sliced_wasserstein])
def test_permutation_tests_hold_their_level_and_see_a_shift(statistic):
    """With 19 permutations the true split is the largest of 20 with probability 1/20 under no difference: more than
    16 of 100 by chance once in 100,000 (binomial). A shift of 1.5 is seen in nearly all."""

    def largest(shift: float, seed: int) -> bool:
        x, y = normal(12, 2, 2 * seed), normal(12, 2, 2 * seed + 1, mean=shift)
        both, generator = torch.cat([x, y]), torch.Generator().manual_seed(seed)
        own = torch.Generator
        values = []
        for _ in range(19):
            order = torch.randperm(24, generator=generator)
            values.append(_call(statistic, both[order[:12]], both[order[12:]], own))
        return _call(statistic, x, y, own) > max(values)

    assert sum(largest(0.0, seed) for seed in range(100)) <= 16
    assert sum(largest(1.5, seed) for seed in range(20)) >= 18


def _call(statistic, x: Tensor, y: Tensor, generator) -> float:
    if statistic is metrics.sliced_wasserstein:
        return statistic(x, y, 8, generator().manual_seed(5))
    if statistic is metrics.mmd:
        return statistic(x, y, 1.5)
    return statistic(x, y)


def test_rows_beyond_a_chunk_are_counted(monkeypatch: pytest.MonkeyPatch):
    x, y = normal(50, 2, 0), normal(41, 2, 1)
    whole = metrics.energy_distance(x, y), metrics.mmd(x, y, 1.0), metrics.precision_recall(x, y)
    monkeypatch.setattr(metrics, "_ROWS", 7)
    parts = metrics.energy_distance(x, y), metrics.mmd(x, y, 1.0), metrics.precision_recall(x, y)
    assert parts[:2] == pytest.approx(whole[:2], rel=1e-12)
    assert parts[2] == whole[2]


def test_precision_and_recall_by_hand():
    """On a line, k = 1: real rows 0, 1, 3 reach 1, 1, 2; made rows .5, 10, 11 reach 9.5, 1, 1."""
    real, made = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [10.0], [11.0]])
    assert metrics.precision_recall(real, made, k=1) == pytest.approx((1 / 3, 1.0))
    assert metrics.precision_recall(made, real, k=1) == pytest.approx((1.0, 1 / 3))


def test_precision_falls_with_bad_samples_and_recall_with_lost_modes():
    real = torch.cat([normal(100, 2, 0, mean=-5.0), normal(100, 2, 1, mean=5.0)])
    one = normal(200, 2, 2, mean=5.0)
    precision, recall = metrics.precision_recall(real, one)
    assert precision > 0.8
    assert recall < 0.55
    wide = torch.cat([real, normal(200, 2, 3, mean=0.0, scale=0.1)])
    precision, recall = metrics.precision_recall(real, wide)
    assert recall == 1.0
    assert precision == pytest.approx(0.5, abs=0.05)


def test_confidence_and_class_entropy_by_hand():
    sharp = torch.eye(4)[torch.tensor([0, 0, 1, 2])]
    assert metrics.confidence(sharp) == 1.0
    assert metrics.class_entropy(sharp) == pytest.approx(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)))
    vague = torch.full((3, 4), 0.25)
    assert metrics.confidence(vague) == 0.25
    assert metrics.class_entropy(vague) == pytest.approx(math.log(4))


def test_a_switched_mode_shows_in_the_share_and_not_in_the_median():
    means = torch.tensor([[-4.0, 0.0], [4.0, 0.0]])
    mixture = GaussianMixture(torch.tensor([0.5, 0.5]), means, torch.eye(2).expand(2, 2, 2) * 0.01)
    exact = means[torch.arange(100) % 2]
    x = exact + torch.tensor([0.0, 0.1])
    x[:3] = -exact[:3]

    def mode(samples: Tensor) -> Tensor:
        return mixture.responsibilities(samples, torch.tensor(0.01)).argmax(1)

    error = metrics.map_error(x, exact, mode)
    assert error.switched == pytest.approx(0.03)
    assert error.median == pytest.approx(0.1, rel=1e-6)
    assert error.rmse == pytest.approx(math.sqrt((3 * 64 + 97 * 0.01) / 100), rel=1e-6)


# --------------------------------------------------------------------------------------------------------- errors


def test_bad_input_is_refused():
    x = normal(5, 2, 0)
    for distance in (metrics.energy_distance, metrics.mmd, metrics.sliced_wasserstein, metrics.frechet_distance):
        with pytest.raises(ValueError, match="two samples"):
            distance(x, normal(5, 3, 0))
        with pytest.raises(ValueError, match="two samples"):
            distance(x, x[:1])
    with pytest.raises(ValueError, match="bandwidth"):
        metrics.mmd(x, x, 0.0)
    with pytest.raises(ValueError, match="k must"):
        metrics.precision_recall(x, x, 5)
    with pytest.raises(ValueError, match="softmax"):
        metrics.confidence(torch.ones(2, 3))
    with pytest.raises(ValueError, match="one shape"):
        metrics.map_error(x, x[:2], lambda s: s)
