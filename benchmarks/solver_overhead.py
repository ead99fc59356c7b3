"""Time that a sampler takes besides the model: the loop of `solve` and our diffusers scheduler beside diffusers' own.

Latents of 4 x 32 x 32 and 4 x 128 x 128 in float32 on one thread; the model hands out one ready tensor, so that what is
timed is the samplers. Sides take turns within each round; a cell is the smallest time of all rounds per step, which
takes noise of a shared machine best. Both sides' plans and time grids are made before the clock starts.

    python benchmarks/solver_overhead.py [--picture docs/images/solver-overhead.png]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _common import COLOURS, emit, parser, picture, table
from torch import Tensor

from consilience.diffusion import METHODS, Denoiser, VPTable
from consilience.diffusion.solve import steps_of
from consilience.diffusion.solvers.plan import run

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPES = ((1, 4, 32, 32), (1, 4, 128, 128))
LIKE = {
    "DDIMScheduler": ("ddim", {}),
    "EulerDiscreteScheduler": ("euler", {}),
    "DPMSolverMultistepScheduler": ("dpmpp-2m", {"solver_order": 2}),
    "UniPCMultistepScheduler": ("unipc2", {"solver_order": 2}),
    "DEISMultistepScheduler": ("deis3", {"solver_order": 3}),
    "LMSDiscreteScheduler": ("ab4", {}),
}
"""diffusers' scheduler, the like method here, its settings."""


def peer(name: str, settings: dict[str, Any], steps: int, x: Tensor, output: Tensor) -> Callable[[], None]:
    """One run of a scheduler as a pipeline makes it."""
    import diffusers

    made = getattr(diffusers, name)(**BETAS, prediction_type="epsilon", **settings)

    def sample() -> None:
        state = x
        for t in made.timesteps:
            made.scale_model_input(state, t)
            state = made.step(output, t, state, return_dict=False)[0]

    def ready() -> None:
        made.set_timesteps(steps)

    sample.ready = ready  # type: ignore[attr-defined]
    return sample


def scheduler(method: str, steps: int, x: Tensor, output: Tensor) -> Callable[[], None]:
    """One run of our scheduler, made from a stock one."""
    import diffusers

    from consilience.diffusion.huggingface import as_scheduler

    made = as_scheduler(diffusers.DDIMScheduler(**BETAS, prediction_type="epsilon"), method)

    def sample() -> None:
        state = x
        for t in made.timesteps:
            made.scale_model_input(state, t)
            state = made.step(output, t, state, return_dict=False)[0]

    sample.ready = lambda: made.set_timesteps(steps)  # type: ignore[attr-defined]
    return sample


def loop(method: str, steps: int, x: Tensor, output: Tensor, process: VPTable) -> Callable[[], None]:
    """One run of the loop behind `solve`."""
    model = Denoiser(lambda x, t: output, process, "eps")
    _, solver, grid, _ = steps_of(method, process, steps)
    plan = solver.plan(grid, process)

    def sample() -> None:
        for _ in run(plan, model, x, lambda *_: x, float(grid[0])):
            pass

    sample.ready = lambda: None  # type: ignore[attr-defined]
    return sample


def fastest(sides: dict[str, Callable[[], None]], rounds: int, steps: int) -> dict[str, float]:
    """Microseconds per step: the smallest of all rounds, the sides in turn."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, sample in sides.items():
            sample.ready()  # type: ignore[attr-defined]
            start = time.perf_counter()
            sample()
            best[name] = min(best[name], (time.perf_counter() - start) / steps * 1e6)
    return best


def measure(rounds: int, steps: int) -> list[dict[str, Any]]:
    """Every like pair, and `auto` beside the fastest peer of its order, on both shapes."""
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    process, found = VPTable(alphas), []
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        x, output = (torch.randn(shape, generator=generator) for _ in range(2))
        for name, (method, settings) in LIKE.items():
            assert method in METHODS
            sides = {"peer": peer(name, settings, steps, x, output), "loop": loop(method, steps, x, output, process),
                     "scheduler": scheduler(method, steps, x, output),
                     "auto": loop("auto", steps, x, output, process)}  # fmt: skip
            found.append({"shape": "x".join(map(str, shape[1:])), "name": name, "method": method}
                         | fastest(sides, rounds, steps))  # fmt: skip
    return found


def main() -> None:
    """Run it."""
    shown = parser(__doc__, rounds=200, steps=20)
    shown.add_argument("--picture", type=Path, help="write the plot here")
    options = shown.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    found = measure(options.rounds, options.steps)
    rows = [
        [
            f"{one['name']} / {one['method']}",
            one["shape"],
            *(f"{one[side]:.1f}" for side in SIDES),
            *(f"{one[side] / one['peer']:.2f}" for side in SIDES[1:]),
        ]
        for one in found
    ]
    if options.picture:
        draw(str(options.picture), found)
    head = ["diffusers' scheduler / method here", "latent", *(f"{side}, us a step" for side in SIDES),
            *(f"{side} / peer" for side in SIDES[1:])]  # fmt: skip
    named = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    emit(options, {"cells": found}, f"{named}.\n\n{table(head, rows)}")


SIDES = ("peer", "loop", "scheduler", "auto")


def draw(path: str, found: list[dict[str, Any]]) -> None:
    """Microseconds per step, one panel for each latent."""
    with picture(path, 8, 3) as figure:
        axes = figure.subplots(1, len(SHAPES))
        for axis, shape in zip(axes, SHAPES, strict=True):
            cells = [one for one in found if one["shape"] == "x".join(map(str, shape[1:]))]
            for k, (side, colour) in enumerate(zip(SIDES, COLOURS, strict=False)):
                axis.bar(
                    [i + 0.2 * k for i in range(len(cells))],
                    [one[side] for one in cells],
                    0.2,
                    color=colour,
                    label=side,
                )
            axis.set_xticks([i + 0.3 for i in range(len(cells))], [one["method"] for one in cells], rotation=30)
            axis.set_title(f"latent {cells[0]['shape']}")
        axes[0].set_ylabel("microseconds a step")
        axes[0].legend(frameon=False)


if __name__ == "__main__":
    main()
