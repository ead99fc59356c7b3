"""DualFast: a solver whose noise prediction is pushed away from the one before, against errors of the network.

Yu et al., arXiv:2506.13058: at few steps a solver's error and the network's own add up, and the order mends the first
alone. In the solver's first-order term eps(x_t, t) becomes (1 + c) eps(x_t, t) - c eps(x_tau, tau), tau the step before
and c growing as the noise falls; no evaluation is added.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from consilience.diffusion.processes import Process
from consilience.diffusion.solvers.multistep import Adams, Points
from consilience.diffusion.solvers.plan import Plan, Solver, Stage


@dataclass(frozen=True, slots=True)
class DualFast:
    """The ``solver``, one of single steps in x0 such as DDIM or DPM-Solver++, with mixed noise predictions.

    c rises evenly from 0 at the first step to ``strength`` at the last; 0 is the solver itself. It helps most beside a
    solver of low order. The even rise, and the step before as tau, are this module's: the paper's own schedule could
    not be had. Raises ValueError for a solver of another kind.
    """

    strength: float = 0.2
    solver: Solver = field(default_factory=lambda: Adams(1, "x0"))

    def __post_init__(self) -> None:
        if not np.isfinite(self.strength):
            raise ValueError(f"the strength must be finite, got {self.strength}")

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The solver's stages, each with the difference of the last two noise predictions."""
        plan, points = self.solver.plan(grid, process), Points(grid, process)
        steps = len(grid) - 1
        kinds = {plan.form(stage) for stage in plan.stages} | {stage.anchor for stage in plan.stages}
        if kinds != {"x0", 0} or plan.evaluations != steps or any(stage.past for stage in plan.stages):
            raise ValueError(f"DualFast mixes the predictions of single steps in x0, not those of {self.solver}")
        mixed = [
            _mixed(stage, points, i, self.strength * i / max(1, steps - 1)) if i and self.strength else stage
            for i, stage in enumerate(plan.stages)
        ]
        return Plan(tuple(mixed), "x0")


def _mixed(stage: Stage, points: Points, i: int, c: float) -> Stage:
    """The stage with c (eps_i - eps_(i-1)) added to eps_i in its first-order term.

    eps_j = (x_j - alpha_j x0_j) / sigma_j. With x fixed that lowers x0 by sigma / alpha as much, and the first-order
    term is the sum of x0's weights times x0.
    """
    alpha, sigma = points.alpha, points.sigma
    by = -c * sum(stage.weights) * sigma[i] / alpha[i]
    weights = np.zeros(max(2, len(stage.weights)))
    weights[: len(stage.weights)] = stage.weights
    weights[0] -= by * alpha[i] / sigma[i]
    weights[1] += by * alpha[i - 1] / sigma[i - 1]
    return replace(
        stage,
        keep=float(stage.keep + by / sigma[i]),
        weights=tuple(float(w) for w in weights),
        past=(float(-by / sigma[i - 1]),),
    )
