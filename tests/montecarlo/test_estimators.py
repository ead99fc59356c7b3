"""Estimators against laws, exact enumeration and simulation."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest

from consilience.montecarlo.estimators import (
    brier,
    expected_calibration_error,
    plurality_curve,
    proportion_interval,
    reliability,
)


def _by_subsets(labels: list[int], right: set[int], k: int) -> float:
    """The vote of k draws over every subset, ties shared; plain Python."""
    total = 0.0
    for subset in itertools.combinations(labels, k):
        votes = {label: subset.count(label) for label in subset if label >= 0}
        if votes:
            leaders = [label for label, count in votes.items() if count == max(votes.values())]
            total += sum(label in right for label in leaders) / len(leaders)
    return total / comb(len(labels), k)


def _by_orders(labels: list[int], right: set[int], k: int) -> float:
    """The vote of the first k draws over every order, ties to the answer seen first; plain Python."""
    hits = orders = 0
    for order in itertools.permutations(labels):
        orders += 1
        seen = [label for label in order[:k] if label >= 0]
        if seen:
            hits += max(dict.fromkeys(seen), key=seen.count) in right
    return hits / orders


def _truth(right: list[set[int]], classes: int) -> np.ndarray:
    return np.array([[label in mine for label in range(classes)] for mine in right])


def test_curve_equals_every_subset() -> None:
    rng = np.random.default_rng(3)
    table = rng.integers(-1, 4, (40, 8))
    right = [set(np.flatnonzero(rng.random(4) < 0.35).tolist()) for _ in table]
    curve = plurality_curve(table, _truth(right, 4), range(1, 9))
    expected = [
        [_by_subsets(row.tolist(), mine, k) for k in range(1, 9)] for row, mine in zip(table, right, strict=True)
    ]
    np.testing.assert_allclose(curve.per_problem, expected, atol=1e-12)
    np.testing.assert_allclose(curve.accuracy, np.mean(expected, axis=0), atol=1e-12)


@pytest.mark.parametrize("labels", [[0, 1, 1, 0, 2, -1], [1, 1, 0, 0, 2, 2], [-1, -1, 0, 1, -1, 0]])
def test_shared_ties_equal_first_seen_over_all_orders(labels: list[int]) -> None:
    curve = plurality_curve([labels], _truth([{0}], 3), range(1, 7))
    expected = [_by_orders(labels, {0}, k) for k in range(1, 7)]
    np.testing.assert_allclose(curve.accuracy, expected, atol=1e-12)


def test_random_orders_agree_with_exact_and_follow_the_seed() -> None:
    rng = np.random.default_rng(5)
    table = rng.integers(-1, 3, (60, 12))
    truth, ks = _truth([{0}] * 60, 3), [7, 1, 12, 40]
    exact = plurality_curve(table, truth, ks)
    runs = [
        plurality_curve(table, truth, ks, method="orders", orders=400, generator=np.random.default_rng(9))
        for _ in range(2)
    ]
    np.testing.assert_array_equal(runs[0].per_problem, runs[1].per_problem)
    # 60 problems x 400 orders: the standard error of the mean is below 0.5 / sqrt(24000) = 0.0033
    np.testing.assert_allclose(runs[0].accuracy, exact.accuracy, atol=5 * 0.0033)
    np.testing.assert_allclose(runs[0].per_problem[:, 2], exact.per_problem[:, 2], atol=1e-12)


def test_one_draw_is_the_share_right_and_labels_carry_no_meaning() -> None:
    rng = np.random.default_rng(1)
    table = rng.integers(-1, 5, (30, 40))
    truth = rng.random((30, 5)) < 0.3
    curve = plurality_curve(table, truth, [1, 5, 40])
    hit = np.where(table >= 0, np.take_along_axis(truth, np.maximum(table, 0), axis=1), False)
    np.testing.assert_allclose(curve.per_problem[:, 0], hit.mean(axis=1), atol=1e-12)
    other = np.array([3, 0, 4, 1, 2])
    renamed = np.where(table >= 0, other[table], -1)
    moved = np.empty_like(truth)
    moved[:, other] = truth
    np.testing.assert_allclose(plurality_curve(renamed, moved, [1, 5, 40]).per_problem, curve.per_problem, atol=1e-12)


def test_draws_past_the_made_ones_do_not_count_and_all_vote_where_k_is_larger() -> None:
    table = np.array([[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    truth = _truth([{0}] * 3, 2)
    curve = plurality_curve(table, truth, [1, 3, 6], drawn=[3, 6, 0])
    np.testing.assert_allclose(curve.per_problem, [[2 / 3, 1, 1], [0, 0, 0], [0, 0, 0]])
    sampled = plurality_curve(
        table, truth, [3, 6], drawn=[3, 6, 0], method="orders", orders=3, generator=np.random.default_rng(0)
    )
    np.testing.assert_allclose(sampled.per_problem, [[1, 1], [0, 0], [0, 0]])


def test_many_draws_use_the_generator() -> None:
    table = np.zeros((2, 200), np.int32)
    with pytest.raises(ValueError, match="generator"):
        plurality_curve(table, np.ones((2, 1), bool), [5])
    curve = plurality_curve(table, np.ones((2, 1), bool), [5], generator=np.random.default_rng(0), orders=3)
    assert curve.accuracy.tolist() == [1.0]
    exact = plurality_curve(table, np.ones((2, 1), bool), [5, 200], method="exact")
    np.testing.assert_allclose(exact.accuracy, [1.0, 1.0])


def test_band_and_no_problem() -> None:
    curve = plurality_curve(np.zeros((0, 4), int), np.zeros((0, 1), bool), [1, 2])
    assert np.isnan(curve.accuracy).all()
    lo, hi = curve.band()
    assert (lo.tolist(), hi.tolist()) == ([0, 0], [1, 1])
    table = np.array([[0, 1, 0], [1, 1, 0]])
    lo, hi = plurality_curve(table, _truth([{0}] * 2, 2), [1, 3]).band()
    assert np.all(lo <= hi)


@pytest.mark.parametrize(
    ("answers", "right", "ks"),
    [
        ([0, 1], [[True]], [1]),
        ([[0, 1]], [[True]], [1]),
        ([[0]], [[True]], [0]),
        ([[0]], [[True], [False]], [1]),
    ],
)
def test_curve_refuses_what_does_not_fit(answers: list, right: list, ks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"answers|ks"):
        plurality_curve(answers, right, ks)


def test_curve_refuses_draws_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="drawn"):
        plurality_curve([[0, 0]], [[True]], [1], drawn=[3])


@pytest.mark.parametrize(
    ("hits", "n", "wilson"),  # Wilson's own interval, from published tables
    [
        (5, 10, (0.236593, 0.763407)),
        (0, 10, (0.0, 0.277533)),
        (10, 10, (0.722467, 1.0)),
        (81, 263, (0.255292, 0.366210)),
    ],
)
def test_interval_is_wilsons_a_little_widened_for_single_runs(hits: int, n: int, wilson: tuple[float, float]) -> None:
    lo, hi = proportion_interval(np.r_[np.ones(hits), np.zeros(n - hits)])
    z2 = (1.959963984540054 * (1 + 1 / n)) ** 2
    p = hits / n
    roots = np.roots([1 + z2 / n, -(2 * p + z2 / n), p * p])  # (p - x)^2 = z^2 x (1 - x) / n
    np.testing.assert_allclose((lo, hi), sorted(roots.real), atol=1e-9)
    assert lo <= wilson[0] <= wilson[1] <= hi
    assert hi - lo <= (wilson[1] - wilson[0]) * (1 + 2 / n)


@pytest.mark.parametrize(("n", "least", "most"), [(100, 0.93, 1.0), (1000, 0.935, 0.965)])
def test_interval_of_single_runs_covers_at_every_p(n: int, least: float, most: float) -> None:
    """Exact, by the binomial law, at every p from 0.3 to 0.97 in steps of 0.001."""
    from scipy.stats import binom

    bounds = np.array([proportion_interval(np.r_[np.ones(x), np.zeros(n - x)]) for x in range(n + 1)])
    for p in np.arange(300, 971) / 1000:
        inside = (bounds[:, 0] <= p) & (p <= bounds[:, 1])
        assert least <= binom.pmf(np.arange(n + 1), n, p)[inside].sum() <= most, p


def test_interval_narrows_with_shares_and_keeps_its_order() -> None:
    rng = np.random.default_rng(2)
    shares = rng.beta(5, 5, 200)
    runs = (rng.random(200) < shares).astype(float)
    width = np.diff(proportion_interval(shares))[0]
    assert width < 0.5 * np.diff(proportion_interval(runs))[0]
    np.testing.assert_allclose(proportion_interval(rng.permutation(shares)), proportion_interval(shares))
    lo, hi = proportion_interval(1 - shares)
    np.testing.assert_allclose((1 - hi, 1 - lo), proportion_interval(shares), atol=1e-12)
    assert np.diff(proportion_interval(shares, 0.99))[0] > width
    # near the normal interval where the sample is large
    normal = 1.96 * shares.std() / np.sqrt(200)
    np.testing.assert_allclose(width / 2, normal, rtol=0.05)


def test_interval_at_the_edges() -> None:
    assert proportion_interval([]) == (0.0, 1.0)
    same = proportion_interval(np.full(50, 0.5))
    np.testing.assert_allclose(same, proportion_interval(np.r_[np.ones(25), np.zeros(25)]))
    lo, hi = proportion_interval([1.0])
    assert (hi, 0 < lo < 0.5) == (1.0, True)
    # all right and almost all right are close: no jump at the edge
    almost = proportion_interval(np.r_[np.ones(99), 0.999])
    np.testing.assert_allclose(almost, proportion_interval(np.ones(100)), atol=2e-3)
    for bad in ([1.2], [float("nan")], [[0.5]]):
        with pytest.raises(ValueError, match="per_problem"):
            proportion_interval(bad)
    with pytest.raises(ValueError, match="level"):
        proportion_interval([0.5], 1.0)


def _sample(rng: np.random.Generator, kind: str, p: float, n: int) -> np.ndarray:
    if kind == "one run":
        return (rng.random(n) < p).astype(float)
    if kind == "five orders":
        return rng.binomial(5, rng.beta(0.3 * p, 0.3 * (1 - p), n)) / 5
    if kind == "rare":  # 40 draws of each; one in fifty is hopeless, the others are alike
        mean = p / 0.98
        return np.where(rng.random(n) < 0.02, 0.0, rng.binomial(40, rng.beta(50 * mean, 50 * (1 - mean), n)) / 40)
    spread = {"split": 0.2, "mixed": 1.0, "alike": 20.0}[kind]
    return rng.beta(spread * p, spread * (1 - p), n)


@pytest.mark.parametrize("kind", ["one run", "five orders", "split", "mixed", "alike", "rare"])
def test_interval_covers_as_promised(kind: str) -> None:
    """1,000 problems: 93.5 to 96.5 %. 100 problems: at least 93 %. 2,000 samples: standard error 0.5 points."""
    rng = np.random.default_rng(11)
    for p in (0.3, 0.6, 0.9, 0.97):
        for n, least, most in ((1000, 0.935, 0.965), (100, 0.93, 1.0)):
            bounds = np.array([proportion_interval(_sample(rng, kind, p, n)) for _ in range(2000)])
            covered = np.mean((bounds[:, 0] <= p) & (p <= bounds[:, 1]))
            assert least <= covered <= most, (kind, p, n, covered)


def test_reliability_by_hand() -> None:
    sure = [0.0, 0.1, 0.15, 0.2, 0.95, 1.0, 0.5]
    right = [0, 1, 0, 1, 1, 1, np.nan]
    rows = reliability(sure, right)
    assert [(row.lower, row.upper, row.count) for row in rows] == [(0.0, 0.1, 2), (0.1, 0.2, 2), (0.9, 1.0, 2)]
    np.testing.assert_allclose([row.confidence for row in rows], [0.05, 0.175, 0.975])
    np.testing.assert_allclose([row.right for row in rows], [0.5, 0.5, 1.0])
    np.testing.assert_allclose((rows[0].lo, rows[0].hi), proportion_interval([0, 1]))
    expected = (2 * 0.45 + 2 * 0.325 + 2 * 0.025) / 6
    np.testing.assert_allclose(expected_calibration_error(sure, right), expected)
    np.testing.assert_allclose(brier(sure, right), (0 + 0.81 + 0.0225 + 0.64 + 0.0025 + 0) / 6)


def test_every_edge_falls_into_the_bin_it_closes() -> None:
    for bins in (3, 10, 49):
        edges = np.arange(1, bins + 1) / bins
        rows = reliability(edges, np.ones(bins), bins)
        assert [row.upper for row in rows] == edges.tolist()


def test_a_perfect_confidence_is_calibrated() -> None:
    rng = np.random.default_rng(4)
    sure = rng.random(200_000)
    right = rng.random(200_000) < sure
    assert expected_calibration_error(sure, right) < 0.01
    np.testing.assert_allclose(brier(sure, right), 1 / 6, atol=0.005)  # mean of c (1 - c)
    inside = [row.lo <= row.confidence <= row.hi for row in reliability(sure, right)]
    assert sum(inside) >= 8


def test_shares_of_repeats_count_like_the_repeats() -> None:
    np.testing.assert_allclose(brier([0.7, 0.2], [0.75, 0.0]), brier([0.7] * 4 + [0.2] * 4, [1, 1, 1, 0] + [0] * 4))


def test_calibration_edges() -> None:
    assert reliability([], []) == []
    assert np.isnan(expected_calibration_error([0.4], [np.nan]))
    assert np.isnan(brier([], []))
    for sure, right, bins in (([0.5], [], 10), ([1.5], [1], 10), ([0.5], [2], 10), ([0.5], [1], 0)):
        with pytest.raises(ValueError, match=r"confidence|right|bins"):
            reliability(sure, right, bins)
