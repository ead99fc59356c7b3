"""Risk and coverage against a plain computation over every order of the ties."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.montecarlo.selective import risk_coverage

VERDICTS = st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9, float("-inf")]), st.booleans()), min_size=1, max_size=6)


def orders(pairs: list[tuple[float, bool]]) -> Iterator[tuple[tuple[float, bool], ...]]:
    """Every order of the verdicts in which the confidence never rises."""
    for order in itertools.permutations(pairs):
        if all(a[0] >= b[0] for a, b in itertools.pairwise(order)):
            yield order


def mean_risks(pairs: list[tuple[float, bool]]) -> np.ndarray:
    """Risk of the first m verdicts, averaged over those orders; plain Python."""
    rows = [[1 - np.mean([hit for _, hit in order[:m]]) for m in range(1, len(order) + 1)] for order in orders(pairs)]
    return np.mean(rows, axis=0)


@given(VERDICTS)
def test_every_number_is_the_mean_over_the_orders_of_ties(pairs: list[tuple[float, bool]]) -> None:
    sure, hit = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    curve, expected, n = risk_coverage(sure, hit), mean_risks(pairs), len(pairs)
    assert curve.aurc() == pytest.approx(expected.mean())
    np.testing.assert_allclose(curve.risk_at(np.arange(1, n + 1) / n), expected, atol=1e-12)
    np.testing.assert_allclose(curve.accuracy_at([1e-6, 1.0]), 1 - expected[[0, -1]], atol=1e-12)
    best = min(
        np.mean([1 - np.mean(order[:m]) for m in range(1, n + 1)]) for order in itertools.permutations(hit.tolist())
    )
    assert curve.excess_aurc() == pytest.approx(expected.mean() - best)
    for bound in (0.0, 0.3, 0.5, 1.0):
        reached = [np.mean(sure >= t) for t in set(sure.tolist()) if 1 - hit[sure >= t].mean() <= bound + 1e-12]
        assert curve.coverage_at(bound) == pytest.approx(max(reached, default=0.0))


@given(VERDICTS, st.randoms())
def test_the_given_order_does_not_matter(pairs: list[tuple[float, bool]], random) -> None:  # type: ignore[no-untyped-def]
    mixed = random.sample(pairs, len(pairs))
    one, two = (risk_coverage([p[0] for p in rows], [p[1] for p in rows]) for rows in (pairs, mixed))
    np.testing.assert_allclose(one.risk, two.risk)
    np.testing.assert_array_equal(one.coverage, two.coverage)
    assert one.aurc() == pytest.approx(two.aurc())


def test_limits_of_the_area() -> None:
    rng = np.random.default_rng(0)
    hit = rng.random(20_000) < 0.8
    r = 1 - hit.mean()
    perfect = risk_coverage(hit.astype(float), hit)
    assert perfect.excess_aurc() == pytest.approx(0, abs=1e-12)
    assert perfect.best_aurc == pytest.approx(r + (1 - r) * np.log(1 - r), abs=2e-4)  # the form of the paper
    useless = risk_coverage(np.full(20_000, 0.3), hit)
    assert useless.aurc() == pytest.approx(r)
    assert (useless.coverage.tolist(), useless.coverage_at(r), useless.coverage_at(r - 1e-6)) == ([1.0], 1.0, 0.0)
    assert risk_coverage(1 - hit.astype(float), hit).excess_aurc() > useless.excess_aurc() > 0


def test_shares_count_like_their_repeats_and_unknown_gold_is_left_out() -> None:
    shares = risk_coverage([0.9, 0.2, 0.5], [0.75, 0.0, np.nan])
    repeats = risk_coverage([0.9] * 4 + [0.2] * 4, [1, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(shares.risk, repeats.risk)
    np.testing.assert_allclose(shares.coverage, repeats.coverage)
    assert shares.count == 2
    assert shares.excess_aurc() == pytest.approx(0)


def test_selective_edges() -> None:
    empty = risk_coverage([], [])
    assert np.isnan(empty.aurc())
    assert np.isnan(empty.excess_aurc())
    assert empty.coverage_at(0.5) == 0
    curve = risk_coverage([0.3, 0.4], [True, False])
    for call in (lambda: curve.risk_at(0), lambda: curve.risk_at(1.1), lambda: empty.risk_at(1)):
        with pytest.raises(ValueError, match="coverage"):
            call()
    with pytest.raises(ValueError, match="risk"):
        curve.coverage_at(np.nan)
    for sure, hit in (([0.5], []), ([np.nan], [1]), ([0.5], [2])):
        with pytest.raises(ValueError, match=r"confidence|right"):
            risk_coverage(sure, hit)
