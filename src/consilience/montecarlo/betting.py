"""Is the leading answer a most probable answer of the model? A certificate by betting, valid at any number of looks.

For every answer m, also one never seen, somebody who believes "m is a mode" is offered a bet before each draw: the
next draw is the leader among the answers other than m, not m itself. If m is a mode, the bet is fair or worse, so
whoever multiplies his stake by 1/error shows, at that error, that m is none (Ville 1939). An answer is certified when
it leads and every other one has been eliminated. There is no union bound: only the process of one fixed mode has to
stay below 1/error. Theorem and proof: ``docs/guide/certified.md``.

Answers are int [problems, draws] in the order of drawing, -1 = a draw without an answer (no bet is won or lost).
The stake of "m is a mode" after ``a`` wins and ``b`` losses is a mixture over the odds,
``M(a, b) = Int (2 t)^a (2 (1 - t))^b pi(dt)`` with pi = 0.9 uniform on [1/2, 1] + 0.1 in the point 0.97. ``M`` rises
with a win and falls with a loss, so the rule is an integer table (`wins_needed`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int = NDArray[np.int32]
Float = NDArray[np.float64]
Bool = NDArray[np.bool_]

ATOM = 0.97
"""The odds that get a weight of their own: unanimous draws are certified one draw earlier than without it."""

ATOM_WEIGHT = 0.1
"""Prior weight of `ATOM`; the rest is uniform on [1/2, 1]."""

CELLS = 300_000
"""Problems times draws times classes that are worked on together: bounds the memory, and suits the cache."""

TAIL_TERMS = 80
"""Terms of the binomial tail where it is smaller than the smallest float; their ratio is below 0.5 there."""


# ------------------------------------------------------------------------------------------------ the mixture


def log_mixture(wins: ArrayLike, losses: ArrayLike) -> Float:
    """log M(a, b), the log of the stake after ``a`` wins and ``b`` losses; broadcasts, float64.

    The uniform part is ``2^n B(a+1, b+1) P(Bin(n, 1/2) > b)`` with n = a + b + 1, by ``betaln`` and ``betainc``; far
    in the tail, where ``betainc`` is 0, the probability is summed in the log domain. Absolute error below 1e-9 up to
    20,000 draws. Raises ValueError on negative counts.
    """
    from scipy.special import betaln  # type: ignore[import-untyped,unused-ignore]

    a, b = np.broadcast_arrays(np.asarray(wins, dtype=np.float64), np.asarray(losses, dtype=np.float64))
    if (a < 0).any() or (b < 0).any():
        raise ValueError("wins and losses must not be negative")
    uniform = np.log1p(-ATOM_WEIGHT) + (a + b + 1) * np.log(2) + betaln(a + 1, b + 1) + _log_tail(a, b)
    point = np.log(ATOM_WEIGHT) + a * np.log(2 * ATOM) + b * np.log(2 - 2 * ATOM)
    return np.logaddexp(uniform, point)


def _log_tail(a: Float, b: Float) -> Float:
    """log P(Bin(a + b + 1, 1/2) > b)."""
    from scipy.special import betainc, betaln

    probability = np.asarray(betainc(b + 1, a + 1, 0.5))
    tiny = probability < 1e-290
    log_tail = np.array(np.log(np.where(tiny, 1.0, probability)))
    if tiny.any():
        few, many = a[tiny], b[tiny]
        n = few + many + 1
        log_first = -np.log(n + 1) - betaln(many + 2, few + 1) - n * np.log(2)  # C(n, b+1) / 2^n
        ratios = (few[:, None] - np.arange(TAIL_TERMS)).clip(min=0) / (many[:, None] + 2 + np.arange(TAIL_TERMS))
        log_tail[tiny] = log_first + np.log1p(ratios.cumprod(1).sum(1))
    return log_tail


@lru_cache(maxsize=64)
def wins_needed(error: float, most: int) -> Int:
    """Wins that eliminate an answer with 0, 1, ..., ``most`` losses, least a with M(a, b) >= 1/error; read-only.

    int32 [most + 1], strictly increasing up to the entries that ``most`` draws cannot reach, which are most + 1. The
    first entries at error 0.05: 6 10 12 15 17 19 21 22 24 26 28 29. Costs one evaluation per entry of the walk, at
    most 2 ``most``. Raises ValueError unless 0 < error < 1 and most >= 0.
    """
    if not 0 < error < 1:
        raise ValueError(f"error must lie strictly between 0 and 1, got {error}")
    if most < 0:
        raise ValueError(f"most must not be negative, got {most}")
    table = np.full(most + 1, most + 1, dtype=np.int32)
    bound = -float(np.log(error))
    wins = 0
    for losses in range(most + 1):
        while wins + losses <= most and log_mixture(wins, losses) < bound:
            wins += 1
        if wins + losses > most:
            break
        table[losses] = wins
    table.setflags(write=False)
    return table


# --------------------------------------------------------------------------------------------------- the bets


@dataclass(frozen=True, slots=True)
class Bets:
    """The bets after each draw, for every class and, in the last column, for any answer not given so far.

    votes, wins, losses: int32 [problems, draws, classes + 1]; leader: int32 [problems, draws], the class with the
    most votes after that draw, -1 = no answer yet. A tie is led by the class that reached the count first.
    """

    votes: Int
    wins: Int
    losses: Int
    leader: Int

    def eliminated(self, needed: Int) -> Bool:
        """Which classes have been eliminated by each draw (for good); bool [problems, draws, classes + 1]."""
        return np.logical_or.accumulate(self.wins >= needed[self.losses], axis=1)


def place_bets(answers: ArrayLike) -> Bets:
    """Every bet on ``answers`` (int [problems, draws], -1 = none), each placed on what was known before its draw.

    The bet against m is on the leader among the other answers: the overall leader, or the runner-up where m itself
    leads, or none where no other answer was given yet. It wins when that answer comes, loses when m comes, and
    stands otherwise. Costs O(problems x draws x classes), without a loop over draws.
    """
    table = np.asarray(answers, dtype=np.int32)
    if table.ndim != 2:
        raise ValueError(f"answers must be [problems, draws], got shape {table.shape}")
    columns = np.arange(int(table.max(initial=-1)) + 2, dtype=np.int32)
    given = table[:, :, None] == columns
    votes = given.cumsum(1, dtype=np.int32)
    leader, second = _first_two(given, votes)
    before, behind = _one_later(leader), _one_later(second)
    leads = columns == before[:, :, None]
    answered = table >= 0
    hit_leader, hit_second = answered & (table == before), answered & (table == behind)
    wins = np.where(leads, hit_second[:, :, None], hit_leader[:, :, None])
    opposed = np.where(leads, (behind >= 0)[:, :, None], (before >= 0)[:, :, None])
    return Bets(votes, wins.cumsum(1, dtype=np.int32), (given & opposed).cumsum(1, dtype=np.int32), leader)


def _first_two(given: Bool, votes: Int) -> tuple[Int, Int]:
    """Leader and runner-up after each draw, int32 [problems, draws] each, -1 = none.

    More votes first; among equals the one that has had them for longer, so that the incumbent keeps its place.
    """
    draws = given.shape[1]
    time = np.arange(1, draws + 1, dtype=np.int32)[:, None]
    reached = np.maximum.accumulate(np.where(given, time, np.int32(0)), axis=1)
    rank = votes * np.int32(draws + 1) - reached
    leader, exists = rank.argmax(2), rank.max(2) > 0
    np.put_along_axis(rank, leader[:, :, None], 0, axis=2)
    second, follows = rank.argmax(2), rank.max(2) > 0
    return np.where(exists, leader, -1).astype(np.int32), np.where(follows, second, -1).astype(np.int32)


def _one_later(values: Int) -> Int:
    """``values`` [problems, draws] as they stood before each draw."""
    return np.concatenate([np.full((len(values), 1), -1, np.int32), values[:, :-1]], axis=1)[:, : values.shape[1]]


def certified(bets: Bets, eliminated: Bool) -> Bool:
    """Whether the leader is the only answer left after each draw, bool [problems, draws].

    That the answers not given so far are eliminated is part of it. At the first such draw the leader is strictly
    ahead: it came while it was leading, as rivals are eliminated by nothing else, or has just overtaken.
    """
    left = ~eliminated
    leads = np.take_along_axis(left, bets.leader[:, :, None].clip(min=0), axis=2)[:, :, 0]
    return (left.sum(2) == 1) & leads & (bets.leader >= 0)


def certified_after(answers: ArrayLike, error: float) -> tuple[Int, Int]:
    """The draw with which an answer is first certified, 1, 2, ..., 0 = never, and that answer, -1 = none.

    answers: int [problems, draws], -1 = none. Returns int32 [problems] each. The probability that an answer is
    certified that is not a mode is at most ``error`` for each problem, whatever its number of draws. Raises
    ValueError unless 0 < error < 1.
    """
    table = np.asarray(answers, dtype=np.int32)
    needed = wins_needed(error, table.shape[1])
    after, answer = np.zeros(len(table), np.int32), np.full(len(table), -1, np.int32)
    for rows in blocks(table):
        bets = place_bets(table[rows])
        sure = certified(bets, bets.eliminated(needed))
        found = sure.any(1)
        first = sure.argmax(1) if sure.shape[1] else np.zeros(len(sure), np.intp)
        after[rows][found] = first[found] + 1
        answer[rows][found] = bets.leader[found, first[found]]
    return after, answer


def blocks(answers: Int) -> Iterator[slice]:
    """Slices of the rows of ``answers`` [problems, draws] whose `Bets` fit into memory together."""
    per_row = max(1, answers.shape[1]) * (int(answers.max(initial=-1)) + 2)
    step = max(1, CELLS // per_row)
    return (slice(start, start + step) for start in range(0, len(answers), step))


# ------------------------------------------------------------------------------------- what a cap leaves behind


def anytime_level(answers: ArrayLike) -> Float:
    """The least error at which the leader would be certified after the last draw: an anytime-valid p-value.

    answers: int [problems, draws], -1 = none (also for draws that are not to be judged). float64 [problems] in
    (0, 1]: 1 / (least running maximum of the stakes against every answer but the leader, those never given among
    them); 1 without a leader, and where the leader's own maximum is as large, so that no error leaves it alone.
    P(some look has level <= x and a leader that is not a mode) <= x for every x. Source: Ville 1939; Ramdas et al.
    2023, arXiv 2210.01948.
    """
    table = _at_least_one_draw(answers)
    level = np.ones(len(table))
    for rows in blocks(table):
        bets = place_bets(table[rows])
        highest = _log_stakes(bets.wins, bets.losses).max(1)
        leader = bets.leader[:, -1]
        own, least = _leader_and_rest(highest, leader)
        level[rows] = np.where((leader >= 0) & (own < least), np.exp(-least.clip(min=0)), 1.0)
    return level


def e_values(answers: ArrayLike) -> Float:
    """The evidence for the leader: the least present stake against any other answer; float64 [problems], 0 = no leader.

    answers: int [problems, draws], -1 = none. Not the running maximum: for any stopping time, the expectation of
    ``e * (the leader is not a mode)`` is at most 1, which is what `e_bh` needs. May be inf beyond 1e308.
    """
    table = _at_least_one_draw(answers)
    values = np.zeros(len(table))
    for rows in blocks(table):
        bets = place_bets(table[rows])
        leader = bets.leader[:, -1]
        _, least = _leader_and_rest(log_mixture(bets.wins[:, -1], bets.losses[:, -1]), leader)
        with np.errstate(over="ignore"):
            values[rows] = np.where(leader >= 0, np.exp(least), 0.0)
    return values


def e_bh(e_values: ArrayLike, alpha: float) -> Bool:
    """Choose questions so that the expected share whose leader is not a mode is at most ``alpha``; bool [questions].

    With r chosen, each has ``e >= questions / (alpha r)``; r is the largest possible. Holds whatever the dependence
    between the questions. e_values: float [questions], of *all* questions of the run, from `e_values` at stopping
    times. Proof: the chosen and wrong ones' share is at most ``alpha / questions`` times the sum of ``e`` over the
    wrong ones, and each of those has expectation at most 1. Raises ValueError on negative or nan values and unless
    0 < alpha < 1. Source: Wang and Ramdas 2022 (e-BH), arXiv 2009.02824.
    """
    values = np.asarray(e_values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"e_values must be [questions], got shape {values.shape}")
    if not (values >= 0).all():
        raise ValueError("e_values must not be negative or nan")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha}")
    largest = np.sort(values)[::-1]
    rank = np.arange(1, len(values) + 1)
    enough = np.flatnonzero(largest * rank >= len(values) / alpha)
    if not enough.size:
        return np.zeros(len(values), bool)
    return values >= largest[enough[-1]]


def _at_least_one_draw(answers: ArrayLike) -> Int:
    """``answers``, with one draw without an answer (which changes nothing) where there is none."""
    table = np.asarray(answers, dtype=np.int32)
    return table if table.ndim != 2 or table.shape[1] else np.full((len(table), 1), -1, np.int32)


def _log_stakes(wins: Int, losses: Int) -> Float:
    """`log_mixture` of arrays with few distinct pairs."""
    base = int(losses.max(initial=0)) + 1
    pairs, where = np.unique(wins.astype(np.int64) * base + losses, return_inverse=True)
    return log_mixture(pairs // base, pairs % base)[where].reshape(wins.shape)


def _leader_and_rest(values: Float, leader: Int) -> tuple[Float, Float]:
    """The leader's value and the least of the others, float64 [problems] each; values [problems, classes + 1]."""
    column = leader[:, None].clip(min=0)
    own = np.take_along_axis(values, column, axis=1)[:, 0]
    rest = values.copy()
    np.put_along_axis(rest, column, np.inf, axis=1)
    return own, rest.min(1)
