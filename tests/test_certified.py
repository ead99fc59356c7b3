"""The certificate against its theorem: table, plain loop, enumeration, error by simulation, laws of a rule.

Simulations fail by chance with probability below `FALSE_ALARM` each; seeds are fixed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from math import comb, log
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from consilience.montecarlo.betting import (
    anytime_level,
    certified_after,
    e_bh,
    e_values,
    log_mixture,
    place_bets,
    wins_needed,
)
from consilience.rules import Rule, View
from consilience.run import solve
from consilience.testing import ScriptedServer, laws
from consilience.text.stopping.certified import Certified, in_order, run_statement
from consilience.text.voting.plurality import Plurality

FALSE_ALARM = 1e-6
REFERENCE = Path(__file__).parents[2] / "shared" / "anchors" / "certified_reference.py"
ERRORS = [0.05, 0.1, 0.2, 0.5]

EXPLICIT: dict[str, tuple[list[float], float]] = {
    "2: .95/.05": ([0.95, 0.05], 0),
    "2: .8/.2": ([0.8, 0.2], 0),
    "2: .7/.3": ([0.7, 0.3], 0),
    "2: .6/.4": ([0.6, 0.4], 0),
    "2: .55/.45": ([0.55, 0.45], 0),
    "2: .51/.49": ([0.51, 0.49], 0),
    "2: .5001/.4999": ([0.5001, 0.4999], 0),
    ".95 + .05 single": ([0.95], 0.05),
    ".9/.05/.05": ([0.9, 0.05, 0.05], 0),
    "3: .5/.3/.2": ([0.5, 0.3, 0.2], 0),
    "3: .4/.35/.25": ([0.4, 0.35, 0.25], 0),
    "3: .36/.32/.32": ([0.36, 0.32, 0.32], 0),
    "3: .334/.333/.333": ([0.334, 0.333, 0.333], 0),
    "4: .2503+3x.2499": ([0.2503, *[0.2499] * 3], 0),
    "10: .1009+9x.0999": ([0.1009, *[0.0999] * 9], 0),
    ".3+14x.05": ([0.3, *[0.05] * 14], 0),
    ".2+8x.1": ([0.2, *[0.1] * 8], 0),
    ".15+17x.05": ([0.15, *[0.05] * 17], 0),
    ".12+8x.11": ([0.12, *[0.11] * 8], 0),
    "geometric": ([*[0.5**k for k in range(1, 21)], 0.5**20], 0),
    "Zipf1 K=50": ([1 / k for k in range(1, 51)], 0),
    "Zipf1.5": ([k**-1.5 for k in range(1, 100_001)], 0),
    "Zipf2": ([float(k) ** -2 for k in range(1, 100_001)], 0),
    ".5 + .5 single": ([0.5], 0.5),
    ".3/.2 + .5 single": ([0.3, 0.2], 0.5),
    ".45/.35 + .2 single": ([0.45, 0.35], 0.2),
    ".1 + .9 single": ([0.1], 0.9),
    ".2/.1/.1/.1 + .5 single": ([0.2, 0.1, 0.1, 0.1], 0.5),
    ".3501/.3499 + .3 single": ([0.3501, 0.3499], 0.3),
}
"""Shares of the repeated answers, and of answers that each come once; the first is the mode."""


def rule(error: float = 0.05, most: int = 40) -> Rule:
    return Rule("certified", Certified(error, most), Plurality())


def sample(name: str, runs: int, draws: int, seed: int) -> np.ndarray:
    """int32 [runs, draws], answer 0 the mode, labels dense within each run."""
    shares, single = EXPLICIT[name]
    return sample_of(np.array(shares), single, runs, draws, seed)


def sample_of(shares: np.ndarray, single: float, runs: int, draws: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    edges = np.cumsum(shares) / shares.sum() * (1 - single)
    labels = np.searchsorted(edges, generator.random((runs, draws)), side="right")
    fresh = np.arange(draws) + len(shares)
    labels = np.where(labels >= len(shares), fresh, labels)
    if labels.max() > 60:  # rename in each run: the mode keeps 0, the others count up
        renamed = [np.unique(np.append(0, row), return_inverse=True)[1][1:] for row in labels]
        labels = np.array(renamed)
    return labels.astype(np.int32)


# ------------------------------------------------------------------------------------- the table and the mixture


def exact_mixture(a: int, b: int) -> Fraction:
    """M(a, b) as a fraction: the uniform part is P(Bin(n, 1/2) > b) 2^n / (n C(n-1, a)), n = a + b + 1."""
    n = a + b + 1
    uniform = Fraction(sum(comb(n, j) for j in range(b + 1, n + 1)), n * comb(n - 1, a))
    return Fraction(9, 10) * uniform + Fraction(1, 10) * Fraction(97, 50) ** a * Fraction(3, 50) ** b


def test_the_mixture_equals_exact_fractions_and_stays_finite_in_the_tail() -> None:
    for a, b in product(range(0, 40, 3), range(0, 40, 3)):
        value = exact_mixture(a, b)
        assert log_mixture(a, b) == pytest.approx(log(value.numerator) - log(value.denominator), abs=1e-10)
    for a, b in [(5, 1500), (170, 1830), (900, 3000), (1800, 200)]:
        value = exact_mixture(a, b)
        expected = log(value.numerator) - log(value.denominator)
        assert log_mixture(a, b) == pytest.approx(expected, rel=1e-10, abs=1e-9)


def test_the_mixture_rises_with_a_win_and_falls_with_a_loss() -> None:
    grid = np.arange(0, 400, 7)
    stakes = log_mixture(grid[:, None], grid)
    assert (np.diff(stakes, axis=0) > 0).all()
    assert (np.diff(stakes, axis=1) < 0).all()


@pytest.mark.parametrize(
    ("error", "entries"),
    [
        (0.05, [6, 10, 12, 15, 17, 19, 21, 22, 24, 26, 28, 29]),
        (0.1, [5, 8, 11, 13, 15, 17, 19, 21, 22, 24, 26, 27]),
        (0.01, [9, 13, 15, 18, 20, 22, 24, 26]),
    ],
)
def test_the_integer_table(error: float, entries: list[int]) -> None:
    assert wins_needed(error, 200)[: len(entries)].tolist() == entries


@pytest.mark.parametrize("error", [0.001, 0.01, 0.05, 0.1, 0.5, 0.9])
def test_the_table_is_exact_and_marks_what_is_out_of_reach(error: float) -> None:
    most = 60
    table, bound = wins_needed(error, most), 1 / Fraction(error)
    for losses, wins in enumerate(table.tolist()):
        if wins == most + 1:
            assert exact_mixture(most - losses, losses) < bound
        else:
            assert exact_mixture(wins, losses) >= bound
            assert wins == 0 or exact_mixture(wins - 1, losses) < bound


@pytest.mark.parametrize(("error", "draw"), [(0.05, 7), (0.1, 6), (0.01, 10)])
def test_unanimous_draws_are_certified_at_the_stated_draw(error: float, draw: int) -> None:
    after, answer = certified_after(np.full((1, 40), 3), error)
    assert (after[0], answer[0]) == (draw, 3)
    wants = [int(Certified(error).want(View.single(np.zeros((1, n), int)))[0, 0]) for n in range(draw + 2)]
    assert wants == [*range(draw, 0, -1), 0, 0]


# ----------------------------------------------------------------------------------- against a plain computation


def plain_stakes(answers: list[int]) -> Iterator[dict[object, Fraction]]:
    """The largest stake so far against each answer after each draw, from the definition, bet by bet, in fractions."""
    everyone = [*sorted({a for a in answers if a >= 0}), "unseen"]
    score = {m: [0, 0] for m in everyone}
    highest = dict.fromkeys(everyone, Fraction(1))
    for t, x in enumerate(answers):
        past = [a for a in answers[:t] if a >= 0]
        for m in everyone if x >= 0 else []:
            opponent = leader_of([a for a in past if a != m])
            if opponent is not None:
                score[m][0] += x == opponent
                score[m][1] += x == m
        highest = {m: max(highest[m], exact_mixture(*score[m])) for m in everyone}
        yield highest


def plain(answers: list[int], error: float) -> tuple[int, int]:
    """The draw of the certificate (0 = never) and its answer."""
    for t, highest in enumerate(plain_stakes(answers), 1):
        leader = leader_of([a for a in answers[:t] if a >= 0])
        if [m for m, stake in highest.items() if stake < 1 / Fraction(error)] == [leader]:
            assert leader is not None
            return t, leader
    return 0, -1


def leader_of(answers: list[int]) -> int | None:
    """The answer with the most votes; at a tie the one that had as many first."""
    counts: dict[int, int] = {}
    leader = None
    for a in answers:
        counts[a] = counts.get(a, 0) + 1
        if leader is None or counts[a] > counts[leader]:
            leader = a
    return leader


def random_runs(number: int, draws: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    runs = []
    for _ in range(number):
        classes = int(generator.integers(1, 7))
        run = generator.choice(classes, size=draws, p=generator.dirichlet(np.full(classes, 0.6)))
        runs.append(np.where(generator.random(draws) < generator.choice([0, 0.2]), -1, run))
    return runs


def test_decisions_equal_the_definition() -> None:
    runs = random_runs(120, 30, seed=1)
    for error in (0.05, 0.5):
        after, answer = certified_after(np.array(runs), error)
        expected = [plain(run.tolist(), error) for run in runs]
        assert list(zip(after.tolist(), answer.tolist(), strict=True)) == expected
        assert (after > 0).any()
        assert (after == 0).any()


def test_levels_equal_the_definition() -> None:
    runs = random_runs(60, 25, seed=14)
    for run, level in zip(runs, anytime_level(np.array(runs)), strict=True):
        *_, highest = plain_stakes(run.tolist())
        leader = leader_of([a for a in run.tolist() if a >= 0])
        least = min(stake for m, stake in highest.items() if m != leader)
        assert level == pytest.approx(float(1 / least) if highest[leader] < least else 1.0)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    if not REFERENCE.exists():
        pytest.skip("the slow reference implementation is not at hand; it is not part of this project")
    spec = importlib.util.spec_from_file_location("certified_reference", REFERENCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_decisions_and_levels_equal_the_slow_reference(reference: ModuleType) -> None:
    runs = random_runs(100, 80, seed=2)
    for error in (0.01, 0.05, 0.1, 0.5):
        after, answer = certified_after(np.array(runs), error)
        for run, draw, label in zip(runs, after, answer, strict=True):
            slow = reference.Certificate(error)
            first = 0
            for t, x in enumerate(run[run >= 0].tolist(), 1):
                if slow.add(x) is not None and not first:
                    first = int(np.flatnonzero(run >= 0)[t - 1]) + 1
                    break
            assert first == draw
            assert label == (-1 if slow.certified is None else slow.certified)
            judged = run[: draw or len(run)]
            assert anytime_level(judged[None])[0] == pytest.approx(slow.level(), rel=1e-9)


def test_the_table_equals_the_slow_reference(reference: ModuleType) -> None:
    for error in (0.05, 0.1, 0.01):
        for losses, wins in enumerate(wins_needed(error, 400)[:60].tolist()):
            assert reference.log_mix(wins, losses) >= -log(error) > reference.log_mix(wins - 1, losses)


# -------------------------------------------------------------------------------------------------- enumeration


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_the_expected_stake_against_a_mode_is_one_at_a_tie_and_at_most_one_else(classes: int) -> None:
    sequences = np.array(list(product(range(classes), repeat=8)), dtype=np.int32)
    bets = place_bets(sequences)
    stakes = np.exp(log_mixture(np.arange(9)[:, None], np.arange(9)))[bets.wins, bets.losses]
    uniform = np.full(len(sequences), 1 / len(sequences))
    expected = np.einsum("s,stm->tm", uniform, stakes[:, :, :classes])
    np.testing.assert_allclose(expected, 1, atol=1e-12)
    generator = np.random.default_rng(classes)
    strict = False
    for _ in range(20):
        shares = np.sort(generator.dirichlet(np.ones(classes)))[::-1]
        weights = shares[sequences].prod(1)
        expected = np.einsum("s,st->t", weights, stakes[:, :, 0])
        assert (expected <= 1 + 1e-12).all()
        strict |= bool((expected[-1] < 0.999).all())
    assert strict
    modes = np.array([2, 2, 1, 1][:classes]) / sum([2, 2, 1, 1][:classes])  # two modes: neither may gain
    weights = modes[sequences].prod(1)
    for mode in (0, 1):
        assert (np.einsum("s,st->t", weights, stakes[:, :, mode]) <= 1 + 1e-12).all()


def test_a_bet_on_a_model_that_drifts_is_fair_as_long_as_the_mode_stays() -> None:
    shares = np.array([[0.5, 0.5, 0], [0.4, 0.2, 0.4], [0.34, 0.33, 0.33], [0.9, 0, 0.1]])[[0, 1, 2, 3, 0, 1, 2]]
    sequences = np.array(list(product(range(3), repeat=7)), dtype=np.int32)
    bets = place_bets(sequences)
    weights = shares[np.arange(7), sequences].prod(1)
    stakes = np.exp(log_mixture(bets.wins[:, :, 0], bets.losses[:, :, 0]))
    assert (weights @ stakes <= 1 + 1e-12).all()


# --------------------------------------------------------------------------------------------------- simulation


def assert_rare(wrong: int, runs: int, error: float) -> None:
    """``wrong`` of ``runs`` is compatible with a probability of at most ``error`` (false alarm below FALSE_ALARM)."""
    assert wrong <= binom.isf(FALSE_ALARM, runs, error), f"{wrong} of {runs} wrong at error {error}"


@pytest.mark.parametrize("name", EXPLICIT)
def test_error_probability(name: str) -> None:
    many = EXPLICIT[name][1] or len(EXPLICIT[name][0]) > 5
    runs, draws = (300, 60) if many else (1500, 150)
    answers = sample(name, runs, draws, seed=5)
    for error in ERRORS:
        _, answer = certified_after(answers, error)
        assert_rare(int((answer > 0).sum()), runs, error)


@pytest.mark.parametrize("classes", [2, 3, 4, 6, 12])
def test_error_probability_at_exact_ties_with_a_designated_mode(classes: int) -> None:
    answers = sample_of(np.ones(classes), 0, 800, 150, seed=6)
    for error in ERRORS:
        after, answer = certified_after(answers, error)
        assert_rare(int((answer > 0).sum()), len(answers), error)
        if classes == 2:
            assert (after > 0).any()


def test_answers_that_come_once_are_as_good_as_no_answer_from_the_third_on() -> None:
    """The benchmark keeps two labels of them in each run; all others it turns into draws without an answer."""
    for name in (".5 + .5 single", ".3/.2 + .5 single", ".1 + .9 single"):
        answers = sample(name, 300, 55, seed=13)  # few enough to keep the labels as they are drawn
        common = len(EXPLICIT[name][0])
        assert answers.max() >= common + 40 or name != ".1 + .9 single"
        once = answers >= common
        number = once.cumsum(1)
        fewer = np.where(once, np.where(number <= 2, common + number - 1, -1), answers)
        for error in (0.05, 0.5):
            after, answer = certified_after(answers, error)
            again, other = certified_after(fewer, error)
            assert (after == again).all()
            assert (answer == other)[answer < common].all()
            assert (after > 0).any() or error == 0.05
        np.testing.assert_allclose(anytime_level(answers), anytime_level(fewer))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPLICIT)
def test_error_probability_at_length(name: str) -> None:
    shares, single = EXPLICIT[name]
    draws = 150 if single or len(shares) > 10 else 1000
    answers = sample(name, 3000, draws, seed=7)
    for error in ERRORS:
        _, answer = certified_after(answers, error)
        assert_rare(int((answer > 0).sum()), len(answers), error)


def test_a_batch_that_is_looked_at_as_a_whole_keeps_the_error() -> None:
    answers = sample_of(np.ones(2), 0, 2000, 96, seed=8)
    wrong = np.zeros(2000, bool)
    for looked in range(8, 97, 8):
        judged = answers[:, :looked]
        level = anytime_level(judged)
        leader = place_bets(judged).leader[:, -1]
        wrong |= (level <= 0.1) & (leader == 1)
    assert_rare(int(wrong.sum()), 2000, 0.1)
    assert wrong.sum() > 20  # not for lack of certificates


def test_clear_questions_are_certified_within_forty_draws() -> None:
    for name, least, largest in [
        ("2: .95/.05", 0.99, 1.0),
        ("2: .8/.2", 0.88, 0.96),
        ("2: .7/.3", 0.45, 0.57),
        ("2: .6/.4", 0.11, 0.2),
    ]:
        after, _ = certified_after(sample(name, 2000, 40, seed=9), 0.05)
        assert least <= (after > 0).mean() <= largest, name


# ------------------------------------------------------------------------------------- level, e-values, selection


def test_the_level_falls_below_the_error_exactly_when_the_rule_stops() -> None:
    for run in random_runs(60, 40, seed=3):
        levels = [anytime_level(run[None, :t])[0] for t in range(1, 41)]
        for error in (0.05, 0.3):
            after = int(certified_after(run[None], error)[0][0])
            if after:
                assert levels[after - 1] <= error
                assert all(level > error for level in levels[: after - 1])


def test_the_level_is_one_where_nothing_is_known() -> None:
    nothing = np.array([[-1, -1, -1], [0, -1, -1], [0, 1, 2]])
    assert anytime_level(nothing).tolist() == [1, 1, 1]
    assert anytime_level(np.zeros((2, 0), int)).tolist() == [1, 1]
    assert e_values(np.zeros((2, 0), int)).tolist() == [0, 0]
    assert e_values(np.array([[-1, -1]])).tolist() == [0]
    assert Certified().level(View.single(np.zeros((1, 7), int)))[0] == pytest.approx(1 / 20, rel=0.2)


def test_the_e_value_of_unanimous_draws_is_the_stake_against_the_unseen() -> None:
    value = e_values(np.zeros((1, 12), int))[0]
    assert value == pytest.approx(float(exact_mixture(11, 0)))
    assert anytime_level(np.zeros((1, 12), int))[0] == pytest.approx(1 / value)


def test_an_e_value_of_a_wrong_leader_has_expectation_at_most_one() -> None:
    sequences = np.array(list(product(range(3), repeat=8)), dtype=np.int32)
    leader = place_bets(sequences).leader[:, -1]
    for shares in ([0.34, 0.33, 0.33], [0.5, 0.49, 0.01], [0.6, 0.3, 0.1]):
        weights = np.array(shares)[sequences].prod(1)
        assert weights @ (e_values(sequences) * (leader != 0)) <= 1


def test_e_bh_by_hand() -> None:
    assert e_bh([100, 19, 13, 1], 0.1).tolist() == [True, False, False, False]  # r e >= 4 / .1
    assert e_bh([100, 19, 14, 1], 0.1).tolist() == [True, True, True, False]
    assert e_bh([39, 19, 13, 9], 0.1).tolist() == [False] * 4
    assert e_bh([np.inf], 0.5).tolist() == [True]
    assert e_bh([], 0.5).tolist() == []


@given(st.lists(st.floats(0, 1e4), max_size=12), st.floats(0.01, 0.9))
def test_e_bh_chooses_as_many_as_its_definition_allows(values: list[float], alpha: float) -> None:
    chosen = e_bh(values, alpha)
    count = max(
        (r for r in range(1, len(values) + 1) if sorted(values)[-r] * r >= len(values) / alpha),
        default=0,
    )
    assert chosen.sum() == count
    assert sorted(np.array(values)[chosen]) == sorted(values)[len(values) - count :]


def test_the_share_of_wrong_answers_among_the_selected() -> None:
    """A run of 40 coin flips and 40 clear questions, 150 times: the mean share of wrong ones is below alpha."""
    generator, alpha, shares = np.random.default_rng(10), 0.2, []
    for _ in range(150):
        coins = (generator.random((40, 60)) < 0.5).astype(np.int32)
        clear = (generator.random((40, 60)) < 0.1).astype(np.int32)
        view = View.single(np.concatenate([coins, clear]))
        chosen = Certified(error=0.1, max=60).select(view, alpha)
        wrong = chosen & (place_bets(view.answers[:, 0]).leader[:, -1] == 1)
        shares.append(wrong.sum() / max(1, chosen.sum()))
    assert np.mean(shares) <= alpha + 4 * np.std(shares) / np.sqrt(len(shares))
    assert chosen.sum() >= 40
    assert run_statement(chosen, alpha).startswith(
        f"of the {chosen.sum()} certified answers, in expectation at most 20 %"
    )


# ------------------------------------------------------------------------------------------------ laws of a rule

PARAMETERS = [(0.05, 40), (0.1, 16), (0.01, 30), (0.5, 12), (0.9, 6), (0.2, 64), (0.05, 7)]


@pytest.mark.parametrize(("error", "most"), PARAMETERS)
def test_pure_laws(error: float, most: int) -> None:
    laws.check_rule(rule(error, most), trials=400, seed=1)


@pytest.mark.parametrize(("error", "most"), PARAMETERS[:5])
def test_live_equals_replay(error: float, most: int) -> None:
    laws.check_live_equals_replay(rule(error, most), problems=25, seed=2)


def test_more_draws_never_undo_a_certificate() -> None:
    for error in (0.05, 0.5):
        answers = np.array(random_runs(300, 40, seed=4))
        after, _ = certified_after(answers, error)
        for drawn in range(41):
            want = Certified(error).want(View.single(answers, np.full(len(answers), drawn)))[:, 0]
            assert ((want == 0) == (((after > 0) & (after <= drawn)) | (drawn == 40))).all()


def test_want_is_never_more_than_the_best_continuation_needs() -> None:
    """Every continuation by one of the answers so far or a new one, breadth first, on short random prefixes."""
    stop, generator, met = Certified(error=0.5, max=30), np.random.default_rng(11), 0
    for _ in range(60):
        prefix = generator.integers(-1, 3, size=generator.integers(0, 10))
        want = int(stop.want(View.single(prefix[None]))[0, 0])
        fewest = next(n for n in range(6) if certifiable(prefix, n, stop.error)) if want <= 5 else None
        if fewest is not None:
            assert want <= fewest
            met += want == fewest
        else:
            assert want > 5
    assert met >= 40


def certifiable(prefix: np.ndarray, more: int, error: float) -> bool:
    tails = np.array(list(product(range(4), repeat=more)), dtype=np.int32).reshape(4**more, more)
    whole = np.concatenate([np.tile(prefix, (len(tails), 1)), tails], axis=1)
    return bool((certified_after(whole, error)[0] > 0).any())


def test_the_certified_answer_is_the_strict_plurality() -> None:
    answers = np.array(random_runs(400, 40, seed=12))
    after, answer = certified_after(answers, 0.3)
    for row, draw, label in zip(answers, after, answer, strict=True):
        if draw:
            votes = np.bincount(row[:draw][row[:draw] >= 0], minlength=7)
            assert (np.delete(votes, label) < votes[label]).all()
            assert Plurality().decide(View.single(row[None, :draw]))[0][0] == label


runs_of_draws = st.lists(st.integers(-1, 4), min_size=1, max_size=45)


@settings(max_examples=60)
@given(runs_of_draws, st.permutations(range(5)), st.sampled_from([0.05, 0.3]))
def test_names_carry_no_meaning(labels: list[int], names: list[int], error: float) -> None:
    renamed = [names[label] if label >= 0 else -1 for label in labels]
    after, answer = certified_after(np.array([labels]), error)
    again, other = certified_after(np.array([renamed]), error)
    assert after[0] == again[0]
    assert other[0] == (names[answer[0]] if answer[0] >= 0 else -1)
    assert anytime_level(np.array([labels]))[0] == anytime_level(np.array([renamed]))[0]


@settings(max_examples=60)
@given(runs_of_draws, st.sampled_from([0.05, 0.3]))
def test_a_draw_without_an_answer_changes_nothing_but_the_count(labels: list[int], error: float) -> None:
    answered = [label for label in labels if label >= 0]
    after, answer = certified_after(np.array([labels]), error)
    without, same = certified_after(np.array([answered], dtype=np.int32).reshape(1, -1), error)
    assert answer[0] == same[0]
    assert without[0] == sum(label >= 0 for label in labels[: after[0]])
    assert anytime_level(np.array([labels]))[0] == anytime_level(np.array([answered], dtype=np.int32).reshape(1, -1))[0]


def test_the_benchmark_runs_and_meets_what_does_not_depend_on_its_size(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "certified.py"
    picture = tmp_path / "certified.png"
    flags = ["--runs", "30", "--cap", "60", "--tie-runs", "50", "--tie-draws", "60", "--plot", str(picture), "--json"]
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(EXPLICIT) == {name.replace(" .5^k", "").replace(" K=1e5", "") for name in result["distributions"]}
    met = {one["demand"]: one["met"] for one in result["demands"]}
    assert met["unanimous draws: 7, 6, 10 at 0.05, 0.1, 0.01"]
    assert met["enumeration, 8 draws, 2 to 4 equal answers: expected stake 1"]
    assert picture.stat().st_size < 80_000


def test_arms_are_judged_by_index_then_arm_up_to_the_first_missing_draw() -> None:
    answers = np.array([[[0, 0, 0, 0], [1, 1, 1, 1]]], dtype=np.int32)
    sequence, length = in_order(View(answers, np.array([[3, 2]], dtype=np.int32)), 40)
    assert (sequence.tolist(), length.tolist()) == ([[0, 1, 0, 1, 0]], [5])
    sequence, length = in_order(View(answers, np.array([[1, 3]], dtype=np.int32)), 40)
    assert (sequence.tolist(), length.tolist()) == ([[0, 1]], [2])  # draw 1 of arm 0 is missing
    same = np.zeros((1, 2, 8), np.int32)
    drawn = np.zeros((1, 2), np.int32)
    wants = []
    while (want := Certified().want(View(same, drawn))).any():
        wants.append(want.tolist())
        drawn = drawn + want
    assert wants == [[[4, 3]]]  # seven draws in all


@pytest.mark.parametrize(
    "build",
    [
        lambda: Certified(error=0),
        lambda: Certified(error=1),
        lambda: Certified(error=float("nan")),
        lambda: Certified(max=0),
        lambda: Certified(max=10_001),
        lambda: Certified(error=0.05, max=6),
        lambda: wins_needed(0.05, -1),
        lambda: place_bets(np.zeros(3, int)),
        lambda: log_mixture(-1, 0),
        lambda: e_bh([-1.0], 0.1),
        lambda: e_bh([float("nan")], 0.1),
        lambda: e_bh([[1.0]], 0.1),
        lambda: e_bh([1.0], 1.0),
    ],
)
def test_bad_input_is_refused(build) -> None:
    with pytest.raises(ValueError, match="must"):
        build()


def test_a_run_says_what_its_certificates_are_worth(tmp_path: Path) -> None:
    questions = [{"question": f"question {n}", "kind": "text"} for n in range(30)]
    split = {f"question {n}": {"yes": 1.0} if n < 24 else {"yes": 0.5, "no": 0.5} for n in range(30)}
    with ScriptedServer(answers=split) as server:
        run = solve(
            questions,
            model=f"openai:m@{server.url}",
            policy="certified:error=0.05,max=12",
            ledger=str(tmp_path / "l.db"),
            config=None,
        )
    said = run.totals["statement"]
    verdicts = [problem.verdict for problem in run.problems]
    sure = sum(verdict.decided for verdict in verdicts)
    assert said.startswith(f"{sure} of 30 answers are certified; in expectation at most 1.5 of")
    assert said in run.notes
    for verdict in verdicts:
        assert verdict.decided == (verdict.model_extra["level"] <= 0.05)
        assert verdict.model_extra["e_value"] >= 0
    selected = int(e_bh(np.array([verdict.model_extra["e_value"] for verdict in verdicts]), 0.1).sum())
    assert f"Of the {selected} answers" in said
    assert selected >= 20
    assert solve(questions[:2], policy="one", model="house", ledger=str(tmp_path / "l.db")).totals["statement"] is None
