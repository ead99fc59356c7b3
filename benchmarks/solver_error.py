"""Error at equal numbers of model evaluations beside diffusers' schedulers and azula, from the same noise.

Three data sets (a mixture of 5 Gaussians in the plane, one of 20 in 64 dimensions, a small network trained on
scikit-learn's digits here and now) under three processes (Stable Diffusion's VP table, EDM, rectified flow). Errors are
distances to where the exact probability-flow ODE takes the same noise: DOP853 for the mixtures, for the network a run
of order 4 with 1024 evaluations, checked against one with 512. Evaluations are counted in calls of the model, and the
schedulers' models are given the exact sigma, not the rounded timestep. A cell is median / RMSE / percent of samples
that went to another mode (an error above 1.5 standard deviations of a component; half the spacing of the digits).

    python benchmarks/solver_error.py [--picture docs/images/solver-error.png]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
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
    on_process,
    solve,
)
from consilience.diffusion.solvers.multistep import Adams

COUNTS = (5, 9, 17, 33, 65)
JUDGED = (9, 17, 33)
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


def digits(seconds: float, seed: int = 0) -> tuple[Denoiser, float, float]:
    """A network trained on the 8 x 8 digits in [-1, 1] for that many seconds, its loss, the digits' own spacing."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    data = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
    process = TrigFlow(sigma_data=float(data.std()))
    network = torch.nn.Sequential(*_layers(64 + 32, 256, 64))
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    mean: list[Tensor] = [parameter.detach().clone() for parameter in network.parameters()]
    begun, loss, smooth = time.monotonic(), 0.0, 1.0
    while (done := (time.monotonic() - begun) / seconds) < 1:
        optimiser.param_groups[0]["lr"] = 2e-3 * (0.02 + 0.98 * math.cos(done * math.pi / 2))
        x0 = data[torch.randint(len(data), (256,))]
        t = torch.arctan(torch.exp(-0.8 + 1.4 * torch.randn(256)) / process.sigma_data)
        noise = torch.randn_like(x0)
        y = torch.cos(t)[:, None] * x0 / process.sigma_data + torch.sin(t)[:, None] * noise
        target = torch.cos(t)[:, None] * noise - torch.sin(t)[:, None] * x0 / process.sigma_data
        value = (_network(network, y, t) - target).square().mean()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        loss = 0.99 * loss + 0.01 * value.item()
        smooth = min(0.999, 1 - 1 / (1 + smooth) if done < 0.02 else 0.999)
        for kept, parameter in zip(mean, network.parameters(), strict=True):
            kept.lerp_(parameter.detach(), 1 - smooth)
    for kept, parameter in zip(mean, network.parameters(), strict=True):
        parameter.data.copy_(kept)
    network.double().requires_grad_(False)
    spacing = float(torch.cdist(data, data).fill_diagonal_(float("inf")).min(1).values.median())
    return Denoiser(lambda x, t: _trig(network, process, x, t), process, "x0"), loss, spacing


def _layers(width_in: int, width: int, width_out: int) -> list[torch.nn.Module]:
    layers: list[torch.nn.Module] = []
    for wide_in in (width_in, width, width):
        layers += [torch.nn.Linear(wide_in, width), torch.nn.SiLU()]
    return [*layers, torch.nn.Linear(width, width_out)]


def _network(network: torch.nn.Module, y: Tensor, t: Tensor) -> Tensor:
    waves = torch.outer(torch.log(torch.tan(t).clamp(1e-3, 1e3)) / 4, torch.arange(1, 17, dtype=y.dtype))
    return network(torch.cat([y, waves.sin(), waves.cos()], 1))


def _trig(network: torch.nn.Module, process: TrigFlow, x: Tensor, t: Tensor) -> Tensor:
    y, t = x / process.sigma_data, t.expand(len(x)).to(x.dtype)
    return process.sigma_data * (torch.cos(t)[:, None] * y - torch.sin(t)[:, None] * _network(network, y, t))


def _by_dop853(model: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
    assert isinstance(model, GaussianMixture)
    return model.ode_map(x, t, s)


def _by_many_steps(model: Denoiser, x: Tensor, t: float, s: float, count: int = 1024) -> Tensor:
    """Order 4 on the angle, with evaluations packed towards small noise."""
    ratios = model.process.ratio(torch.tensor([t, s], dtype=torch.float64))
    ends = torch.log((ratios + 0.02) / (1 + ratios / 5)).nan_to_num(math.log(5.0))
    g = torch.exp(torch.linspace(float(ends[0]), float(ends[1]), count + 1, dtype=torch.float64))
    grid = model.process.time((g - 0.02) / (1 - g / 5))
    grid[0], grid[-1] = t, s
    return solve(model, x, grid, Adams(4, "v", "angle")).x


def cases(data: str, options: Any) -> list[Case]:
    """One set under the three processes."""
    if data == "digits":
        model, loss, spacing = digits(options.train_seconds)
        count, exact, switched = options.samples_digits, _by_many_steps, spacing / 2
        print(f"<!-- digits: training loss {loss:.4f} -->", flush=True)
        made = {name: model.on(process) for name, process in PROCESSES.items()}
        dim = 64
    else:
        mixture = plane() if data == "plane" else wide()
        count = options.samples_plane if data == "plane" else options.samples_wide
        exact, dim = _by_dop853, mixture.dim
        trace = torch.einsum("k,kii->", mixture.weights, mixture.covariances)
        switched = 1.5 * float(trace.sqrt())
        made = {name: mixture.on(process) for name, process in PROCESSES.items()}
    z = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [Case(data, name, made[name], z, switched, exact) for name in PROCESSES]


# ------------------------------------------------------------------------------------------------------- the peers


class Counted:
    """A model that counts its calls."""

    def __init__(self, model: Denoiser) -> None:
        self.model, self.calls = model, 0

    def __call__(self, want: str, x: Tensor, t: float | Tensor) -> Tensor:
        self.calls += 1
        return self.model.predict(want, x, t)  # type: ignore[arg-type]


Sampled = tuple[Tensor, Tensor, int]
"""A peer's samples, the exact ones from the same noise, and the calls it took."""
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
        return x, case.reference(), model.calls

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
        return x, case.reference(), model.calls

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
        return x, case.reference(), model.calls

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
        return x, case.mapped(model.model, case.z * top, top, end), model.calls

    return sample


# ---------------------------------------------------------------------------------------------------------- our own


NAMED = ("ab3", "ab4", "flow-ab3", "flow-ab4", "deis3", "expab2", "expab3", "dpmpp-2m", "unipc2", "unipc3")


def own_rows() -> dict[str, Row]:
    """`auto`, and named methods on the grid that a count gives and on the arcsinh grid."""
    rows: dict[str, Row] = {"auto": _own("auto")}
    for name in NAMED:
        rows[name] = _own(name)
        rows[f"{name}, arcsinh 0.2"] = _own(name, 0.2)
    return rows


def _own(method: str, scale: float | None = None) -> Row:
    def sample(case: Case, count: int) -> Sampled:
        model, process = Counted(case.model), case.model.process
        counted = Denoiser(lambda x, t: model("x0", x, t), process, "x0")
        steps: Tensor | int = count
        if scale is not None:
            top = min(float(process.ratio(torch.tensor(process.t_max).double())), 1e4)
            steps = on_process(arcsinh_grid(count, top, scale), process)
            steps[0] = process.t_max
        done = solve(counted, case.start(), steps, method)
        if done.nfe != model.calls:
            raise AssertionError(f"{method} said {done.nfe} evaluations and made {model.calls}")
        return done.x, case.reference(), model.calls

    return sample


# ---------------------------------------------------------------------------------------------------------- the run


def measure(case: Case, row: Row, count: int, may_fail: bool) -> dict[str, float] | None:
    """Median and root mean square distance and the share that switched mode; None where the row cannot run."""
    try:
        x, exact, calls = row(case, count)
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


def best(cells: dict[str, dict[int, Any]], count: int) -> tuple[str, dict[str, float]]:
    """The row of the smallest median at a count."""
    able = {name: row[count] for name, row in cells.items() if row[count] is not None}
    name = min(able, key=lambda key: able[key]["median"])
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
    with picture(path, 9, 7.5) as figure:
        axes = figure.subplots(3, 3, sharex=True)
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
        axes[1, 0].set_ylabel("median error")
        axes[2, 1].set_xlabel("model evaluations")


def main() -> None:
    """Run it."""
    shown = parser(__doc__, samples_plane=256, samples_wide=64, samples_digits=128, train_seconds=60.0)
    shown.add_argument("--picture", type=Path, help="write the plot here")
    shown.add_argument("--only", default="plane,wide,digits", help="the sets, by comma")
    options = shown.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False) if "digits" not in options.only else None
    warnings.simplefilter("ignore")
    import diffusers

    diffusers.logging.set_verbosity_error()
    results = []
    for data in options.only.split(","):
        for case in cases(data, options):
            if data == "digits":
                half = _by_many_steps(case.model, case.start(), case.model.process.t_max, _end(case.model.process), 512)
                gap = float((case.reference() - half).norm(dim=1).median())
                print(
                    f"<!-- digits, {case.process}: 1024 and 512 evaluations differ by {gap:.1e} (median) -->",
                    flush=True,
                )
            results.append(compare(case))
    if options.picture:
        draw(str(options.picture), results)
    named = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "azula"))
    emit(options, {"results": results}, f"{named}.\n\n{summary(results)}\n\n## Every row\n\n{everything(results)}")


def _end(process: Process) -> float:
    return float(process.time(torch.zeros((), dtype=torch.float64)))


if __name__ == "__main__":
    main()
