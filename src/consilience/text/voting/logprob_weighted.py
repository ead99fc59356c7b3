"""The vote weighted by the probability of each reply."""

from __future__ import annotations

from dataclasses import dataclass

from consilience.rules import Float, Int, View
from consilience.text.voting.weighted import ballots, elect, relative


@dataclass(frozen=True, slots=True)
class LogprobWeighted:
    """Each draw votes with the probability that the model gave its text: the answer with the largest sum wins.

    ``normalised`` takes the probability per token, exp(``mean_logprob``), so that long replies count like short ones;
    otherwise it is that of the whole text, exp(``logprob``), and one short reply can outweigh many. A draw without the
    field does not vote; a tie goes to the answer seen first. Confidence is the winner's share of the weights.

    Source: Wang et al. 2022, arXiv 2203.11171, section 2 and table 1, "weighted sum", normalised and unnormalised.
    """

    normalised: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """``mean_logprob`` (natural logarithm per token) or ``logprob`` (of the whole text)."""
        return ("mean_logprob",) if self.normalised else ("logprob",)

    def decide(self, view: View) -> tuple[Int, Float]:
        """The winner, int32 [problems], -1 = no ballot, and its share of the weights, float64 [problems]."""
        labels, logs = ballots(view, self.needs[0])
        return elect(labels, relative(labels, logs))
