"""What tune found: figures on two halves, the choice, its calibration, and the policy file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from consilience import record
from consilience.rules import Rule

Cost = Literal["draws", "tokens", "usd"]
Measure = Literal["accuracy", "agreement"]

LEVEL = 0.95
"""Level of the one-sided bound that the choice is made by, and of the intervals."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One policy on one half of the problems; shares in [0, 1].

    accuracy: share of verdicts that are right (without gold answers: that agree with the full vote), with its 95 %
    interval. drop: how much less that is than for the full vote in the same orders, mean over problems, with a 95 %
    interval; drop_bound: its one-sided upper bound (`LEVEL`). draws and cost per problem, cost in the unit chosen;
    saved: share of the full vote's cost.
    """

    problems: int
    accuracy: float
    accuracy_ci: tuple[float, float]
    drop: float
    drop_ci: tuple[float, float]
    drop_bound: float
    draws: float
    cost: float
    saved: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy with its figures on both halves; ``frontier``: none is better on the search half at no more cost."""

    rule: Rule
    search: Figures
    held_out: Figures
    frontier: bool = False

    def summary(self) -> dict[str, Any]:
        """As in ``--json``."""
        halves = {"search": dataclasses.asdict(self.search), "held_out": dataclasses.asdict(self.held_out)}
        return {"policy": self.rule.name, **halves}


@dataclass(frozen=True, slots=True)
class Calibration:
    """The map from the chosen policy's confidence to the share of right answers, fitted on the search half.

    confidence (strictly rising) and accuracy (nondecreasing) are its knots, linear in between. ece_before and
    ece_after are the expected calibration errors of the confidence on the held-out half, raw and mapped.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    ece_before: float
    ece_after: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `tune` found. ``found``: a policy is within ``max_drop`` (a share) by its bound and cheaper; else
    ``chosen`` is the full vote. ``measure`` says what accuracy stands for, ``cost`` what was made small."""

    chosen: Candidate
    found: bool
    full: Candidate
    candidates: tuple[Candidate, ...]
    calibration: Calibration | None
    measure: Measure
    cost: Cost
    max_drop: float
    repeats: int
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def frontier(self) -> list[Candidate]:
        """The Pareto frontier of the search half, by rising cost."""
        return sorted((c for c in self.candidates if c.frontier), key=lambda c: c.search.cost)

    @property
    def rule(self) -> Rule:
        """The chosen policy with its calibration."""
        if self.calibration is None:
            return self.chosen.rule
        knots = (self.calibration.confidence, self.calibration.accuracy)
        return dataclasses.replace(self.chosen.rule, calibration=knots)

    def summary(self) -> dict[str, Any]:
        """The figures of the command-line contract."""
        return {
            "policy": self.chosen.rule.name,
            "found": self.found,
            "max_drop": self.max_drop,
            "measure": self.measure,
            "cost": self.cost,
            "repeats": self.repeats,
            "seed": self.seed,
            "evaluated": len(self.candidates),
            "chosen": self.chosen.summary(),
            "full_vote": self.full.summary(),
            "frontier": [candidate.summary() for candidate in self.frontier],
            "calibration": None if self.calibration is None else dataclasses.asdict(self.calibration),
            "notes": list(self.notes),
        }

    def policy_file(self, name: str = "") -> dict[str, Any]:
        """The content of a policy file, which ``--policy @FILE`` reads; ``name`` is that of the record."""
        kept = ("found", "max_drop", "measure", "cost", "repeats", "seed", "chosen", "full_vote")
        measured = {"record": name, **{key: value for key, value in self.summary().items() if key in kept}}
        fitted = self.calibration
        if fitted is not None:
            measured["ece"] = {"before": fitted.ece_before, "after": fitted.ece_after}
        knots = fitted and {"confidence": list(fitted.confidence), "accuracy": list(fitted.accuracy)}
        measured["version"] = version("consilience")
        return {"policy": self.chosen.rule.name, "calibration": knots, "measured": measured}

    def save(self, path: str | Path, name: str = "") -> None:
        """Write the policy file, whole or not at all. Raises InputError where it cannot be written."""
        with record.replacing(Path(path)) as stream:
            stream.write(json.dumps(self.policy_file(name), indent=1).encode() + b"\n")
