"""The density of the probability-flow ODE: the prior's log-density plus the divergence met on the way to it.

Song et al., arXiv:2011.13456, section 4.3 and appendix D.2; the random trace is FFJORD's (arXiv:1810.01367).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser


@dataclass(frozen=True, slots=True)
class Likelihood:
    """``log_density`` [batch] in nats, float64; ``latent``, x at ``t_max``; ``nfe``, how often the model was run."""

    log_density: Tensor
    latent: Tensor
    nfe: int

    def bits_per_dim(self, bin_width: float) -> Tensor:
        """Bits per dimension, [batch], of data rounded to bins of this width (2 / 255 for bytes scaled to [-1, 1])."""
        dim = self.latent[0].numel()
        return -(self.log_density / dim + math.log(bin_width)) / math.log(2)


def log_likelihood(
    model: Denoiser,
    x: Tensor,
    t: float | None = None,
    *,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    **cond: Any,
) -> Likelihood:
    """log p_t(x) of data x [batch, ...] with the little noise of time ``t``, by default the process's ``t_min``.

    Without ``probes`` the trace is exact, at one backward pass per dimension; with them it is the mean over that many
    random signs of ``generator``, the same at all times: unbiased. ``prior`` is the log-density [batch] at ``t_max``,
    by default of normal noise of deviation sigma, which takes the signal left there for nothing. The ODE is solved in
    the angle arctan(sigma / alpha) by DOP853 in float64; x's dtype is what the model sees. Raises ValueError for a
    time without noise or past ``t_max``.
    """
    process = model.process
    start = process.t_min if t is None else t
    ends = torch.tensor([start, process.t_max], dtype=torch.float64)
    alpha, sigma = process.alpha(ends), process.sigma(ends)
    if not (start < process.t_max and float(sigma[0]) > 0):
        raise ValueError(f"the density needs a time of some noise before {process.t_max}, got {start}")
    if probes is not None and probes < 1:
        raise ValueError(f"the trace needs at least one probe, got {probes}")
    angles, scale = torch.atan2(sigma, alpha).tolist(), torch.hypot(alpha, sigma).tolist()
    flow = _Flow(model.run(), x, _signs(x, probes, generator), (start, process.t_max), cond)
    end, gained = flow.integrate(angles, scale[0], rtol, atol)
    latent = (end * scale[1]).reshape(x.shape)
    dim = x[0].numel()
    log_prior = _normal(latent, float(sigma[1])) if prior is None else prior(latent.to(x)).double().cpu()
    change = gained + dim * math.log(scale[1] / scale[0])
    return Likelihood(log_prior + change, latent.to(x), flow.evaluations)


class _Flow:
    """y = x / hypot(alpha, sigma) along the angle: dy / dangle = v / hypot(alpha, sigma), and its divergence."""

    def __init__(
        self, model: Denoiser, x: Tensor, signs: Tensor | None, times: tuple[float, float], cond: dict[str, Any]
    ) -> None:
        self.model, self.x, self.signs, self.times, self.cond = model, x, signs, times, cond
        self.evaluations = 0

    def integrate(self, angles: list[float], scale: float, rtol: float, atol: float) -> tuple[Tensor, Tensor]:
        """y at the end, [batch, D], and the integral of the divergence, [batch]."""
        from scipy.integrate import solve_ivp  # type: ignore[import-untyped,unused-ignore]

        count = len(self.x)
        y = (self.x.detach().double().cpu() / scale).reshape(count, -1)
        begin = torch.cat([y, torch.zeros(count, 1, dtype=torch.float64)], 1).numpy().ravel()
        found = solve_ivp(self.slope, angles, begin, method="DOP853", rtol=rtol, atol=atol, t_eval=angles[1:])
        if not found.success:
            raise RuntimeError(f"the density's integration failed: {found.message}")
        end = torch.from_numpy(found.y[:, -1]).reshape(count, -1)
        return end[:, :-1], end[:, -1]

    def slope(self, angle: float, flat: np.ndarray) -> np.ndarray:
        """What scipy asks for: [batch * (D + 1)]."""
        process, x = self.model.process, self.x
        t = process.time(torch.tensor(math.tan(angle), dtype=torch.float64)).clamp(*self.times)
        scale = float(torch.hypot(process.alpha(t), process.sigma(t)))
        state = torch.from_numpy(flat.reshape(len(x), -1))[:, :-1]
        with torch.enable_grad():
            at = (state * scale).reshape(x.shape).to(x).requires_grad_(True)
            v = self.model.predict("v", at, float(t), **self.cond)
            divergence = _divergence(v, at, self.signs)
        self.evaluations += 1
        slope = (v.detach().double().cpu() / scale).reshape(len(x), -1)
        return torch.cat([slope, divergence.double().cpu()[:, None]], 1).numpy().ravel()


def _divergence(v: Tensor, x: Tensor, signs: Tensor | None) -> Tensor:
    """tr dv/dx per sample, [batch]: exact, or with ``signs`` [probes, batch, ...] the mean of e . (dv/dx)^T e."""
    if signs is None:
        flat = v.reshape(len(v), -1)
        total = torch.zeros(len(v), dtype=v.dtype, device=v.device)
        for i in range(flat.shape[1]):
            row = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0]
            total += row.reshape(len(v), -1)[:, i]
        return total
    parts = [torch.autograd.grad(v, x, e, retain_graph=True)[0] * e for e in signs]
    return torch.stack([part.reshape(len(v), -1).sum(1) for part in parts]).mean(0)


def _signs(x: Tensor, probes: int | None, generator: torch.Generator | None) -> Tensor | None:
    if probes is None:
        return None
    device = x.device if generator is None else generator.device
    coins = torch.randint(0, 2, (probes, *x.shape), generator=generator, device=device)
    return (2 * coins - 1).to(x)


def _normal(x: Tensor, sigma: float) -> Tensor:
    flat = x.reshape(len(x), -1)
    return -0.5 * (flat / sigma).square().sum(1) - flat.shape[1] * math.log(sigma * math.sqrt(2 * math.pi))
