"""What all objectives share: one noise for both times, the stopped gradient, dropout, distance, weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import relu

from consilience.diffusion.consistency.maps import FlowMap, ddim_step, same_state
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process, expand

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


def rows(p: Pair, which: slice | Tensor) -> Pair:
    """Some rows of a batch, by a slice or by their indices, and of the conditions that have one row per sample."""
    cond = {
        name: value[which] if isinstance(value, Tensor) and value.ndim and len(value) == len(p.t) else value
        for name, value in p.cond.items()
    }
    return Pair(p.x0[which], cond, p.t[which], p.s[which], p.noise[which], p.x_t[which], p.x_s[which])


@torch.no_grad()
def teacher_step(teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor, heun: bool = True, **cond: Any) -> Tensor:
    """The state at s of x at t [batch, ...] by one Heun (or Euler) step of the teacher's ODE, without gradient.

    Taken in tau = sigma / (alpha + sigma), where the ODE is regular from pure noise to data, up or down; t and s are
    [batch]. Euler's is the DDIM step; Heun's takes two evaluations, and is Euler's where s has no noise left. On VE and
    EDM the papers' Heun step is in sigma itself: of the same order, and here of the larger error.
    """
    process = teacher.process
    flow = teacher.predict("flow", x, t, **cond)
    y = ddim_step(x, flow, t, s, process, "flow")
    if not heun:
        return y
    clean = process.sigma(s) == 0
    later = teacher.predict("flow", torch.where(expand(clean, x), x, y), torch.where(clean, t, s), **cond)
    return ddim_step(x, (flow + torch.where(expand(clean, x), flow, later)) / 2, t, s, process, "flow")


@contextmanager
def same_dropout(seed: int) -> Iterator[None]:
    """Passes of a network under the same seed here drop the same units; the global generators are left as they were."""
    with same_state():
        # torch.manual_seed formats the whole traceback where CUDA is not at work: as long as a pass of a small network
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        elif torch.backends.mps.is_available():
            torch.mps.manual_seed(seed)
        yield


def dropout_seed(generator: torch.Generator | None) -> int:
    """A seed for `same_dropout` from the loss's own generator."""
    device = None if generator is None else generator.device
    return int(torch.randint(2**31, (), generator=generator, device=device))


def random_states() -> tuple[bytes, ...]:
    """The states of the global generators: a pass that leaves them as they were has no dropout."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states += torch.cuda.get_rng_state_all()
    elif torch.backends.mps.is_available():
        states.append(torch.mps.get_rng_state())
    return tuple(state.numpy().tobytes() for state in states)


class _Through(torch.autograd.Function):
    """A function of a state whose backward reaches the state and nothing else that the function knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.at = x.detach().requires_grad_()
            ctx.value = function(ctx.at)
        return torch.as_tensor(ctx.value.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # kept: the losses that are scaled by the ratio of their gradients are differentiated more than once
        (back,) = torch.autograd.grad(ctx.value, ctx.at, grad, retain_graph=True)
        return back, None


def through(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` whose gradient flows to x [batch, ...], and not to the weights that the function uses."""
    found: Tensor = _Through.apply(x, function)  # type: ignore[no-untyped-call]
    return found


def ends(student: FlowMap, target: FlowMap | None, p: Pair, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Where the student takes x_t, and where the target (None: the student) takes x_s: the latter without gradient.

    Both passes drop the same units. [batch, ...] each.
    """
    seed = dropout_seed(generator)
    with same_dropout(seed):
        near = student.x0(p.x_t, p.t, **p.cond)
    with torch.no_grad(), same_dropout(seed):
        far = (student if target is None else target).x0(p.x_s, p.s, **p.cond)
    return near, far


def gap(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """The difference of the ratios sigma / alpha at t and s: that of the times themselves under VE and EDM."""
    return process.ratio(t) - process.ratio(s)


def compared(
    process: Process, p: Pair, near: Tensor, far: Tensor, distance: Distance, weight: Tensor | None = None
) -> Result:
    """The mean weighted distance of the two ends [batch, ...], and what `curriculum.diagnose` reads of a run.

    Logged: ``distance`` without weight, ``difference`` its root mean square per coordinate, ``log_gap`` the mean of
    log(sigma / alpha at t over that at s) bounded by 10, ``ratio`` the mean of s over t in sigma / alpha, and
    ``spread``, the variance of the student's ends over that of the data among the noisier half of the batch.
    """
    values = distance(near, far)
    loss = mean(values, weight)
    with torch.no_grad():
        ratio = process.ratio(p.s) / process.ratio(p.t)
        noisy = process.ratio(p.t) >= process.ratio(p.t).median()
        log = {
            "distance": float(values.mean()),
            "difference": float((near - far).square().mean().sqrt()),
            "log_gap": float(-ratio.clamp(min=math.exp(-10)).log().mean()),
            "ratio": float(ratio.mean()),
            "spread": float(_variance(near[noisy]) / _variance(p.x0).clamp(min=1e-12)),
        }
    return loss, log


def _variance(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().mean()


def mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean over the batch of per-sample ``values`` [batch], each times its ``weight`` [batch]; 0-d."""
    return (values if weight is None else values * weight.to(values)).mean()


def gradient_ratio(loss: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """The norm of the loss's gradient by ``weight`` over that of the other's, without gradient, at most 10^4; 0-d.

    The adaptive weight of VQGAN (arXiv:2012.09841), which CTM takes (arXiv:2310.02279).
    """
    mine, its = (torch.autograd.grad(part, weight, retain_graph=True)[0].norm() for part in (loss, other))
    return (mine / (its + 1e-4)).clamp(max=1e4).detach()


Discriminator = Callable[[Tensor, Tensor], Tensor]
"""Of states x [batch, ...] and times t [batch]: logits, one or more per sample, high for what is real."""


def hinge(made: Tensor, real: Tensor) -> Result:
    """relu(1 + made) + relu(1 - real), the means over a discriminator's logits of the two, of any shapes."""
    loss = relu(1 + made).mean() + relu(1 - real).mean()
    return loss, {"loss": float(loss.detach())}


Distance = Callable[[Tensor, Tensor], Tensor]
"""Between states [batch, ...]: [batch]."""


def squared(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||^2 per sample."""
    return (a - b).square().flatten(1).sum(1)


def pseudo_huber(c: float) -> Distance:
    """sqrt(||a - b||^2 + c^2) - c per sample (iCT, arXiv:2310.14189, equation 7); ``c`` 0 is the distance itself.

    Its gradient is 0 where a = b, also for c = 0.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        if c == 0:
            return torch.linalg.vector_norm((a - b).flatten(1), dim=1)
        return torch.sqrt(squared(a, b) + c**2) - c

    return distance


def elementwise_huber(c: float) -> Distance:
    """The mean over a sample's values of sqrt(d^2 + c^2) - c, d their difference: pseudo-Huber value by value."""
    return lambda a, b: (torch.sqrt((a - b).square() + c**2) - c).flatten(1).mean(1)


def cauchy(c: float) -> Distance:
    """log(1 + ||a - b||^2 / (2 c^2)) per sample (arXiv:2502.01441)."""
    return lambda a, b: torch.log1p(squared(a, b) / (2 * c**2))
