"""The control scheme of early-stopping self-consistency: what a window and a maximum will cost and lose.

From the first few draws of every question, `forecast` predicts for each pair of a window and a maximum the mean number
of draws of ``esc`` and how often it will miss the most probable answer; `choose` takes the pair that suits a budget or
a tolerated loss.

Source: Li et al. 2024, arXiv 2401.10480 (control scheme), and control_scheme.py of the authors' code, Yiwei98/ESC. As
there, a question's answers have the shares of its first draws, and the expected draws are exact given these. In place
of the code's normal approximation for one window stands the exact probability for all of them, and the loss by a small
maximum is added, so that pairs of different maxima can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from consilience.rules import Float, View, vote_counts
from consilience.text.stopping.esc import EarlyStopping


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predictions for every pair, float64 [windows, maxes] each, nan where the window is larger than the maximum.

    draws: mean draws per question. cut: how often a window agrees on another than the most probable answer and ends
    the drawing before the maximum. missed: an estimate of how often the verdict is another than the most probable
    answer, ``cut`` plus the failures of the full vote at that maximum.
    """

    windows: tuple[int, ...]
    maxes: tuple[int, ...]
    draws: Float
    cut: Float
    missed: Float

    @property
    def loss(self) -> Float:
        """``missed`` beyond that of the best pair, which is about that of the full vote at the largest maximum."""
        return np.asarray(self.missed - np.nanmin(self.missed))


def forecast(labels: ArrayLike, windows: Sequence[int], maxes: Sequence[int]) -> Forecast:
    """What ``esc`` will cost and lose on these questions with each of ``windows`` and ``maxes``.

    labels: int [questions, draws], the classes of the first draws of each question, -1 = no answer; the more, the
    better: shares of few draws look clearer than they are, so that draws and loss come out too low. Raises ValueError
    without a question or a draw, and unless windows and maxes are positive and some pair is possible.
    """
    table = np.asarray(labels)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"labels must be [questions, draws], at least one of each, got shape {table.shape}")
    if not windows or not maxes or min(*windows, *maxes, 10_000) < 1 or min(windows) > max(maxes):
        raise ValueError(f"windows and maxes must be positive, and one window within a max: {windows}, {maxes}")
    shares = answer_shares(table)
    draws, cut, missed = (np.full((len(windows), len(maxes)), np.nan) for _ in range(3))
    for column, most in enumerate(maxes):
        failures = vote_fails(shares, most)
        for row, window in enumerate(windows):
            if window <= most:
                short = cut_short(shares, window, most)
                draws[row, column] = expected_draws(shares, window, most).mean()
                cut[row, column] = short.mean()
                missed[row, column] = np.minimum(short + failures, 1).mean()
    return Forecast(tuple(windows), tuple(maxes), draws, cut, missed)


def choose(predicted: Forecast, *, budget: float | None = None, tolerance: float | None = None) -> EarlyStopping:
    """The rule with the least loss within ``budget`` draws per question, or the cheapest that loses ``tolerance``.

    Exactly one of the two is given; ``tolerance`` is a share of the questions, compared with `Forecast.loss`. Equals
    are decided by the other figure, then by the larger window. Raises ValueError where no pair is possible, naming
    the least budget that is.
    """
    if (budget is None) == (tolerance is None):
        raise ValueError("give either a budget (draws per question) or a tolerance (share of the questions)")
    draws, loss = predicted.draws, predicted.loss
    possible = ~np.isnan(draws) & (draws <= budget if budget is not None else loss <= (tolerance or 0.0))
    if not possible.any():
        least = f"{np.nanmin(draws):.4g} draws per question" if budget is not None else "a tolerance of 0"
        raise ValueError(f"no pair of window and max is possible: at least {least} must be allowed")
    figures = (loss, draws) if budget is not None else (draws, loss)
    pairs = [(figures[0][i, j], figures[1][i, j], -predicted.windows[i], i, j) for i, j in np.argwhere(possible)]
    _, _, _, row, column = min(pairs)
    return EarlyStopping(window=predicted.windows[row], max=predicted.maxes[column])


def answer_shares(labels: NDArray[np.integer]) -> Float:
    """Shares of the answers of each question, largest first; float64 [questions, answers], answerless draws left out.

    labels: int [questions, draws]. The shares are of all draws, so they sum to less than 1 where some gave no answer.
    """
    counts = np.sort(vote_counts(View.single(labels)), axis=1)[:, ::-1]
    padded = counts if counts.shape[1] else np.zeros((len(labels), 1), np.int32)
    return np.asarray(padded / labels.shape[1])


def expected_draws(shares: Float, window: int, most: int) -> Float:
    """Mean draws of ``esc``, float64 [questions]: sum of the windows' sizes times the chance that they are drawn.

    A window agrees with probability q = sum_i p_i^window, so the k-th is drawn with probability (1 - q)^(k-1); the
    last may be shorter.
    """
    before = 1 - (shares**window).sum(1)
    starts = np.arange(0, most, window)
    sizes = np.minimum(window, most - starts)
    return np.asarray((sizes * before[:, None].clip(min=0) ** (starts // window)).sum(1))


def cut_short(shares: Float, window: int, most: int) -> Float:
    """Chance that ``esc`` ends before ``most`` draws by a window of another than the first answer; float64 [questions].

    Such a window comes with probability r = sum_{i > 1} p_i^window, and is the first to agree of those that end before
    ``most`` with probability r sum_k (1 - q)^(k-1).
    """
    agree = shares**window
    windows = np.arange((most - 1) // window)
    waiting = (1 - agree.sum(1)).clip(min=0)[:, None] ** windows
    return np.asarray(agree[:, 1:].sum(1) * waiting.sum(1))


def vote_fails(shares: Float, draws: int) -> Float:
    """Chance that another than the first answer wins the vote of ``draws`` draws; float64 [questions].

    The sum over the other answers of the chance to beat the first, at most 1; a tie counts one half, as the answer
    seen first wins it. Exact for two answers, else a bound.
    """
    first = np.repeat(shares[:, :1], shares.shape[1] - 1, axis=1)
    pairs = np.stack([first, shares[:, 1:]], axis=-1)[shares[:, 1:] > 0]
    rows = np.nonzero(shares[:, 1:] > 0)[0]
    distinct, where = np.unique(pairs, axis=0, return_inverse=True)
    beaten = np.array([_beaten(float(p), float(q), draws) for p, q in distinct])
    chances = np.bincount(rows, beaten[where.ravel()] if len(rows) else None, minlength=len(shares))
    return np.minimum(chances, 1.0)


def _beaten(first: float, other: float, draws: int) -> float:
    """P(other has more of ``draws`` draws) + P(as many) / 2, for two answers with these shares."""
    from scipy.stats import binom  # type: ignore[import-untyped,unused-ignore]

    both = np.arange(draws + 1)
    weight = binom.pmf(both, draws, min(first + other, 1.0))
    share = other / (first + other)
    more = binom.sf(both // 2, both, share)
    as_many = np.where(both % 2 == 0, binom.pmf(both // 2, both, share), 0.0)
    return float((weight * (more + as_many / 2)).sum())
