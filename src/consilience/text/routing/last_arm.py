"""The answer of the model that was asked last: what a cascade returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from consilience.rules import Float, Int, View
from consilience.text.voting.plurality import Plurality


@dataclass(frozen=True, slots=True)
class LastArm:
    """The plurality of the last arm that gave an answer; the draws of the arms before it do not vote.

    Under ``cascade`` that is the model whose agreement was accepted, or the last one. Confidence is that of
    ``plurality`` on the arm's own draws.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def decide(self, view: View) -> tuple[Int, Float]:
        """The winner, int32 [problems], -1 = no answer at all, and its confidence, float64 [problems]."""
        judged = view.judged()
        given: NDArray[np.bool_] = np.any(judged >= 0, axis=2)
        arms = given.shape[1]
        last = np.where(np.any(given, axis=1), arms - 1 - given[:, ::-1].argmax(1), 0)
        rows = np.arange(len(judged))
        return Plurality().decide(View.single(judged[rows, last], view.drawn[rows, last]))
