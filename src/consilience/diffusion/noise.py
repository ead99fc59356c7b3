"""Brownian noise that is one path whatever the steps: increments for stochastic samplers that agree across grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.processes import Process
from consilience.diffusion.solvers.plan import Noise


def brownian(process: Process, x: Tensor, seed: int, sigma_max: float | None = None) -> Noise:
    """Unit noise for steps between times: (W(u') - W(u)) / sqrt(u' - u), W one Brownian path of the shape of x.

    Its clock u is arctan(sigma / alpha), bounded for every process. Halving the steps refines the path instead of
    drawing another; torchsde's Brownian tree keeps it. For solvers that add noise once over any time, as `Ancestral`
    and `SDEDPM` do: the repetitions of a `Restart` would all get the same. Raises ModuleNotFoundError without torchsde.
    """
    import torchsde  # type: ignore[import-untyped,unused-ignore]

    def clock(t: float) -> float:
        at = torch.tensor(t, dtype=torch.float64)
        return float(torch.atan2(process.sigma(at), process.alpha(at)))

    top = torch.pi / 2 if sigma_max is None else float(torch.tensor(sigma_max).arctan())
    tree: Any = torchsde.BrownianTree(t0=0.0, w0=torch.zeros_like(x), t1=top, entropy=seed)

    def noise(_x: Tensor, t: float, s: float) -> Tensor:
        low, high = sorted((clock(t), clock(s)))
        increment: Tensor = tree(low, high) / (high - low) ** 0.5
        return increment if clock(s) < clock(t) else -increment

    return noise
