"""Each model votes with a weight that falls with the entropy of its answers to the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from consilience.rules import Float, Int, View
from consilience.text.routing.arms import arm_counts, numbers
from consilience.text.voting.weighted import elect


@dataclass(frozen=True, slots=True)
class EntropyWeighted:
    """A draw votes with its model's internal weight on the question times the model's external weight, ``prior``.

    With n answers of entropy H over k distinct ones the internal weight is 1/n + (1 - 1/n)(1 - H / log k): 1 where
    all agree, 1/n where no answer is commoner than another. ``prior`` lists one number per arm, such as each model's
    accuracy on questions of the kind: ``entropy-weighted:prior="0.8,0.6"``; a single number weighs all alike. A tie
    goes to the answer seen first. Confidence is the winner's share of all weights.

    Raises ValueError unless every prior is a positive finite number, and in `decide` where there are not as many
    priors as arms. Source: Chen et al. 2025, arXiv 2504.00762; the formula is that of its released code
    (JianhaoChen-nju/ModelSwitch, Analyze.py), where log k is the entropy's upper limit.
    """

    prior: str = "1"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        values = numbers(self.prior, "prior", len(self.prior.split(",")))
        if not all(0 < value < float("inf") for value in values):
            raise ValueError(f"prior must be positive numbers, got {self.prior!r}")

    def decide(self, view: View) -> tuple[Int, Float]:
        """The winner, int32 [problems], -1 = no answer at all, and its share, float64 [problems]."""
        judged = view.judged()
        weights = internal_weights(view) * np.array(numbers(self.prior, "prior", judged.shape[1]))
        by_draw = judged.transpose(0, 2, 1)  # the order of sight: by draw index, then by arm
        each = np.broadcast_to(weights[:, None, :], by_draw.shape)
        return elect(by_draw.reshape(len(judged), -1), each.reshape(len(judged), -1))


def internal_weights(view: View) -> Float:
    """How consistent each arm is on each problem, float64 [problems, arms] in (0, 1]; 1 where it gave no answer."""
    counts = arm_counts(view)
    total = counts.sum(2)
    share = counts / np.maximum(total, 1)[:, :, None]
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(2)
    distinct = (counts > 0).sum(2)
    relative = np.divide(entropy, np.log(np.maximum(distinct, 2)), where=distinct > 1, out=np.zeros_like(entropy))
    least = 1 / np.maximum(total, 1)
    weights: Float = least + (1 - least) * (1 - relative)
    return weights
