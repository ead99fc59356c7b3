"""What a verifier is worth: its rates, the best of k draws by its score, and the limits of sampling until one passes.

Right or wrong is known here for every draw; the verifier is what a user has instead: a flag (it passes or not) or a
score. A *task* is one problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from consilience.montecarlo.coverage import Curve, check_beyond, check_counts, curve_of, pass_at_k
from consilience.montecarlo.resampling import Interval, bootstrap_interval

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]

EXACT_DRAWS = 1_024
"""`Resampling.best` looks at every K up to here, and at a grid in steps of 1 % above, refined around its best."""

CELLS = 1_000_000
"""Tasks times numbers of draws that are worked on together: bounds the memory."""

MOST_DRAWS = 2.0**53
"""The grid ends here, where whole numbers leave the floats."""


# --------------------------------------------------------------------------------- a verifier's flags and scores


@dataclass(frozen=True, slots=True)
class VerifierRates:
    """How often a verifier passes what is right and what is wrong, by task and over all draws together.

    accuracy, true_pass, false_pass: float64 [tasks], the share of right draws, P(passes | right) and
    P(passes | wrong), nan where a task has no such draw; pooled: the same three over all draws.
    """

    accuracy: Float
    true_pass: Float
    false_pass: Float
    pooled: tuple[float, float, float]


def verifier_rates(right: ArrayLike, passes: ArrayLike, drawn: ArrayLike | None = None) -> VerifierRates:
    """The rates of a verifier from recorded draws.

    right, passes: bool [tasks, draws]; drawn: int [tasks], the leading draws made (default: all). Raises ValueError
    on shapes that do not fit. Source: true and false positive rate as in Stroebl et al. 2024, arXiv 2411.17501.
    """
    truth, flag, made = _recorded(right, passes, drawn)
    counts = [(mask & made).sum(axis=1) for mask in (truth, ~truth, truth & flag, ~truth & flag)]
    with np.errstate(invalid="ignore", divide="ignore"):
        by_task = _shares(*counts)
        pooled = _shares(*(values.sum() for values in counts))
    return VerifierRates(*by_task, pooled=(float(pooled[0]), float(pooled[1]), float(pooled[2])))


def _shares(good: Int, bad: Int, true_pass: Int, false_pass: Int) -> tuple[Float, Float, Float]:
    return np.divide(good, good + bad), np.divide(true_pass, good), np.divide(false_pass, bad)


def _recorded(right: ArrayLike, passes: ArrayLike, drawn: ArrayLike | None) -> tuple[Bool, Bool, Bool]:
    """Right, passes and made, bool [tasks, draws] each."""
    truth, flag = np.asarray(right, dtype=np.bool_), np.asarray(passes, dtype=np.bool_)
    if truth.ndim != 2 or truth.shape != flag.shape:
        raise ValueError(f"right and passes must be [tasks, draws] both, got {truth.shape} and {flag.shape}")
    made = np.arange(truth.shape[1]) < _made(truth, drawn)[:, None]
    return truth, flag, made


def _made(table: NDArray[np.generic], drawn: ArrayLike | None) -> Int:
    count = np.full(len(table), table.shape[1]) if drawn is None else np.asarray(drawn)
    if count.shape != (len(table),) or (count < 0).any() or (count > table.shape[1]).any():
        raise ValueError("drawn must be [tasks], each between 0 and the number of columns")
    return count.astype(np.int64)


def best_of_k(
    scores: ArrayLike,
    right: ArrayLike,
    ks: Sequence[int],
    *,
    drawn: ArrayLike | None = None,
    beyond: str = "raise",
) -> Curve:
    """The probability that the draw with the highest score of k is right; tied draws are equally likely chosen.

    Exact and without bias: the mean over all subsets of k of a problem's n draws. With L draws below a score and g at
    it, r of them right, the subset's best lies there with probability [C(L + g, k) - C(L, k)] / C(n, k), and the
    chosen one is then right with probability r / g. scores: float [problems, draws], -inf allowed (never chosen while
    there is another), nan not; right: bool [problems, draws]; drawn: int [problems], the leading draws made. With
    ``right`` itself as the score it is pass@k, with equal scores the accuracy of one draw.

    Raises ValueError where k > n (``beyond="nan"``: nan there), on nan scores and shapes that do not fit.

    Source: the subset estimate of Chen et al. 2021, arXiv 2107.03374, for a score instead of a test.
    """
    table, truth = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=np.bool_)
    if table.ndim != 2 or table.shape != truth.shape:
        raise ValueError(f"scores and right must be [problems, draws] both, got {table.shape} and {truth.shape}")
    _, count, steps = check_counts(np.zeros(len(table)), _made(table, drawn), ks)
    check_beyond(count, steps, beyond)
    owner, below, upto, share = _score_groups(table, truth, count)
    per_problem = np.empty((len(table), len(steps)))
    for place, k in enumerate(steps.tolist()):
        subsets = _log_subsets(k, int(count.max(initial=0)))
        total = subsets[count]
        chance = np.exp(subsets[upto] - _finite(total)[owner]) - np.exp(subsets[below] - _finite(total)[owner])
        sums = np.bincount(owner, weights=share * chance, minlength=len(table))
        per_problem[:, place] = np.where(count < k, np.nan, np.clip(sums, 0.0, 1.0))
    return curve_of(steps, per_problem, np.zeros_like(per_problem))


def _finite(logs: Float) -> Float:
    return np.where(np.isinf(logs), 0.0, logs)


def _score_groups(scores: Float, right: Bool, count: Int) -> tuple[Int, Int, Int, Float]:
    """For each distinct score of each problem: the problem, draws below it, draws up to it, its share right."""
    parts = []
    for problem, n in enumerate(count.tolist()):
        row = scores[problem, :n]
        if np.isnan(row).any():
            raise ValueError(f"problem {problem} has a draw without a score (nan): leave it out, or give it -inf")
        _, group, size = np.unique(row, return_inverse=True, return_counts=True)
        upto = size.cumsum()
        good = np.bincount(group, weights=right[problem, :n], minlength=len(size))
        parts.append(np.stack([np.full(len(size), problem), upto - size, upto, good / size]))
    joined = np.concatenate(parts, axis=1) if parts else np.zeros((4, 0))
    whole = joined[:3].astype(np.int64)
    return whole[0], whole[1], whole[2], joined[3]


def _log_subsets(k: int, most: int) -> Float:
    """log C(m, k) for m = 0, 1, ..., most; float64, -inf for m < k."""
    table = np.full(most + 1, -np.inf)
    if k <= most:
        m = np.arange(k + 1, most + 1)
        table[k] = 0.0
        table[k + 1 :] = -np.log1p(-k / m).cumsum()
    return table


@dataclass(frozen=True, slots=True)
class Gap:
    """What selection leaves on the table at each k.

    ks: int64 [ks]; coverage, selected: float64 [ks]; per_problem: float64 [problems, ks], coverage minus selected;
    gap: its mean over the problems with its paired bootstrap interval, float64 [ks] each.
    """

    ks: Int
    coverage: Float
    selected: Float
    per_problem: Float
    gap: Interval


def selection_gap(
    coverage: Curve,
    selected: Curve,
    generator: np.random.Generator,
    *,
    strata: ArrayLike | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Gap:
    """The generation-verification gap: coverage (`pass_at_k`) minus the accuracy of what a selector picks, at each k.

    selected: a curve over the same problems and ks, from `best_of_k` or `majority_at_k`. The interval resamples
    problems, with both numbers of a problem together. It is the part that a perfect verifier would gain over the
    selector; Song et al. 2024 (arXiv 2412.02674) measure the gain over a *single draw* instead, which is
    ``selected - pass@1``. Raises ValueError on other ks or problems, and on nan.

    Source: coverage against selection as in Brown et al. 2024, arXiv 2407.21787, section 4.
    """
    if coverage.per_problem.shape != selected.per_problem.shape or (coverage.ks != selected.ks).any():
        raise ValueError("coverage and selected must be over the same problems and ks")
    left = coverage.per_problem - selected.per_problem
    found = bootstrap_interval(left, generator, strata=strata, resamples=resamples, level=level)
    return Gap(coverage.ks, coverage.mean, selected.mean, left, found)


# ------------------------------------------------------------------------------------ sampling until one passes


@dataclass(frozen=True, slots=True)
class Best:
    """A number of draws (0: better not to answer at all; inf: the more the better) and the utility it reaches."""

    draws: float
    utility: float


@dataclass(frozen=True, slots=True)
class Resampling:
    """Draw until the verifier passes one, at most K times; without a pass there is no answer.

    passing: float64 [tasks], the probability that a draw passes; ceiling: float64 [tasks], the probability that a
    draw that passes is right, which no number of draws exceeds (nan where none passes); weights: float64 [tasks], the
    distribution of the tasks, sums to 1.
    """

    passing: Float
    ceiling: Float
    weights: Float

    @classmethod
    def from_rates(
        cls, accuracy: ArrayLike, true_pass: ArrayLike, false_pass: ArrayLike, weights: ArrayLike | None = None
    ) -> Resampling:
        """From P(right), P(passes | right) and P(passes | wrong) by task; they broadcast to [tasks].

        A rate that never matters (the false pass of a task that is always right) may be nan. weights: default equal.
        Raises ValueError on values outside [0, 1] and weights that are negative or all 0.
        """
        rates = (accuracy, true_pass, false_pass)
        p, c, f = np.broadcast_arrays(*(np.atleast_1d(np.asarray(rate, dtype=np.float64)) for rate in rates))
        c, f = np.where(p > 0, c, 0.0), np.where(p < 1, f, 0.0)
        if p.ndim != 1 or not all(((v >= 0) & (v <= 1)).all() for v in (p, c, f)):
            raise ValueError("accuracy, true_pass and false_pass must be [tasks] with values between 0 and 1")
        passing = p * c + (1 - p) * f
        with np.errstate(invalid="ignore"):
            ceiling = np.where(passing > 0, p * c / np.where(passing > 0, passing, 1.0), np.nan)
        return cls(passing, ceiling, _weights(weights, len(p)))

    @classmethod
    def from_draws(cls, right: ArrayLike, passes: ArrayLike, drawn: ArrayLike | None = None) -> Resampling:
        """With the shares among the recorded draws in place of the probabilities; right, passes: bool [tasks, draws].

        A plug-in: a task of which no recorded draw passes never passes here. For K up to the recorded draws
        `resampling_utility` has no such bias. Raises ValueError on tasks without any draw.
        """
        truth, flag, made = _recorded(right, passes, drawn)
        count = made.sum(axis=1)
        if (count == 0).any():
            raise ValueError("every task needs at least one draw")
        passed = (flag & made).sum(axis=1)
        good = (truth & flag & made).sum(axis=1)
        ceiling = np.where(passed > 0, good / np.maximum(passed, 1), np.nan)
        return cls(passed / count, ceiling, _weights(None, len(count)))

    def reach(self, draws: ArrayLike) -> Float:
        """P(some draw of K passes) = 1 - (1 - passing)^K; float64 [tasks, *draws.shape]; K may be 0 and inf."""
        k = np.asarray(draws, dtype=np.float64)
        if not (k >= 0).all():
            raise ValueError("draws must not be negative or nan")
        a = self.passing.reshape(-1, *(1,) * k.ndim)
        with np.errstate(divide="ignore", invalid="ignore"):
            reached = -np.expm1(k * np.log1p(-a))
        return np.where((k == 0) | (a == 0), 0.0, reached)

    def accuracy(self, draws: ArrayLike) -> Float:
        """The share of tasks answered and right with at most K draws; with K = inf the ceiling; shape of draws."""
        return np.asarray(np.tensordot(self.weights * np.nan_to_num(self.ceiling), self.reach(draws), axes=1))

    def utility(self, draws: ArrayLike, cost: float) -> Float:
        """Expected utility with at most K draws: 1 for a right answer, -cost for a wrong one, 0 for none.

        The weighted mean over tasks of ``(1 - (1 - passing)^K) (ceiling - cost (1 - ceiling))``; shape of draws.
        Drawing itself costs nothing here. Raises ValueError on a negative cost.
        """
        return np.asarray(np.tensordot(self.weights * self._gain(cost), self.reach(draws), axes=1))

    def best(self, cost: float) -> Best:
        """The number of draws of the highest utility; the least of them where several tie.

        With one task it is 0 or inf. Over tasks of different difficulty it can lie between: the easy tasks, which
        pass early, are worth answering, and the hard ones, which pass late, are not. Exact where the utility rises
        and falls once, as with two kinds of task; a second peak narrower than 1 % of its K beyond `EXACT_DRAWS`
        would be overlooked.
        """
        gain = self.weights * self._gain(cost)
        useful = (self.passing > 0) & (gain != 0)
        if not useful.any():
            return Best(0.0, 0.0)
        a, gain = self.passing[useful], gain[useful]
        law = Resampling(a, np.ones(len(a)), gain)
        last = min(40 / float(a.min().clip(1e-300)), MOST_DRAWS)
        steps = max(0, int(np.ceil(np.log(max(last / EXACT_DRAWS, 1.0)) / np.log(1.01))))
        grid = np.unique(np.r_[np.arange(EXACT_DRAWS + 1.0), np.floor(EXACT_DRAWS * 1.01 ** np.arange(steps + 1))])
        blocks = np.array_split(grid, max(1, len(grid) * len(a) // CELLS))
        values = np.concatenate([law.accuracy(block) for block in blocks])
        place = int(values.argmax())
        low, high = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
        k = _turning_point(a, gain, int(low), int(high))
        value, limit = float(law.accuracy(k)), float(gain.sum())
        slack = 1e-12 * float(np.abs(gain).sum())
        if value > limit + slack or (k == 0 and limit <= slack):
            return Best(float(k), value)
        return Best(float("inf"), limit)

    def _gain(self, cost: float) -> Float:
        if not 0 <= cost < np.inf:
            raise ValueError(f"cost must be finite and not negative, got {cost}")
        return np.where(self.passing > 0, np.nan_to_num(self.ceiling) * (1 + cost) - cost, 0.0)


def _weights(weights: ArrayLike | None, tasks: int) -> Float:
    given = np.ones(tasks) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.shape != (tasks,) or not (np.isfinite(given) & (given >= 0)).all() or given.sum() <= 0:
        raise ValueError("weights must be [tasks], none negative, not all 0")
    return given / given.sum()


def _turning_point(passing: Float, gain: Float, low: int, high: int) -> int:
    """The first K from low on, at most high, from which one draw more no longer gains."""

    def rises(k: int) -> bool:
        return float((gain * passing * (1 - passing) ** k).sum()) > 0

    if not rises(low):
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rises(middle) else (low, middle)
    return high


def resampling_utility(
    right: ArrayLike, passes: ArrayLike, ks: Sequence[int], cost: float, *, drawn: ArrayLike | None = None
) -> Curve:
    """Utility of drawing until one passes, at most K times, from n >= K recorded draws, without bias.

    The mean over all orders of a task's draws: some draw of K passes with probability 1 - C(n - m, K) / C(n, K), and
    the first that does is each of the m that pass with equal probability, whatever K. 1 for a right answer, -cost for
    a wrong one, 0 for none; with cost 0 it is the accuracy. right, passes: bool [tasks, draws]. Returns a `Curve` of
    values in [-cost, 1] (`Curve.band` is for shares: with a cost above 0 use `resampling.bootstrap_interval` on
    ``per_problem``). Raises ValueError where K > n, on a negative cost and shapes that do not fit.

    Source: Stroebl et al. 2024, arXiv 2411.17501, with the subset estimate of Chen et al. 2021, arXiv 2107.03374.
    """
    truth, flag, made = _recorded(right, passes, drawn)
    passed = (flag & made).sum(axis=1)
    reach = pass_at_k(passed, made.sum(axis=1), ks)
    precision = (truth & flag & made).sum(axis=1) / np.maximum(passed, 1)
    if not 0 <= cost < np.inf:
        raise ValueError(f"cost must be finite and not negative, got {cost}")
    per_problem = reach.per_problem * (precision * (1 + cost) - cost)[:, None]
    return curve_of(reach.ks, per_problem, np.zeros_like(per_problem))
