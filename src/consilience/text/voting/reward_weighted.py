"""The vote weighted by a reward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from consilience.rules import Float, Int, View
from consilience.text.voting.weighted import ballots, elect, relative

_WEIGHTS = ("raw", "softmax")


@dataclass(frozen=True, slots=True)
class RewardWeighted:
    """Each draw votes with its reward: the answer with the largest sum wins.

    ``weights=raw`` takes the reward as it is; a negative one counts against its answer. ``softmax`` takes
    exp(reward / temperature): plurality for a high temperature, the best draw for a low one, and unlike the raw sum
    unmoved by a constant added to all rewards. A draw without the ``field`` does not vote; a tie goes to the answer
    seen first. Confidence is the winner's sum, at least 0, over the sum of the absolute weights: its share of the
    weights where none is negative.

    Raises ValueError for other ``weights`` or a temperature that is not positive and finite. Source: the vote weighted
    by a verifier of Li et al. 2022, arXiv 2206.02336, with any reward in the verifier's place.
    """

    weights: str = "raw"
    temperature: float = 1.0
    field: str = "reward"

    def __post_init__(self) -> None:
        if self.weights not in _WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(_WEIGHTS)}, got {self.weights!r}")
        if not (self.temperature > 0 and np.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The field that holds the reward, larger = better."""
        return (self.field,)

    def decide(self, view: View) -> tuple[Int, Float]:
        """The winner, int32 [problems], -1 = no ballot, and its share of the weights, float64 [problems]."""
        labels, rewards = ballots(view, self.field)
        raw = self.weights == "raw"
        return elect(labels, rewards if raw else relative(labels, rewards, self.temperature))
