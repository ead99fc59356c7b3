"""The answer of the best draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from consilience.rules import Float, Int, View
from consilience.text.voting.weighted import ballots, best_ballot, share


@dataclass(frozen=True, slots=True)
class BestOfN:
    """The answer of the draw with the largest value of ``field`` wins, the draw seen first of equals.

    Only draws with an answer and the field are compared. A reward has no scale of its own, so the confidence is the
    share of those draws that give the winning answer: how far the vote agrees with the choice.

    Source: Cobbe et al. 2021, arXiv 2110.14168, section 4.2 (the best of many by a verifier).
    """

    field: str = "reward"

    @property
    def needs(self) -> tuple[str, ...]:
        """The field that is maximised."""
        return (self.field,)

    def decide(self, view: View) -> tuple[Int, Float]:
        """The winner, int32 [problems], -1 = no ballot, and the share of ballots it has, float64 [problems]."""
        labels, values = ballots(view, self.field)
        answer = best_ballot(labels, values)
        return answer, share(labels, np.ones(labels.shape), answer)
