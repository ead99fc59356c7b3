"""Drawing images from a pipeline: a seed, a number of evaluations, classes and guidance -> images and what it took."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.guidance import apg
from consilience.diffusion.huggingface import grid_of, start_scale
from consilience.diffusion.pipeline import ImagePipeline
from consilience.diffusion.processes import Process
from consilience.diffusion.solve import solve, steps_of
from consilience.diffusion.solvers.plan import Noise, Solution
from consilience.errors import InputError

BATCH = 256
"""Images that go through the network together."""
BLOCK = 4096
"""Values of fresh noise that are drawn together; a multiple of the 16 in which torch makes them."""


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
    values = 4 * math.prod(pipe.shape(count))  # the noise, the images, the parts they are put together from, a picture
    check_memory(f"count {count}: so many images", values, "draw fewer at a time, each time from another seed")
    try:
        return process.prior(pipe.shape(count), torch.Generator().manual_seed(seed))
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"count {count}: there is no memory for so many images; draw fewer at a time") from error


def check_memory(what: str, values: int, advice: str) -> None:
    """Raise InputError where so many float32 values are more than this machine's memory."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not known on this system
        return
    if 4 * values > memory:
        raise InputError(f"{what} take {4 * values / 2**30:,.1f} GiB, this machine has {memory / 2**30:,.1f}; {advice}")


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
    found: list[Tensor] = []
    first: Solution | None = None
    for solution in _solutions(pipe, noise, steps, method, labels, guidance, seed, keep > 0):
        first = first or solution
        found.append(solution.x.cpu())
        if on_images is not None:
            on_images(sum(map(len, found)))
    assert first is not None
    times, scales, states = _trajectory(first, process, method, steps, noise, keep)
    return Drawn(torch.cat(found), noise, labels, first.nfe, first.method, first.why, states, times, scales)


def _solutions(
    pipe: ImagePipeline,
    noise: Tensor,
    steps: int | Tensor,
    method: str,
    labels: Tensor | None,
    guidance: Guidance | None,
    seed: int,
    trajectory: bool,
) -> Iterator[Solution]:
    """Of one part of the images after the other; the first has the trajectory, if any, and all the warnings."""
    fresh = _Fresh(noise, seed + 1)
    for start in range(0, len(noise), BATCH):
        part = slice(start, start + BATCH)
        model = guided(pipe, None if labels is None else labels[part], guidance)
        with warnings.catch_warnings():
            if start:  # said once
                warnings.simplefilter("ignore")
            solution = solve(
                model,
                noise[part].to(pipe.network.device),
                steps,
                method,
                noise=fresh.of_the_next(),
                trajectory=trajectory and not start,
            )
        yield solution


class _Fresh:
    """The noise of methods that add any: an image's does not depend on how many go through together.

    A stage's noise for all images is one stream of values, and the stages' streams follow each other in the
    generator's; each stage keeps its place in its own. No more than a block of a stage is held.
    """

    def __init__(self, like: Tensor, seed: int) -> None:
        self._count, self._start = like.numel(), torch.Generator().manual_seed(seed)
        self._streams: list[_Stream] = []

    def of_the_next(self) -> Noise:
        """That of the images after those that had theirs, from the first stage on."""
        stages = itertools.count()

        def noise(x: Tensor, _t: float, _s: float) -> Tensor:
            stage = next(stages)
            if stage == len(self._streams):
                start = self._streams[-1].end() if self._streams else self._start
                self._streams.append(_Stream(start, self._count, x.dtype))
            return self._streams[stage].take(x.numel()).view(x.shape).to(x.device)

        return noise


class _Stream:
    """``count`` normal values of a generator in order, `BLOCK` at a time; they are those of one draw of them all."""

    def __init__(self, generator: torch.Generator, count: int, dtype: torch.dtype) -> None:
        self._generator, self._count, self._dtype = generator, count, dtype
        self._held = torch.empty(0, dtype=dtype)

    def take(self, count: int) -> Tensor:
        """The next ``count`` of them."""
        parts, have = [self._held], len(self._held)
        while have < count:
            parts.append(self._block())
            have += len(parts[-1])
        values = torch.cat(parts)
        self._held = values[count:].clone()
        return values[:count]

    def end(self) -> torch.Generator:
        """The generator as it is after the last of them."""
        rest = _Stream(self._generator.clone_state(), self._count, self._dtype)
        while rest._count:
            rest._block()
        return rest._generator

    def _block(self) -> Tensor:
        # a draw of fewer than 16 values is made in another way: the last block takes them
        size = BLOCK if self._count >= BLOCK + 16 else self._count
        self._count -= size
        return torch.randn(size, generator=self._generator, dtype=self._dtype)


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
    solution: Solution, process: Process, method: str, steps: int | Tensor, noise: Tensor, keep: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[Tensor, ...]]:
    """(times, scales, states) from the noise on, of the first ``keep`` images."""
    if not keep:
        return (), (), ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choice = steps_of(method, process, steps)
    plan = choice.solver.plan(choice.grid, process)
    times = (float(solution.grid[0]), *(stage.end for stage in plan.stages))
    scales = tuple(max(1.0, start_scale(process, time)) for time in times)
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
