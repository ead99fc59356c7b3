"""The reply that the model itself finds likeliest, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from consilience.rules import Float, Int, View
from consilience.text.voting.weighted import ballots, best_ballot, share

_FIELDS = {"mean": "mean_token_prob", "min": "min_token_logprob", "product": "mean_logprob"}


@dataclass(frozen=True, slots=True)
class SoftSelfConsistency:
    """Each draw gets a score in [0, 1] from the probabilities of its tokens, and the best draw's answer wins.

    Nothing is counted, so it can choose where all answers differ. ``aggregate``: ``mean`` of the token probabilities,
    their ``min``, or their ``product``, which the authors' code takes per token (the geometric mean; for the product
    itself use ``best-of-n:field=logprob``). A draw without the field does not count; of equal scores the draw seen
    first wins. Confidence is the share of all draws' scores that belongs to draws with the winning answer.

    Raises ValueError for another ``aggregate``. Source: Wang et al. 2024, arXiv 2402.13212.
    """

    aggregate: str = "mean"

    def __post_init__(self) -> None:
        if self.aggregate not in _FIELDS:
            raise ValueError(f"aggregate must be one of {', '.join(_FIELDS)}, got {self.aggregate!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """``mean_token_prob``, ``min_token_logprob`` or ``mean_logprob`` (see `token_statistics`)."""
        return (_FIELDS[self.aggregate],)

    def decide(self, view: View) -> tuple[Int, Float]:
        """The winner, int32 [problems], -1 = no ballot, and its share of the scores, float64 [problems]."""
        labels, scores = ballots(view, self.needs[0])
        answer = best_ballot(labels, scores)
        return answer, share(labels, scores if self.aggregate == "mean" else np.exp(scores), answer)
