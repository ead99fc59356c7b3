"""Noising processes x_t = alpha(t) x0 + sigma(t) eps, each in its own time.

Everything a solver needs of a process is alpha, sigma, their derivatives, and the time that belongs to a
noise-to-signal ratio sigma / alpha: on that ratio all Gaussian processes are one (Karras et al., arXiv:2206.00364).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Process(ABC):
    """A Gaussian process x_t = alpha(t) x0 + sigma(t) eps; times are tensors of any shape, or floats.

    ``t_min`` and ``t_max`` bound the times that models are trained on; sampling starts at ``t_max``.
    """

    t_min: float
    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The signal's scale, the shape of ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The noise's standard deviation, the shape of ``t``."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """The derivative of `alpha` by time."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """The derivative of `sigma` by time."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is ``ratio``."""

    def ratio(self, t: Tensor) -> Tensor:
        """sigma(t) / alpha(t), infinite where no signal is left."""
        return self.sigma(t) / self.alpha(t)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [batch, ...] of data and noise of that shape; ``t`` is one time or one per sample."""
        t = expand(t, x0)
        return self.alpha(t) * x0 + self.sigma(t) * noise

    def noise(self, shape: tuple[int, ...], t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The noise that `add_noise` takes, of the dtype and device of ``t``: standard normal."""
        return standard_normal(shape, t, generator)

    def prior(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Where sampling starts: x at ``t_max`` without its signal, [batch, ...]."""
        t = torch.tensor(self.t_max, dtype=dtype, device=device)
        return self.sigma(t) * self.noise(shape, t, generator)


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers of the dtype and device of ``like``, drawn where the generator is and then moved there.

    So a generator of the CPU serves every device, and gives the same numbers on all of them.
    """
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def expand(t: Tensor, x: Tensor) -> Tensor:
    """One time, or one per sample, shaped to broadcast over ``x`` [batch, ...]."""
    return t if t.ndim == 0 else t.reshape(-1, *(1,) * (x.ndim - 1))


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: alpha = 1, and time is sigma itself (Song et al., arXiv:2011.13456)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """``sigma_min``."""
        return self.sigma_min

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """``sigma_max``."""
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        return ratio


@dataclass(frozen=True)
class EDM(VE):
    """Variance exploding with EDM's range of sigma (Karras et al., arXiv:2206.00364, table 1)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0


@dataclass(frozen=True)
class PFGMPP(EDM):
    """PFGM++: data augmented by ``extra_dim`` dimensions; time is sigma = r / sqrt(extra_dim) (arXiv:2302.04265).

    The sampling ODE is that of VE; only the noise differs, a heavy-tailed kernel on ``dim`` data dimensions that
    tends to the normal one as ``extra_dim`` grows (section 3.1 and theorem 4.1 there).
    """

    dim: int = 2
    extra_dim: float = 128.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim < 1 or self.extra_dim <= 0:
            raise ValueError(f"need dim >= 1 and extra_dim > 0, got {self.dim} and {self.extra_dim}")

    def noise(self, shape: tuple[int, ...], t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Radius R with R^2 / (r^2 + R^2) ~ Beta(dim/2, extra_dim/2), in a uniform direction, divided by sigma."""
        if math.prod(shape[1:]) != self.dim:
            raise ValueError(f"samples of shape {tuple(shape[1:])} have not {self.dim} dimensions")
        direction = standard_normal(shape, t, generator)
        flat = direction.reshape(shape[0], -1)
        flat = flat / flat.norm(dim=1, keepdim=True)
        device = t.device if generator is None else generator.device
        halves = torch.tensor([self.dim / 2, self.extra_dim / 2], dtype=torch.float64, device=device)
        gammas = torch._standard_gamma(halves.expand(shape[0], 2), generator=generator)
        radius = math.sqrt(self.extra_dim) * (gammas[:, 0] / gammas[:, 1]).sqrt().to(t)
        return (radius[:, None] * flat).reshape(shape)


class _VP(Process):
    """Variance preserving: sigma^2 = 1 - alpha^2, given minus the logarithm of alpha, its derivative and inverse."""

    t_min: float
    t_max: float

    @abstractmethod
    def _decay(self, t: Tensor) -> Tensor:
        """-log alpha(t)."""

    @abstractmethod
    def _decay_dot(self, t: Tensor) -> Tensor:
        """Its derivative."""

    @abstractmethod
    def _time_of_decay(self, decay: Tensor) -> Tensor:
        """Its inverse."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._decay(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-2 * self._decay(t)))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -self._decay_dot(t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self._decay_dot(t) * self.alpha(t) ** 2 / self.sigma(t)

    def ratio(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.expm1(2 * self._decay(t)))

    def time(self, ratio: Tensor) -> Tensor:
        return self._time_of_decay(torch.log1p(ratio**2) / 2)


@dataclass(frozen=True)
class VPLinear(_VP):
    """Variance preserving with beta(t) linear from ``beta_0`` to ``beta_1``, t in [0, 1] (arXiv:2011.13456, eq. 32)."""

    beta_0: float = 0.1
    beta_1: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_0 < self.beta_1:
            raise ValueError(f"need 0 < beta_0 < beta_1, got {self.beta_0} and {self.beta_1}")

    def _decay(self, t: Tensor) -> Tensor:
        return t * (self.beta_0 / 2 + t * (self.beta_1 - self.beta_0) / 4)

    def _decay_dot(self, t: Tensor) -> Tensor:
        return (self.beta_0 + t * (self.beta_1 - self.beta_0)) / 2

    def _time_of_decay(self, decay: Tensor) -> Tensor:
        half = self.beta_0 / 2
        return 2 * decay / (half + torch.sqrt(half**2 + (self.beta_1 - self.beta_0) * decay))


@dataclass(frozen=True)
class VPScaledLinear(_VP):
    """Variance preserving with sqrt(beta(t)) linear, t in [0, 1]: Stable Diffusion's schedule in continuous time."""

    beta_0: float = 0.85
    beta_1: float = 12.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_0 < self.beta_1:
            raise ValueError(f"need 0 < beta_0 < beta_1, got {self.beta_0} and {self.beta_1}")

    @property
    def _roots(self) -> tuple[float, float]:
        return math.sqrt(self.beta_0), math.sqrt(self.beta_1) - math.sqrt(self.beta_0)

    def _decay(self, t: Tensor) -> Tensor:
        root, slope = self._roots
        return t * (root**2 + t * (root * slope + t * slope**2 / 3)) / 2

    def _decay_dot(self, t: Tensor) -> Tensor:
        root, slope = self._roots
        return (root + slope * t) ** 2 / 2

    def _time_of_decay(self, decay: Tensor) -> Tensor:
        root, slope = self._roots
        cubic = root**3 + 6 * slope * decay
        third = cubic ** (1 / 3)
        return 6 * decay / (third**2 + third * root + root**2)  # (third - root) / slope without cancellation


@dataclass(frozen=True)
class VPCosine(_VP):
    """Variance preserving with the cosine schedule of Nichol and Dhariwal (arXiv:2102.09672, eq. 17), t in [0, 1)."""

    offset: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        if self.offset <= 0:
            raise ValueError(f"offset must be positive, got {self.offset}")

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.offset) / (1 + self.offset) * (math.pi / 2)

    @property
    def _start(self) -> float:
        return self.offset / (1 + self.offset) * (math.pi / 2)

    def _decay(self, t: Tensor) -> Tensor:
        # cos(a0 + d) / cos(a0) = cos d - tan(a0) sin d, so that -log of it keeps its digits near t = 0
        step = t / (1 + self.offset) * (math.pi / 2)
        return -torch.log1p(-2 * torch.sin(step / 2) ** 2 - math.tan(self._start) * torch.sin(step))

    def _decay_dot(self, t: Tensor) -> Tensor:
        return torch.tan(self._angle(t)) * (math.pi / 2) / (1 + self.offset)

    def _time_of_decay(self, decay: Tensor) -> Tensor:
        # the same equation for tan(d / 2), a quadratic solved without cancellation
        lost, slant = -torch.expm1(-decay), math.tan(self._start)
        half = lost / (slant + torch.sqrt(slant**2 + lost * (2 - lost)))
        return torch.arctan(half) * (4 / math.pi) * (1 + self.offset)


@dataclass(frozen=True, eq=False)
class VPTable(_VP):
    """Variance preserving from a table ``alphas_cumprod`` [steps]: diffusers' timesteps 0 .. steps - 1 are its times.

    Between timesteps the logarithm of sigma / alpha is linear; below timestep 0 sigma / alpha falls linearly to 0 at
    time -1, so that sampling can end without noise.
    """

    alphas_cumprod: Tensor
    t_min: float = 0.0
    t_max: float = field(init=False)
    _log_ratio: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.detach().double().cpu()
        if table.ndim != 1 or len(table) < 2 or not bool((table[1:] < table[:-1]).all() and table[0] < 1):
            raise ValueError("alphas_cumprod must be one decreasing row of at least two values below 1")
        if table[-1] <= 0:  # zero terminal SNR: the last value is kept finite, as float32 tables do in practice
            table = table.clamp(min=1e-12)
        object.__setattr__(self, "_log_ratio", 0.5 * torch.log((1 - table) / table))
        object.__setattr__(self, "t_max", float(len(table) - 1))

    def _decay(self, t: Tensor) -> Tensor:
        return torch.log1p(self.ratio(t) ** 2) / 2

    def _decay_dot(self, t: Tensor) -> Tensor:
        ratio, low = self.ratio(t), t < 0
        _, slope = self._piece(t)
        grown = torch.where(low, torch.full_like(ratio, math.exp(float(self._log_ratio[0]))), ratio * slope)
        return ratio * grown / (1 + ratio**2)

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of the ratio at ``t`` and its slope, for t >= 0."""
        table = self._log_ratio.to(t.device)
        left = t.detach().floor().clamp(0, len(table) - 2).long()
        slope = (table[left + 1] - table[left]).to(t.dtype)
        return table[left].to(t.dtype) + (t - left.to(t.dtype)) * slope, slope

    def ratio(self, t: Tensor) -> Tensor:
        value, _ = self._piece(t.clamp(min=0))
        return torch.where(t < 0, (t + 1) * math.exp(float(self._log_ratio[0])), torch.exp(value))

    def time(self, ratio: Tensor) -> Tensor:
        table = self._log_ratio.to(ratio.device)
        log = torch.log(ratio.double().clamp(min=1e-300))
        left = (torch.searchsorted(table, log.contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        inside = left + (log - table[left]) / (table[left + 1] - table[left])
        below = ratio.double() / math.exp(float(table[0])) - 1
        return torch.where(log < table[0], below, inside).to(ratio.dtype)

    def _time_of_decay(self, decay: Tensor) -> Tensor:
        return self.time(torch.sqrt(torch.expm1(2 * decay)))


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """The straight path x_t = (1 - s) x0 + s eps with s = shift * t / (1 + (shift - 1) t), t in [0, 1].

    ``shift`` is the resolution's time shift of Stable Diffusion 3 (arXiv:2403.03206, eq. 23); rectified flow is
    arXiv:2209.03003.
    """

    shift: float = 1.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}")

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -self.shift / (1 + (self.shift - 1) * t) ** 2

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.shift / (1 + (self.shift - 1) * t) ** 2

    def time(self, ratio: Tensor) -> Tensor:
        return torch.where(torch.isinf(ratio), torch.ones_like(ratio), ratio / (self.shift + ratio))


@dataclass(frozen=True)
class TrigFlow(Process):
    """x_t = cos(t) x0 + sin(t) z with z of the data's standard deviation ``sigma_data`` (sCM, arXiv:2410.11081)."""

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if self.sigma_data <= 0 or not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"need sigma_data > 0 and 0 < sigma_min < sigma_max, got {self.sigma_data}, {self.sigma_min} and "
                f"{self.sigma_max}"
            )

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """arctan(sigma_min / sigma_data)."""
        return math.atan(self.sigma_min / self.sigma_data)

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """arctan(sigma_max / sigma_data)."""
        return math.atan(self.sigma_max / self.sigma_data)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.sin(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.cos(t)

    def time(self, ratio: Tensor) -> Tensor:
        return torch.arctan(ratio / self.sigma_data)
