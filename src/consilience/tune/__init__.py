"""Tune: the cheapest policy that a record's draws show to be, within a limit, as good as the vote of all draws.

The problems are split in two halves. Every candidate is replayed on all; the choice is made on the *search* half alone,
by an upper confidence bound on what the policy loses, and the *held-out* half then says what was found.
"""

from consilience.tune.families import FAMILIES, Family, candidates
from consilience.tune.results import Calibration, Candidate, Cost, Figures, Measure, Tuned
from consilience.tune.search import LEAST, Survey, drop_figures, survey, tune

__all__ = [
    "FAMILIES",
    "LEAST",
    "Calibration",
    "Candidate",
    "Cost",
    "Family",
    "Figures",
    "Measure",
    "Survey",
    "Tuned",
    "candidates",
    "drop_figures",
    "survey",
    "tune",
]
