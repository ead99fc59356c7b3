"""Solvers for models that jump: consistency models, and flow maps that are told where to land."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.diffusion.processes import Process
from consilience.diffusion.solvers.plan import Plan, Stage


@dataclass(frozen=True, slots=True)
class Jumps:
    """Jump to (1 - ``gamma``) of each next time and add noise up to it; to the last time jump without noise.

    ``gamma`` 1 is multistep consistency sampling: to the data, and back (arXiv:2303.01469, algorithm 1); 0 is the
    deterministic chain; what is between them is that of trajectory consistency distillation (arXiv:2402.19159,
    algorithm 4). The jumps are those of `consistency.samplers`, as a plan for `solve` and the diffusers scheduler.
    Raises ValueError for gamma outside [0, 1].
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be between 0 and 1, got {self.gamma}")

    def grid(self, n: int, process: Process, sigma_max: float) -> Tensor:
        """n + 1 times, even in sigma / (alpha + sigma) between ``sigma_max``, which may be infinite, and no noise."""
        top = 1.0 if math.isinf(sigma_max) else sigma_max / (1 + sigma_max)
        tau = top * torch.arange(n, -1, -1, dtype=torch.float64) / n
        ratio = tau / (1 - tau)
        ratio[0] = sigma_max
        return process.time(ratio)

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The stages on a grid: a jump, and where it fell short of the next time, the noise."""
        grid = grid.detach().double().cpu()
        clean = process.time(torch.zeros((), dtype=torch.float64))
        stages = []
        for i in range(len(grid) - 1):
            there = grid[i + 1]
            whole = self.gamma == 0 or i == len(grid) - 2
            land = there if whole else clean + (1 - self.gamma) * (there - clean)
            stages.append(_jump(process, grid[i], land))
            if land < there:
                stages.append(_noised(process, land, there))
        return Plan(tuple(stages), "x0", jumps=True)


def _jump(process: Process, t: Tensor, s: Tensor) -> Stage:
    """x_s = alpha_s x0 + sigma_s eps of the evaluation at t."""
    share = float(process.sigma(s) / process.sigma(t))
    weight = float(process.alpha(s)) - float(process.alpha(t)) * share
    return Stage(float(t), float(s), share, (weight,))


def _noised(process: Process, s: Tensor, t: Tensor) -> Stage:
    """From s to the later t by the process's own law."""
    keep = float(process.alpha(t) / process.alpha(s))
    left = max(0.0, float(process.sigma(t)) ** 2 - (keep * float(process.sigma(s))) ** 2)  # below 0 by rounding
    return Stage(None, float(t), keep, noise=math.sqrt(left))
