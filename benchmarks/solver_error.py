"""Error at equal numbers of model evaluations beside diffusers' schedulers and azula, from the same noise.

Four data sets (a mixture of 5 Gaussians in the plane, one of 20 in 64 dimensions, the digits model of the package with
one class per sample, and a network on the digits that is told log sigma and trained here for a fixed number of steps)
under three processes (Stable Diffusion's VP table, EDM, rectified flow). Errors are distances to where the exact
probability-flow ODE takes the same noise: DOP853 for the mixtures, for the networks runs of order 4, checked on eight
samples against ones with twice the evaluations. Evaluations are counted in calls of the model, and the schedulers'
models are given the exact sigma, not the rounded timestep. A cell is median / RMSE / percent of samples that went to
another mode (an error above 1.5 standard deviations of a component; half the spacing of the digits).

    python benchmarks/solver_error.py [--picture docs/images/solver-error.png]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _common import COLOURS, emit, parser, picture, table
from torch import Tensor

from consilience.diffusion import (
    EDM,
    Denoiser,
    GaussianMixture,
    Process,
    RectifiedFlow,
    TrigFlow,
    VPTable,
    arcsinh_grid,
    exponential_grid,
    on_process,
    solve,
)
from consilience.diffusion.solvers.multistep import Adams

COUNTS = (5, 9, 17, 33, 65)
JUDGED = (9, 17, 33)
AIMS = {"best here": 0.7, "auto": 0.85}
"""Medians over those of the best peer, at the judged counts."""
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
PROCESSES: dict[str, Process] = {"VP": VPTable(STABLE), "EDM": EDM(), "flow": RectifiedFlow()}


# ------------------------------------------------------------------------------------------------ what is sampled


@dataclass
class Case:
    """A model under a process, noise, the exact samples and the distance that counts as another mode."""

    data: str
    process: str
    model: Denoiser
    z: Tensor
    switched: float
    exact: Callable[[Denoiser, Tensor, float, float], Tensor]
    found: dict[tuple[float, float], Tensor] = field(default_factory=dict)

    def start(self) -> Tensor:
        """x at t_max: noise of standard deviation sigma, for VP of 1 as its pipelines start."""
        here = self.model.process
        return self.z * (1.0 if self.process == "VP" else float(here.sigma(torch.tensor(here.t_max).double())))

    def reference(self) -> Tensor:
        """Where the exact ODE takes `start`."""
        end = float(self.model.process.time(torch.zeros((), dtype=torch.float64)))
        return self.mapped(self.model, self.start(), self.model.process.t_max, end)

    def mapped(self, model: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        """Remembered: the exact ODE of ``model`` from t to s; one x for each process."""
        if (t, s) not in self.found:
            self.found[t, s] = self.exact(model, x, t, s)
        return self.found[t, s]


def plane() -> GaussianMixture:
    """Five Gaussians in the plane with standard deviations from .05 to .25."""
    weights = torch.tensor([0.30, 0.25, 0.20, 0.15, 0.10], dtype=torch.float64)
    means = torch.tensor([[1.0, 0.2], [-0.9, 0.8], [-0.4, -1.1], [0.7, -0.9], [0.3, 1.3]], dtype=torch.float64)
    shapes = [(0.20, 0.08, 0.3), (0.15, 0.15, 0.0), (0.25, 0.06, 1.1), (0.10, 0.10, 0.0), (0.12, 0.05, 2.0)]
    covariances = []
    for one, two, angle in shapes:
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
        covariances.append(turn @ torch.diag(torch.tensor([one, two]).double() ** 2) @ turn.T)
    return GaussianMixture(weights, means, torch.stack(covariances))


def wide(seed: int = 20) -> GaussianMixture:
    """Twenty Gaussians in 64 dimensions; standard deviations along random axes log-uniform from .02 to .6."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    weights = uniform(20) + 0.2
    means = 0.6 * torch.randn(20, 64, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(20, 64, 64, generator=generator, dtype=torch.float64))[0]
    scales = torch.exp(math.log(0.02) + math.log(0.6 / 0.02) * uniform(20, 64))
    covariances = torch.einsum("kij,kj,klj->kil", axes, scales**2, axes)
    return GaussianMixture(weights / weights.sum(), means, (covariances + covariances.transpose(1, 2)) / 2)


def digits(count: int) -> Denoiser:
    """The package's flow model of the digits on flat images [at most ``count``, 64], classes 0 to 9 in rotation."""
    from consilience.diffusion.digits import teacher

    pipeline, labels = teacher(), torch.arange(count) % 10
    pipeline.network.requires_grad_(False)
    of = cache(lambda n: pipeline.denoiser(labels[:n]))
    process = of(count).process

    def flow(x: Tensor, t: Tensor) -> Tensor:
        images = of(len(x)).predict("flow", x.reshape(-1, 1, 8, 8).float(), t.float())
        return images.flatten(1).to(x.dtype)

    return Denoiser(flow, process, "flow")


STEPS = 12000
"""Of the training of the network that is told log sigma."""


def told_logarithm(seed: int = 0) -> Denoiser:
    """A network on the digits, preconditioned as EDM's and told log sigma; kept in the folder for temporary files."""
    data, _ = _flat_digits()
    process = TrigFlow(sigma_data=float(data.std()))
    torch.manual_seed(seed)
    network = torch.nn.Sequential(*_layers(64 + 32, 256, 64))
    place = Path(tempfile.gettempdir()) / f"consilience-solver-error-{STEPS}-{seed}-{version('torch')}.pt"
    if place.exists():
        network.load_state_dict(torch.load(place, weights_only=True))
    else:
        with torch.enable_grad():
            network.load_state_dict(_trained(network, process, data))
        torch.save(network.state_dict(), place)
    network.double().requires_grad_(False)
    return Denoiser(lambda x, t: _trig(network, process, x, t), process, "x0")


def _flat_digits() -> tuple[Tensor, float]:
    """The digits [1797, 64] in [-1, 1] and the median distance of a digit from the nearest other."""
    from consilience.diffusion.digits import digits as images

    data = images()[0].flatten(1)
    return data, float(torch.cdist(data, data).fill_diagonal_(float("inf")).min(1).values.median())


def _trained(network: torch.nn.Module, process: TrigFlow, data: Tensor) -> dict[str, Tensor]:
    """The network's averaged parameters after `STEPS` steps of Adam."""
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    average = {name: value.clone() for name, value in network.state_dict().items()}
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = 2e-3 * (0.02 + 0.98 * math.cos(step / STEPS * math.pi / 2))
        x0 = data[torch.randint(len(data), (256,))]
        t = torch.arctan(torch.exp(-0.8 + 1.4 * torch.randn(256)) / process.sigma_data)
        noise, cos, sin = torch.randn_like(x0), torch.cos(t)[:, None], torch.sin(t)[:, None]
        target = cos * noise - sin * x0 / process.sigma_data
        loss = (_network(network, cos * x0 / process.sigma_data + sin * noise, t) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for name, value in network.state_dict().items():
                average[name].lerp_(value, max(0.001, 1 / (step + 2)))
    return average


def _layers(width_in: int, width: int, width_out: int) -> list[torch.nn.Module]:
    layers: list[torch.nn.Module] = []
    for wide_in in (width_in, width, width):
        layers += [torch.nn.Linear(wide_in, width), torch.nn.SiLU()]
    return [*layers, torch.nn.Linear(width, width_out)]


def _network(network: torch.nn.Module, y: Tensor, t: Tensor) -> Tensor:
    waves = torch.outer(torch.log(torch.tan(t).clamp(1e-3, 1e3)) / 4, torch.arange(1, 17, dtype=y.dtype))
    value: Tensor = network(torch.cat([y, waves.sin(), waves.cos()], 1))
    return value


def _trig(network: torch.nn.Module, process: TrigFlow, x: Tensor, t: Tensor) -> Tensor:
    y, t = x / process.sigma_data, t.expand(len(x)).to(x.dtype)
    return process.sigma_data * (torch.cos(t)[:, None] * y - torch.sin(t)[:, None] * _network(network, y, t))


def _by_dop853(model: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
    assert isinstance(model, GaussianMixture)
    return model.ode_map(x, t, s)


def _by_many_steps(model: Denoiser, x: Tensor, t: float, s: float, count: int) -> Tensor:
    """Order 4 on the angle, with evaluations packed towards small noise."""
    ratios = model.process.ratio(torch.tensor([t, s], dtype=torch.float64))
    ends = torch.log((ratios + 0.02) / (1 + ratios / 5)).nan_to_num(math.log(5.0))
    g = torch.exp(torch.linspace(float(ends[0]), float(ends[1]), count + 1, dtype=torch.float64))
    grid = model.process.time((g - 0.02) / (1 - g / 5))
    grid[0], grid[-1] = t, s
    return solve(model, x, grid, Adams(4, "v", "angle")).x


NETWORKS = {"digits": 512, "digits-log": 1024}
"""The evaluations that the networks' exact samples are taken with."""


def cases(data: str, options: Any) -> list[Case]:
    """One set under the three processes."""
    count = getattr(options, f"samples_{data.replace('-', '_')}")
    model: Denoiser
    if data in NETWORKS:
        model = digits(count) if data == "digits" else told_logarithm()
        exact: Callable[..., Tensor] = partial(_by_many_steps, count=NETWORKS[data])
        switched, dim = _flat_digits()[1] / 2, 64
    else:
        model = mixture = plane() if data == "plane" else wide()
        exact, dim = _by_dop853, mixture.dim
        switched = 1.5 * float(torch.einsum("k,kii->", mixture.weights, mixture.covariances).sqrt())
    z = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [Case(data, name, model.on(process), z, switched, exact) for name, process in PROCESSES.items()]


def checked(case: Case) -> None:
    """Print how far the networks' exact samples move with twice the evaluations."""
    process, few = case.model.process, 8
    end = float(process.time(torch.zeros((), dtype=torch.float64)))
    fine = _by_many_steps(case.model, case.start()[:few], process.t_max, end, 2 * NETWORKS[case.data])
    gap = (case.reference()[:few] - fine).norm(dim=1)
    print(f"<!-- {case.data}, {case.process}: twice the evaluations move the exact samples by {gap.median():.1e} "
          f"(median), {gap.max():.1e} (largest) -->", flush=True)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the peers


class Counted:
    """A model that counts its calls."""

    def __init__(self, model: Denoiser) -> None:
        self.model, self.calls = model, 0

    def __call__(self, want: str, x: Tensor, t: float | Tensor) -> Tensor:
        self.calls += 1
        return self.model.predict(want, x, t)  # type: ignore[arg-type]


Sampled = tuple[Tensor, Tensor, Tensor, int]
"""Samples, the exact ones at the row's own end from the same noise, those without any noise left, and the calls."""
Row = Callable[[Case, int], Sampled]


def _half(count: int) -> int:
    return (count + 1) // 2


def _same(count: int) -> int:
    return count


def diffusers_rows(process: str) -> dict[str, Row]:
    """Name to sampler, for the schedulers that run the process."""
    return {"VP": _vp_rows, "EDM": _edm_rows, "flow": _flow_rows}[process]()


SPACINGS: dict[str, dict[str, Any]] = {
    "linspace": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}


def _vp_rows() -> dict[str, Row]:
    import diffusers as d

    rows: dict[str, Row] = {}
    for spacing in ("trailing", "leading", "linspace"):
        rows[f"DDIM {spacing}"] = _vp(d.DDIMScheduler, timestep_spacing=spacing, clip_sample=False)
    skip = {"timestep_spacing": "leading", "steps_offset": 1, "skip_prk_steps": True}
    rows["PNDM leading"] = _vp(d.PNDMScheduler, steps=lambda n: n - 1, **skip)
    for tag, use in SPACINGS.items():
        line = {"timestep_spacing": "linspace", **use}
        rows[f"Euler {tag}"] = _vp(d.EulerDiscreteScheduler, **line)
        rows[f"Heun {tag}"] = _vp(d.HeunDiscreteScheduler, steps=_half, **line)
        rows[f"KDPM2 {tag}"] = _vp(d.KDPM2DiscreteScheduler, steps=_half, **line)
        rows[f"LMS-4 {tag}"] = _vp(d.LMSDiscreteScheduler, **line)
        for order in (2, 3):
            rows[f"DPM++{order}M {tag}"] = _vp(d.DPMSolverMultistepScheduler, solver_order=order, **line)
            rows[f"DPM++{order}S {tag}"] = _vp(d.DPMSolverSinglestepScheduler, solver_order=order, **use)
            rows[f"UniPC-{order} {tag}"] = _vp(d.UniPCMultistepScheduler, solver_order=order, **line)
            rows[f"DEIS-{order} {tag}"] = _vp(d.DEISMultistepScheduler, solver_order=order, **line)
    rows["DPM++2M lu"] = _vp(d.DPMSolverMultistepScheduler, solver_order=2, use_lu_lambdas=True)
    rows["DPM++3M lu"] = _vp(d.DPMSolverMultistepScheduler, solver_order=3, use_lu_lambdas=True)
    return rows


def _vp(scheduler: Any, steps: Callable[[int], int] = _same, **settings: Any) -> Row:
    def sample(case: Case, count: int) -> Sampled:
        made = scheduler(**BETAS, prediction_type="epsilon", **settings)
        made.set_timesteps(steps(count))
        name, process = type(made).__name__, case.model.process
        scaled = name[:3] in ("Eul", "Heu", "LMS", "KDP")
        model, x = Counted(case.model), case.start()
        if scaled:  # these keep x / alpha
            x = x * math.hypot(1, float(process.ratio(torch.tensor(process.t_max))))
        for t in made.timesteps:
            state, at = made.scale_model_input(x, t), t.double()
            if hasattr(made, "sigmas") and name[:3] not in ("Heu", "KDP"):  # the sigma itself, not the rounded time
                if made.step_index is None:
                    made._init_step_index(t)
                at = process.time(made.sigmas[made.step_index].double())
            x = made.step(model("eps", state, at), t, x).prev_sample
        return x, case.reference(), case.reference(), model.calls

    return sample


def _edm_rows() -> dict[str, Row]:
    import diffusers as d

    rows: dict[str, Row] = {}
    for schedule in ("karras", "exponential"):
        rows[f"EDM Euler {schedule}"] = _edm(d.EDMEulerScheduler, sigma_schedule=schedule)
        for order in (2, 3):
            use = {"solver_order": order, "sigma_schedule": schedule}
            rows[f"EDM DPM++{order}M {schedule}"] = _edm(d.EDMDPMSolverMultistepScheduler, **use)
    return rows


def _edm(scheduler: Any, **settings: Any) -> Row:
    def sample(case: Case, count: int) -> Sampled:
        made = scheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, **settings)
        made.set_timesteps(count)
        model, x = Counted(case.model), case.start()
        for t in made.timesteps:
            if made.step_index is None:
                made._init_step_index(t)
            s = float(made.sigmas[made.step_index])
            total = math.hypot(s, 0.5)
            state = made.scale_model_input(x, t) * total
            raw = (model("x0", state, s) - (0.5 / total) ** 2 * state) / (0.5 * s / total)
            x = made.step(raw, t, x).prev_sample
        return x, case.reference(), case.reference(), model.calls

    return sample


def _flow_rows() -> dict[str, Row]:
    import diffusers as d

    rows: dict[str, Row] = {}
    for shift in (1.0, 3.0):
        tag = f"shift {shift:g}"
        rows[f"FlowMatchEuler {tag}"] = _flow(d.FlowMatchEulerDiscreteScheduler, shift=shift)
        rows[f"FlowMatchHeun {tag}"] = _flow(d.FlowMatchHeunDiscreteScheduler, steps=_half, shift=shift)
        use = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
        for order in (2, 3):
            rows[f"DPM++{order}M {tag}"] = _flow(d.DPMSolverMultistepScheduler, solver_order=order, **use)
            rows[f"DPM++{order}S {tag}"] = _flow(d.DPMSolverSinglestepScheduler, solver_order=order, **use)
            rows[f"UniPC-{order} {tag}"] = _flow(d.UniPCMultistepScheduler, solver_order=order, **use)
            rows[f"DEIS-{order} {tag}"] = _flow(d.DEISMultistepScheduler, solver_order=order, **use)
    for tag, use in list(SPACINGS.items())[1:]:
        rows[f"FlowMatchEuler {tag}"] = _flow(d.FlowMatchEulerDiscreteScheduler, **use)
    return rows


def _flow(scheduler: Any, steps: Callable[[int], int] = _same, **settings: Any) -> Row:
    def sample(case: Case, count: int) -> Sampled:
        made = scheduler(num_train_timesteps=1000, **settings)
        made.set_timesteps(steps(count))
        model, x = Counted(case.model), case.start()
        for t in made.timesteps:
            if made.step_index is None:
                made._init_step_index(t)
            exact = float(t) / 1000 if "Heun" in type(made).__name__ else float(made.sigmas[made.step_index])
            x = made.step(model("flow", x, min(exact, 1.0)), t, x).prev_sample
        return x, case.reference(), case.reference(), model.calls

    return sample


AZULA = ("DDIMSampler", "EulerSampler", "HeunSampler", "zABSampler", "vABSampler", "zEABSampler", "xEABSampler")


def azula_rows(process: str) -> dict[str, Row]:
    """azula's deterministic samplers on its own schedule for the process, each against the ODE between its own ends."""
    from azula import noise

    schedule = {"VP": noise.VPSchedule, "EDM": lambda: noise.VESchedule(0.002, 80.0), "flow": noise.RectifiedSchedule}
    rows = {f"azula {name}": _azula(name, schedule[process], 2) for name in (*AZULA, "REABSampler")}
    return rows | {f"azula {name} 3": _azula(name, schedule[process], 3) for name in AZULA if "AB" in name}


def _azula(name: str, schedule: Callable[[], Any], order: int) -> Row:
    from azula import sample as samplers
    from azula.denoise import Denoiser as Base
    from azula.denoise import DiracPosterior

    def sample(case: Case, count: int) -> Sampled:
        here = schedule()
        model = Counted(case.model.on(EDM()) if case.process != "EDM" else case.model)

        class Model(Base):  # type: ignore[misc]
            schedule = here

            def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
                alpha, sigma = here(t.double())
                return DiracPosterior(model("x0", x / alpha, sigma / alpha))

        alpha, sigma = here(torch.tensor([1.0, 0.0], dtype=torch.float64))
        top, end = (sigma / alpha).tolist()
        steps = (count - 1) // 2 if name == "HeunSampler" else count
        settings: dict[str, Any] = {"order": order} if "AB" in name and name != "REABSampler" else {}
        made = getattr(samplers, name)(Model(), steps=steps, silent=True, dtype=torch.float64, **settings)
        x = made(case.z * float(sigma[0])) / float(alpha[1])
        start = case.z * top
        return x, case.mapped(model.model, start, top, end), case.mapped(model.model, start, top, 0.0), model.calls

    return sample


# ---------------------------------------------------------------------------------------------------------- our own


NAMED = ("ab3", "ab4", "flow-ab3", "flow-ab4", "deis3", "expab3", "dpmpp-2m", "unipc3")
GRIDS: dict[str, Callable[[int, float], Tensor]] = {
    "arcsinh 0.2": arcsinh_grid,
    "exponential": lambda count, top: exponential_grid(count, 0.002, top),
}


def own_rows() -> dict[str, Row]:
    """`auto`, named methods on the grid that a count gives, and one of order 4 on two other grids."""
    rows = {name: _own(name) for name in ("auto", *NAMED)}
    return rows | {f"ab4, {name}": _own("ab4", grid) for name, grid in GRIDS.items()}


def _own(method: str, grid: Callable[[int, float], Tensor] | None = None) -> Row:
    def sample(case: Case, count: int) -> Sampled:
        model, process = Counted(case.model), case.model.process
        counted = Denoiser(lambda x, t: model("x0", x, t), process, "x0")
        steps: Tensor | int = count
        if grid is not None:
            top = min(float(process.ratio(torch.tensor(process.t_max).double())), 1e4)
            steps = on_process(grid(count, top), process)
            steps[0] = process.t_max
        done = solve(counted, case.start(), steps, method)
        if done.nfe != model.calls:
            raise AssertionError(f"{method} said {done.nfe} evaluations and made {model.calls}")
        return done.x, case.reference(), case.reference(), model.calls

    return sample


# ---------------------------------------------------------------------------------------------------------- the run


def measure(case: Case, row: Row, count: int, may_fail: bool) -> dict[str, float] | None:
    """Median and root mean square distance and the share that switched mode; None where the row cannot run."""
    try:
        x, exact, clean, calls = row(case, count)
    except Exception as error:  # some schedulers cannot run some counts or grids
        if not may_fail:
            raise
        print(f"<!-- {case.data}, {case.process}, {count}: {type(error).__name__}: {str(error)[:60]} -->", flush=True)
        return None
    if calls > count:
        return None
    error = (x.double() - exact).norm(dim=1).nan_to_num(float("inf"))
    return {
        "median": float(error.median()),
        "rmse": float(error.square().mean().sqrt()),
        "switched": float((error > case.switched).double().mean()),
        "to data": float((x.double() - clean).norm(dim=1).nan_to_num(float("inf")).median()),
        "calls": calls,
    }


def compare(case: Case) -> dict[str, Any]:
    """All rows at all counts for one case, and the best of either side."""
    peers = diffusers_rows(case.process) | azula_rows(case.process)
    sides = {"peer": peers, "own": own_rows()}
    cells: dict[str, dict[str, dict[int, Any]]] = {}
    for side, rows in sides.items():
        cells[side] = {
            name: {count: measure(case, row, count, side == "peer") for count in COUNTS} for name, row in rows.items()
        }
    return {"data": case.data, "process": case.process, "cells": cells}


def best(cells: dict[str, dict[int, Any]], count: int, by: str = "median") -> tuple[str, dict[str, float]]:
    """The row of the smallest median at a count."""
    able = {name: row[count] for name, row in cells.items() if row[count] is not None}
    name = min(able, key=lambda key: able[key][by])
    return name, able[name]


def cell(found: dict[str, float]) -> str:
    """median / RMSE / share that switched, in percent."""
    return f"{found['median']:.2e} / {found['rmse']:.2e} / {100 * found['switched']:.1f}"


def summary(results: list[dict[str, Any]]) -> str:
    """One row per case and count: the best peer, the best method here, `auto`, and the two ratios of medians."""
    rows = []
    for result in results:
        for count in COUNTS:
            name, peer = best(result["cells"]["peer"], count)
            mine, own = best(result["cells"]["own"], count)
            auto = result["cells"]["own"]["auto"][count]
            ratios = [f"{one['median'] / peer['median']:.2f}" for one in (own, auto)]
            rows.append([f"{result['data']}, {result['process']}", count, f"{name}: {cell(peer)}",
                         f"{mine}: {cell(own)}", cell(auto), *ratios])  # fmt: skip
    head = ["data, process", "evaluations", "best peer", "best here", "auto", "best here / peer", "auto / peer"]
    return table(head, rows)


def claim(results: list[dict[str, Any]], by: str = "median") -> str:
    """How many of the judged rows meet the two aims, the ratios' range, and the rows that miss one.

    By the ``median`` at each row's own end, or the one ``to data``: with what is left to do there charged too.
    """
    ratios: dict[str, list[float]] = {"best here": [], "auto": []}
    missed = []
    for result in results:
        for count in JUDGED:
            peer = best(result["cells"]["peer"], count, by)[1][by]
            ratios["best here"].append(best(result["cells"]["own"], count, by)[1][by] / peer)
            ratios["auto"].append(result["cells"]["own"]["auto"][count][by] / peer)
            if ratios["best here"][-1] > AIMS["best here"] or ratios["auto"][-1] > AIMS["auto"]:
                missed.append(f"{result['data']} under {result['process']} at {count}")
    shown = [
        f"{name}: {sum(ratio <= AIMS[name] for ratio in found)} of {len(found)} rows at most {AIMS[name]}, "
        f"{min(found):.2f} to {max(found):.2f}"
        for name, found in ratios.items()
    ]
    return f"{'; '.join(shown)}; missed: {', '.join(missed) or 'none'}."


def everything(results: list[dict[str, Any]]) -> str:
    """Median errors of every row."""
    parts = []
    for result in results:
        rows = []
        for side in ("peer", "own"):
            for name, row in result["cells"][side].items():
                shown = ["-" if row[n] is None else f"{row[n]['median']:.1e}" for n in COUNTS]
                rows.append([name, *shown])
        parts.append(
            f"### {result['data']}, {result['process']}\n\n" + table(["median error", *map(str, COUNTS)], rows)
        )
    return "\n\n".join(parts)


def draw(path: str, results: list[dict[str, Any]]) -> None:
    """Median error against evaluations: the best peer, the best method here, `auto`."""
    with picture(path, 9, 2.5 * math.ceil(len(results) / 3)) as figure:
        axes = figure.subplots(math.ceil(len(results) / 3), 3, sharex=True, squeeze=False)
        for axis, result in zip(axes.flat, results, strict=True):
            lines = {
                "best peer": [best(result["cells"]["peer"], n)[1]["median"] for n in COUNTS],
                "best here": [best(result["cells"]["own"], n)[1]["median"] for n in COUNTS],
                "auto": [result["cells"]["own"]["auto"][n]["median"] for n in COUNTS],
            }
            for (name, line), colour, mark in zip(lines.items(), COLOURS, "sov", strict=False):
                axis.loglog(COUNTS, line, color=colour, marker=mark, label=name)
            axis.set_title(f"{result['data']}, {result['process']}")
            axis.set_xticks(COUNTS, [str(n) for n in COUNTS])
            axis.minorticks_off()
        axes[0, 0].legend(frameon=False)
        axes[-1, 0].set_ylabel("median error")
        axes[-1, 1].set_xlabel("model evaluations")


def main() -> None:
    """Run it."""
    shown = parser(__doc__, samples_plane=512, samples_wide=128, samples_digits=32, samples_digits_log=128)
    shown.add_argument("--picture", type=Path, help="write the plot here")
    shown.add_argument("--only", default="plane,wide,digits,digits-log", help="the sets, by comma")
    options = shown.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    import diffusers

    diffusers.logging.set_verbosity_error()
    begun, results = time.process_time(), []
    for data in options.only.split(","):
        for case in cases(data, options):
            if data in NETWORKS:
                checked(case)
            results.append(compare(case))
            print(f"<!-- {data}, {case.process}: {time.process_time() - begun:.0f} CPU seconds -->", flush=True)
    if options.picture:
        draw(str(options.picture), results)
    named = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "azula"))
    charged = f"With azula's samples compared with the data's end too, as all others are: {claim(results, 'to data')}"
    shares = f"{claim(results)}\n\n{charged}\n\n{time.process_time() - begun:.0f} CPU seconds."
    shown_text = f"{named}. {shares}\n\n{summary(results)}\n\n## Every row\n\n{everything(results)}"
    emit(options, {"results": results}, shown_text)


if __name__ == "__main__":
    main()
