"""Drawing images from a pipeline: a seed, a number of evaluations, classes and guidance -> images and what it took."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.guidance import apg
from consilience.diffusion.huggingface import grid_of, start_scale
from consilience.diffusion.pipeline import ImagePipeline
from consilience.diffusion.solve import solve, steps_of
from consilience.diffusion.solvers.plan import Noise, Solution
from consilience.errors import InputError

BATCH = 256
"""Images that go through the network together."""


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance of a ``scale``, 1 being none; ``projected`` for `apg` with its ``norm_limit``."""

    scale: float = 1.0
    projected: bool = False
    norm_limit: float = float("inf")


@dataclass(frozen=True, slots=True)
class Drawn:
    """Images ``x`` [n, channels, height, width] of ``noise`` and perhaps ``labels`` [n], and how they were made.

    ``states`` are those of the first images from the noise on, each [k, channels, height, width], ``times`` the
    process's times and ``scales`` the standard deviations that belong to them. ``nfe`` counts per image.
    """

    x: Tensor
    noise: Tensor
    labels: Tensor | None
    nfe: int
    method: str
    why: str
    states: tuple[Tensor, ...] = ()
    times: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()


def noise_of(pipe: ImagePipeline, count: int, seed: int) -> Tensor:
    """The starting noise [count, channels, height, width] of a seed, the same on every device.

    Raises InputError where so many images and what is made of them cannot be held in this machine's memory.
    """
    process = pipe.denoiser(torch.zeros(1, dtype=torch.long)).process
    _check_memory(count, pipe.shape(count))
    try:
        return process.prior(pipe.shape(count), torch.Generator().manual_seed(seed))
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"count {count}: there is no memory for so many images; draw fewer at a time") from error


def _check_memory(count: int, shape: tuple[int, ...]) -> None:
    """Noise, images, the parts that they are put together from, and a picture: four float32 tensors of the shape."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not known on this system
        return
    needed = 16 * math.prod(shape)
    if needed > memory:
        raise InputError(
            f"count {count}: so many images take {needed / 2**30:,.1f} GiB, this machine has {memory / 2**30:,.1f}; "
            "draw fewer at a time, each time from another seed"
        )


@torch.no_grad()
def draw(
    pipe: ImagePipeline,
    noise: Tensor,
    evaluations: int,
    method: str | None = None,
    labels: Tensor | None = None,
    guidance: Guidance | None = None,
    *,
    seed: int = 0,
    keep: int = 0,
    on_images: Callable[[int], None] | None = None,
) -> Drawn:
    """Images of ``noise`` by at most ``evaluations`` evaluations of the network per image, guidance's included.

    ``method`` None is what the pipeline's scheduler names; ``seed`` is for methods that add noise; the states of the
    first ``keep`` images are kept, `BATCH` at most. Raises ValueError for what `solve` refuses, or where guidance has
    no labels.
    """
    keep = min(keep, BATCH)
    method = method or pipe.scheduler.config.get("method", "auto")
    process = pipe.denoiser(torch.zeros(1, dtype=torch.long)).process
    steps = grid_of(pipe.scheduler.config, process, method, _steps(pipe, labels, guidance, evaluations))
    fresh = _Fresh(noise, seed + 1)
    found: list[Tensor] = []
    first: Solution | None = None
    for start in range(0, len(noise), BATCH):
        part = slice(start, start + BATCH)
        model = guided(pipe, None if labels is None else labels[part], guidance)
        with warnings.catch_warnings():
            if first is not None:  # said once
                warnings.simplefilter("ignore")
            solution = solve(
                model,
                noise[part].to(pipe.network.device),
                steps,
                method,
                noise=fresh.of(part),
                trajectory=keep > 0 and first is None,
            )
        first = first or solution
        found.append(solution.x.cpu())
        if on_images is not None:
            on_images(min(start + BATCH, len(noise)))
    assert first is not None
    times, scales, states = _trajectory(first, model, method, steps, noise, keep)
    return Drawn(torch.cat(found), noise, labels, first.nfe, first.method, first.why, states, times, scales)


class _Fresh:
    """The noise of methods that add any: an image's does not depend on how many go through together."""

    def __init__(self, like: Tensor, seed: int) -> None:
        self._shape, self._generator = like.shape, torch.Generator().manual_seed(seed)
        self._drawn: list[Tensor] = []

    def of(self, part: slice) -> Noise:
        """That of some of the images, from the first stage on."""
        stages = itertools.count()

        def noise(x: Tensor, _t: float, _s: float) -> Tensor:
            stage = next(stages)
            if stage == len(self._drawn):
                self._drawn.append(torch.randn(self._shape, generator=self._generator, dtype=x.dtype))
            return self._drawn[stage][part].to(x.device)

        return noise


def guided(pipe: ImagePipeline, labels: Tensor | None, guidance: Guidance | None) -> Denoiser:
    """The pipeline's model of these classes under guidance; raises ValueError where guidance has no labels."""
    if guidance is None or guidance.scale == 1:
        return pipe.denoiser(labels)
    if labels is None or not pipe.classes:
        raise ValueError("guidance needs a model with classes, and classes to guide to")
    labels = labels.to(pipe.network.device)
    pipe.check_guidance()
    if guidance.projected:
        return apg(pipe.denoiser(labels), guidance.scale, pipe.denoiser(), norm_limit=guidance.norm_limit)
    return pipe.guided(labels, guidance.scale)


def _steps(pipe: ImagePipeline, labels: Tensor | None, guidance: Guidance | None, evaluations: int) -> int:
    """How often the guided model may be evaluated."""
    model = guided(pipe, labels, guidance)
    each = model.cost(model.process.t_max)
    if evaluations < each:
        raise ValueError(f"one step under guidance takes {each} evaluations, got {evaluations}")
    return evaluations // each


def _trajectory(
    solution: Solution, model: Denoiser, method: str, steps: int | Tensor, noise: Tensor, keep: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[Tensor, ...]]:
    """(times, scales, states) from the noise on, of the first ``keep`` images."""
    if not keep:
        return (), (), ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choice = steps_of(method, model.process, steps)
    plan = choice.solver.plan(choice.grid, model.process)
    times = (float(solution.grid[0]), *(stage.end for stage in plan.stages))
    scales = tuple(max(1.0, start_scale(model.process, time)) for time in times)
    return times, scales, (noise[:keep], *(state[:keep].cpu() for state in solution.states))


@torch.no_grad()
def usual_difference(pipe: ImagePipeline, labels: Tensor, evaluations: int = 16) -> float:
    """How far apart the predictions of x0 with and without class are half-way of a plain run, the median.

    What `apg` is best given as its limit: a difference that good samples have. ``labels`` [n] are classes to ask for.
    """
    noise = noise_of(pipe, len(labels), 0)
    plain, free = pipe.denoiser(labels), pipe.denoiser()
    drawn = draw(pipe, noise, evaluations, "auto", labels, keep=len(labels))
    middle = len(drawn.states) // 2
    x, t = drawn.states[middle].to(pipe.network.device), drawn.times[middle]
    return float((plain.x0(x, t) - free.x0(x, t)).flatten(1).norm(dim=1).median())
