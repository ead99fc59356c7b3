"""Coverage: how often at least one of k draws is right, and how often the plurality of k draws is.

Estimates from n >= k recorded draws are means over *all* subsets of k of them, so they have no bias; a draw count
may differ from problem to problem. Beyond the recorded draws there are two laws: a power law of log(coverage), and a
Beta distribution of the problems' success probability, whose tail at 0 is what makes that power law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from consilience.montecarlo.estimators import EXACT_DRAWS, plurality_curve, proportion_interval

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]

CELLS = 2_000_000
"""Numbers that are worked on together: bounds the memory."""

MAJORITY_SAMPLES = 1_000
"""Random subsets per problem and k where `majority_at_k` cannot enumerate."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A share as a function of the number of draws.

    ks: int64 [ks]; mean: float64 [ks], over the problems that have a value; per_problem: float64 [problems, ks], nan
    where a problem has fewer than k draws; standard_error: float64 [problems, ks], the Monte Carlo error of
    per_problem, 0 where it is exact.
    """

    ks: Int
    mean: Float
    per_problem: Float
    standard_error: Float

    def band(self, level: float = 0.95) -> tuple[Float, Float]:
        """`proportion_interval` over the problems at each k: float64 [ks] each. Pointwise, not simultaneous over k."""
        columns = [column[~np.isnan(column)] for column in self.per_problem.T]
        table = np.array([proportion_interval(column, level) for column in columns], dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]


# ------------------------------------------------------------------------------------------- from recorded draws


def pass_at_k(
    right: ArrayLike, drawn: ArrayLike, ks: Sequence[int], *, beyond: Literal["raise", "nan"] = "raise"
) -> Curve:
    """The probability that at least one of k draws is right, 1 - C(n - c, k) / C(n, k) for each problem.

    The unbiased estimate from n draws of which c are right: the share of the subsets of k with a right draw in them.
    Computed from the sum of log(1 - c / (n - i)) over i < k, so that neither a large n nor a small probability costs
    digits. right: int [problems], c; drawn: int [problems], n (or one n for all); ks: whole numbers from 1 on.
    Returns a `Curve`; with ``beyond="nan"`` a problem with fewer than k draws has nan at k and leaves the mean there,
    which then is over fewer problems.

    Raises ValueError where k > n with ``beyond="raise"``, on c outside [0, n], on shapes that do not fit.

    Source: Chen et al. 2021, arXiv 2107.03374, section 2.1.
    """
    hits, count, steps = check_counts(right, drawn, ks)
    check_beyond(count, steps, beyond)
    pairs, row = np.unique(np.stack([hits, count], axis=1), axis=0, return_inverse=True)
    table = np.empty((len(pairs), len(steps)))
    rows = max(1, CELLS // max(1, int(steps.max(initial=1))))
    for start in range(0, len(pairs), rows):
        part = slice(start, start + rows)
        table[part] = _any_right(pairs[part, 0], pairs[part, 1], steps)
    per_problem = table[row.ravel()]
    return curve_of(steps, per_problem, np.zeros_like(per_problem))


def _any_right(hits: Int, count: Int, ks: Int) -> Float:
    """1 - C(n - c, k) / C(n, k), float64 [problems, ks]; nan where k > n."""
    taken = np.arange(int(ks.max(initial=1)))
    left = (count[:, None] - taken).clip(min=1)
    with np.errstate(divide="ignore"):
        misses = np.log1p(np.maximum(-hits[:, None] / left, -1.0)).cumsum(axis=1)[:, ks - 1]
    return np.where(ks > count[:, None], np.nan, -np.expm1(misses))


def majority_at_k(
    answers: ArrayLike,
    right: ArrayLike,
    ks: Sequence[int],
    *,
    drawn: ArrayLike | None = None,
    beyond: Literal["raise", "nan"] = "raise",
    generator: np.random.Generator | None = None,
    samples: int = MAJORITY_SAMPLES,
) -> Curve:
    """The probability that the plurality of k draws is right; tied answers share the vote.

    The mean over the subsets of k of a problem's n draws: all of them, by `estimators.plurality_curve`, for problems
    with up to `EXACT_DRAWS` draws, and ``samples`` random ones above, by the multivariate hypergeometric law of the
    vote counts, with the standard error of that mean. answers: int [problems, draws], -1 = no answer (it votes for
    nothing); right: bool [problems, classes]; drawn: int [problems], the leading draws made (default: all). A vote
    without any answer is wrong.

    Raises ValueError where k > n with ``beyond="raise"`` (``"nan"``: nan there), on shapes that do not fit, and where
    random subsets lack a generator.

    Source: the vote of Wang et al. 2022, arXiv 2203.11171; "majority@k" beside coverage as in Brown et al. 2024,
    arXiv 2407.21787, section 4.
    """
    table, truth = np.asarray(answers, dtype=np.int64), np.asarray(right, dtype=np.bool_)
    if table.ndim != 2:
        raise ValueError(f"answers must be [problems, draws], got shape {table.shape}")
    count = np.full(len(table), table.shape[1]) if drawn is None else np.asarray(drawn, dtype=np.int64)
    plurality_curve(table[:, :0], truth, [1])  # the checks of shapes
    _, count, steps = check_counts(np.zeros(len(table), np.int64), count, ks)
    if (count > table.shape[1]).any() or table.max(initial=-1) >= truth.shape[1]:
        raise ValueError("answers must have a column for every draw made, and right one for every class")
    check_beyond(count, steps, beyond)
    few = count <= EXACT_DRAWS
    if generator is None and not few.all():
        raise ValueError(
            f"problems with more than {EXACT_DRAWS} draws need a generator: pass numpy.random.default_rng(seed)"
        )
    per_problem, error = np.full((2, len(table), len(steps)), np.nan)
    if few.any():
        exact = plurality_curve(table[few, :EXACT_DRAWS], truth[few], steps.tolist(), drawn=count[few], method="exact")
        per_problem[few], error[few] = exact.per_problem, 0.0
    for problem in np.flatnonzero(~few):
        labels = table[problem, : count[problem]]
        votes = np.bincount(labels + 1, minlength=truth.shape[1] + 1)
        assert generator is not None
        per_problem[problem], error[problem] = _sampled_vote(votes, truth[problem], steps, generator, samples)
    late = steps > count[:, None]
    per_problem[late], error[late] = np.nan, np.nan
    return curve_of(steps, per_problem, error)


def _sampled_vote(
    votes: Int, truth: Bool, ks: Int, generator: np.random.Generator, samples: int
) -> tuple[Float, Float]:
    """Mean and its standard error, float64 [ks] each, over random subsets; votes[0] counts draws without answer."""
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    mean, error = np.zeros((2, len(ks)))
    for place, k in enumerate(ks.tolist()):
        if k > votes.sum():
            continue
        counts = generator.multivariate_hypergeometric(votes, k, size=samples, method="marginals")[:, 1:]
        most = counts.max(axis=1, keepdims=True, initial=0)
        leading = (counts == most) & (most > 0)
        share = (leading & truth).sum(axis=1) / np.maximum(leading.sum(axis=1), 1)
        mean[place], error[place] = share.mean(), share.std(ddof=1) / np.sqrt(samples)
    return mean, error


def check_counts(right: ArrayLike, drawn: ArrayLike, ks: Sequence[int]) -> tuple[Int, Int, Int]:
    """Right draws and draws, int64 [problems] each, and ks, int64 [ks]; ValueError where they are no such counts."""
    hits = np.asarray(right)
    if hits.ndim != 1:
        raise ValueError(f"right must be [problems], got shape {hits.shape}")
    count = np.broadcast_to(np.asarray(drawn), hits.shape)
    steps = np.asarray(ks)
    for name, values in (("right", hits), ("drawn", count), ("ks", steps)):
        if values.size and not (np.isfinite(values).all() and (values == np.floor(values)).all()):
            raise ValueError(f"{name} must hold whole numbers")
    if ((hits < 0) | (hits > count)).any():
        raise ValueError("right must lie between 0 and the number of draws everywhere")
    if steps.ndim != 1 or (steps < 1).any():
        raise ValueError("ks must be a list of whole numbers from 1 on")
    return hits.astype(np.int64), count.astype(np.int64), steps.astype(np.int64)


def check_beyond(count: Int, ks: Int, beyond: str) -> None:
    """ValueError where a k is larger than a problem's draws (count: int [problems]) and that is not wanted as nan."""
    if beyond not in ("raise", "nan"):
        raise ValueError(f'beyond must be "raise" or "nan", got {beyond!r}')
    if beyond == "raise" and len(ks) and (count < ks.max()).any():
        first = int(np.flatnonzero(count < ks.max())[0])
        raise ValueError(
            f"k = {int(ks.max())} needs as many draws, problem {first} has {int(count[first])}: "
            'leave out the larger ks, or pass beyond="nan"'
        )


def curve_of(ks: Int, per_problem: Float, error: Float) -> Curve:
    """The curve of values and standard errors per problem, float64 [problems, ks] each, nan = not known."""
    present = ~np.isnan(per_problem)
    size = present.sum(axis=0)
    total = np.where(present, per_problem, 0.0).sum(axis=0)
    return Curve(ks, np.where(size > 0, total / np.maximum(size, 1), np.nan), per_problem, error)


# ------------------------------------------------------------------------------------------------ the power law


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """log(coverage) = a k^b with a, b < 0, and the parameters of the bootstrap resamples.

    a, b: the fit; resamples: float64 [resamples, 2], (a, b) of each, nan where a resample could not be fitted.
    """

    a: float
    b: float
    resamples: Float

    def coverage(self, ks: ArrayLike) -> Float:
        """The fitted coverage at any k > 0, also far beyond the draws; float64, the shape of ks."""
        return _power_law(np.array([[self.a, self.b]]), ks)[0]

    def interval(self, ks: ArrayLike, level: float = 0.95) -> tuple[Float, Float]:
        """Percentile interval of `coverage` over the resampled problems; float64 [ks] each.

        It holds what resampling the problems does to the fit, and nothing of whether the law is true: where the
        coverage leaves the law beyond the fitted range, the interval does not know.
        """
        return _quantiles(_power_law(self.resamples, ks), level)

    def parameter_interval(self, level: float = 0.95) -> tuple[Float, Float]:
        """Percentile interval of (a, b); float64 [2] each."""
        return _quantiles(self.resamples, level)


def fit_power_law(curve: Curve, generator: np.random.Generator, resamples: int = 2_000) -> PowerLaw:
    """Fit log(coverage) = a k^b to a curve of `pass_at_k`, with a bootstrap over the problems.

    Least squares of log(-log(coverage)) on log(k), a straight line: a has a closed form and is negative, b is too as
    coverage never falls with k. Every k of the curve weighs the same, so choose them evenly in log(k). A k at which
    coverage is 0 or 1 has no logarithm and is left out, in each resample too. The same problems are resampled for all
    k. Raises ValueError where fewer than two ks are left, and on curves with nan (a mean over other problems at other
    k is no curve).

    Source: Brown et al. 2024, arXiv 2407.21787, section 3; the weighing of the points is ours.
    """
    if np.isnan(curve.per_problem).any():
        raise ValueError("the curve has nan: fit to ks for which every problem has draws")
    point = _fit_lines(curve.per_problem.mean(axis=0)[None], curve.ks)[0]
    if np.isnan(point).any():
        raise ValueError("a fit needs at least two different ks with a coverage strictly between 0 and 1")
    problems = len(curve.per_problem)
    weights = generator.multinomial(problems, np.full(problems, 1 / problems), size=resamples) / problems
    return PowerLaw(float(point[0]), float(point[1]), _fit_lines(weights @ curve.per_problem, curve.ks))


def _fit_lines(coverage: Float, ks: Int) -> Float:
    """(a, b) for each row of coverage [rows, ks]; nan where fewer than two ks can be used."""
    usable = (coverage > 1e-12) & (coverage < 1 - 1e-12)
    y = np.log(-np.log(np.where(usable, coverage, 0.5)))
    x = np.broadcast_to(np.log(ks), y.shape)
    size = usable.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = (x * usable).sum(axis=1) / size
        height = (y * usable).sum(axis=1) / size
        away = (x - middle[:, None]) * usable
        slope = (away * y).sum(axis=1) / (away**2).sum(axis=1)
    slope = np.where((away**2).sum(axis=1) > 0, slope, np.nan)
    return np.stack([-np.exp(height - slope * middle), slope], axis=1)


def _power_law(parameters: Float, ks: ArrayLike) -> Float:
    """Coverage for each row (a, b); float64 [rows, ks]."""
    k = np.asarray(ks, dtype=np.float64)
    if (k <= 0).any():
        raise ValueError("ks must be positive")
    return np.exp(parameters[:, :1] * k ** parameters[:, 1:])


def _quantiles(values: Float, level: float) -> tuple[Float, Float]:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


# ------------------------------------------------------------------------------------- heavy tails of difficulty


@dataclass(frozen=True, slots=True)
class BetaDifficulty:
    """Success probabilities that follow Beta(alpha, beta) over the problems.

    The failure left after k draws falls like k^-alpha, so log(coverage) follows a power law with b = -alpha for large
    k: the exponent is the weight of the almost unsolvable problems. Each problem alone fails exponentially rarely.
    """

    alpha: float
    beta: float

    def coverage(self, ks: ArrayLike) -> Float:
        """1 - B(alpha, beta + k) / B(alpha, beta), the expected coverage of k draws; float64, the shape of ks."""
        return beta_coverage(self.alpha, self.beta, ks)

    @property
    def exponent(self) -> float:
        """The exponent b of log(coverage) = a k^b for large k."""
        return -self.alpha


def beta_coverage(alpha: ArrayLike, beta: ArrayLike, ks: ArrayLike) -> Float:
    """Expected coverage of k draws where success has a Beta(alpha, beta) distribution; broadcasts, float64.

    ``1 - E (1 - p)^k = 1 - B(alpha, beta + k) / B(alpha, beta)``. A mixture of Betas covers with the mixture of
    these; its exponent for large k is the least alpha. Raises ValueError unless alpha, beta > 0 and ks >= 0.

    Source: Schaeffer et al. 2025, arXiv 2502.17578 (the exponent from the tail of the success probabilities).
    """
    from scipy.special import betaln  # type: ignore[import-untyped,unused-ignore]

    a, b, k = (np.asarray(values, dtype=np.float64) for values in (alpha, beta, ks))
    if not ((a > 0).all() and (b > 0).all() and (k >= 0).all()):
        raise ValueError("alpha and beta must be positive, ks not negative")
    return -np.expm1(betaln(a, b + k) - betaln(a, b))


def fit_beta_difficulty(right: ArrayLike, drawn: ArrayLike) -> BetaDifficulty:
    """The Beta distribution of success that makes the recorded counts most likely (beta-binomial likelihood).

    right: int [problems], right draws; drawn: int [problems], draws made (or one number). A second way beyond the
    recorded draws besides `fit_power_law`: it reads the tail from how often each problem was solved, not from the
    curve. Raises ValueError on counts that do not fit, and where all draws of all problems are right, or none: then
    no parameters are the best.

    Source: Schaeffer et al. 2025, arXiv 2502.17578 (a fitted distribution of success as a forecast).
    """
    from scipy.optimize import minimize  # type: ignore[import-untyped,unused-ignore]
    from scipy.special import betaln

    hits, count, _ = check_counts(right, drawn, [1])
    if not 0 < hits.sum() < count.sum():
        raise ValueError("the fit needs right and wrong draws")
    pairs, times = np.unique(np.stack([hits, count], axis=1), axis=0, return_counts=True)

    def loss(logs: Float) -> float:
        a, b = np.exp(logs)
        return -float((times * (betaln(a + pairs[:, 0], b + pairs[:, 1] - pairs[:, 0]) - betaln(a, b))).sum())

    mean = float(hits.sum() / count.sum())
    starts = [np.log([size * mean, size * (1 - mean)]) for size in (0.3, 3.0)]
    bounds = [(-12.0, 12.0)] * 2
    found = min((minimize(loss, s, method="L-BFGS-B", bounds=bounds) for s in starts), key=lambda result: result.fun)
    alpha, beta = np.exp(found.x)
    return BetaDifficulty(float(alpha), float(beta))
