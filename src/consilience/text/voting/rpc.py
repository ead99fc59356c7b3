"""Perplexity consistency with pruning: the model's own probabilities in place of counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilience.montecarlo.weibull import fit_weibull_mixture
from consilience.rules import Float, Int, View
from consilience.text.voting.weighted import elect, sighted


@dataclass(frozen=True, slots=True)
class PerplexityConsistency:
    """An answer's score is the summed probability of the *distinct* replies that reach it; unlikely ones are dropped.

    A reply drawn twice tells nothing new about its probability, so it counts once: draws of one answer with exactly
    the same log-probability are taken for the same reply. (Where an endpoint gives one text different numbers from
    call to call it counts again, in the authors' code too.) ``normalised`` takes the probability per token,
    exp(``mean_logprob``), as the authors' code does (their theory speaks of the whole text, exp(``logprob``); those
    are divided by a problem's largest, which changes no vote and brings them to the scale of the fit).

    ``pruning`` fits a mixture of two Weibull distributions to the probabilities of all draws of a problem, with an
    answer or not, and drops a draw that more likely belongs to the component of the smaller mean and lies below the
    mean probability. Nothing is dropped where the fit fails or has fewer than 5 distinct probabilities to go by, or
    where no draw with an answer would remain. A draw without the field does not count; a tie goes to the answer seen
    first. Confidence is the winner's share of the remaining probability.

    Source: Zhou et al. 2025, arXiv 2502.00511 (perplexity consistency, reasoning pruning).
    """

    normalised: bool = True
    pruning: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """``mean_logprob`` (natural logarithm per token) or ``logprob`` (of the whole text)."""
        return ("mean_logprob",) if self.normalised else ("logprob",)

    def decide(self, view: View) -> tuple[Int, Float]:
        """The winner, int32 [problems], -1 = no ballot, and its share, float64 [problems]."""
        labels, logs = sighted(view, self.needs[0])
        known = ~np.isnan(logs)
        largest = np.where(known, logs, -np.inf).max(1, initial=-np.inf, keepdims=True)
        shift = 0.0 if self.normalised else np.where(np.isfinite(largest), largest, 0.0)
        probability = np.where(known, np.exp(np.where(known, logs - shift, 0.0)), 0.0)
        voters = np.where(known, labels, np.int32(-1))
        if self.pruning:
            kept = np.where(unlikely(probability), np.int32(-1), voters)
            voters = np.where((kept >= 0).any(1, keepdims=True), kept, voters)
        voters = np.where(_repeated(voters, logs), np.int32(-1), voters)
        return elect(voters, probability)


def unlikely(probability: Float) -> NDArray[np.bool_]:
    """Which draws the pruning drops; probability: float64 [problems, draws], 0 = absent. One fit per set of values."""
    dropped = np.zeros(probability.shape, bool)
    sets, member = np.unique(np.sort(probability, axis=1), axis=0, return_inverse=True)
    for number, ordered in enumerate(sets):
        present = ordered[ordered > 0]
        mixture = fit_weibull_mixture(present)
        if mixture is None:
            continue
        rows = np.flatnonzero(member.reshape(-1) == number)
        values = probability[rows]
        low = mixture.low_is_likelier(np.where(values > 0, values, 1.0))
        dropped[rows] = (values > 0) & low & (values < present.mean())
    return dropped


def _repeated(labels: Int, logs: Float) -> NDArray[np.bool_]:
    """Whether an earlier ballot of the row has the same class and the same log-probability; bool [problems, votes]."""
    rows, columns = np.nonzero(labels >= 0)
    classes, values = labels[rows, columns], logs[rows, columns]
    order = np.lexsort((values, classes, rows))  # stable: of equals the one seen first comes first
    same = np.ones(max(len(order) - 1, 0), bool)
    for key in (rows, classes, values):
        same &= key[order][1:] == key[order][:-1]
    repeats = order[1:][same]
    repeated = np.zeros(labels.shape, bool)
    repeated[rows[repeats], columns[repeats]] = True
    return repeated
