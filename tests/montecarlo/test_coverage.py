"""pass@k, majority@k, the power law and heavy tails against enumeration, exact arithmetic and closed forms."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom, binom, hypergeom

from consilience.montecarlo.coverage import (
    Curve,
    _sampled_vote,
    beta_coverage,
    fit_beta_difficulty,
    fit_power_law,
    majority_at_k,
    pass_at_k,
)
from consilience.montecarlo.estimators import EXACT_DRAWS, plurality_curve, proportion_interval


def fraction(n: int, c: int, k: int) -> Fraction:
    return 1 - Fraction(comb(n - c, k), comb(n, k))


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets(n: int, data: st.DataObject) -> None:
    row = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    curve = pass_at_k([sum(row)], n, range(1, n + 1))
    expected = [np.mean([any(part) for part in itertools.combinations(row, k)]) for k in range(1, n + 1)]
    np.testing.assert_allclose(curve.per_problem[0], expected, atol=1e-14)


@pytest.mark.parametrize(("n", "c", "k"), [(10_000, 1, 1), (10_000, 3, 4_999), (10_000, 5_000, 7), (9_999, 1, 9_999)])
def test_pass_at_k_keeps_its_digits(n: int, c: int, k: int) -> None:
    value = pass_at_k([c], [n], [k]).per_problem[0, 0]
    np.testing.assert_allclose(value, float(fraction(n, c, k)), rtol=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Over all outcomes of n draws with success p the estimate averages to 1 - (1 - p)^k."""
    n, ks = 12, np.arange(1, 13)
    table = pass_at_k(np.arange(n + 1), n, ks.tolist()).per_problem
    for p in (0.0, 0.03, 0.4, 1.0):
        np.testing.assert_allclose(binom.pmf(np.arange(n + 1), n, p) @ table, 1 - (1 - p) ** ks, atol=1e-12)


def test_draw_counts_may_differ() -> None:
    counts, hits = [4, 9, 2, 9], [1, 2, 2, 0]
    curve = pass_at_k(hits, counts, [1, 2, 5], beyond="nan")
    pairs = zip(counts, hits, strict=True)
    expected = [[float(fraction(n, c, k)) if k <= n else np.nan for k in (1, 2, 5)] for n, c in pairs]
    np.testing.assert_allclose(curve.per_problem, expected, atol=1e-14)
    np.testing.assert_allclose(curve.mean, np.nanmean(expected, axis=0))
    low, high = curve.band()
    np.testing.assert_allclose((low[2], high[2]), proportion_interval(curve.per_problem[[1, 3], 2]))
    assert np.isnan(pass_at_k([1], 1, [2], beyond="nan").mean[0])


def test_the_blocks_of_pass_at_k_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    count = rng.integers(20, 40, 60)
    hits = rng.binomial(count, 0.2)
    whole = pass_at_k(hits, count, [1, 7, 20]).per_problem
    monkeypatch.setattr("consilience.montecarlo.coverage.CELLS", 60)
    np.testing.assert_array_equal(pass_at_k(hits, count, [1, 7, 20]).per_problem, whole)


@pytest.mark.parametrize(
    ("right", "drawn", "ks", "match"),
    [
        ([3], [2], [1], "right"),
        ([-1], [2], [1], "right"),
        ([1], [2], [3], "needs as many draws"),
        ([1], [2], [0], "ks"),
        ([1], [2], [1.5], "ks"),
        ([0.5], [2], [1], "right"),
        ([[1]], [2], [1], "right"),
    ],
)
def test_pass_at_k_refuses(right: list, drawn: list, ks: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pass_at_k(right, drawn, ks)


def test_majority_is_the_exact_plurality_and_knows_its_draws() -> None:
    rng = np.random.default_rng(3)
    table = rng.integers(-1, 3, (20, 9))
    truth = rng.random((20, 3)) < 0.4
    made = rng.integers(5, 10, 20)
    curve = majority_at_k(table, truth, [1, 4, 7], drawn=made, beyond="nan")
    exact = plurality_curve(table, truth, [1, 4, 7], drawn=made).per_problem
    np.testing.assert_array_equal(np.isnan(curve.per_problem), np.array([1, 4, 7]) > made[:, None])
    there = ~np.isnan(curve.per_problem)
    np.testing.assert_array_equal(curve.per_problem[there], exact[there])
    assert not curve.standard_error[there].any()
    with pytest.raises(ValueError, match="needs as many draws"):
        majority_at_k(table, truth, [7], drawn=made)


def test_majority_of_many_draws_is_sampled_with_its_error() -> None:
    """Two classes and no silent draw: the vote of k is a hypergeometric tail. 200 z-scores, false alarm 1e-4."""
    rng = np.random.default_rng(8)
    n, k, problems = EXACT_DRAWS + 72, 31, 200
    hits = rng.integers(80, 120, problems)
    table = (np.arange(n) >= hits[:, None]).astype(int)
    truth = np.tile([True, False], (problems, 1))
    curve = majority_at_k(table, truth, [k], generator=np.random.default_rng(1), samples=400)
    expected = hypergeom.sf(k // 2, n, hits, k)
    z = (curve.per_problem[:, 0] - expected) / curve.standard_error[:, 0]
    assert abs(z.mean()) < 3.9 / np.sqrt(problems)
    assert 0.8 < z.std() < 1.2
    again = majority_at_k(table, truth, [k], generator=np.random.default_rng(1), samples=400)
    np.testing.assert_array_equal(again.per_problem, curve.per_problem)
    with pytest.raises(ValueError, match="generator"):
        majority_at_k(table, truth, [k])


def test_silent_draws_and_ties_of_sampled_votes_match_the_exact_ones() -> None:
    """The same 100 draws, exact and sampled: 5 standard errors, 60 numbers, false alarm below 1e-4."""
    rng = np.random.default_rng(2)
    table = rng.integers(-1, 4, (15, 100))
    truth = rng.random((15, 4)) < 0.4
    ks = [1, 2, 10, 99]
    exact = plurality_curve(table, truth, ks).per_problem
    for row, right, expected in zip(table, truth, exact, strict=True):
        votes = np.bincount(row + 1, minlength=5)
        mean, error = _sampled_vote(votes, right, np.array(ks), rng, 2_000)
        assert (np.abs(mean - expected) <= 5 * error + 1e-9).all()


def test_majority_plateaus_where_the_mode_is_wrong_and_coverage_does_not() -> None:
    """With p = .3 right against one rival at .6 the vote falls to 0, coverage rises to 1."""
    rng = np.random.default_rng(0)
    table = rng.choice([0, 1, 2], p=[0.3, 0.6, 0.1], size=(40, 100))
    truth = np.tile([True, False, False], (40, 1))
    ks = [1, 10, 60]
    vote = majority_at_k(table, truth, ks).mean
    cover = pass_at_k((table == 0).sum(1), 100, ks).mean
    assert vote[0] == pytest.approx(cover[0])
    assert vote[2] < 0.02
    assert cover[2] > 0.999


def curve_with(means: np.ndarray, ks: list[int]) -> Curve:
    return Curve(np.array(ks), means, np.tile(means, (6, 1)), np.zeros((6, len(ks))))


@given(st.floats(-5, -0.05), st.floats(-1.2, -0.05))
def test_power_law_is_recovered(a: float, b: float) -> None:
    ks = [1, 2, 5, 10, 30, 100]
    found = fit_power_law(curve_with(np.exp(a * np.array(ks, float) ** b), ks), np.random.default_rng(0), resamples=5)
    np.testing.assert_allclose((found.a, found.b), (a, b), rtol=1e-6)
    np.testing.assert_allclose(found.resamples, np.tile([a, b], (5, 1)), rtol=1e-6)
    np.testing.assert_allclose(found.coverage([10_000]), np.exp(a * 10_000.0**b), rtol=1e-6)
    low, high = found.interval([7, 10_000])
    np.testing.assert_allclose(low, high, rtol=1e-6)


def test_power_law_leaves_out_what_has_no_logarithm() -> None:
    ks = [1, 2, 4, 8]
    means = np.array([0.0, 0.5, 0.75, 1.0])
    found = fit_power_law(curve_with(means, ks), np.random.default_rng(0), resamples=3)
    np.testing.assert_allclose(found.coverage([2, 4]), [0.5, 0.75])
    assert found.a < 0
    assert found.b < 0
    for bad in (np.array([0.0, 0.0, 0.5, 1.0]), np.array([np.nan, 0.1, 0.2, 0.3])):
        with pytest.raises(ValueError, match=r"two different ks|nan"):
            fit_power_law(curve_with(bad, ks), np.random.default_rng(0))


def test_power_law_interval_holds_an_interpolated_truth() -> None:
    """Beta(0.4, 1.2) problems, fitted to k <= 25: the curve there is a near straight line in log-log, and the interval
    at k = 10 holds the true coverage in at least 90 % of 200 data sets (95 % and 3.2 standard errors)."""
    ks = [1, 2, 3, 5, 8, 13, 25]
    rng = np.random.default_rng(4)
    truth = beta_coverage(0.4, 1.2, 10)
    held = 0
    for _ in range(200):
        hits = rng.binomial(100, rng.beta(0.4, 1.2, 150))
        low, high = fit_power_law(pass_at_k(hits, 100, ks), rng, resamples=300).interval([10])
        held += bool(low[0] <= truth <= high[0])
    assert held >= 180


def test_coverage_of_beta_problems() -> None:
    k = np.arange(0, 30)
    for a, b in ((0.3, 2.0), (1.0, 1.0), (4.0, 0.5)):
        expected = [1 - betabinom.pmf(0, int(n), a, b) if n else 0.0 for n in k]
        np.testing.assert_allclose(beta_coverage(a, b, k), expected, atol=1e-12)
    np.testing.assert_allclose(beta_coverage(1.0, 1.0, k), k / (k + 1))
    with pytest.raises(ValueError, match="positive"):
        beta_coverage(0.0, 1.0, [1])


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_a_heavy_tail_makes_the_power_law_and_its_exponent(alpha: float) -> None:
    """-log(coverage) falls like k^-alpha for Beta(alpha, .), and each problem alone exponentially."""
    ks = np.array([10**6, 10**7])
    logs = np.log(-np.log(beta_coverage(alpha, 1.5, ks)))
    slope = np.diff(logs)[0] / np.log(10)
    assert slope == pytest.approx(-alpha, abs=0.01)
    single = np.log(-np.log1p(-((1 - 0.1) ** np.array([100, 200]))))
    assert np.diff(single)[0] == pytest.approx(100 * np.log(0.9), rel=1e-3)


def test_a_mixture_has_the_exponent_of_its_heaviest_tail() -> None:
    ks = np.array([10**9, 10**10])
    mixed = 0.2 * beta_coverage(0.3, 1, ks) + 0.8 * beta_coverage(2.0, 1, ks)
    assert np.diff(np.log(-np.log(mixed)))[0] / np.log(10) == pytest.approx(-0.3, abs=0.01)


def test_beta_fit_recovers_and_forecasts() -> None:
    rng = np.random.default_rng(7)
    hits = rng.binomial(50, rng.beta(0.4, 1.5, 4_000))
    found = fit_beta_difficulty(hits, 50)
    assert found.alpha == pytest.approx(0.4, rel=0.08)
    assert found.beta == pytest.approx(1.5, rel=0.12)
    assert found.exponent == -found.alpha
    np.testing.assert_allclose(found.coverage([1, 5_000]), beta_coverage(0.4, 1.5, [1, 5_000]), atol=0.02)


def test_beta_fit_is_the_highest_likelihood() -> None:
    counts = np.array([3, 8, 20, 20, 11])
    hits = np.array([0, 8, 5, 19, 2])

    def likelihood(a: float, b: float) -> float:
        return float(betabinom.logpmf(hits, counts, a, b).sum())

    found = fit_beta_difficulty(hits, counts)
    best = likelihood(found.alpha, found.beta)
    for up in (0.9, 1.1):
        assert likelihood(found.alpha * up, found.beta) < best
        assert likelihood(found.alpha, found.beta * up) < best
    for bad in (np.zeros(5), counts):
        with pytest.raises(ValueError, match="right and wrong"):
            fit_beta_difficulty(bad, counts)


def test_power_law_forecasts_a_heavy_tail_four_times_as_far() -> None:
    """Fitted to k <= 25 of exact Beta curves, within 2 points at k = 100, nearer than a line in log k."""
    ks = [1, 2, 3, 5, 8, 12, 18, 25]
    for alpha, beta in ((0.25, 0.9), (0.4, 1.2), (0.2, 0.5)):
        means = beta_coverage(alpha, beta, ks)
        truth = float(beta_coverage(alpha, beta, 100))
        found = fit_power_law(curve_with(means, ks), np.random.default_rng(0), resamples=2)
        assert found.coverage([100])[0] == pytest.approx(truth, abs=0.02)
        line = np.polyval(np.polyfit(np.log(ks), means, 1), np.log(100))
        assert abs(line - truth) > abs(found.coverage([100])[0] - truth)
