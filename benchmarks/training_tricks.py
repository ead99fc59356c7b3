"""What three training methods are worth on small data: immiscible diffusion, LCSC and Online SFBD.

Each is trained beside what it is to improve on: same network, data, seeds and number of optimizer steps. On a mixture
of five Gaussians in the plane and on scikit-learn's 8x8 digits. Energy distances to held-out data, unbiased, times
1000; the mean and the range over the seeds.

    python benchmarks/training_tricks.py [--picture plot.png]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
import platform
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from _common import COLOURS, emit, parser, picture, table
from torch import Tensor, nn

from consilience.diffusion import (
    EDM,
    Denoiser,
    GaussianMixture,
    RectifiedFlow,
    arcsinh_grid,
    linear_grid,
    precondition,
    solve,
)
from consilience.diffusion.losses import denoising_loss, edm_weight, lognormal_times
from consilience.diffusion.metrics import energy_distance
from consilience.diffusion.solvers.multistep import Adams
from consilience.diffusion.training import DenoisedPool, Power, assigned, cosine, lcsc, reconstruct, snapshots, train

SIGMA_DATA = 0.9
CLEAN, NOISE = 40, 0.3
"""How many of 4000 data are clean, and the standard deviation of the noise of the others."""
EULER, FLOW, THIRD = (Adams(order, "flow", "flow") for order in (1, 2, 3))


class Network(nn.Module):
    """An MLP of x [batch, D] and a time [batch], which enters as sines and cosines."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(-2, 4))
        sizes = [dim + 12, width, width, width]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.reshape(-1, 1).expand(len(x), 1) * self.frequencies
        return self.body(torch.cat([x, angles.sin(), angles.cos()], 1))


def five_gaussians() -> GaussianMixture:
    """Unequal weights, full covariances, a standard deviation of about 0.9."""
    shapes = ((0.20, 0.08, 0.3), (0.15, 0.15, 0.0), (0.25, 0.06, 1.1), (0.10, 0.10, 0.0), (0.12, 0.05, 2.0))
    covariances = []
    for long, short, angle in shapes:
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        covariances.append(turn @ torch.diag(torch.tensor([long**2, short**2])) @ turn.T)
    means = torch.tensor([[1.0, 0.2], [-0.9, 0.8], [-0.4, -1.1], [0.7, -0.9], [0.3, 1.3]])
    return GaussianMixture(torch.tensor([0.30, 0.25, 0.20, 0.15, 0.10]), means, torch.stack(covariances))


def digits() -> tuple[Tensor, Tensor]:
    """The 8x8 digits in [-1, 1], [., 64]: a half to train on and a half to compare with."""
    from sklearn.datasets import load_digits

    rows = torch.from_numpy(load_digits().data).float() / 8 - 1
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[::2], rows[1::2]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def distance(model: Denoiser, held_out: Tensor, evaluations: int, seed: int, solver: Adams) -> float:
    """1000 times the energy distance of as many samples as there are held-out data."""
    process = model.process
    start = process.prior(tuple(held_out.shape), generator(1000 + seed))
    grid = linear_grid(evaluations, process) if process == RectifiedFlow() else arcsinh_grid(evaluations, process.t_max)
    return 1000 * energy_distance(solve(model, start, grid, solver).x, held_out)


# ----------------------------------------------------------------------------------------------------- immiscible


def flow(network: nn.Module) -> Denoiser:
    return Denoiser(network, RectifiedFlow(), "flow")


def immiscible(options: Namespace, data: str) -> list[dict[str, Any]]:
    """Flow matching with and without assigned noise: distance against steps, for few and for many evaluations."""
    if data == "digits":
        rows, held_out = digits()
        source, width, compared = rows, 256, held_out
    else:
        mixture = five_gaussians()
        source, width, compared = mixture.sample(20000, generator(1)), 128, mixture.sample(2000, generator(2))
    results = []
    for seed in range(options.seeds):
        for name in ("independent", "assigned"):
            noise = assigned(RectifiedFlow()) if name == "assigned" else None
            seen: list[dict[str, Any]] = []

            def loss(network: nn.Module, batch: Tensor, rng: torch.Generator, noise: Any = noise) -> Tensor:
                return denoising_loss(flow(network), batch, rng, noise=noise)

            def look(step: int, network: nn.Module, seen: list[dict[str, Any]] = seen, seed: int = seed) -> None:
                found = {
                    f"at {n}": distance(flow(network), compared, n, seed, EULER if n == 4 else FLOW) for n in (4, 32)
                }
                seen.append({"step": step, **found})

            torch.manual_seed(seed)
            begun = time.process_time()
            trained = train(
                Network(compared.shape[1], width),
                loss,
                source,
                steps=options.steps,
                batch_size=128,
                lr=cosine(2e-3, options.steps, options.steps // 20),
                seed=seed,
                ema=0.99,
                log_every=options.steps,
                sample_every=max(1, options.steps // 5),
                on_sample=look,
                progress=False,
            )
            results.append({
                "data": data, "noise": name, "seed": seed, "curve": seen,
                "loss": trained.log[-1]["loss"], "seconds": time.process_time() - begun,
            })  # fmt: skip
    return results


# ----------------------------------------------------------------------------------------------------------- lcsc


def edm(network: nn.Module) -> Denoiser:
    return precondition(network, EDM(), SIGMA_DATA)


def edm_loss(network: nn.Module, batch: Tensor, rng: torch.Generator) -> Tensor:
    return denoising_loss(edm(network), batch, rng, times=lognormal_times(), weight=edm_weight(SIGMA_DATA))


def searched(options: Namespace, seed: int) -> dict[str, Any]:
    """Checkpoints of a run at a constant rate: the last, averages chosen on the same data as LCSC, and LCSC."""
    mixture = five_gaussians()
    visible, held_out = mixture.sample(1000, generator(10 + seed)), mixture.sample(2000, generator(20 + seed))
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as out:
        train(
            Network(2, 128),
            edm_loss,
            mixture.sample(20000, generator(30 + seed)),
            steps=options.steps,
            batch_size=128,
            lr=2e-3,
            seed=seed,
            ema=(Power(0.05), Power(0.1)),
            snapshot_every=max(1, options.steps // 40),
            out=out,
            log_every=options.steps,
            progress=False,
        )
        shots = snapshots(out)
    network = Network(2, 128)

    def judge(state: dict[str, Tensor], rows: Tensor, draw: int) -> float:
        network.load_state_dict(state)
        return distance(edm(network), rows, 9, draw, THIRD)

    states = [shot["model"] for shot in shots]
    averages = [reconstruct(shots, length)[0] for length in (0.02, 0.05, 0.1, 0.15, 0.2)]
    average = min(averages, key=lambda state: judge(state, visible, seed))
    found = lcsc.search(
        states, lambda state: judge(state, visible, seed), np.random.default_rng(seed), evaluations=options.evaluations
    )
    candidates = {"last checkpoint": states[-1], "best average": average, "lcsc": found.state}
    return {
        "seed": seed,
        "checkpoints": len(states),
        "negative": float(found.coefficients[found.coefficients < 0].sum()),
        "visible": {name: judge(state, visible, seed) for name, state in candidates.items()},
        "held out": {name: judge(state, held_out, 500 + seed) for name, state in candidates.items()},
    }


# ---------------------------------------------------------------------------------------------------- online sfbd


def from_noisy(options: Namespace, seed: int) -> dict[str, Any]:
    """4000 data of which 1 % are clean: what each way of using them comes to, at equal optimizer steps."""
    mixture = five_gaussians()
    rows, held_out = mixture.sample(4000, generator(40 + seed)), mixture.sample(2000, generator(50 + seed))
    clean, rest = rows[:CLEAN], rows[CLEAN:]
    noisy = rest + NOISE * torch.randn(rest.shape, generator=generator(60 + seed))
    first, more = 5 * options.steps // 2, 3 * options.steps // 2

    def fit(data: Any, steps: int, start: nn.Module | None = None, on_step: Any = None) -> nn.Module:
        torch.manual_seed(seed)
        network = Network(2, 128)
        if start is not None:
            network.load_state_dict(start.state_dict())
        settings = {"batch_size": 128, "lr": cosine(1e-3, steps, steps // 20), "seed": seed, "ema": 0.995}
        return train(network, edm_loss, data, steps=steps, on_step=on_step, progress=False, **settings).best

    pretrained = fit(clean, first)
    once, online = (DenoisedPool(clean, noisy, NOISE, edm, every=20, share=0.05, seed=seed) for _ in range(2))
    once.fill(pretrained)
    online.fill(pretrained)
    made = {
        "noisy data only": fit(torch.cat([clean, noisy]), first + more),
        "clean data only": fit(clean, first + more),
        "denoised once": fit(once, more, pretrained),
        "online sfbd": fit(online, more, pretrained, online.on_step),
        "all data clean": fit(rows, first + more),
    }
    pools = {"noisy": noisy, "denoised once": once.denoised, "online sfbd": online.denoised}
    return {
        "seed": seed,
        "samples": {name: distance(edm(network), held_out, 17, seed, THIRD) for name, network in made.items()},
        "pool": {name: 1000 * energy_distance(pool[:2000], held_out) for name, pool in pools.items()},
    }


# --------------------------------------------------------------------------------------------------------- output


def measure(options: Namespace) -> dict[str, Any]:
    """All three, each in a process of its own."""
    with ProcessPoolExecutor(3, get_context("spawn"), _one_thread) as pool:
        parts = [pool.submit(part, options) for part in (both_data, combined, denoised)]
        (noise, first), (weights, second), (noisy, third) = (part.result() for part in parts)
    return {
        "steps": options.steps,
        "seeds": options.seeds,
        "immiscible": noise,
        "lcsc": weights,
        "sfbd": noisy,
        "seconds": first + second + third,
    }


def _one_thread() -> None:
    torch.set_num_threads(1)


def both_data(options: Namespace) -> tuple[list[dict[str, Any]], float]:
    """Noise assignment on both data sets, and the CPU seconds."""
    return [run for data in ("mixture", "digits") for run in immiscible(options, data)], time.process_time()


def combined(options: Namespace) -> tuple[list[dict[str, Any]], float]:
    """LCSC for every seed, and the CPU seconds."""
    return [searched(options, seed) for seed in range(options.seeds)], time.process_time()


def denoised(options: Namespace) -> tuple[list[dict[str, Any]], float]:
    """Online SFBD for every seed, and the CPU seconds."""
    return [from_noisy(options, seed) for seed in range(options.seeds)], time.process_time()


def spread(values: list[float]) -> str:
    """Mean and range."""
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def markdown(result: dict[str, Any]) -> str:
    """The tables of the results page."""
    return "\n\n".join([
        f"{result['steps']} steps, {result['seeds']} seeds; {result['seconds']:.0f} CPU seconds in all. Python "
        f"{platform.python_version()}, torch {version('torch')}, one thread. Energy distance x 1000, mean and range.",
        immiscible_table(result["immiscible"]), lcsc_table(result["lcsc"]), sfbd_table(result["sfbd"]),
    ])  # fmt: skip


def immiscible_table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for data in ("mixture", "digits"):
        for name in ("independent", "assigned"):
            mine = [run for run in runs if run["data"] == data and run["noise"] == name]
            for point in range(len(mine[0]["curve"])):
                at = [run["curve"][point] for run in mine]
                seconds = np.mean([run["seconds"] for run in mine]) if point == len(mine[0]["curve"]) - 1 else None
                rows.append([
                    data, name, at[0]["step"], *(spread([entry[f"at {n}"] for entry in at]) for n in (4, 32)),
                    "" if seconds is None else f"{seconds:.0f}",
                ])  # fmt: skip
    return table(["data", "noise", "step", "at 4 evaluations", "at 32 evaluations", "CPU s per run"], rows)


def lcsc_table(runs: list[dict[str, Any]]) -> str:
    rows = [
        [name, *(spread([run[where][name] for run in runs]) for where in ("visible", "held out"))]
        for name in runs[0]["visible"]
    ]
    negative = spread([run["negative"] for run in runs])
    shown = table(["weights", "data the search sees", "held-out data"], rows)
    return f"{shown}\n\n{runs[0]['checkpoints']} checkpoints; the negative coefficients of LCSC sum to {negative}."


def sfbd_table(runs: list[dict[str, Any]]) -> str:
    samples = [[name, spread([run["samples"][name] for run in runs])] for name in runs[0]["samples"]]
    pools = [[name, spread([run["pool"][name] for run in runs])] for name in runs[0]["pool"]]
    return table(["trained on", "samples"], samples) + "\n\n" + table(["training data", "distance"], pools)


def draw(result: dict[str, Any], path: str) -> None:
    """Distance against steps; the weights of LCSC; what noisy data come to."""
    with picture(path, 9.0, 3.0) as figure:
        left, middle, right = figure.subplots(1, 3)
        for number, (data, name) in enumerate(
            [(d, n) for d in ("mixture", "digits") for n in ("independent", "assigned")]
        ):
            mine = [run for run in result["immiscible"] if run["data"] == data and run["noise"] == name]
            steps = [entry["step"] for entry in mine[0]["curve"]]
            values = [np.mean([run["curve"][i]["at 4"] for run in mine]) for i in range(len(steps))]
            style = {"color": COLOURS[number // 2], "linestyle": "-" if name == "assigned" else ":"}
            left.plot(steps, values, marker="o", markersize=3, label=f"{data}, {name}", **style)
        left.set(yscale="log", xlabel="optimizer steps", title="noise assignment, 4 evaluations")
        left.legend(frameon=False, fontsize=7)
        bars(middle, [run["held out"] for run in result["lcsc"]], "combined checkpoints, held out")
        bars(right, [run["samples"] for run in result["sfbd"]], "noisy data, 1 % clean")


def bars(axes: Any, runs: list[dict[str, float]], title: str) -> None:
    """Mean and every seed, one row per name."""
    names = list(runs[0])[::-1]
    axes.barh(names, [np.mean([run[name] for run in runs]) for name in names], color=COLOURS[0], alpha=0.5)
    for place, name in enumerate(names):
        axes.plot([run[name] for run in runs], [place] * len(runs), "o", color=COLOURS[5], markersize=3)
    axes.set(title=title, xlabel="energy distance x 1000")


def main() -> None:
    """Measure, print, draw."""
    flags = parser(__doc__, steps=1000, seeds=3, evaluations=200, picture="")
    options = flags.parse_args()
    result = measure(options)
    if options.picture:
        draw(result, options.picture)
    emit(options, result, markdown(result))


if __name__ == "__main__":
    main()
