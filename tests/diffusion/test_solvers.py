"""The deterministic solvers on models whose probability-flow map is known: orders, identities, limits, no NaN."""

import math

import pytest
import torch

from consilience.diffusion import (
    EDM,
    VE,
    GaussianMixture,
    Process,
    RectifiedFlow,
    TrigFlow,
    VPCosine,
    VPLinear,
    VPTable,
    karras_grid,
    linear_grid,
    on_process,
    solve,
)
from consilience.diffusion.solve import steps_of
from consilience.diffusion.solvers.dpm import Multistep, Singlestep
from consilience.diffusion.solvers.multistep import Adams
from consilience.diffusion.solvers.plan import Solver
from consilience.diffusion.solvers.rungekutta import RungeKutta
from consilience.diffusion.solvers.unipc import UniPC

torch.set_num_threads(1)

STABLE_DIFFUSION = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
NAMES = [
    *("euler", "ddim", "ab2", "ab3", "ab4", "expab1", "expab2", "expab3", "expab4", "flow-ab2", "flow-ab3", "flow-ab4"),
    *("deis1", "deis2", "deis3", "deis4", "heun", "flow-heun", "flow-midpoint", "flow-rk4"),
    *("dpmpp-2m", "dpmpp-3m", "dpmpp-2s", "dpmpp-3s"),
    *("unipc1", "unipc2", "unipc3", "unipc1-bh1", "unipc2-bh1", "unipc3-bh1"),
]
PROCESSES: list[Process] = [EDM(), VPLinear(), VPCosine(), VPTable(STABLE_DIFFUSION), RectifiedFlow(), TrigFlow()]

ORDERS: dict[str, tuple[Solver, int]] = {
    "euler": (Adams(1, "eps"), 1),
    **{f"ab{k}": (Adams(k, "eps", "sigma"), k) for k in (2, 3, 4)},
    **{f"expab{k}": (Adams(k, "x0", "lambda"), k) for k in (2, 3, 4)},
    **{f"flow-ab{k}": (Adams(k, "flow", "flow"), k) for k in (2, 3, 4)},
    **{f"dpmpp-{k}m": (Multistep(k), k) for k in (1, 2, 3)},
    **{f"dpmpp-{k}s": (Singlestep(k), k) for k in (1, 2, 3)},
    "heun": (RungeKutta("heun"), 2),
    "flow-heun": (RungeKutta("heun", "flow"), 2),
    "flow-midpoint": (RungeKutta("midpoint", "flow"), 2),
    "flow-rk4": (RungeKutta("rk4", "flow"), 4),
    "rk4": (RungeKutta("rk4"), 4),
    **{f"unip{k}-{b}": (UniPC(k, b, False), k) for k in (1, 2, 3) for b in ("bh1", "bh2")},
    **{f"unipc{k}-{b}": (UniPC(k, b), k + 1) for k in (1, 2, 3) for b in ("bh1", "bh2")},
}


def mixture(process: Process, spread: float = 0.0) -> GaussianMixture:
    weights = torch.tensor([0.45, 0.3, 0.25], dtype=torch.float64)
    means = torch.tensor([[1.0, 0.2], [-0.9, 0.8], [-0.2, -1.1]], dtype=torch.float64)
    covariances = torch.tensor(
        [[[0.04, 0.01], [0.01, 0.02]], [[0.03, 0.0], [0.0, 0.03]], [[0.02, -0.01], [-0.01, 0.06]]], dtype=torch.float64
    )
    return GaussianMixture(weights, means, covariances + spread * torch.eye(2, dtype=torch.float64), process)


def gaussian(process: Process) -> tuple[GaussianMixture, torch.Tensor, torch.Tensor]:
    mean = torch.tensor([0.4, -0.7, 0.1], dtype=torch.float64)
    deviations = torch.tensor([0.3, 1.0, 0.05], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, mean[None], torch.diag(deviations**2)[None], process), mean, deviations


def start(process: Process, t: float, count: int, dim: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    at = torch.tensor(t, dtype=torch.float64)
    return x * torch.hypot(process.sigma(at), 0.8 * process.alpha(at))


@pytest.fixture(scope="module")
def problem() -> tuple[GaussianMixture, torch.Tensor, torch.Tensor]:
    """A mixture under EDM, states at sigma 80 and where the exact ODE takes them at sigma 0.002."""
    model = mixture(EDM(), 0.04)
    x = start(model.process, 80.0, 48, 2)
    return model, x, model.ode_map(x, 80.0, 0.002)


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_observed_is_the_order_claimed(
    problem: tuple[GaussianMixture, torch.Tensor, torch.Tensor], name: str
) -> None:
    model, x, exact = problem
    solver, order = ORDERS[name]
    errors = []
    for n in (128, 256):
        grid = karras_grid(n + 1, 0.002, 80.0)[:-1]
        errors.append(float((solve(model, x, grid, solver).x - exact).norm(dim=1).median()))
    assert math.log2(errors[0] / errors[1]) > order - 0.15


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", NAMES)
def test_any_count_gives_numbers_within_the_budget(process: Process, name: str) -> None:
    model = mixture(process)
    x = process.prior((3, 2), torch.Generator().manual_seed(1), dtype=torch.float64)
    ran = 0
    for n in (1, 2, 3, 4, 5, 6, 13):
        try:
            found = solve(model, x, n, name)
        except ValueError as error:
            assert n < 4 and "takes" in str(error)  # noqa: PT017, PT018
            continue
        ran += 1
        assert bool(torch.isfinite(found.x).all()), n
        assert 1 <= found.nfe <= n
    assert ran >= 4


@pytest.mark.slow
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", NAMES)
def test_no_count_up_to_a_hundred_gives_nan(process: Process, name: str) -> None:
    """Every coefficient of every plan is finite, and so is what a run of every ninth gives."""
    model = mixture(process)
    x = process.prior((2, 2), torch.Generator().manual_seed(1), dtype=torch.float64)
    for n in range(4, 101):
        choice = steps_of(name, process, n)
        for stage in choice.solver.plan(choice.grid, process).stages:
            assert all(math.isfinite(part) for part in (stage.keep, *stage.weights)), n
        if n % 9 == 0:
            assert bool(torch.isfinite(solve(model, x, n, name).x).all()), n


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"euler", "ddim", "expab1", "deis1"}))
def test_a_fine_grid_ends_at_the_exact_map_of_a_gaussian(process: Process, name: str) -> None:
    """mu + (x - alpha mu) / sqrt(alpha^2 s^2 + sigma^2) s: the last step to no noise is of full order."""
    model, mean, deviations = gaussian(process)
    x = start(process, process.t_max, 16, 3)
    at = torch.tensor(process.t_max, dtype=torch.float64)
    alpha, sigma = process.alpha(at), process.sigma(at)
    exact = mean + (x - alpha * mean) * deviations / torch.sqrt(alpha**2 * deviations**2 + sigma**2)
    found = solve(model, x, 120, name).x
    assert float((found - exact).abs().median()) < 8e-3


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        *((make(k), 2 * k) for make in (Multistep, Singlestep, UniPC) for k in (2, 3)),
        *((Adams(k, "x0", "lambda"), 2 * k) for k in (2, 3)),
        (Adams(1, "x0"), 2),
        (Adams(2, "eps", "sigma"), 4),  # eps is odd in sigma: a line through its last two values errs in sigma^3 dsigma
    ],
    ids=repr,
)
def test_the_last_step_is_of_full_order(solver: Solver, order: int) -> None:
    """Its own error, from exact states: x0 is even in sigma, so that k evaluations leave sigma_min^(2 k)."""
    model, mean, deviations = gaussian(EDM())
    x = start(model.process, 80.0, 16, 3)

    def exact(t: float) -> torch.Tensor:
        return mean + (x - mean) * torch.sqrt((deviations**2 + t**2) / (deviations**2 + 80.0**2))

    errors = []
    for low in (0.004, 0.002):
        grid = low * torch.tensor([2.2, 1.9, 1.6, 1.3, 1.15, 1.0, 0.0], dtype=torch.float64)
        plan = solver.plan(grid, EDM())
        last = plan.stages[-1]
        state = last.keep * exact(float(grid[-2]))
        for weight, t in zip(last.weights, reversed(grid[:-1].tolist()), strict=False):
            state = state + weight * model.predict(plan.prediction, exact(t), t)
        errors.append(float((state - exact(0.0))[:, 2].abs().median()))
    assert math.log2(errors[0] / errors[1]) > order - 0.15


GRIDS = [
    (EDM(), karras_grid(9, 0.002, 80.0)),
    (VPLinear(), on_process(karras_grid(8, 0.01, 100.0), VPLinear())),
    (RectifiedFlow(), linear_grid(9, RectifiedFlow())),
    (VE(), karras_grid(7, 0.02, 50.0)[:-1]),
]


@pytest.mark.parametrize(("process", "grid"), GRIDS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Multistep(1), Adams(1, "x0")),  # DPM-Solver++ 1 is DDIM
        (Singlestep(1), Adams(1, "eps")),  # on every path
        (UniPC(1, "bh1", False), Adams(1, "flow", "flow")),
        (UniPC(2, "bh2", False), Multistep(2)),  # UniP-2 with B2 is DPM-Solver++ 2M
        (UniPC(3, "bh2", False), Multistep(3)),  # both exact for quadratics in lambda
    ],
    ids=repr,
)
def test_solvers_that_are_one_method_agree(process: Process, grid: torch.Tensor, left: Solver, right: Solver) -> None:
    model, x = mixture(process), start(process, float(grid[0]), 8, 2)
    torch.testing.assert_close(solve(model, x, grid, left).x, solve(model, x, grid, right).x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [EDM(), VPLinear()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    ("left", "right"),
    [(UniPC(3, "bh1", False), UniPC(3, "bh2", False)), (Multistep(3), Adams(3, "x0", "lambda"))],
    ids=repr,
)
def test_third_order_is_one_method_once_three_outputs_are_there(process: Process, left: Solver, right: Solver) -> None:
    """B(h) cancels where its system is solved; before that the second order differs by what it leaves out."""
    grid = on_process(karras_grid(9, 0.02, 60.0), process)
    for one, other in zip(left.plan(grid, process).stages[2:], right.plan(grid, process).stages[2:], strict=True):
        assert one.keep == pytest.approx(other.keep, rel=1e-12)
        assert one.weights == pytest.approx(other.weights, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("deis2", "deis3", "deis4")])
def test_only_sigma_over_alpha_matters(name: str) -> None:
    """The same grid of sigma / alpha under VP, EDM and a flow: states differ by their scale alone."""
    sigmas = karras_grid(10, 0.02, 60.0)
    results = []
    for process in (EDM(), VPLinear(), RectifiedFlow(2.0)):
        grid = on_process(sigmas, process)
        x = start(EDM(), 60.0, 8, 2) * process.alpha(grid[0])
        results.append(solve(mixture(process), x, grid, name).x)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(results[2], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["euler", "ab3", "deis3", "heun", "dpmpp-2m", "dpmpp-3s", "unipc2", "ddim", "flow-ab3"]
)
def test_every_path_leaves_pure_noise_by_the_same_step(name: str) -> None:
    """x_s = alpha_s x0 + sigma_s eps with x0 the data's mean, all that the model can know there."""
    model = mixture(RectifiedFlow())
    x = start(model.process, 1.0, 8, 2)
    x = x / x.std()
    grid = torch.tensor([1.0, 0.8, 0.5, 0.2], dtype=torch.float64)
    first = solve(model, x, grid, name, trajectory=True).states[0]
    torch.testing.assert_close(first, 0.2 * model.mean + 0.8 * x, rtol=1e-12, atol=1e-12)


def test_almost_pure_noise_is_left_without_loss_of_digits() -> None:
    """alpha = 6e-17 in float32: x / alpha would be infinite in all but name."""
    model = mixture(TrigFlow())
    model = GaussianMixture(model.weights.float(), model.means.float(), model.covariances.float(), model.process)
    x = 0.5 * torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(math.pi / 2, 0, 41, dtype=torch.float64)
    exact = model.ode_map(x, math.pi / 2, 0.0)
    for name in ("ab2", "deis2", "heun", "euler"):
        assert float((solve(model, x, grid, name).x - exact).norm(dim=1).median()) < 0.05, name


@pytest.mark.parametrize(
    ("solver", "n", "evaluations"),
    [
        (RungeKutta("heun"), 7, 13),
        (RungeKutta("heun", "flow"), 7, 13),
        (RungeKutta("midpoint", "flow"), 7, 14),
        (RungeKutta("rk4", "flow"), 7, 27),
        (Singlestep(3), 7, 7),
        (UniPC(3), 7, 7),
    ],
    ids=repr,
)
def test_evaluations_are_counted_exactly(solver: Solver, n: int, evaluations: int) -> None:
    calls = []
    model = mixture(EDM())
    counted = type(model)(model.weights, model.means, model.covariances, model.process)
    inner = counted.function

    def count(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(float(t))
        return inner(x, t)

    object.__setattr__(counted, "function", count)
    found = solve(counted, start(EDM(), 80.0, 2, 2), karras_grid(n, 0.002, 80.0), solver)
    assert found.nfe == len(calls) == evaluations


def test_heun_spends_an_odd_count_whole() -> None:
    model, x = mixture(EDM()), start(EDM(), 80.0, 2, 2)
    assert [solve(model, x, n, "heun").nfe for n in (1, 2, 3, 9, 10)] == [1, 1, 3, 9, 9]
    assert [solve(model, x, n, "flow-rk4").nfe for n in (3, 7, 8, 11)] == [3, 7, 7, 11]
    with pytest.raises(ValueError, match="takes 2 evaluations, got 1"):
        solve(model, x, 1, "flow-midpoint")


def test_heun_is_edms_algorithm() -> None:
    """Algorithm 1 of arXiv:2206.00364 without noise, written out."""
    model, grid = mixture(EDM()), karras_grid(6, 0.002, 80.0)
    x = start(EDM(), 80.0, 8, 2)
    found = solve(model, x, grid, "heun").x
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        d = (x - model.x0(x, t)) / t
        ahead = x + (s - t) * d
        x = ahead if s == 0 else x + (s - t) * (d / 2 + (ahead - model.x0(ahead, s)) / s / 2)
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


def test_singlestep_takes_the_papers_inner_times_where_the_grid_has_them() -> None:
    """Algorithm 1 with r = 1/2, the inner time half way in lambda, written out."""
    model = mixture(EDM())
    lambdas = torch.linspace(-math.log(80.0), -math.log(0.01), 9, dtype=torch.float64)
    x = start(EDM(), 80.0, 8, 2)
    found = solve(model, x, torch.exp(-lambdas), "dpmpp-2s").x
    for i in range(0, 8, 2):
        s, inner, t = torch.exp(-lambdas[i : i + 3]).tolist()
        h = math.log(s / t)
        data = model.x0(x, s)
        u = inner / s * x - math.expm1(-h / 2) * data
        x = t / s * x - math.expm1(-h) * model.x0(u, inner)
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Multistep(4), "orders 1 to 3"),
        (lambda: Singlestep(0), "orders 1 to 3"),
        (lambda: UniPC(4), "orders 1 to 3"),
        (lambda: UniPC(2, "bh3"), "bh1 or bh2"),  # type: ignore[arg-type]
        (lambda: RungeKutta("euler"), "no rule"),
        (lambda: Adams(5), "orders 1 to 4"),
    ],
)
def test_a_method_that_does_not_exist_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("process", [VPLinear(), VPCosine(), VPTable(STABLE_DIFFUSION)], ids=lambda p: type(p).__name__)
def test_the_weights_of_an_adams_step_sum_to_the_length_of_the_step(process: Process) -> None:
    """The basis polynomials sum to one, also next to t = 0 where a VP process's d sigma / dt is infinite."""
    ends = [float(process.ratio(torch.tensor(t, dtype=torch.float64))) for t in (process.t_min, process.t_max)]
    grid = on_process(karras_grid(6, *ends), process)
    for order in (2, 3, 4):
        for high, low in zip(
            Adams(order, "eps", "time").plan(grid, process).stages, Adams(1).plan(grid, process).stages, strict=True
        ):
            assert sum(high.weights) == pytest.approx(sum(low.weights), rel=1e-12)
            assert high.keep == low.keep
