"""What a plan does to Gaussian data, computed exactly: every evaluation is linear in the state."""

import math

import torch

from consilience.diffusion import GaussianMixture, Process, solve


def propagate(model: GaussianMixture, plan, process: Process, t: float, std: float) -> float:
    """The exact variance at the end of a plan on Gaussian data, where every evaluation is linear in the state."""
    at = torch.tensor(t, dtype=torch.float64)
    count = 1 + sum(stage.noise != 0 for stage in plan.stages)
    state = torch.zeros(1, count, dtype=torch.float64)
    state[0, 0] = float(process.sigma(at)) if math.isinf(float(process.ratio(at))) else 1.0
    if state[0, 0] == 1.0:
        state[0, 0] = float(torch.sqrt(process.alpha(at) ** 2 * std**2 + process.sigma(at) ** 2))
    unit = torch.eye(count, dtype=torch.float64)
    drawn = iter(range(1, count))
    grid = torch.tensor([t, *(stage.end for stage in plan.stages)], dtype=torch.float64)
    x = state.T  # [count, 1]: a batch of the unit sources, each carried through the linear plan
    found = solve(
        model,
        x,
        grid,
        type("Fixed", (), {"plan": lambda *_: plan})(),
        noise=lambda *_: unit[next(drawn)][:, None],
    ).x
    return float((found**2).sum())
