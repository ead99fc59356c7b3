"""The same methods on the same sigmas in diffusers, an independent computation in float32 coefficients."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import diffusers as library
import pytest
import torch

from consilience.diffusion import GaussianMixture, VPTable, solve
from consilience.diffusion.processes import VE, Process
from consilience.diffusion.solvers.dpm import Multistep, Singlestep
from consilience.diffusion.solvers.multistep import Adams
from consilience.diffusion.solvers.plan import Solver
from consilience.diffusion.solvers.rungekutta import RungeKutta
from consilience.diffusion.solvers.unipc import UniPC, Variant

torch.set_num_threads(1)

diffusers: Any = library

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FULL: dict[str, Any] = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
TABLE = VPTable(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0))


def mixture(process: Process) -> GaussianMixture:
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    means = torch.tensor([[0.8, 0.2], [-0.9, 0.5]], dtype=torch.float64)
    return GaussianMixture(weights, means, 0.05 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2), process)


def theirs(scheduler: Any, model: GaussianMixture, x: torch.Tensor) -> torch.Tensor:
    """Their loop, with the model told the exact sigma of every step instead of a rounded timestep."""
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].double()
        x = scheduler.step(model.eps(x, model.process.time(sigma)), timestep, x).prev_sample
    return x


def unipc(order: int, variant: str) -> Any:
    return diffusers.UniPCMultistepScheduler(solver_order=order, solver_type=variant, **BETAS, **FULL)


def deis(order: int) -> Any:
    return diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=False, **BETAS)


CASES: dict[str, tuple[Callable[[], Any], Solver]] = {
    "DPM++ 1": (lambda: diffusers.DPMSolverMultistepScheduler(solver_order=1, **BETAS, **FULL), Multistep(1)),
    "DPM++ 2M": (lambda: diffusers.DPMSolverMultistepScheduler(solver_order=2, **BETAS, **FULL), Multistep(2)),
    "DPM++ 2S": (lambda: diffusers.DPMSolverSinglestepScheduler(solver_order=2, **BETAS, **FULL), Singlestep(2)),
    **{f"UniPC-{k} {b}": (partial(unipc, k, b), UniPC(k, b)) for k in (1, 2, 3) for b in get_args(Variant)},
    "UniP-2": (
        lambda: diffusers.UniPCMultistepScheduler(solver_order=2, disable_corrector=list(range(99)), **BETAS, **FULL),
        UniPC(2, corrector=False),
    ),
    # theirs is polynomial in log sigma / alpha, where the paper has time
    **{f"DEIS-{k}": (partial(deis, k), Adams(k, "eps", "lambda")) for k in (1, 2, 3)},
}


@pytest.mark.parametrize("n", [6, 12])
@pytest.mark.parametrize("name", CASES)
def test_vp_schedulers_agree(name: str, n: int) -> None:
    make, solver = CASES[name]
    scheduler, model = make(), mixture(TABLE)
    scheduler.set_timesteps(n)
    x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = TABLE.time(scheduler.sigmas.double())
    found = solve(model, x, grid, solver).x
    atol = 5e-5 if name == "DEIS-3" else 1e-5  # their integrals of third order lose digits in float32
    torch.testing.assert_close(theirs(scheduler, model, x), found, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("n", [6, 12])
def test_euler_agrees_to_the_end(n: int) -> None:
    scheduler, model = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **BETAS), mixture(VE(0.02, 20.0))
    scheduler.set_timesteps(n)
    sigmas = scheduler.sigmas.double()
    x = sigmas[0] * torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(scheduler, model, x), solve(model, x, sigmas, "euler").x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [4, 9])
def test_heun_agrees_to_the_end(n: int) -> None:
    scheduler, model = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True, **BETAS), mixture(VE(0.02, 20.0))
    scheduler.set_timesteps(n)
    sigmas = torch.unique(scheduler.sigmas.double()).flip(0)  # theirs stand twice
    x = sigmas[0] * torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = solve(model, x, sigmas, RungeKutta("heun"))
    assert found.nfe == len(scheduler.timesteps) == 2 * n - 1
    torch.testing.assert_close(theirs(scheduler, model, x), found.x, rtol=1e-5, atol=1e-5)
