"""Verifiers: best of k against all subsets and orders, resampling laws against enumeration and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.montecarlo.coverage import majority_at_k, pass_at_k
from consilience.montecarlo.resampling import paired_bootstrap
from consilience.montecarlo.verification import (
    Resampling,
    best_of_k,
    resampling_utility,
    selection_gap,
    verifier_rates,
)

INF = float("inf")


def best_by_subsets(scores: list[float], right: list[bool], k: int) -> float:
    """The best of k over every subset, ties shared; plain Python."""
    values = []
    for part in itertools.combinations(range(len(scores)), k):
        top = max(scores[i] for i in part)
        values.append(np.mean([right[i] for i in part if scores[i] == top]))
    return float(np.mean(values))


@given(st.lists(st.tuples(st.sampled_from([0.1, 2.0, 3.0, -INF]), st.booleans()), min_size=1, max_size=8))
def test_best_of_k_is_the_mean_over_subsets(draws: list[tuple[float, bool]]) -> None:
    scores, right = [d[0] for d in draws], [d[1] for d in draws]
    ks = range(1, len(draws) + 1)
    curve = best_of_k([scores], [right], ks)
    np.testing.assert_allclose(curve.per_problem[0], [best_by_subsets(scores, right, k) for k in ks], atol=1e-12)


def test_best_of_k_has_the_expectation_of_fresh_draws() -> None:
    """Scores 0, 1, 2 with right depending on the score; all 6^4 samples of 4 against all samples of k."""
    kinds = [(s, r) for s in (0, 1, 2) for r in (False, True)]
    chance = np.array([0.2, 0.05, 0.25, 0.1, 0.3, 0.1])

    def expected(n: int, k: int) -> float:
        rows = list(itertools.product(range(6), repeat=n))
        weight = chance[np.array(rows)].prod(axis=1)
        table = np.array([[kinds[i] for i in row] for row in rows])
        return float(weight @ best_of_k(table[..., 0], table[..., 1] > 0, [k]).per_problem[:, 0])

    for k in (1, 2, 3):
        assert expected(4, k) == pytest.approx(expected(k, k))


def test_best_of_k_limits() -> None:
    rng = np.random.default_rng(0)
    right = rng.random((12, 30)) < 0.3
    ks = [1, 3, 17, 30]
    np.testing.assert_allclose(
        best_of_k(right, right, ks).per_problem, pass_at_k(right.sum(1), 30, ks).per_problem, atol=1e-12
    )
    np.testing.assert_allclose(
        best_of_k(np.zeros((12, 30)), right, ks).per_problem, np.tile(right.mean(1)[:, None], 4), atol=1e-12
    )
    np.testing.assert_allclose(best_of_k(~right, right, [30]).mean, right.all(1).mean())
    scores = rng.normal(size=(12, 30))
    np.testing.assert_allclose(
        best_of_k(scores, right, ks).per_problem, best_of_k(np.exp(scores), right, ks).per_problem, atol=1e-14
    )
    made = rng.integers(3, 31, 12)
    part = best_of_k(scores, right, [2, 17], drawn=made, beyond="nan")
    alone = best_of_k(scores[:1, : made[0]], right[:1, : made[0]], [2])
    np.testing.assert_allclose(part.per_problem[0, 0], alone.per_problem[0, 0])
    np.testing.assert_array_equal(np.isnan(part.per_problem[:, 1]), made < 17)


def test_best_of_many_draws_keeps_its_digits() -> None:
    """10,000 distinct scores, right in the top 10: P(best of k is among the top 10) by the pass@k formula."""
    n, ks = 10_000, [1, 40, 5_000, 10_000]
    scores = np.arange(n)[None]
    found = best_of_k(scores, scores >= n - 10, ks).per_problem
    np.testing.assert_allclose(found, pass_at_k([10], n, ks).per_problem, rtol=1e-8)


@pytest.mark.parametrize(
    ("scores", "right", "ks"),
    [([[np.nan]], [[True]], [1]), ([[1.0]], [[True]], [2]), ([[1.0]], [[True, False]], [1]), ([1.0], [True], [1])],
)
def test_best_of_k_refuses(scores: list, right: list, ks: list) -> None:
    with pytest.raises(ValueError, match=r"scores|score|draws"):
        best_of_k(scores, right, ks)


def test_gap_is_coverage_less_selection_by_problem() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, (40, 9))
    right = labels == 0
    ks = [1, 4, 9]
    coverage = pass_at_k(right.sum(1), 9, ks)
    vote = majority_at_k(labels, np.tile([True, False, False], (40, 1)), ks)
    gap = selection_gap(coverage, vote, np.random.default_rng(1), resamples=500)
    np.testing.assert_allclose(gap.gap.estimate, coverage.mean - vote.mean)
    assert (gap.per_problem >= -1e-12).all()
    assert gap.per_problem[:, 0] == pytest.approx(0)
    same = paired_bootstrap(coverage.per_problem, vote.per_problem, np.random.default_rng(1), resamples=500)
    np.testing.assert_array_equal(gap.gap.low, same.low)
    perfect = selection_gap(coverage, best_of_k(right, right, ks), np.random.default_rng(1), resamples=50)
    np.testing.assert_allclose(perfect.per_problem, 0, atol=1e-12)
    with pytest.raises(ValueError, match="same problems"):
        selection_gap(coverage, pass_at_k(right.sum(1), 9, [1, 2, 9]), np.random.default_rng(1))


def test_rates_by_hand() -> None:
    right = [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]]
    passes = [[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    rates = verifier_rates(right, passes, drawn=[4, 4, 2])
    np.testing.assert_allclose(rates.accuracy, [0.5, 1, 0])
    np.testing.assert_allclose(rates.true_pass, [0.5, 0.75, np.nan])
    np.testing.assert_allclose(rates.false_pass, [0.5, np.nan, 0.5])
    np.testing.assert_allclose(rates.pooled, (6 / 10, 4 / 6, 2 / 4))
    laws = Resampling.from_rates(rates.accuracy, rates.true_pass, rates.false_pass)
    counted = Resampling.from_draws(right, passes, drawn=[4, 4, 2])
    np.testing.assert_allclose(laws.passing, counted.passing)
    np.testing.assert_allclose(laws.ceiling, counted.ceiling)


def test_resampling_equals_simulation() -> None:
    """Beta difficulty, 300 tasks, 400 runs each of at most 6 draws; 4 standard errors."""
    rng = np.random.default_rng(3)
    p, c, f, cost, most = rng.beta(0.5, 1.0, 300), 0.9, 0.15, 1.5, 6
    law = Resampling.from_rates(p, c, f)
    right = rng.random((400, 300, most)) < p[:, None]
    passes = rng.random(right.shape) < np.where(right, c, f)
    first = passes.argmax(-1)
    hit = np.take_along_axis(right, first[..., None], -1)[..., 0]
    reward = np.where(passes.any(-1), np.where(hit, 1.0, -cost), 0.0)
    error = np.sqrt(reward.var(0).mean() / reward.size)
    assert reward.mean() == pytest.approx(float(law.utility(most, cost)), abs=4 * error)
    solved = passes.any(-1) & hit
    assert solved.mean() == pytest.approx(float(law.accuracy(most)), abs=4 * 0.5 / np.sqrt(solved.size))


def test_ceiling_and_limits() -> None:
    law = Resampling.from_rates([0.2, 0.0, 1.0, 0.5], [0.9, np.nan, 0.8, 0.0], [0.1, 0.2, np.nan, 0.0])
    np.testing.assert_allclose(law.ceiling, [0.18 / 0.26, 0.0, 1.0, np.nan])
    limit = (0.18 / 0.26 + 0 + 1) / 4
    assert float(law.accuracy(INF)) == pytest.approx(limit)
    np.testing.assert_allclose(law.accuracy([0, 10**7]), [0, limit])
    assert float(law.utility(1, 2.0)) == pytest.approx((0.18 - 2 * 0.08 - 2 * 0.2 + 0.8) / 4)
    perfect = Resampling.from_rates([0.01, 0.3], 1.0, 0.0)
    assert float(perfect.accuracy(INF)) == 1.0
    ks = np.array([1, 2, 50])
    np.testing.assert_allclose(perfect.accuracy(ks), (2 - 0.99**ks - 0.7**ks) / 2)


def test_a_weak_model_cannot_reach_a_strong_one() -> None:
    """False positives cap the weak model below one draw of the strong one, however many draws; a perfect verifier
    would let it pass."""
    weak = Resampling.from_rates(np.random.default_rng(0).beta(0.3, 0.9, 500), 1.0, 0.2)
    strong = 0.75
    assert float(weak.accuracy(INF)) < strong
    none = Resampling.from_rates(np.random.default_rng(0).beta(0.3, 0.9, 500).clip(1e-6), 1.0, 0.0)
    assert float(none.accuracy(INF)) == pytest.approx(1.0)


@pytest.mark.parametrize("cost", [0.0, 0.7, 1.0, 2.0, 5.0])
def test_best_draws_of_two_kinds_of_task(cost: float) -> None:
    """The two kinds of task of the authors' notebook: right with .87 and .13, a quarter of the wrong ones pass."""
    law = Resampling.from_rates([0.87, 0.13], 1.0, 0.25, weights=[0.58, 0.42])
    best = law.best(cost)
    ks = np.arange(2_000)
    every = law.utility(ks, cost)
    limit = float(law.utility(INF, cost))
    if every.max() > limit + 1e-12:
        assert best.draws == every.argmax()
    else:
        assert best.draws == INF
    assert best.utility == pytest.approx(max(every.max(), limit))
    if cost == 2.0:
        assert 0 < best.draws < 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.001, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6),
    st.floats(0, 5),
)
def test_best_draws_has_the_highest_utility(tasks: list[tuple[float, float, float]], cost: float) -> None:
    law = Resampling.from_rates(*zip(*tasks, strict=True))
    best = law.best(cost)
    ks = np.r_[np.arange(3_000), 10.0 ** np.arange(4, 9), INF]
    values = law.utility(ks, cost)
    assert best.utility >= values.max() - 1e-9
    assert best.utility == pytest.approx(float(law.utility(best.draws, cost)), abs=1e-9)


def test_best_draws_of_rare_passes_lies_far_out() -> None:
    """An easy task that passes once in 10,000 draws and is worth it, a hard one once in 10 million and is not: the
    derivative is zero where e^(-1e-4 K) and e^(-1e-7 K) balance."""
    law = Resampling.from_rates([1e-4, 0.0], 1.0, [0.0, 1e-7])
    best = law.best(1.0)
    at = np.log(1e-4 / 1e-7) / (-np.log1p(-1e-4) + np.log1p(-1e-7))
    assert best.draws == pytest.approx(at, abs=2)
    assert Resampling.from_rates(0.5, 1.0, 0.0).best(3.0).draws == INF
    assert Resampling.from_rates(0.5, 0.0, 0.4).best(3.0) == Resampling.from_rates(0.5, 0.0, 0.0).best(3.0)
    assert Resampling.from_rates(0.5, 0.0, 0.4).best(3.0).draws == 0


def test_recorded_utility_is_the_mean_over_orders() -> None:
    rng = np.random.default_rng(1)
    right, passes = rng.random((4, 5)) < 0.5, rng.random((4, 5)) < 0.6
    passes[3] = False
    for cost in (0.0, 2.5):
        curve = resampling_utility(right, passes, range(1, 6), cost)
        for row in range(4):
            for k in range(1, 6):
                rewards = []
                for order in itertools.permutations(range(5)):
                    hits = [right[row, i] for i in order[:k] if passes[row, i]]
                    rewards.append((1.0 if hits[0] else -cost) if hits else 0.0)
                assert curve.per_problem[row, k - 1] == pytest.approx(np.mean(rewards))


def test_recorded_utility_is_unbiased_and_the_plug_in_is_not() -> None:
    """One task, all outcomes of n = 3 draws with P(right, passes) known, against the law with fresh draws."""
    p, c, f, cost, k = 0.3, 0.8, 0.2, 1.0, 2
    truth = float(Resampling.from_rates(p, c, f).utility(k, cost))
    chance = {(1, 1): p * c, (1, 0): p * (1 - c), (0, 1): (1 - p) * f, (0, 0): (1 - p) * (1 - f)}
    mean = plug = 0.0
    for outcome in itertools.product(chance, repeat=3):
        weight = np.prod([chance[draw] for draw in outcome])
        right, passes = [[d[0] for d in outcome]], [[d[1] for d in outcome]]
        mean += weight * resampling_utility(right, passes, [k], cost).mean[0]
        plug += weight * float(Resampling.from_draws(right, passes).utility(k, cost))
    assert mean == pytest.approx(truth)
    assert abs(plug - truth) > 1e-3


@pytest.mark.parametrize(
    "call",
    [
        lambda: Resampling.from_rates(1.2, 1.0, 0.0),
        lambda: Resampling.from_rates(0.5, np.nan, 0.0),
        lambda: Resampling.from_rates([0.5], 1.0, 0.0, weights=[-1.0]),
        lambda: Resampling.from_rates(0.5, 1.0, 0.0).utility(1, -1.0),
        lambda: Resampling.from_rates(0.5, 1.0, 0.0).accuracy(-1),
        lambda: Resampling.from_draws([[1]], [[1]], drawn=[0]),
        lambda: verifier_rates([[1]], [[1, 0]]),
        lambda: verifier_rates([[1]], [[1]], drawn=[2]),
        lambda: resampling_utility([[1]], [[1]], [2], 1.0),
        lambda: resampling_utility([[1]], [[1]], [1], -1.0),
    ],
)
def test_bad_input(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"must|needs"):
        call()
