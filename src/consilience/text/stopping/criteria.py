"""The criteria of adaptive consistency: has the leading answer won?

Each has two methods. ``stops(labels)``, bool [draws, rows], says after every draw of ``labels`` [draws, rows], -1 =
none, whether the criterion holds; ``missing(counts)``, int32 [rows], says of vote counts [rows, classes], in falling
order, how many further draws are certainly needed until it can hold, 0 = it holds.

Source: Aggarwal et al. 2023, arXiv 2305.11860 (``beta``: section 2.2). The other criteria, and every default threshold,
are those of the authors' package AdaptiveConsistency 1.0.0, whose Dirichlet probability is a numerical integral over
all shares where ours is one-dimensional.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from consilience.montecarlo.dirichlet import largest_share, largest_share_exact
from consilience.rules import Float, Int
from consilience.text.stopping.counts import Bool, Counts, running_counts, top_counts

LOOKAHEAD = 16
"""Further draws that ``missing`` looks through where it has to try them; more are asked for in a second step."""

SLACK = 1e-12
"""What the comparison of two sums of logarithms may lose to rounding; a tie counts as reached."""

CLOSE = 1e-9
"""Distance from the threshold below which a Dirichlet probability is computed exactly."""


class Criterion(Protocol):
    """When the leading answer has won."""

    def stops(self, labels: Counts) -> Bool:
        """Whether the criterion holds after every draw; bool [draws, rows]."""

    def missing(self, counts: Int) -> Int:
        """Draws that are certainly needed until it can hold; int32 [rows]."""


@dataclass(frozen=True, slots=True)
class Beta:
    """The leader's share is above the runner-up's with posterior probability at least ``threshold``.

    With a uniform prior on the share among the two, P(Beta(v1 + 1, v2 + 1) > 1/2): an integer table, `votes_needed`.
    """

    threshold: float
    most: int
    least: ClassVar[float] = 0.5

    def stops(self, labels: Counts) -> Bool:
        """See the module."""
        first, second = top_counts(labels, 2)
        return np.asarray(first >= self._needed()[second])

    def missing(self, counts: Int) -> Int:
        """Votes that the leader needs in a row: no other course is shorter."""
        return (self._needed()[counts[:, 1]] - counts[:, 0]).clip(min=0).astype(np.int32)

    def _needed(self) -> NDArray[np.int16]:
        return votes_needed(self.threshold, self.most).astype(np.int16)


@dataclass(frozen=True, slots=True)
class Dirichlet:
    """The leader's share is the largest with posterior probability at least ``threshold``, given a uniform prior.

    The shares are those of the five most frequent answers; with two or fewer it is the `Beta` criterion. It implies
    that one, since the runner-up is among the others.
    """

    threshold: float
    most: int
    least: ClassVar[float] = 0.5
    places: ClassVar[int] = 5

    def stops(self, labels: Counts) -> Bool:
        """See the module."""
        counts = np.stack(top_counts(labels, self.places), axis=-1)
        ahead: Bool = Beta(self.threshold, self.most)._needed()[counts[..., 1]] <= counts[..., 0]
        ahead[ahead] = self._reached(counts[ahead])
        return ahead

    def missing(self, counts: Int) -> Int:
        """Votes that the leader needs in a row; at least what `Beta` needs."""
        low = Beta(self.threshold, self.most).missing(counts)
        near = np.flatnonzero(low + counts.sum(1) <= self.most)
        top = counts[near, : self.places]
        top[:, 0] += low[near]

        def holds(rows: NDArray[np.intp], extra: int) -> Bool:
            raised = top[rows]
            raised[:, 0] += extra
            return self._reached(raised)

        low[near] += _search(len(near), holds)
        return low

    def _reached(self, counts: Counts) -> Bool:
        """Whether the criterion holds of ``counts`` [states, places] that meet `Beta`; bool [states]."""
        held = np.ones(len(counts), bool)
        for classes in range(3, counts.shape[1] + 1):
            at = np.count_nonzero(counts, axis=1) == classes
            if at.any():
                held[at] = self._decide(counts[at, :classes])
        return held

    def _decide(self, counts: Counts) -> Bool:
        states, where = np.unique(counts.astype(np.int32), axis=0, return_inverse=True)
        probability = largest_share(states)
        held = probability >= self.threshold
        for state in np.flatnonzero(abs(probability - self.threshold) < CLOSE):
            held[state] = largest_share_exact(states[state]) >= Fraction(self.threshold)
        return np.asarray(held[where.ravel()])


@dataclass(frozen=True, slots=True)
class Entropy:
    """The entropy of the answers' shares, over its largest value for that many answers, is at most ``threshold``.

    A single answer is taken together with one vote for another, and nothing holds before the second vote.
    """

    threshold: float
    most: int
    least: ClassVar[float] = 0.0

    def stops(self, labels: Counts) -> Bool:
        """See the module."""
        own = running_counts(labels)
        steps = np.diff(_xlogx(int(own.max(initial=0))), prepend=0.0)
        classes, votes = (own == 1).cumsum(0), (own > 0).cumsum(0)
        return self._low(votes, classes, steps[own].cumsum(0))

    def missing(self, counts: Int) -> Int:
        """The fewest draws, over all ways to spread them.

        With a given number of new answers the entropy is least when each has one vote and the leader all others; the
        number of new answers is tried out, for each of the next `LOOKAHEAD` draws.
        """
        table = _xlogx(self.most + LOOKAHEAD)
        votes, classes = counts.sum(1), np.count_nonzero(counts, axis=1).clip(min=1)
        rest = table[counts[:, 1:]].sum(1)

        def holds(rows: NDArray[np.intp], extra: int) -> Bool:
            new = np.arange(extra + 1)
            leader = counts[rows, :1] + extra - new
            sums = rest[rows, None] + table[leader]
            low = self._low((votes[rows] + extra)[:, None], classes[rows, None] + new, sums)
            return np.asarray((low & (leader > 0)).any(1))

        return _search(len(counts), holds)

    def _low(self, votes: NDArray[np.integer], classes: NDArray[np.integer], sums: Float) -> Bool:
        """Whether the scaled entropy is low; ``sums`` of c log2 c over the answers, all of one shape."""
        total = votes + (classes == 1)
        scaled = np.log2(total.clip(min=2)) * total - sums
        return np.asarray((votes > 1) & (scaled <= (self.threshold + SLACK) * total * np.log2(classes.clip(min=2))))


@dataclass(frozen=True, slots=True)
class Majority:
    """The leader's share of the votes is at least ``threshold``; nothing holds before the second vote."""

    threshold: float
    most: int
    least: ClassVar[float] = 0.0

    def stops(self, labels: Counts) -> Bool:
        """See the module."""
        first = running_counts(labels)
        votes = (first > 0).cumsum(0, dtype=np.int16)
        (leader,) = top_counts(labels, 1)
        return np.asarray(votes - leader <= self._others()[votes])

    def missing(self, counts: Int) -> Int:
        """Votes that the leader needs in a row: no other course is shorter."""
        votes = counts.sum(1)
        against, others = votes - counts[:, 0], self._others()
        enough = np.searchsorted(others, against)
        return np.where(against <= others[votes], 0, enough - votes).astype(np.int32)

    def _others(self) -> NDArray[np.int16]:
        return _others_allowed(self.threshold, self.most)


Criteria = Beta | Dirichlet | Entropy | Majority


def _search(rows: int, holds: Callable[[NDArray[np.intp], int], Bool]) -> Int:
    """The least ``extra`` with ``holds(rows, extra)``, int32 [rows], at most `LOOKAHEAD`."""
    result = np.full(rows, LOOKAHEAD, np.int32)
    left = np.arange(rows)
    for extra in range(LOOKAHEAD):
        if not left.size:
            break
        found = holds(left, extra)
        result[left[found]] = extra
        left = left[~found]
    return result


@lru_cache(maxsize=64)
def _xlogx(most: int) -> Float:
    """c log2 c for c = 0, ..., ``most``; read-only."""
    counts = np.arange(most + 1.0)
    table = counts * np.log2(counts.clip(min=1))
    table.setflags(write=False)
    return table


@lru_cache(maxsize=64)
def _others_allowed(threshold: float, most: int) -> NDArray[np.int16]:
    """Votes that may go to other answers among 0, 1, ..., ``most``; int16 [most + 1], never falling, -1 = none yet."""
    votes = np.arange(most + 1)[:, None]
    near = np.ceil(votes * threshold).astype(np.int64) + np.array([-1, 0, 1])
    enough = near / votes.clip(min=1) >= threshold  # the rounded quotient, so that 4 of 5 reach 0.8
    leader = np.take_along_axis(near, enough.argmax(1)[:, None], axis=1)
    allowed = (votes - leader)[:, 0].astype(np.int16)
    allowed[:2] = -1
    allowed.setflags(write=False)
    return allowed


@lru_cache(maxsize=64)
def votes_needed(threshold: float, most: int) -> NDArray[np.int64]:
    """Votes the leader needs against a runner-up with 0, 1, ..., ``most`` votes; int64 [most + 1], increasing.

    Exact integer arithmetic: with n = v1 + v2 + 1 and S(n, k) = sum of C(n, j) over j <= k, the criterion is
    S(n, v1) >= threshold * 2^n, and S(n + 1, k) = 2 S(n, k) - C(n, k) walks to the next table entry. Entries
    beyond ``most`` draws are out of reach and set to most + 1.
    """
    bound = Fraction(threshold)
    table = np.full(most + 1, most + 1, dtype=np.int64)
    first, n, below, term = 0, 1, 1, 1  # S(1, 0) = 1, C(1, 0) = 1: no votes at all
    for second in range(most + 1):
        while below * bound.denominator < bound.numerator << n:
            # one more vote for the leader: S(n+1, k+1) = 2 S(n, k) - C(n, k) + C(n+1, k+1)
            after = term * (n + 1) // (first + 1)
            below, term, first, n = 2 * below - term + after, after, first + 1, n + 1
            if first + second > most:
                return table
        table[second] = first
        # one more vote for the runner-up: S(n+1, k) = 2 S(n, k) - C(n, k), C(n+1, k) = C(n, k) (n+1) / (n+1-k)
        below, term, n = 2 * below - term, term * (n + 1) // (n + 1 - first), n + 1
    return table
