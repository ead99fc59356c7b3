"""What all objectives share: one noise for both times, the stopped gradient, dropout, distance, weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process

Log = dict[str, float]
Result = tuple[Tensor, Log]
"""A loss, 0-d, and numbers for the log."""


class Objective(Protocol):
    """``loss(student, teacher, batch, generator, ...)``: teacher is a denoiser, or None to train from data alone.

    ``batch`` is data [batch, ...], or a mapping with it under ``x`` and conditions beside. ``target`` is the map whose
    values are learned from (an average of the student's weights), None for the student itself without gradient.
    """

    def __call__(
        self,
        student: FlowMap,
        teacher: Denoiser | None,
        batch: Batch,
        generator: torch.Generator | None = None,
        *,
        target: FlowMap | None = None,
    ) -> Result:
        """The loss and its log."""


class Pair(NamedTuple):
    """A datum at two times with ONE noise: t above s, [batch] each; x_t and x_s [batch, ...]."""

    x0: Tensor
    cond: dict[str, Any]
    t: Tensor
    s: Tensor
    noise: Tensor
    x_t: Tensor
    x_s: Tensor


def split(batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """Data and conditions of a batch."""
    if isinstance(batch, Mapping):
        return batch["x"], {name: value for name, value in batch.items() if name != "x"}
    return batch, {}


def pair(
    process: Process,
    batch: Batch,
    t: Tensor,
    s: Tensor,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Pair:
    """The batch at times t and s [batch], the same noise at both, drawn here unless given."""
    x0, cond = split(batch)
    t, s = t.to(x0), s.to(x0)
    eps = process.noise(tuple(x0.shape), t, generator) if noise is None else noise
    return Pair(x0, cond, t, s, eps, process.add_noise(x0, eps, t), process.add_noise(x0, eps, s))


@torch.no_grad()
def teacher_step(teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor, heun: bool = True, **cond: Any) -> Tensor:
    """The state at s of x at t [batch, ...] by one Heun (or Euler) step of the teacher's ODE, without gradient.

    Taken in the ratio sigma / alpha, t and s [batch]; two evaluations, or one.
    """
    process = teacher.process
    ones = (len(x),) + (1,) * (x.ndim - 1)
    (a_t, r_t), (a_s, r_s) = ((process.alpha(u).reshape(ones), process.ratio(u).reshape(ones)) for u in (t, s))
    slope = teacher.eps(x, t, **cond)
    y = x / a_t + (r_s - r_t) * slope
    if heun:
        ending = r_s == 0
        later = teacher.eps(y * a_s, torch.where(ending.flatten(), t, s), **cond)
        slope = torch.where(ending, slope, (slope + later) / 2)
        y = x / a_t + (r_s - r_t) * slope
    return y * a_s


@contextmanager
def same_dropout(seed: int) -> Iterator[None]:
    """Passes of a network under the same seed here drop the same units; the global generators are left as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def dropout_seed(generator: torch.Generator | None) -> int:
    """A seed for `same_dropout` from the loss's own generator."""
    device = None if generator is None else generator.device
    return int(torch.randint(2**31, (), generator=generator, device=device))


def mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean over the batch of per-sample ``values`` [batch], each times its ``weight`` [batch]; 0-d."""
    return (values if weight is None else values * weight.to(values)).mean()


Distance = Callable[[Tensor, Tensor], Tensor]
"""Between states [batch, ...]: [batch]."""


def squared(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||^2 per sample."""
    return (a - b).square().flatten(1).sum(1)


def pseudo_huber(c: float) -> Distance:
    """sqrt(||a - b||^2 + c^2) - c per sample (iCT, arXiv:2310.14189, equation 7); ``c`` 0 is the distance itself."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return torch.sqrt(squared(a, b) + c**2) - c

    return distance


def cauchy(c: float) -> Distance:
    """log(1 + ||a - b||^2 / (2 c^2)) per sample (arXiv:2502.01441)."""
    return lambda a, b: torch.log1p(squared(a, b) / (2 * c**2))
