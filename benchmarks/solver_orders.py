"""Observed orders of convergence: every method on an exact denoiser, the steps doubled from 32 to 256.

    python benchmarks/solver_orders.py

The data are a mixture of three Gaussians under EDM's process; the reference is the exact map to sigma_min, so the slope
of the median error between 128 and 256 steps is the order, with nothing of a last step to zero in it.
"""

from __future__ import annotations

import math

import torch

from consilience.diffusion import GaussianMixture, karras_grid, solve
from consilience.diffusion.solvers.dpm import Multistep, Singlestep
from consilience.diffusion.solvers.multistep import Adams
from consilience.diffusion.solvers.plan import Solver
from consilience.diffusion.solvers.rungekutta import RungeKutta
from consilience.diffusion.solvers.unipc import UniPC

STEPS = (32, 64, 128, 256)
LOW, HIGH = 0.002, 80.0
METHODS: dict[str, tuple[Solver, int]] = {
    "Euler, DDIM": (Adams(1), 1),
    **{f"Adams-Bashforth in sigma, order {k}": (Adams(k, "eps", "sigma"), k) for k in (2, 3, 4)},
    **{f"exponential Adams-Bashforth, order {k}": (Adams(k, "x0", "lambda"), k) for k in (2, 3, 4)},
    **{f"Adams-Bashforth on the straight path, order {k}": (Adams(k, "flow", "flow"), k) for k in (2, 3, 4)},
    **{f"DEIS, order {k}": (Adams(k, "eps", "time"), k) for k in (2, 3, 4)},
    **{f"DPM-Solver++ {k}M": (Multistep(k), k) for k in (2, 3)},
    **{f"DPM-Solver++ {k}S": (Singlestep(k), k) for k in (2, 3)},
    **{f"UniPC-{k} with corrector": (UniPC(k), k + 1) for k in (1, 2, 3)},
    "Heun": (RungeKutta("heun"), 2),
    "midpoint on the straight path": (RungeKutta("midpoint", "flow"), 2),
    "RK4 on the straight path": (RungeKutta("rk4", "flow"), 4),
}


def mixture() -> GaussianMixture:
    """Three components wide enough that 32 steps are in the asymptotic range."""
    means = torch.tensor([[1.0, 0.2], [-0.9, 0.8], [-0.2, -1.1]], dtype=torch.float64)
    covariances = torch.diag_embed(torch.tensor([[0.3, 0.2], [0.25, 0.25], [0.2, 0.3]], dtype=torch.float64))
    return GaussianMixture(torch.tensor([0.45, 0.3, 0.25], dtype=torch.float64), means, covariances)


def main() -> None:
    torch.set_num_threads(1)
    model = mixture()
    x = HIGH * torch.randn(256, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = model.ode_map(x, HIGH, LOW, 1e-12, 1e-13)
    print("| method | nominal order | " + " | ".join(f"error, {n} steps" for n in STEPS) + " | observed, 128 to 256 |")
    print("|---|---:|" + "---:|" * len(STEPS) + "---:|")
    for name, (solver, order) in METHODS.items():
        errors = []
        for n in STEPS:
            grid = karras_grid(n + 1, LOW, HIGH)[:-1]
            errors.append(float((solve(model, x, grid, solver).x - exact).norm(dim=1).median()))
        slope = math.log2(errors[-2] / errors[-1])
        print(f"| {name} | {order} | " + " | ".join(f"{error:.1e}" for error in errors) + f" | {slope:.2f} |")


if __name__ == "__main__":
    main()
