"""Special samplers and searched grids where the exact solution is known, and on a small network.

Eight parts: restarts under a score with a fixed error, shifted times, analytical teleportation, a searched solver,
Align Your Steps, an evolved grid, compensated UniPC, and Brownian noise that is one path for all step counts.

    python benchmarks/samplers.py [--plot plot.png]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
import math
import platform
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from _common import COLOURS, emit, parser, picture, table
from torch import Tensor, nn
from training_tricks import Network

from consilience.diffusion import (
    EDM,
    Denoiser,
    GaussianMixture,
    Process,
    VPLinear,
    VPScaledLinear,
    arcsinh_grid,
    exponential_grid,
    karras_grid,
    linear_grid,
    on_process,
    precondition,
    solve,
)
from consilience.diffusion.ays import ays_grid
from consilience.diffusion.digits import digits
from consilience.diffusion.losses import denoising_loss, edm_weight, lognormal_times
from consilience.diffusion.metrics import energy_distance, frechet_distance, map_error, sliced_wasserstein
from consilience.diffusion.noise import brownian
from consilience.diffusion.search import autodiffusion
from consilience.diffusion.solve import METHODS
from consilience.diffusion.solvers.dc import fit
from consilience.diffusion.solvers.dpm import Multistep
from consilience.diffusion.solvers.multistep import Adams
from consilience.diffusion.solvers.plan import Plan, Solver
from consilience.diffusion.solvers.sde import SDEDPM, Churn, Interval, Restart
from consilience.diffusion.solvers.searched import ORDERS, PATHS, VARIABLES, Scheduled, Strategy, s3
from consilience.diffusion.solvers.unipc import UniPC
from consilience.diffusion.teleport import teleport
from consilience.diffusion.time_shift import fitting_time, time_shifted

Row = dict[str, Any]
SIGMA_DATA = 0.75  # of the digits, in [-1, 1]
DDIM = METHODS["ddim"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(process: Process, count: int, dim: int, seed: int) -> Tensor:
    return process.prior((count, dim), seeded(seed), dtype=torch.float64)


def three(process: Process | None = None) -> GaussianMixture:
    """Three Gaussians in the plane."""
    means = torch.tensor([[1.0, 0.3], [-0.8, -0.4], [0.2, 1.1]], dtype=torch.float64)
    covariances = torch.diag_embed(torch.tensor([[0.04, 0.02], [0.06, 0.01], [0.01, 0.03]], dtype=torch.float64))
    return GaussianMixture(torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64), means, covariances, process)


def six(dim: int = 16) -> GaussianMixture:
    """Six Gaussians in 16 dimensions, each flat in all but four directions of its own."""
    generator = seeded(11)
    means = 0.5 * torch.randn(6, dim, dtype=torch.float64, generator=generator)
    roots = 0.25 * torch.randn(6, dim, 4, dtype=torch.float64, generator=generator)
    covariances = roots @ roots.transpose(1, 2) + 0.03**2 * torch.eye(dim, dtype=torch.float64)
    return GaussianMixture(torch.full((6,), 1 / 6, dtype=torch.float64), means, covariances)


# ------------------------------------------------------------------------------------------------ a network on digits


@dataclass(frozen=True)
class Digits:
    """The data in two halves, the trained denoiser, and features of a classifier."""

    seen: Tensor
    held: Tensor
    model: Denoiser
    features: Callable[[Tensor], Tensor]

    def frechet(self, x: Tensor) -> float:
        return frechet_distance(self.features(x), self.features(self.held))


def trained(o: Namespace) -> Digits:
    """A perceptron as EDM's denoiser, on half of the digits; a classifier of the same half."""
    images, labels = digits()
    data = images.flatten(1) - images.mean()
    order = torch.randperm(len(data), generator=seeded(5))
    seen, held = data[order[: len(data) // 2]], data[order[len(data) // 2 :]]
    torch.manual_seed(0)
    network, generator = Network(data.shape[1], o.width), seeded(0)
    model = precondition(network, EDM(), SIGMA_DATA)
    times, weight = lognormal_times(-0.6, 1.4), edm_weight(SIGMA_DATA)

    def loss(rows: Tensor) -> Tensor:
        return denoising_loss(model, {"x": seen[rows]}, generator, times=times, weight=weight)

    fitted(network, loss, len(seen), o.steps, generator)
    body = nn.Sequential(nn.Linear(data.shape[1], 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    head, known = nn.Linear(32, 10), labels[order[: len(seen)]]
    classifier = nn.Sequential(body, head)
    fitted(
        classifier,
        lambda rows: nn.functional.cross_entropy(classifier(seen[rows]), known[rows]),
        len(seen),
        o.steps // 3,
        generator,
    )
    for part in (network, classifier):
        part.requires_grad_(False)
    return Digits(seen, held, model, body)


def fitted(
    module: nn.Module, loss: Callable[[Tensor], Tensor], size: int, steps: int, generator: torch.Generator
) -> None:
    """Adam with a linearly falling rate on batches of 128."""
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        value = loss(torch.randint(size, (128,), generator=generator))
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


# ----------------------------------------------------------------------------------------------------------- restart


def wrong(model: GaussianMixture, size: float, above: float) -> Denoiser:
    """The exact denoiser plus a fixed smooth field, of root mean square ``size`` where sigma is greater than ``above``.

    Below sigma 1 the field shrinks with sigma, as the error of a noise prediction of constant size does.
    """
    generator = seeded(9)
    waves = 3 * torch.randn(2, 2, dtype=torch.float64, generator=generator)
    phases = 2 * math.pi * torch.rand(2, dtype=torch.float64, generator=generator)

    def function(x: Tensor, t: Tensor) -> Tensor:
        scale = torch.sqrt(1 + t**2)
        field = torch.sin(x / scale @ waves + phases + torch.log(t))
        return model.x0(x, t) + size * (t > above) * t / scale * field

    return Denoiser(function, model.process)


def restart_rows(o: Namespace) -> list[Row]:
    """Energy distance to the data against evaluations: Heun's ODE, EDM's churn, and restarts."""
    model, heun = three(), METHODS["heun"]
    x, real = noise(model.process, o.samples, 2, 3), model.sample(2 * o.samples, seeded(1))

    def restarts(times: int) -> Restart:
        return Restart((Interval(0.1, 1.0, times, 4),), 1.0, heun)

    methods: list[tuple[str, int, str | Solver]] = [("ODE (Heun)", n, "heun") for n in (12, 18, 36, 72)]
    methods += [("SDE (churn)", n, Churn(0.4 * n, inflation=1.0)) for n in (12, 18, 36, 72)]
    methods += [(f"restart, K = {k}", 18, restarts(k)) for k in (1, 2, 4, 8)]
    errors = (("none", 0.0, 0.0), ("sigma above 1", 0.6, 1.0), ("all sigma", 0.2, 0.0))
    rows = []
    for error, size, above in errors:
        for name, n, solver in methods:
            found = solve(wrong(model, size, above), x, karras_grid(n, 0.01, 80.0), solver, generator=seeded(4))
            distance = 1000 * energy_distance(found.x, real)
            rows.append({"error": error, "method": name, "nfe": found.nfe, "distance": distance})
    return rows


# -------------------------------------------------------------------------------------------------------- time shift


def late(model: Denoiser, shift: float, cutoff: float) -> Denoiser:
    """The time raised by the same ``shift`` whatever the state, to tell what the variance rule itself is worth."""
    process = model.process

    def function(x: Tensor, t: Tensor) -> Tensor:
        moved = torch.where((t > cutoff) & (t < process.t_max), (t + shift).clamp(max=process.t_max), t)
        return model.eps(x, moved)

    return Denoiser(function, process, "eps")


def swapped(model: Denoiser, window: float, cutoff: float) -> Denoiser:
    """The time that fits another sample of the batch, to tell what each sample's own time is worth."""

    def function(x: Tensor, t: Tensor) -> Tensor:
        return model.eps(x, fitting_time(x, t, model.process, window, cutoff).roll(1))

    return Denoiser(function, model.process, "eps")


def drawn(model: Denoiser, d: Digits, where: Tensor | int, seed: int, method: str = "ddim") -> Tensor:
    """As many samples as there are held-out digits."""
    return solve(model, model.process.prior((len(d.held), d.held.shape[1]), seeded(seed)), where, method).x


def tuned_shift(model: Denoiser, d: Digits, grid: Tensor) -> tuple[float, float]:
    """The window and the cutoff with the least Frechet distance to the data that the network has seen."""

    def score(choice: tuple[float, float]) -> float:
        return frechet_distance(d.features(drawn(time_shifted(model, *choice), d, grid, 50)), d.features(d.seen))

    windows = (0.08, 0.16, 0.24, 0.32, 0.4, 0.6, 0.8, 1.0)
    return min(itertools.product(windows, (0.3, 0.4, 0.5, 0.6, 0.7)), key=score)


def shift_rows(d: Digits, o: Namespace) -> dict[str, Any]:
    """DDIM with window and cutoff chosen on one noise, at 10 steps, and judged on others."""
    model = d.model.on(VPLinear())
    grid, longer = linear_grid(10, model.process), linear_grid(20, model.process)
    window, cutoff = tuned_shift(model, d, grid)
    shifted = time_shifted(model, window, cutoff)
    ways = {
        "DDIM": model,
        f"DDIM, time shift {window} above {cutoff}": shifted,
        "DDIM, the times of other samples": swapped(model, window, cutoff),
        f"DDIM, {window / 2} later above {cutoff}": late(model, window / 2, cutoff),
    }
    seeds = range(o.seeds)
    made = {name: [drawn(way, d, grid, seed) for seed in seeds] for name, way in ways.items()}
    made["DDIM, 20 steps"] = [drawn(model, d, longer, seed) for seed in seeds]
    made["DDIM, 20 steps, the same shift"] = [drawn(shifted, d, longer, seed) for seed in seeds]
    made["`auto`, 10 evaluations"] = [drawn(model, d, 10, seed, "auto") for seed in seeds]
    made["the other half of the digits"] = [d.seen]
    rows = [
        {
            "method": name,
            "frechet": [d.frechet(x) for x in runs],
            "distance": [1000 * energy_distance(x, d.held) for x in runs],
            "variance": [float(x.var(1).mean() / d.held.var(1).mean()) for x in runs],
        }
        for name, runs in made.items()
    ]
    return {"rows": rows, "mismatch": {name: mismatch(way, d, grid) for name, way in ways.items()}}


def mismatch(model: Denoiser, d: Digits, grid: Tensor) -> list[float]:
    """Mean variance of the sampler's states over that of noised data, at each inner time of the grid."""
    process = model.process
    x = process.prior((len(d.held), d.held.shape[1]), seeded(0))
    states = solve(model, x, grid, "ddim", trajectory=True).states
    found = []
    for state, t in zip(states[:-1], grid[1:-1].float(), strict=True):
        forward = process.add_noise(d.held, torch.randn(d.held.shape, generator=seeded(1)), t)
        found.append(float(state.var(1).mean() / forward.var(1).mean()))
    return found


# ----------------------------------------------------------------------------------------------------- teleportation

STARTS = (80.0, 8.0, 4.0, 2.0)


def teleport_rows(o: Namespace) -> list[Row]:
    """A mixture whose endpoint is known: all evaluations from sigma 80, or from where teleportation puts the state."""
    model, rows = six(), []
    x = noise(model.process, o.samples // 2, model.dim, 3)
    exact, real = model.ode_map(x, 80.0, 0.0, 1e-8, 1e-10), model.sample(len(x), seeded(1))
    floor = sliced_wasserstein(exact, real, generator=seeded(2))
    for n, top in itertools.product((6, 9, 12, 18), STARTS):
        begun = x if top == 80.0 else teleport(x, model.process, 80.0, top, model.mean, model.covariance)
        found = solve(model, begun, karras_grid(n, 0.01, top), "ab2")
        error = map_error(found.x, exact, lambda s: model.responsibilities(s, 0.0).argmax(1))
        sliced = sliced_wasserstein(found.x, real, generator=seeded(2))
        judged = {"median": error.median, "rmse": error.rmse, "sliced": sliced, "floor": floor}
        rows.append({"nfe": found.nfe, "start": top, **judged})
    return rows


def teleported_gaussian() -> float:
    """The largest error over samples of teleporting Gaussian data in 16 dimensions to sigma 0 at once."""
    mixture = six()
    one = torch.ones(1, dtype=torch.float64)
    model = GaussianMixture(one, mixture.mean[None], mixture.covariance[None])
    x = noise(model.process, 64, model.dim, 3)
    ended = teleport(x, model.process, 80.0, 0.0, model.mean, model.covariance)
    return float((ended - model.ode_map(x, 80.0, 0.0)).norm(dim=1).max())


def teleported_digits(d: Digits, o: Namespace) -> list[Row]:
    """The same with the network on digits, by the mean and covariance of what it was trained on."""
    process, rows = d.model.process, []
    mean, covariance = d.seen.mean(0), torch.cov(d.seen.T)
    for n, top in itertools.product((6, 9, 12, 18), STARTS):
        distances, frechet = [], []
        for seed in range(o.seeds):
            x = process.prior((len(d.held), d.held.shape[1]), seeded(seed))
            begun = x if top == 80.0 else teleport(x, process, 80.0, top, mean, covariance)
            found = solve(d.model, begun, karras_grid(n, 0.02, top), "ab2").x
            distances.append(1000 * energy_distance(found, d.held))
            frechet.append(d.frechet(found))
        rows.append({"nfe": n, "start": top, "distance": distances, "frechet": frechet})
    return rows


# ---------------------------------------------------------------------------------------------------- searched solver


def s3_rows(o: Namespace) -> dict[str, Any]:
    """Every uniform solver of 5 evaluations on seven grids, `auto`, and the schedules of three searches."""
    model, n = three(), 5
    noises = {"search": noise(model.process, 96, 2, 0), "fresh": noise(model.process, 1024, 2, 1)}
    exact = {name: model.ode_map(x, 80.0, 0.0, 1e-8, 1e-10) for name, x in noises.items()}

    def error(grid: Tensor | int, solver: str | Solver, name: str = "fresh") -> tuple[float, float, float]:
        found = solve(model, noises[name], grid, solver).x
        whole = map_error(found, exact[name], lambda s: model.responsibilities(s, 0.0).argmax(1))
        return whole.median, whole.rmse, whole.switched

    grids = {f"arcsinh {scale}": arcsinh_grid(n, 80.0, scale) for scale in (0.1, 0.2, 0.3, 0.5)}
    grids |= {f"Karras {low}": karras_grid(n, low, 80.0) for low in (0.02, 0.05, 0.1)}
    solvers: list[Solver] = [Adams(*one) for one in itertools.product(ORDERS, PATHS, VARIABLES)]
    solvers += [*(UniPC(order) for order in (1, 2, 3)), *(Multistep(order) for order in (2, 3))]
    uniform = [
        {"method": f"{solver}, {name}", "fit": error(grid, solver, "search")[0], **scored(error(grid, solver))}
        for (name, grid), solver in itertools.product(grids.items(), solvers)
    ]
    uniform.sort(key=lambda row: row["median"])
    best = [row for k, row in enumerate(uniform) if k == 0 or row["median"] > uniform[k - 1]["median"] * (1 + 1e-6)]
    rows = [*best[:3], {"method": "`auto`", "fit": error(n, "auto", "search")[0], **scored(error(n, "auto"))}]

    def fitness(grid: Tensor, solver: Solver) -> float:
        return error(grid, solver, "search")[0]

    begin = start_schedules(list(grids.values()), fitness)
    for seed in range(o.seeds):
        found = s3(fitness, begin, np.random.default_rng(seed), generations=o.generations, parents=len(begin))
        judged = scored(error(found.grid, found.solver))
        rows.append({"method": f"searched, seed {seed}, {found.evaluated} tried", "fit": found.fitness, **judged})
    return {"rows": rows, "uniform": [row["median"] for row in uniform]}


def start_schedules(
    grids: Sequence[Tensor], fitness: Callable[[Tensor, Solver], float], count: int = 16
) -> list[tuple[Tensor, Scheduled]]:
    """The uniform schedules that are best on the search's noise; those that are the same method count once."""
    strategies = [Strategy(*one) for one in itertools.product(ORDERS, PATHS, VARIABLES)]
    schedules = [(grid, Scheduled((one,) * (len(grid) - 1))) for grid in grids for one in strategies]
    known = {round(fitness(*schedule), 9): schedule for schedule in schedules}
    return [known[value] for value in sorted(known)[:count]]


def scored(error: tuple[float, float, float]) -> Row:
    return dict(zip(("median", "rmse", "switched"), error, strict=True))


# --------------------------------------------------------------------------------------------------- Align Your Steps

LOW, HIGH = 0.02, 80.0


def ays_grids(model: GaussianMixture, n: int, o: Namespace) -> dict[str, Tensor]:
    generator, even = seeded(0), VPLinear()
    ends = even.time(torch.tensor([HIGH, LOW], dtype=torch.float64))
    times = torch.linspace(float(ends[0]), float(ends[1]), n, dtype=torch.float64)
    return {
        "AYS": ays_grid(model, model.sample(o.samples, generator), n, LOW, HIGH, generator),
        "Karras": karras_grid(n, LOW, HIGH),
        "exponential": exponential_grid(n, LOW, HIGH),
        "even VP times": torch.cat([even.ratio(times), torch.zeros(1, dtype=torch.float64)]),
    }


def ays_rows(o: Namespace) -> list[Row]:
    """The exact KL divergence on Gaussian data, and the energy distance on a mixture."""
    rows = []
    one = torch.ones(1, dtype=torch.float64)
    gaussian, mixture = GaussianMixture(one, 0 * one[:, None], 0.25 * one[:, None, None]), three()
    x, real = noise(mixture.process, o.samples, 2, 3), mixture.sample(2 * o.samples, seeded(1))
    methods: dict[str, Solver] = {"SDE-DPM-Solver++1": SDEDPM(1), "ddim": DDIM}
    for n in (5, 10, 20, 40):
        on_gaussian, on_mixture = ays_grids(gaussian, n, o), ays_grids(mixture, n, o)
        bounds = {grid_name: 1000 * bound(grid, 0.5) for grid_name, grid in on_gaussian.items()}
        rows.append({"data": "Gaussian", "measure": "AYS' bound x 1000", "method": "", "nfe": n, **bounds})
        for name, solver in methods.items():
            exact: Row = {"data": "Gaussian", "measure": "KL x 1000", "method": name, "nfe": n}
            sampled: Row = {"data": "mixture", "measure": "energy distance x 1000", "method": name, "nfe": n}
            for grid_name, grid in on_gaussian.items():
                exact[grid_name] = 1000 * divergence(gaussian, solver.plan(grid, gaussian.process), 0.5)
            for grid_name, grid in on_mixture.items():
                found = solve(mixture, x, grid, solver, generator=seeded(4)).x
                sampled[grid_name] = 1000 * energy_distance(found, real)
            rows += [exact, sampled]
    return rows


def bound(grid: Tensor, std: float) -> float:
    """The integral that AYS minimises, on N(0, std^2): E||D_s - D_S||^2 / s^3 over each step from S, by quadrature."""
    total, variance = 0.0, std**2
    for top, low in itertools.pairwise(grid[:-1].tolist()):
        s = np.geomspace(low, top, 2000)
        moved = variance**2 * (top**2 - s**2) / ((variance + s**2) * (variance + top**2))
        total += float(np.trapezoid(moved / s**3, s))
    return total


def divergence(model: GaussianMixture, plan: Plan, std: float) -> float:
    """KL(sample | data) of a plan on N(0, std^2) from its exact variance: every stage is linear in the state.

    The states carried are the coefficients of x on the independent sources: the start and each step's noise.
    """
    count = 1 + sum(stage.noise != 0 for stage in plan.stages)
    state = torch.zeros(count, 1, dtype=torch.float64)
    state[0] = math.hypot(std, HIGH)
    sources, drawn = torch.eye(count, dtype=torch.float64)[:, :, None], itertools.count(1)
    grid = torch.tensor([HIGH, *(stage.end for stage in plan.stages)], dtype=torch.float64)
    ended = solve(model, state, grid, _Fixed(plan), noise=lambda *_: sources[next(drawn)]).x
    ratio = float((ended**2).sum()) / std**2
    return (ratio - 1 - math.log(ratio)) / 2


@dataclass(frozen=True)
class _Fixed:
    """A solver whose plan is given."""

    given: Plan

    def plan(self, grid: Tensor, process: Process) -> Plan:
        return self.given


# -------------------------------------------------------------------------------------------------------- evolved grid


def evolved_rows(d: Digits, o: Namespace) -> list[Row]:
    """Four steps of DDIM: on the mixture by energy distance, on digits by the Frechet distance of features."""
    mixture, network = three(VPLinear()), d.model.on(VPLinear())
    small = mixture.sample(o.samples // 2, seeded(1))

    def distance(grid: Tensor, seed: int, count: int, real: Tensor) -> float:
        return 1000 * energy_distance(solve(mixture, noise(mixture.process, count, 2, seed), grid, "ddim").x, real)

    def frechet(grid: Tensor, seed: int, real: Tensor) -> float:
        x = network.process.prior((len(real), real.shape[1]), seeded(seed))
        return frechet_distance(d.features(solve(network, x, grid, "ddim").x), d.features(real))

    fresh = mixture.sample(2 * o.samples, seeded(2))
    problems: list[tuple[str, Callable[[Tensor], float], Callable[[Tensor, int], float]]] = [
        ("mixture", lambda g: distance(g, 7, o.samples // 4, small), lambda g, s: distance(g, s, o.samples, fresh)),
        ("digits", lambda g: frechet(g, 7, d.seen), lambda g, s: frechet(g, 100 + s, d.held)),
    ]
    rows = []
    for name, fitness, judged in problems:
        grids = four_steps(mixture.process)
        times = linear_grid(50, mixture.process)
        found = autodiffusion(fitness, times, 4, np.random.default_rng(1), start=(grids["even"],))
        grids["evolved"] = found.grid
        rows += [
            {
                "data": name,
                "grid": kind,
                "times": " ".join(f"{t:.2f}" for t in grid.tolist()),
                "fitness": fitness(grid),
                "fresh": [judged(grid, seed) for seed in range(20, 20 + o.seeds)],
            }
            for kind, grid in grids.items()
        ]
    return rows


def four_steps(process: Process) -> dict[str, Tensor]:
    """Usual grids of four steps, in times of the process."""
    top = float(process.ratio(torch.tensor(process.t_max, dtype=torch.float64)))
    even = linear_grid(4, process)
    karras = on_process(karras_grid(4, 0.05, top), process)
    return {"even": even, "quadratic": even**2 / process.t_max, "Karras": karras}


# ----------------------------------------------------------------------------------------------------------- DC-Solver


def guided(scale: float, process: Process) -> Denoiser:
    """Classifier-free guidance towards the first of four components, from the exact denoisers of both."""
    weights = torch.tensor([0.3, 0.25, 0.25, 0.2], dtype=torch.float64)
    means = torch.tensor([[1.0, 0.2], [-0.9, 0.8], [-0.4, -1.1], [0.7, -0.9]], dtype=torch.float64)
    spread = torch.diag_embed(torch.tensor([[0.04, 0.02], [0.03, 0.03], [0.06, 0.01], [0.02, 0.02]]).double())
    whole = GaussianMixture(weights, means, spread, process)
    wanted = GaussianMixture(torch.ones(1, dtype=torch.float64), means[:1], spread[:1], process)

    def function(x: Tensor, t: Tensor) -> Tensor:
        without = whole.x0(x, t)
        return without + scale * (wanted.x0(x, t) - without)

    return Denoiser(function, process)


PLAIN: dict[str, Solver] = {
    "UniPC-2": UniPC(2),
    "UniPC-3": UniPC(3),
    "DPM-Solver++2M": Multistep(2),
    "DPM-Solver++3M": Multistep(3),
}


def dc_rows(o: Namespace) -> list[Row]:
    """Ratios fitted on 10 trajectories, three times, and on 40; mean squared error on noise no fit has seen."""
    process, rows = VPScaledLinear(), []
    x = noise(process, o.samples // 2, 2, 1)
    for scale, n in itertools.product((4.0, 7.5), (5, 8, 10)):
        model, grid = guided(scale, process), linear_grid(n, process, t_min=0.02)
        fine = np.interp(np.linspace(0, n, 100 * n + 1), np.arange(n + 1), grid.numpy())
        exact = solve(model, x, torch.from_numpy(fine), "flow-ab3").x
        compensated = [fit(model, noise(process, 10, 2, seed), grid, substeps=40) for seed in (10, 11, 12)]
        more = fit(model, noise(process, 40, 2, 13), grid, substeps=40)
        *plain, first, second, third, last = (
            float((solve(model, x, grid, one).x - exact).square().mean())
            for one in (*PLAIN.values(), *compensated, more)
        )
        fitted_errors = {"DC-Solver": [first, second, third], "DC-Solver, 40": last}
        rows.append({"scale": scale, "nfe": n, **dict(zip(PLAIN, plain, strict=True)), **fitted_errors})
    return rows


# ------------------------------------------------------------------------------------------------------ Brownian path


def brownian_rows(o: Namespace) -> list[Row]:
    """The distance of SDE samples to those of 400 steps: on one path, on another, and with one generator's seed."""
    model = three()
    x = noise(model.process, o.samples // 4, 2, 3)

    def run(n: int, path: int | None) -> Tensor:
        grid, solver = arcsinh_grid(n, 80.0, 0.2), SDEDPM(2, 1.0)
        if path is None:
            return solve(model, x, grid, solver, generator=seeded(6)).x
        return solve(model, x, grid, solver, noise=brownian(model.process, x, path)).x

    exact, seeded_exact, rows = run(400, 1), run(400, None), []
    for n in (25, 50, 100, 200):
        row: Row = {"steps": n}
        for name, found, truth in (
            ("path", run(n, 1), exact),
            ("other", run(n, 2), exact),
            ("seed", run(n, None), seeded_exact),
        ):
            error = map_error(found, truth, lambda s: model.responsibilities(s, 0.0).argmax(1))
            row |= {name: error.median, f"{name} switched": error.switched}
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------------ output


def cell(value: Any, digits: int) -> str:
    """A number, or a list of them as mean and range."""
    if isinstance(value, list):
        mean, low, high = (f"{part:.{digits}f}" for part in (sum(value) / len(value), min(value), max(value)))
        return mean if len(value) == 1 else f"{mean} ({low} to {high})"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def shown(rows: Sequence[Row], columns: dict[str, tuple[str, int]]) -> str:
    """``columns`` gives each field its head and its digits."""
    body = [[cell(row[name], places) for name, (_, places) in columns.items()] for row in rows]
    return table([head for head, _ in columns.values()], body)


def pivoted(rows: Sequence[Row], of: str, over: str, fields: Sequence[str]) -> list[Row]:
    """One row for each combination of ``fields``, the values of ``of`` in columns named by ``over``."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in fields)
        found.setdefault(key, {name: row[name] for name in fields})[str(row[over])] = row[of]
    return list(found.values())


def markdown(result: dict[str, Any]) -> str:
    """Everything the results page shows."""
    evaluations, starts = ("evaluations", 0), {str(top): (f"from {top:g}", 4) for top in STARTS}
    errors = {name: (name, 1) for name in ("none", "sigma above 1", "all sigma")}
    restart = pivoted(result["restart"], "distance", "error", ("method", "nfe"))
    judged = {"frechet": ("Frechet", 2), "distance": ("energy distance x 1000", 1)}
    shift = {"method": ("method", 0), **judged, "variance": ("variance of the samples", 3)}
    inner = [f"{0.9 - 0.1 * k:.1f}" for k in range(9)]
    mismatches = result["shift"]["mismatch"].items()
    times = [{"method": name, **dict(zip(inner, values, strict=True))} for name, values in mismatches]
    fields = {"method": ("method", 0), "fit": ("median, searched on", 4), "median": ("median, fresh", 4)}
    ays = {"data": ("data", 0), "measure": ("measure", 0), "method": ("solver", 0), "nfe": evaluations}
    dc = {
        "scale": ("guidance scale", 1),
        "nfe": evaluations,
        **{name: (name, 4) for name in (*PLAIN, "DC-Solver", "DC-Solver, 40")},
    }
    paths = {"path": "one path", "other": "two paths", "seed": "one seed, no path"}
    brown = {"steps": ("steps", 0)}
    for name, head in paths.items():
        brown |= {name: (head, 4), f"{name} switched": ("switched", 3)}
    return "\n\n".join(
        [
            f"{result['cpu']:.0f} CPU seconds in all. {result['on']}",
            shown(restart, {"method": ("method", 0), "nfe": evaluations, **errors}),
            shown(result["shift"]["rows"], shift),
            shown(times, {"method": ("variance at time", 0), **{t: (t, 3) for t in inner}}),
            *(
                shown(
                    pivoted(result["teleport"], name, "start", ("nfe",)), {"nfe": (f"{head}, evaluations", 0), **starts}
                )
                for name, head in (("median", "median error"), ("rmse", "RMSE"), ("sliced", "sliced Wasserstein"))
            ),
            f"Sliced Wasserstein distance of the exact endpoints: {result['teleport'][0]['floor']:.4f}. "
            f"Gaussian data teleported to sigma 0: largest error {result['gaussian']:.1e}.",
            *(
                shown(
                    pivoted(result["teleported digits"], name, "start", ("nfe",)),
                    {
                        "nfe": (f"{head}, evaluations", 0),
                        **{top: (label, places) for top, (label, _) in starts.items()},
                    },
                )
                for name, (head, places) in judged.items()
            ),
            shown(result["s3"]["rows"], {**fields, "rmse": ("RMSE", 4), "switched": ("switched", 3)}),
            shown(
                sorted(result["ays"], key=lambda row: (row["data"], row["measure"], row["method"])),
                {**ays, **{name: (name, 2) for name in ("AYS", "Karras", "exponential", "even VP times")}},
            ),
            shown(
                result["evolved"],
                {
                    "data": ("data", 0),
                    "grid": ("grid", 0),
                    "times": ("times", 0),
                    "fitness": ("searched on", 2),
                    "fresh": ("fresh", 2),
                },
            ),
            shown(result["dc"], dc),
            shown(result["brownian"], brown),
        ]
    )


def plot(path: str, result: dict[str, Any]) -> None:
    """One small panel per method."""
    with picture(path, 9.4, 4.4) as figure:
        axes = figure.subplots(2, 4).ravel()
        rows = [row for row in result["restart"] if row["error"] == "sigma above 1"]
        for name in ("ODE (Heun)", "SDE (churn)", "restart"):
            mine = [row for row in rows if row["method"].startswith(name)]
            line(axes[0], [row["nfe"] for row in mine], [max(row["distance"], 0.1) for row in mine], name)
        axes[0].set(title="Restart", xlabel="evaluations", ylabel="energy distance x 1000", yscale="log")
        at = [0.9 - 0.1 * k for k in range(9)]
        values = result["shift"]["mismatch"].values()
        for one, name in zip(values, ("DDIM", "time shift", "others' times", "later always"), strict=True):
            line(axes[1], at, one, name)
        axes[1].axhline(1, color="0.6", lw=0.8, ls="--")
        axes[1].set(title="Time shift", xlabel="time", ylabel="variance / that of data", ylim=(0.78, 1.5))
        for top in STARTS:
            mine = [row for row in result["teleport"] if row["start"] == top]
            line(axes[2], [row["nfe"] for row in mine], [row["median"] for row in mine], f"from {top:g}")
        axes[2].set(title="Teleportation", xlabel="evaluations", ylabel="median error", yscale="log")
        axes[3].hist(np.log10(result["s3"]["uniform"]), bins=25, color="0.75")
        for row in result["s3"]["rows"][4:]:
            axes[3].axvline(math.log10(row["median"]), color=COLOURS[1])
        axes[3].set(title="Searched, 5 evaluations", xlabel="log10 median error", ylabel="uniform solvers")
        rows = [row for row in result["ays"] if row["data"] == "Gaussian" and row["method"].startswith("SDE")]
        for name in ("AYS", "Karras", "exponential", "even VP times"):
            line(axes[4], [row["nfe"] for row in rows], [row[name] for row in rows], name)
        axes[4].set(title="Align Your Steps, SDE", xlabel="evaluations", ylabel="KL x 1000", yscale="log")
        rows = [row for row in result["evolved"] if row["data"] == "digits"]
        axes[5].bar([row["grid"] for row in rows], [np.mean(row["fresh"]) for row in rows], color=COLOURS[: len(rows)])
        axes[5].set(title="Evolved grid, 4 steps", ylabel="Frechet, digits")
        axes[5].tick_params(axis="x", labelsize=6)
        rows = [row for row in result["dc"] if row["scale"] == 7.5]
        for name in (*PLAIN, "DC-Solver"):
            line(axes[6], [row["nfe"] for row in rows], [float(np.mean(row[name])) for row in rows], name)
        axes[6].set(title="DC-Solver, scale 7.5", xlabel="evaluations", ylabel="mean squared error", yscale="log")
        axes[6].set_ylim(bottom=2e-6)  # room for the legend
        for name, label in (("path", "one path"), ("other", "two paths"), ("seed", "one seed, no path")):
            rows = result["brownian"]
            line(axes[7], [row["steps"] for row in rows], [row[name] for row in rows], label)
        axes[7].set(title="Brownian path", xlabel="steps", ylabel="median distance to 400", yscale="log")
        for axis in axes[[0, 1, 2, 4, 6, 7]]:
            axis.legend(frameon=False, fontsize=6, loc="lower left" if axis is axes[6] else "best")


def line(axis: Any, x: Sequence[float], y: Sequence[float], label: str) -> None:
    axis.plot(x, y, "o-", ms=3, lw=1.2, c=COLOURS[len(axis.lines) % len(COLOURS)], label=label)


def main() -> None:
    options = parser(__doc__, samples=2000, steps=4000, width=256, generations=30, seeds=4)
    options.add_argument("--plot", help="write the picture here")
    o = options.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    on_digits = trained(o)
    result: dict[str, Any] = {
        "restart": restart_rows(o),
        "shift": shift_rows(on_digits, o),
        "teleport": teleport_rows(o),
        "gaussian": teleported_gaussian(),
        "teleported digits": teleported_digits(on_digits, o),
        "s3": s3_rows(o),
        "ays": ays_rows(o),
        "evolved": evolved_rows(on_digits, o),
        "dc": dc_rows(o),
        "brownian": brownian_rows(o),
    }
    result["cpu"] = time.process_time() - begun
    result["on"] = f"Python {platform.python_version()}, torch {version('torch')}, one thread."
    if o.plot:
        plot(o.plot, result)
    emit(o, result, markdown(result))


if __name__ == "__main__":
    main()
