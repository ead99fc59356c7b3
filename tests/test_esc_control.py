"""The control scheme of early-stopping self-consistency: exact enumeration, simulation, limits, the choice.

The simulations fail by chance with probability below 1e-6 each (5 standard errors); seeds are fixed.
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import prod, sqrt

import numpy as np
import pytest

from consilience.rules import View
from consilience.text.stopping.esc import EarlyStopping
from consilience.text.stopping.esc_control import (
    answer_shares,
    choose,
    cut_short,
    expected_draws,
    forecast,
    vote_fails,
)
from consilience.text.voting.plurality import Plurality

SHARES = ((0.6, 0.4), (0.5, 0.3, 0.2), (0.7, 0.2), (1.0,), (1 / 3, 1 / 3, 1 / 3))


def enumerated(shares: tuple[float, ...], window: int, most: int) -> tuple[float, float, float]:
    """Mean draws, chance of an early end by another answer than the first, and chance that the vote of ``most`` fails.

    Over all sequences; what is missing to 1 is a draw without an answer.
    """
    weights = [*shares, 1 - sum(shares)]
    draws = cut = fails = 0.0
    for sequence in product(range(len(weights)), repeat=most):
        weight = prod(weights[answer] for answer in sequence)
        if weight <= 0:
            continue
        ends = (k for k in range(window, most, window) if len(set(sequence[k - window : k])) == 1)
        end = next((k for k in ends if sequence[k - 1] < len(shares)), most)
        draws += weight * end
        cut += weight * (end < most and sequence[end - 1] > 0)
        votes = Counter(answer for answer in sequence if answer < len(shares))
        fails += weight * (bool(votes) and votes.most_common(1)[0][0] != 0)
    return draws, cut, fails


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize(("window", "most"), [(1, 3), (2, 6), (2, 7), (3, 7), (4, 4), (3, 8)])
def test_forecast_of_known_shares_is_exact(shares: tuple[float, ...], window: int, most: int) -> None:
    table = np.array([shares])
    draws, cut, fails = enumerated(shares, window, most)
    assert expected_draws(table, window, most)[0] == pytest.approx(draws, abs=1e-12)
    assert cut_short(table, window, most)[0] == pytest.approx(cut, abs=1e-12)
    bound = vote_fails(table, most)[0]
    assert bound >= fails - 1e-12
    if len(shares) <= 2 and sum(shares) > 1 - 1e-9:
        assert bound == pytest.approx(fails, abs=1e-12)


def test_expected_draws_are_those_of_the_rule() -> None:
    generator = np.random.default_rng(5)
    shares = np.array([[0.55, 0.25, 0.15, 0.05], [0.9, 0.06, 0.04, 0.0], [0.3, 0.3, 0.2, 0.2]])
    for window, most in ((5, 40), (4, 30), (8, 20)):
        for question in shares:
            labels = generator.choice(4, size=(20_000, most), p=question).astype(np.int32)
            drawn, _ = EarlyStopping(window, most).stopping_index(View.single(labels))
            error = drawn.std() / sqrt(len(drawn))
            assert abs(drawn.mean() - expected_draws(question[None], window, most)[0]) <= 5 * error + 1e-9


def test_missed_covers_what_the_rule_misses() -> None:
    """On draws with known shares, the verdict of the rule misses the first answer no more often than forecast."""
    generator = np.random.default_rng(6)
    shares = np.array([[0.5, 0.3, 0.2]])
    for window, most in ((2, 10), (3, 20), (5, 40)):
        labels = generator.choice(3, size=(20_000, most), p=shares[0]).astype(np.int32)
        drawn, _ = EarlyStopping(window, most).stopping_index(View.single(labels))
        winner, _ = Plurality().decide(View.single(labels, drawn))
        missed = float((winner != 0).mean())
        predicted = float(cut_short(shares, window, most)[0] + vote_fails(shares, most)[0])
        error = sqrt(0.25 / len(labels))
        assert missed <= predicted + 5 * error


def test_limits() -> None:
    unanimous = np.zeros((4, 5), int)
    sure = forecast(unanimous, (3, 5), (5, 40))
    assert sure.draws.tolist() == [[3, 3], [5, 5]]
    assert not sure.cut.any()
    assert not sure.missed.any()
    different = np.arange(5)[None].repeat(3, axis=0)
    open_ = forecast(different, (5, 10), (10, 40))
    q = 5 * 0.2**5
    assert open_.draws[0, 1] == pytest.approx(5 * (1 - (1 - q) ** 8) / q)
    silent = forecast(np.full((2, 5), -1), (5,), (40,))
    assert silent.draws.tolist() == [[40.0]]
    assert silent.missed.tolist() == [[0.0]]


def test_shares_are_of_all_draws() -> None:
    assert answer_shares(np.array([[3, 3, 1, -1], [-1, -1, -1, -1]])).tolist() == [[0.5, 0.25, 0, 0], [0, 0, 0, 0]]


def test_a_larger_window_costs_more_and_is_cut_less() -> None:
    labels = np.random.default_rng(7).choice(4, size=(50, 10), p=[0.6, 0.2, 0.1, 0.1])
    predicted = forecast(labels, (2, 4, 5, 10), (20, 40))
    assert (np.diff(predicted.draws, axis=0) > 0).all()
    assert (np.diff(predicted.cut, axis=0) < 0).all()
    assert (np.diff(predicted.draws, axis=1) >= 0).all()


def test_choice() -> None:
    labels = np.random.default_rng(8).choice(4, size=(50, 10), p=[0.6, 0.2, 0.1, 0.1])
    predicted = forecast(labels, (2, 4, 5, 10, 30), (10, 20, 40))
    assert np.isnan(predicted.draws[4, :2]).all()
    for budget in (5.0, 9.0, 15.0, 40.0):
        rule = choose(predicted, budget=budget)
        at = predicted.windows.index(rule.window), predicted.maxes.index(rule.max)
        assert predicted.draws[at] <= budget
        assert predicted.loss[at] == np.nanmin(predicted.loss[predicted.draws <= budget])
    for tolerance in (0.0, 0.05, 1.0):
        rule = choose(predicted, tolerance=tolerance)
        at = predicted.windows.index(rule.window), predicted.maxes.index(rule.max)
        assert predicted.loss[at] <= tolerance
        assert predicted.draws[at] == np.nanmin(predicted.draws[predicted.loss <= tolerance])
    assert choose(predicted, tolerance=1.0) == EarlyStopping(2, 10)
    with pytest.raises(ValueError, match="draws per question must be allowed"):
        choose(predicted, budget=1.0)
    with pytest.raises(ValueError, match="at least a tolerance of 0"):
        choose(predicted, tolerance=-0.1)
    with pytest.raises(ValueError, match="either"):
        choose(predicted)
    with pytest.raises(ValueError, match="either"):
        choose(predicted, budget=9, tolerance=0.1)


@pytest.mark.parametrize(
    ("labels", "windows", "maxes"),
    [
        (np.zeros((0, 5)), (5,), (40,)),
        (np.zeros((5, 0)), (5,), (40,)),
        (np.zeros(5), (5,), (40,)),
        (np.zeros((5, 5)), (), (40,)),
        (np.zeros((5, 5)), (0,), (40,)),
        (np.zeros((5, 5)), (50,), (40,)),
    ],
)
def test_bad_input_is_refused(labels: np.ndarray, windows: tuple[int, ...], maxes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        forecast(labels, windows, maxes)
