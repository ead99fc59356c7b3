"""Bootstrap and paired tests against full enumeration, plain computations, SciPy and simulated coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from consilience.montecarlo.resampling import (
    EXACT_FLIPS,
    bootstrap_interval,
    difference_interval,
    paired_bootstrap,
    paired_permutation_test,
    sign_test,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_percentiles_are_those_of_all_resamples() -> None:
    """Three problems, 27 equally likely resamples: the quantiles at 1/4 and 3/4 lie on atoms of their law."""
    values = np.array([0.0, 0.3, 1.0])
    means = sorted(np.mean(part) for part in itertools.product(values, repeat=3))
    found = bootstrap_interval(values, rng(), resamples=200_000, level=0.5)
    low, high = np.quantile(means, [0.25, 0.75], method="inverted_cdf")
    assert float(found.estimate) == pytest.approx(values.mean())
    np.testing.assert_allclose((found.low, found.high), (low, high), atol=1e-12)


def test_the_mean_by_weights_is_the_mean_by_repeats_and_columns_share_resamples() -> None:
    table = rng(1).random((30, 2))
    strata = np.repeat(["a", "b", "c"], 10)
    for method in ("percentile", "bca"):
        fast = bootstrap_interval(table, rng(2), strata=strata, resamples=300, method=method)
        slow = bootstrap_interval(
            table, rng(2), strata=strata, resamples=300, method=method, statistic=lambda values: values.mean(axis=0)
        )
        np.testing.assert_allclose(fast.low, slow.low, atol=0.01 if method == "bca" else 1e-12)
        np.testing.assert_allclose(fast.high, slow.high, atol=0.01 if method == "bca" else 1e-12)
    both = bootstrap_interval(np.stack([table[:, 0], 1 - table[:, 0]], axis=1), rng(3), resamples=500)
    np.testing.assert_allclose(both.low[0], 1 - both.high[1], atol=1e-12)


def test_strata_keep_their_sizes() -> None:
    """A value that is constant within its stratum has no spread left; without strata it has."""
    values = np.repeat([0.0, 1.0], [30, 10])
    inside = bootstrap_interval(values, rng(), strata=values, resamples=200)
    assert float(inside.low) == float(inside.high) == 0.25
    plain = bootstrap_interval(values, rng(), resamples=200)
    assert plain.low < 0.25 < plain.high
    mixed = np.r_[rng(5).normal(0, 1, 40), rng(6).normal(9, 1, 40)]
    tight = bootstrap_interval(mixed, rng(), strata=np.repeat([0, 1], 40), resamples=4_000)
    expected = 1.96 * np.sqrt((mixed[:40].var() + mixed[40:].var()) / 40) / 2
    assert float(tight.high - tight.low) / 2 == pytest.approx(expected, rel=0.05)


def test_bca_agrees_with_scipy() -> None:
    """Both carry Monte Carlo error: 40,000 resamples, a quantile at 2.5 % is good to about 2 % of the width."""
    values = rng(3).exponential(size=25)
    found = bootstrap_interval(values, rng(4), resamples=40_000, method="bca")
    theirs = stats.bootstrap((values,), np.mean, n_resamples=40_000, method="BCa", rng=rng(5)).confidence_interval
    width = theirs.high - theirs.low
    np.testing.assert_allclose((found.low, found.high), (theirs.low, theirs.high), atol=0.03 * width)
    plain = bootstrap_interval(values, rng(4), resamples=40_000)
    assert found.low > plain.low  # a sample skewed to the right: both bounds move to the right
    assert found.high > plain.high
    same = bootstrap_interval(values, rng(4), resamples=2_000, method="bca", statistic=lambda v: np.median(v, axis=0))
    median = stats.bootstrap((values,), np.median, n_resamples=2_000, method="BCa", rng=rng(5)).confidence_interval
    assert float(same.low) == pytest.approx(median.low, abs=0.15 * width)


def test_bootstrap_covers_the_mean() -> None:
    """400 data sets of 80 shares: 95 % minus the known shortfall of small samples; 4 standard errors of 1.1 points."""
    source, held = rng(9), 0
    for _ in range(400):
        values = source.beta(0.6, 0.4, 80)
        found = bootstrap_interval(values, source, resamples=400)
        held += bool(found.low <= 0.6 <= found.high)
    assert 0.90 <= held / 400 <= 0.99


def test_memory_is_bounded_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = rng(1).random(20)
    monkeypatch.setattr("consilience.montecarlo.resampling.CELLS", 100)
    found = bootstrap_interval(values, rng(2), resamples=1_003)
    assert found.low < found.estimate < found.high


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_interval([], rng()),
        lambda: bootstrap_interval([np.nan], rng()),
        lambda: bootstrap_interval([1.0], rng(), strata=[1, 2]),
        lambda: bootstrap_interval([1.0], rng(), level=1.0),
        lambda: bootstrap_interval([1.0], rng(), resamples=0),
        lambda: bootstrap_interval([1.0], rng(), method="normal"),  # type: ignore[arg-type]
        lambda: paired_bootstrap([1.0], [1.0, 2.0], rng()),
        lambda: sign_test([1.0], [1.0, 2.0]),
        lambda: sign_test([np.nan], [1.0]),
        lambda: difference_interval([2.0], [0.5]),
        lambda: paired_permutation_test(np.ones(EXACT_FLIPS + 1), np.zeros(EXACT_FLIPS + 1)),
    ],
)
def test_bad_input(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"values|strata|level|first|per_problem|generator"):
        call()


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_sign_test_is_the_exact_binomial_test(pairs: list[tuple[bool, bool]]) -> None:
    a, b = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs], float)
    wins, losses = int((a > b).sum()), int((a < b).sum())
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    found = sign_test(a, b)
    assert found.p_value == pytest.approx(expected)
    assert sign_test(b, a).p_value == pytest.approx(expected)
    assert found.exact


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_permutation_test_goes_through_all_swaps(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array([p[0] for p in pairs]) / 5, np.array([p[1] for p in pairs]) / 5
    gains = a - b
    totals = [abs(np.dot(signs, gains)) for signs in itertools.product([1, -1], repeat=len(gains))]
    expected = np.mean([total >= abs(gains.sum()) - 1e-9 for total in totals])
    found = paired_permutation_test(a, b)
    assert found.p_value == pytest.approx(expected)
    assert found.difference == pytest.approx(gains.mean())


def test_permutation_test_on_right_or_wrong_is_the_sign_test() -> None:
    a = np.r_[np.ones(11), np.zeros(3), np.ones(30)]
    b = np.r_[np.zeros(11), np.ones(3), np.ones(30)]
    assert paired_permutation_test(a, b).p_value == pytest.approx(sign_test(a, b).p_value)


def test_sampled_permutations_agree_with_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = rng(3).normal(0.25, 1, 18)
    exact = paired_permutation_test(gains, np.zeros(18))
    monkeypatch.setattr("consilience.montecarlo.resampling.EXACT_FLIPS", 5)
    found = paired_permutation_test(gains, np.zeros(18), rng(4), resamples=40_000)
    assert (exact.exact, found.exact) == (True, False)
    error = np.sqrt(exact.p_value * (1 - exact.p_value) / 40_000)
    assert found.p_value == pytest.approx(exact.p_value, abs=5 * error)
    far = paired_permutation_test(np.ones(40), np.zeros(40), rng(), resamples=99)
    assert far.p_value == 1 / 100


def test_paired_tests_keep_their_level() -> None:
    """2,000 null data sets: at most 5 % below 0.05, with 4 standard errors of 0.49 points to spare."""
    source, low = rng(12), np.zeros(2)
    for _ in range(2_000):
        hard = source.beta(0.5, 0.5, 25)
        a, b = source.binomial(3, hard) / 3, source.binomial(3, hard) / 3
        low += [sign_test(a, b).p_value <= 0.05, paired_permutation_test(a, b, source, resamples=99).p_value <= 0.05]
    assert (low / 2_000 <= 0.05 + 4 * 0.0049).all()
    assert low[1] / 2_000 > 0.02


def test_paired_bootstrap_is_that_of_the_differences() -> None:
    a, b = rng(1).random(20), rng(2).random(20)
    pair = paired_bootstrap(a, b, rng(3), resamples=500)
    single = bootstrap_interval(a - b, rng(3), resamples=500)
    assert (pair.low, pair.high, pair.estimate) == (single.low, single.high, single.estimate)


def test_difference_interval_turns_around_and_uses_the_pairing() -> None:
    source = rng(3)
    base = source.random(300)
    a, b = (base + 0.1 > source.random(300)).astype(float), (base > source.random(300)).astype(float)
    low, high = difference_interval(a, b)
    assert low < a.mean() - b.mean() < high
    np.testing.assert_allclose(difference_interval(b, a), (-high, -low), atol=1e-12)
    mixed = difference_interval(a, source.permutation(b))
    assert high - low < mixed[1] - mixed[0]
    same = difference_interval(a, a)
    assert same[0] <= 0 <= same[1]
    assert same[1] - same[0] < 0.02
    assert difference_interval([], []) == (-1.0, 1.0)
    assert difference_interval(np.ones(9), np.zeros(9))[1] == 1.0


@pytest.mark.parametrize("size", [60, 400])
def test_difference_interval_covers(size: int) -> None:
    """Two policies on shared questions, one run and shares of 5: 1,500 data sets, 95 % less 4 standard errors."""
    source = rng(21)
    for repeats in (1, 5):
        held = 0
        for _ in range(1_500):
            hard = source.beta(1.0, 0.4, size)
            a, b = source.binomial(repeats, hard) / repeats, source.binomial(repeats, hard**2) / repeats
            low, high = difference_interval(a, b)
            truth = 1 / 1.4 - 2 / (1.4 * 2.4)
            held += low <= truth <= high
        assert 0.9275 <= held / 1_500 <= 0.985, (repeats, held / 1_500)
