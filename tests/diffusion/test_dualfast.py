"""DualFast: the base solver at strength 0, its update by hand, and what it is worth against errors of the network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from consilience.diffusion import EDM, Denoiser, GaussianMixture, Process, RectifiedFlow, VPLinear, linear_grid, solve
from consilience.diffusion.solvers.dpm import Multistep, Singlestep
from consilience.diffusion.solvers.dualfast import DualFast
from consilience.diffusion.solvers.multistep import Adams
from consilience.diffusion.solvers.plan import Solver
from consilience.diffusion.solvers.rungekutta import RungeKutta
from consilience.diffusion.solvers.unipc import UniPC

torch.set_num_threads(1)

DDIM, SECOND = Adams(1, "x0"), Multistep(2)
SPREAD = torch.tensor([0.04, 0.02, 0.06], dtype=torch.float64)[:, None, None] * torch.eye(2, dtype=torch.float64)


def mixture(process: Process) -> GaussianMixture:
    weights = torch.tensor([0.3, 0.25, 0.45], dtype=torch.float64)
    return GaussianMixture(weights, torch.tensor([[1.0, 0.2], [-0.9, 0.8], [-0.2, -1.0]]), SPREAD, process)


def start(process: Process, count: int = 400) -> Tensor:
    return process.prior((count, 2), torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("process", [VPLinear(), RectifiedFlow(), EDM()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("base", [DDIM, SECOND, Multistep(3), Adams(3, "x0", "lambda")])
@pytest.mark.filterwarnings("ignore:.*cannot carry order")
def test_at_strength_0_it_is_the_solver_to_the_bit(process: Process, base: Solver) -> None:
    model, x = mixture(process), start(process, 8)
    for n in (1, 2, 5, 9):
        assert torch.equal(solve(model, x, n, DualFast(0.0, base)).x, solve(model, x, n, base).x)
    assert not torch.equal(solve(model, x, 5, DualFast(0.1, base)).x, solve(model, x, 5, base).x)
    one = DualFast(0.5, base)  # a single step has no step before
    assert torch.equal(solve(model, x, 1, one).x, solve(model, x, 1, base).x)


@pytest.mark.parametrize("process", [VPLinear(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_ddim_takes_the_mixed_prediction(process: Process) -> None:
    """x_s = alpha_s (x - sigma eps) / alpha + sigma_s eps with eps = (1 + c) eps_t - c eps_tau, written out."""
    model, x = mixture(process), start(process, 8)
    grid, strength = linear_grid(6, process), 0.3
    found = solve(model, x, grid, DualFast(strength, DDIM))
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    state, before = x, None
    for i in range(6):
        x0 = model.x0(state, float(grid[i]))
        now = (state - alpha[i] * x0) / sigma[i]
        if before is not None:
            c = strength * i / 5
            x0 = (state - sigma[i] * ((1 + c) * now - c * before)) / alpha[i]
        state = sigma[i + 1] / sigma[i] * state + (alpha[i + 1] - sigma[i + 1] / sigma[i] * alpha[i]) * x0
        before = now
    torch.testing.assert_close(found.x, state, rtol=1e-10, atol=1e-10)
    assert found.nfe == 6


def test_the_first_order_term_of_dpm_solver_is_that_of_ddim() -> None:
    """2M adds a difference of x0 to DDIM's step; what DualFast adds to one it adds to the other."""
    process = VPLinear()
    grid = linear_grid(5, process)
    added = []
    for base in (DDIM, SECOND):
        plain, mixed = base.plan(grid, process), DualFast(0.2, base).plan(grid, process)
        row = []
        for one, other in zip(plain.stages[1:-1], mixed.stages[1:-1], strict=True):
            weights = [b - a for a, b in zip((*one.weights, 0.0), other.weights, strict=False)]
            row.append((other.keep - one.keep, *weights[:2], *other.past))
        added.append(row)
    for one, other in zip(*added, strict=True):
        assert one == pytest.approx(other, abs=1e-12)


@pytest.mark.parametrize("n", [5, 6, 8])
@pytest.mark.parametrize("kind", ["shrunk", "grown", "waves"])
def test_against_an_error_that_grows_as_the_noise_falls_it_beats_ddim(n: int, kind: str) -> None:
    """An error of up to 15 % of eps, or 0.15 sin(4 x): the median distance to the exact map falls by 10 % and more.

    At n = 5 and 6 DPM-Solver++ gains too; the larger the strength the more until it is far too large.
    """
    process = VPLinear()
    exact, x = mixture(process), start(process)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        value, size = exact.eps(x, t), 0.15 / (1 + process.ratio(t))
        return {"shrunk": value * (1 - size), "grown": value * (1 + size), "waves": value + size * (4 * x).sin()}[kind]

    network, end = Denoiser(eps, process, "eps"), exact.ode_map(x, process.t_max, 0.0)

    def error(solver: Solver) -> float:
        return float((solve(network, x, linear_grid(n, process), solver).x - end).norm(dim=1).median())

    errors = [error(DualFast(strength, DDIM)) for strength in (0.0, 0.1, 0.2)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.9 * errors[0]
    assert error(DualFast(-0.2, DDIM)) > errors[0]
    if n == 5:
        assert error(DualFast(0.2, SECOND)) < error(SECOND)


@pytest.mark.parametrize("base", [Adams(2, "eps"), RungeKutta("heun"), Singlestep(2), UniPC(2)])
def test_solvers_of_another_kind_are_refused(base: Solver) -> None:
    with pytest.raises(ValueError, match="mixes the predictions of single steps in x0"):
        solve(mixture(VPLinear()), start(VPLinear(), 2), 6, DualFast(0.1, base))
    with pytest.raises(ValueError, match="finite"):
        DualFast(float("nan"))
