"""A Gaussian mixture under a process: the exact denoiser, its density and its probability-flow map.

A model whose every quantity is known: what solvers, guidance and distillation are tested against.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser, as_time
from consilience.diffusion.processes import EDM, PFGMPP, Process, standard_normal


class GaussianMixture(Denoiser):
    """The exact denoiser of data from a mixture of Gaussians in D dimensions.

    ``weights`` [K] sum to one, ``means`` [K, D], ``covariances`` [K, D, D] symmetric, positive semidefinite: tensors,
    arrays or lists, kept in the widest floating dtype among them. States are [batch, D], or [batch, ...] with D values;
    what comes out has their dtype. Raises ValueError where these do not fit.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, process: Process | None = None) -> None:
        weights, means, covariances = _tensors(weights=weights, means=means, covariances=covariances)
        _check(weights, means, covariances)
        if isinstance(process, PFGMPP):
            raise ValueError("a mixture is exact under normal noise; PFGM++ has another kernel")
        super().__init__(self._posterior_mean, process or EDM(), "x0")
        values, vectors = torch.linalg.eigh(covariances.to(torch.promote_types(covariances.dtype, torch.float32)))
        values, vectors = values.to(covariances), vectors.to(covariances)
        parts = {"weights": weights, "means": means, "covariances": covariances}
        for name, value in (parts | {"_values": values.clamp(min=0), "_vectors": vectors}).items():
            object.__setattr__(self, name, value)

    weights: Tensor
    means: Tensor
    covariances: Tensor
    _values: Tensor
    _vectors: Tensor

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        """Of the data, [D]."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Of the data, [D, D]."""
        centred = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covariances + centred[:, :, None] * centred[:, None, :])

    def on(self, process: Process) -> GaussianMixture:
        """The same data under another process."""
        return GaussianMixture(self.weights, self.means, self.covariances, process)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Data, [count, D]."""
        if count < 1:
            raise ValueError(f"the number of data must be at least 1, got {count}")
        weights = self.weights if generator is None else self.weights.to(generator.device)
        which = torch.multinomial(weights, count, replacement=True, generator=generator).to(self.means.device)
        normal = standard_normal((count, self.dim), self.means, generator)
        scaled = normal * self._values[which].sqrt()
        return self.means[which] + torch.einsum("nij,nj->ni", self._vectors[which], scaled)

    def log_density(self, x: Tensor, t: Tensor | float) -> Tensor:
        """log p_t(x), [batch]; at sigma = 0 the density of the data."""
        return torch.logsumexp(self._parts(x, t)[0], 1).to(_floating(x, self.means))

    def responsibilities(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The probability of each component given x, [batch, K]."""
        return torch.softmax(self._parts(x, t)[0], 1).to(_floating(x, self.means))

    def ode_map(self, x: Tensor, t: float, s: float, rtol: float = 1e-10, atol: float = 1e-12) -> Tensor:
        """Where the probability-flow ODE takes x [batch, ...] from time t to s, by DOP853 in float64.

        Integrated in the angle arctan(sigma / alpha), where it is regular from pure noise to pure data.
        """
        from scipy.integrate import solve_ivp  # type: ignore[import-untyped,unused-ignore]

        self._check_states(x)
        times = torch.tensor([t, s], dtype=torch.float64)
        alpha, sigma = self.process.alpha(times), self.process.sigma(times)
        scale, angle = torch.hypot(alpha, sigma), torch.atan2(sigma, alpha)
        exact = _Trig(self)

        def slope(theta: float, flat: np.ndarray) -> np.ndarray:
            state = torch.from_numpy(flat.reshape(len(x), -1))
            return exact.slope(state, theta).numpy().ravel()

        start = (x.detach().double().cpu() / scale[0]).reshape(len(x), -1).numpy().ravel()
        span = (float(angle[0]), float(angle[1]))
        if span[0] == span[1]:
            return x.clone()
        found = solve_ivp(slope, span, start, method="DOP853", rtol=rtol, atol=atol, t_eval=[span[1]])
        if not found.success:
            raise RuntimeError(f"the reference integration failed: {found.message}")
        return (torch.from_numpy(found.y[:, -1]).reshape(x.shape) * scale[1]).to(x)

    def _posterior_mean(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        log_weights, gain = self._parts(x, t)
        share = torch.softmax(log_weights, 1)
        return torch.einsum("nk,nki->ni", share, gain).reshape(x.shape).to(_floating(x, self.means))

    def _parts(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Per component: log (weight x density at x) [batch, K], and the mean of x0 given x [batch, K, D].

        In the wider of the two dtypes; raises ValueError for states or times that do not fit.
        """
        self._check_states(x)
        x = x.to(torch.promote_types(x.dtype, self.means.dtype))
        t = as_time(t, x)
        if t.ndim and len(t) not in (1, len(x)):
            raise ValueError(f"one time, or one for each of {len(x)} states; got {tuple(t.shape)}")
        alpha, sigma = (part.to(x.dtype) for part in (self.process.alpha(t), self.process.sigma(t)))
        return _parts(self, x.reshape(len(x), self.dim), alpha, sigma)

    def _check_states(self, x: Tensor) -> None:
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.dim:
            raise ValueError(f"states have {self.dim} values each, [batch, {self.dim}]; got shape {tuple(x.shape)}")


class _Trig:
    """The mixture in float64 on the angle: y = cos x0 + sin eps, dy/dangle = cos eps - sin x0."""

    def __init__(self, mixture: GaussianMixture) -> None:
        weights, means, covariances = mixture.weights, mixture.means, mixture.covariances
        self.mixture = GaussianMixture(weights.double().cpu(), means.double().cpu(), covariances.double().cpu())

    def slope(self, y: Tensor, theta: float) -> Tensor:
        cos, sin = (
            torch.tensor(math.cos(theta), dtype=torch.float64),
            torch.tensor(math.sin(theta), dtype=torch.float64),
        )
        log_weights, gain = _parts(self.mixture, y, cos, sin)
        x0 = torch.einsum("nk,nki->ni", torch.softmax(log_weights, 1), gain)
        if theta == 0.0:
            # eps = (y - cos x0) / sin has a limit, -sigma * score -> 0 there
            return torch.zeros_like(y)
        return cos * (y - cos * x0) / sin - sin * x0


def _parts(mixture: GaussianMixture, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors, means = (part.to(x.dtype) for part in (mixture._values, mixture._vectors, mixture.means))
    alpha, sigma = (part.reshape(-1, 1, 1) for part in (alpha, sigma))  # [1 or batch, 1, 1]
    variance = alpha**2 * values + sigma**2  # [., K, D]
    away = torch.einsum("kij,nki->nkj", vectors, x[:, None, :] - alpha * means)  # along the axes
    scaled = away / variance
    log_density = -0.5 * ((away * scaled).sum(-1) + variance.log().sum(-1) + mixture.dim * math.log(2 * math.pi))
    mean = means + torch.einsum("kij,nkj->nki", vectors, alpha * values * scaled)
    return mixture.weights.to(x.dtype).log() + log_density, mean


def _tensors(**given: Any) -> tuple[Tensor, ...]:
    """The parts as tensors of one floating dtype; raises ValueError for what is no array of numbers."""
    made = {}
    for name, value in given.items():
        try:
            made[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: expected numbers in a tensor, an array or nested lists ({error})") from error
        if made[name].is_complex():
            raise ValueError(f"{name}: expected real numbers, got {made[name].dtype}")
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in made.values()))
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    return tuple(part.to(dtype) for part in made.values())


def _floating(x: Tensor, means: Tensor) -> torch.dtype:
    """The dtype of what comes out at states x: theirs, or the mixture's where they are whole numbers."""
    return x.dtype if x.is_floating_point() else means.dtype


def _check(weights: Tensor, means: Tensor, covariances: Tensor) -> None:
    if means.ndim != 2 or weights.shape != means.shape[:1] or covariances.shape != (*means.shape, means.shape[1]):
        shapes = [tuple(part.shape) for part in (weights, means, covariances)]
        raise ValueError(f"need weights [K], means [K, D] and covariances [K, D, D], got shapes {shapes}")
    if len({part.device for part in (weights, means, covariances)}) > 1:
        raise ValueError(f"weights, means and covariances must be on one device, not {weights.device}, {means.device}")
    if not all(bool(torch.isfinite(part).all()) for part in (weights, means, covariances)):
        raise ValueError("weights, means and covariances must be finite")
    off = 1e-4 if torch.finfo(weights.dtype).eps < 1e-4 else 1e-2
    if bool((weights <= 0).any()) or not abs(float(weights.double().sum()) - 1) <= off:
        raise ValueError(f"weights must be positive and sum to 1, they are {weights.tolist()}")
    if means.shape[1] == 0:
        raise ValueError("means have one dimension at least, got none")
    if not torch.allclose(covariances, covariances.transpose(1, 2), atol=1e-6):
        raise ValueError("covariances must be symmetric")
    if float(torch.linalg.eigvalsh(covariances.double()).min()) < -1e-6:
        raise ValueError("covariances must be positive semidefinite")
