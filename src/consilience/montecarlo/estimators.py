"""Estimators with honest error bars: accuracy of a vote of k draws, intervals for shares, calibration of a
confidence.

Everything takes and returns arrays. One *problem* is the unit that was sampled from the population: draws and
orders within a problem are shared, so every interval is over problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]
Method = Literal["auto", "exact", "orders"]

PRIOR_WEIGHT = 60.0
"""`proportion_interval` starts its variance from this over ``n p (1 - p)`` all-or-nothing problems; chosen by
simulation (benchmarks/interval_coverage.py): with 12 it covers only 87 % at 100 problems where one in fifty is hopeless
and the others are nearly always right, as a sample often holds none of the hopeless ones."""

EXACT_DRAWS = 128
"""With ``method="auto"`` the vote is exact up to this many draws per problem, by random orders above."""


def proportion_interval(per_problem: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Interval for the mean of a share over the population that the problems were sampled from.

    Each value is one problem's share in [0, 1]: 0 or 1 for one run, a mean over repeated orders for a replay.
    It is Wilson's score interval with the effective sample size ``p (1 - p) / variance of the mean``, never
    below the number of problems (values of 0 and 1 have exactly that); what it has above, a t quantile with
    ``problems - 1`` degrees of freedom shrinks, as the variance is itself estimated. That estimate starts from
    a few problems of the largest variance ``p (1 - p)`` (`PRIOR_WEIGHT`): near 0 and 1 a sample often holds
    none of the rare problems that make most of the variance. Where all values are equal (all right, all wrong)
    the sample size is the number of problems. The normal quantile is widened by ``1 + 1 / problems``: Wilson's
    own interval for 100 runs covers only 92.7 % at some p (0.945), the widened one 93.5 % or more everywhere.

    per_problem: float [problems]; nan is not allowed. Returns ``(lo, hi)`` inside [0, 1]; with no problem
    ``(0, 1)``: nothing is known. Raises ``ValueError`` on values outside [0, 1] or a level outside (0, 1).

    Source: Wilson 1927 (J. Am. Stat. Assoc. 22); the effective size in a score interval as in Dean and Pagano
    2015 (J. Surv. Stat. Methodol. 3), the t adjustment as in Korn and Graubard 1998 (Surv. Methodol. 24).
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped,unused-ignore]

    values = _shares(per_problem, "per_problem")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    n = len(values)
    if n == 0:
        return 0.0, 1.0
    p = float(values.mean())
    z = NormalDist().inv_cdf((1 + level) / 2) * (1 + 1 / n)
    size = float(n)
    spread = float(values.var())
    if n > 1 and spread > 1e-12 and 0 < p < 1:
        t = float(stdtrit(n - 1, (1 + level) / 2))
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        largest = centre * (1 - centre)
        prior = PRIOR_WEIGHT / (n * largest)
        spread = (n * spread + prior * largest) / (n + prior)
        size = n + max(n * p * (1 - p) / spread - n, 0.0) * (z / t) ** 2
    return _wilson(p, size, z)


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's score interval for a share ``p`` of ``n`` (not necessarily whole) observations."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(max(p * (1 - p) / n, 0.0) + z * z / (4 * n * n))
    lo = 0.0 if p <= 0 else max(0.0, centre - half)
    hi = 1.0 if p >= 1 else min(1.0, centre + half)
    return float(lo), float(hi)


@dataclass(frozen=True, slots=True)
class PluralityCurve:
    """Accuracy of the plurality vote of k draws.

    ks: int64 [ks]; accuracy: float64 [ks]; per_problem: float64 [problems, ks], the probability that the vote
    of k of the problem's draws is right.
    """

    ks: NDArray[np.int64]
    accuracy: Float
    per_problem: Float

    def band(self, level: float = 0.95) -> tuple[Float, Float]:
        """`proportion_interval` at each k: float64 [ks] each. Pointwise, not simultaneous over k."""
        pairs = [proportion_interval(column, level) for column in self.per_problem.T]
        table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]


def plurality_curve(
    answers: ArrayLike,
    right: ArrayLike,
    ks: Sequence[int],
    *,
    drawn: ArrayLike | None = None,
    generator: np.random.Generator | None = None,
    orders: int = 200,
    method: Method = "auto",
) -> PluralityCurve:
    """Accuracy of the plurality vote of k draws, from n >= k recorded draws, for each k in ``ks``.

    Without bias: the mean over *all* subsets of k of a problem's draws, in which tied answers share the vote
    (the same number as "ties to the answer seen first" averaged over all orders: among tied answers each is
    equally likely to have come first). ``exact`` sums over the vote counts of the multivariate hypergeometric
    law; ``orders`` averages over ``orders`` random orders drawn from ``generator`` instead, which is what the
    field does; ``auto`` is exact up to `EXACT_DRAWS` draws.

    answers: int [problems, draws], the class of each draw's answer, -1 = no answer (a draw that votes for
    nothing). right: bool [problems, classes], which classes are right. drawn: int [problems], how many leading
    draws were made (default: all); where k is larger, all of them vote. A vote without any answer is wrong.

    Raises ``ValueError`` on shapes that do not fit, on k < 1, and where random orders lack a generator.

    Source: subset (U-statistic) estimates as for pass@k in Chen et al. 2021 (arXiv:2107.03374), here for the
    vote of Wang et al. 2022 (arXiv:2203.11171).
    """
    table, truth, count, steps = _checked(answers, right, ks, drawn)
    exact = method == "exact" or (method == "auto" and table.shape[1] <= EXACT_DRAWS)
    if exact:
        per_problem = _exact_curve(table, truth, count, steps)
    elif generator is None:
        raise ValueError("random orders need a generator: pass generator=numpy.random.default_rng(seed)")
    else:
        per_problem = _sampled_curve(table, truth, count, steps, generator, orders)
    accuracy = per_problem.mean(axis=0) if len(table) else np.full(len(steps), np.nan)
    return PluralityCurve(steps, accuracy, per_problem)


def _checked(
    answers: ArrayLike, right: ArrayLike, ks: Sequence[int], drawn: ArrayLike | None
) -> tuple[NDArray[np.int64], Bool, NDArray[np.int64], NDArray[np.int64]]:
    table = np.asarray(answers, dtype=np.int64)
    truth = np.asarray(right, dtype=np.bool_)
    steps = np.asarray(ks, dtype=np.int64)
    if table.ndim != 2 or truth.ndim != 2 or len(table) != len(truth):
        raise ValueError(
            f"answers must be [problems, draws] and right [problems, classes], got {table.shape}, {truth.shape}"
        )
    if table.size and int(table.max()) >= truth.shape[1]:
        raise ValueError(f"answers name class {int(table.max())}, but right has {truth.shape[1]} classes")
    if steps.ndim != 1 or (len(steps) and int(steps.min()) < 1):
        raise ValueError("ks must be a list of whole numbers from 1 on")
    count = np.full(len(table), table.shape[1]) if drawn is None else np.asarray(drawn, dtype=np.int64)
    if count.shape != (len(table),) or np.any(count < 0) or np.any(count > table.shape[1]):
        raise ValueError("drawn must be [problems], each between 0 and the number of columns of answers")
    return table, truth, count.astype(np.int64), steps


def _exact_curve(table: NDArray[np.int64], truth: Bool, drawn: NDArray[np.int64], ks: NDArray[np.int64]) -> Float:
    known: dict[tuple[tuple[int, ...], tuple[int, ...], int], Float] = {}
    out = np.zeros((len(table), len(ks)))
    for row, n in enumerate(drawn.tolist()):
        if n == 0:
            continue
        labels = table[row, :n]
        counts = np.bincount(labels[labels >= 0], minlength=truth.shape[1])
        good = tuple(sorted(counts[truth[row] & (counts > 0)].tolist()))
        bad = tuple(sorted(counts[~truth[row] & (counts > 0)].tolist()))
        if (good, bad, n) not in known:
            known[good, bad, n] = _vote_probability(good, bad, n)
        out[row] = known[good, bad, n][np.minimum(ks, n)]
    return out


def _vote_probability(good: tuple[int, ...], bad: tuple[int, ...], n: int) -> Float:
    """P(the vote of k of n draws is right), ties shared; float64 [n + 1], index k.

    For a right class with c votes among the n draws: the number of subsets in which it has v votes, t others
    have v too and no class has more is a coefficient of the product over the other classes of
    ``sum_{u < v} C(c_i, u) x^u + y C(c_i, v) x^v``, times ``(1 + x)^(draws without answer)``.
    """
    total = np.zeros(n + 1)
    for index, own in enumerate(good):
        others = [*good[:index], *good[index + 1 :], *bad]
        v = np.arange(1, own + 1)
        ways = np.zeros((own, len(others) + 1, n + 1))  # [v - 1, tied others, draws taken]
        ways[v - 1, 0, v] = _binomials(own)[1:]
        for tied, votes in enumerate(others):
            ways = _times_class(ways, votes, tied, v)
        ways = _times_silent(ways, n - sum(good) - sum(bad))
        total += (ways / np.arange(1, len(others) + 2)[None, :, None]).sum(axis=(0, 1))
    result: Float = np.clip(total / _binomials(n), 0.0, 1.0)
    return result


def _binomials(n: int) -> Float:
    """C(n, 0..n); float64 [n + 1]."""
    return np.array([math.comb(n, u) for u in range(n + 1)], dtype=np.float64)


def _times_class(ways: Float, votes: int, tied: int, v: NDArray[np.int64]) -> Float:
    """Multiply by one further class with ``votes`` votes; at most ``tied`` others are tied so far."""
    out = np.zeros_like(ways)
    width = ways.shape[2]
    used = slice(0, tied + 1)
    for u, factor in enumerate(_binomials(votes).tolist()):
        below = v > u
        out[below, used, u:] += factor * ways[below, used, : width - u]
        if 1 <= u <= len(v):
            out[u - 1, 1 : tied + 2, u:] += factor * ways[u - 1, used, : width - u]
    return out


def _times_silent(ways: Float, silent: int) -> Float:
    """Multiply by ``(1 + x)^silent``: the draws without an answer."""
    out = np.zeros_like(ways)
    width = ways.shape[2]
    for u, factor in enumerate(_binomials(silent).tolist()):
        out[:, :, u:] += factor * ways[:, :, : width - u]
    return out


def _sampled_curve(
    table: NDArray[np.int64],
    truth: Bool,
    drawn: NDArray[np.int64],
    ks: NDArray[np.int64],
    generator: np.random.Generator,
    orders: int,
) -> Float:
    if orders < 1:
        raise ValueError(f"orders must be at least 1, got {orders}")
    problems, draws = table.shape
    rows = np.arange(problems)
    past = np.arange(draws)[None, :] >= drawn[:, None]
    out = np.zeros((problems, len(ks)))
    for _ in range(orders):
        order = np.where(past, np.inf, generator.random((problems, draws))).argsort(axis=1)
        shuffled = np.take_along_axis(np.where(past, -1, table), order, axis=1)
        counts = np.zeros(truth.shape, dtype=np.int64)
        taken = 0
        for position in np.argsort(ks, kind="stable"):
            for column in range(taken, min(int(ks[position]), draws)):
                voting = shuffled[:, column] >= 0
                counts[rows[voting], shuffled[voting, column]] += 1
            taken = max(taken, int(ks[position]))
            out[:, position] += _tie_share(counts, truth)
    return out / orders


def _tie_share(counts: NDArray[np.int64], truth: Bool) -> Float:
    """The share of right classes among those with the most votes; float64 [problems]."""
    most = counts.max(axis=1, initial=0)
    leading = (counts == most[:, None]) & (most > 0)[:, None]
    share: Float = (leading & truth).sum(axis=1) / np.maximum(leading.sum(axis=1), 1)
    return share


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The verdicts whose confidence falls into ``(lower, upper]``.

    confidence: their mean confidence; right: the share that is right, with its interval ``lo, hi``.
    """

    lower: float
    upper: float
    count: int
    confidence: float
    right: float
    lo: float
    hi: float


def reliability(confidence: ArrayLike, right: ArrayLike, bins: int = 10, level: float = 0.95) -> list[ReliabilityBin]:
    """Confidence against the share that is right, in ``bins`` bins of equal width; empty bins are left out.

    confidence: float [verdicts] in [0, 1]. right: bool or share in [0, 1], [verdicts]; a verdict whose ``right``
    is nan (no gold answer) is left out. A confidence of exactly 0 belongs to the first bin.

    Source: the reliability diagram as in Guo et al. 2017 (arXiv:1706.04599).
    """
    sure, hit = _verdicts(confidence, right)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    edges = np.arange(bins + 1) / bins
    place = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    rows = []
    for index in np.unique(place).tolist():
        mine = place == index
        lo, hi = proportion_interval(hit[mine], level)
        rows.append(
            ReliabilityBin(
                lower=float(edges[index]),
                upper=float(edges[index + 1]),
                count=int(mine.sum()),
                confidence=float(sure[mine].mean()),
                right=float(hit[mine].mean()),
                lo=lo,
                hi=hi,
            )
        )
    return rows


def expected_calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int = 10) -> float:
    """Mean gap between confidence and share right over `reliability`'s bins, weighted by count; nan if empty.

    Shapes and errors as `reliability`. Source: Naeini, Cooper and Hauskrecht 2015 (AAAI); Guo et al. 2017
    (arXiv:1706.04599).
    """
    rows = reliability(confidence, right, bins)
    total = sum(row.count for row in rows)
    return sum(row.count * abs(row.confidence - row.right) for row in rows) / total if total else float("nan")


def brier(confidence: ArrayLike, right: ArrayLike) -> float:
    """Mean squared gap between confidence and outcome; nan if there is none.

    A ``right`` between 0 and 1 is the share of repeats that were right at this confidence, and its own spread
    counts: ``(c - r)^2 + r (1 - r)``, the mean over those repeats.

    Shapes and errors as `reliability`. Source: Brier 1950 (Mon. Weather Rev. 78).
    """
    sure, hit = _verdicts(confidence, right)
    return float(((sure - hit) ** 2 + hit * (1 - hit)).mean()) if len(sure) else float("nan")


def _verdicts(confidence: ArrayLike, right: ArrayLike) -> tuple[Float, Float]:
    sure = np.asarray(confidence, dtype=np.float64)
    hit = np.asarray(right, dtype=np.float64)
    if sure.shape != hit.shape or sure.ndim != 1:
        raise ValueError(f"confidence and right must be [verdicts] each, got {sure.shape} and {hit.shape}")
    known = ~np.isnan(hit)
    return _shares(sure[known], "confidence"), _shares(hit[known], "right")


def _shares(values: ArrayLike | Any, name: str) -> Float:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {table.shape}")
    if not np.all((table >= 0) & (table <= 1)):
        raise ValueError(f"{name} must be between 0 and 1 everywhere")
    return table
