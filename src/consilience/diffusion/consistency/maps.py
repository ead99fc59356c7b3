"""Flow maps: f(x, t, s) takes a state at time t along the probability-flow ODE to time s.

Consistency models are flow maps with s fixed at the end, denoisers their derivative at s = t. A map is made from a
network's prediction by one DDIM step from t to s, so that f(x, t, t) = x by construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from consilience.diffusion.denoisers import Denoiser, Prediction, as_time, convert, weights
from consilience.diffusion.mixture import GaussianMixture
from consilience.diffusion.processes import Process, expand

Jvp = Literal["exact", "finite"]

NOISE_TOP = 80.0
"""The greatest sigma / alpha that is trained on where the process ends in pure noise: EDM's."""


@dataclass(frozen=True)
class FlowMap:
    """A two-time model: ``function(x, t, s, **cond)`` is its ``prediction`` of x0, eps, v or flow from t to s.

    x is [batch, ...], t and s are 0-d or [batch], t above s. At s = t the prediction is that of a denoiser
    (`denoiser`); elsewhere it is the one whose DDIM step from t lands where the ODE does.
    """

    function: Callable[..., Tensor]
    process: Process
    prediction: Prediction = "flow"

    def __call__(self, x: Tensor, t: Tensor | float, s: Tensor | float, **cond: Any) -> Tensor:
        """The state at s of x at t: x itself where s = t, also where no noise or no signal is left."""
        t, s = as_time(t, x), as_time(s, x)
        # there a prediction may say nothing: x0 of the noise where there is none, eps of the data in pure noise
        still = (t == s) & ((self.process.sigma(t) == 0) | (self.process.alpha(t) == 0))
        t = torch.where(still, torch.full_like(t, self.process.t_min), t)
        moved = ddim_step(x, self.function(x, t, s, **cond), t, s, self.process, self.prediction)
        return torch.where(expand(still, x), x, moved)

    def x0(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The data that the map takes x at t to: one evaluation."""
        return self(x, t, self.process.time(torch.zeros_like(as_time(t, x))), **cond)

    @property
    def denoiser(self) -> Denoiser:
        """The instantaneous model, the prediction at s = t."""
        return Denoiser(lambda x, t, **cond: self.function(x, t, t, **cond), self.process, self.prediction)

    def on(self, process: Process) -> FlowMap:
        """The same map on another process: states are rescaled to the times of equal sigma / alpha.

        It predicts x0, eps or flow, which are the same on all processes. Where the other process has no signal left
        and this one always some, the map is asked at its own ``t_max``.
        """
        here = self.process
        want: Prediction = self.prediction if self.prediction in ("x0", "eps", "flow") else "flow"
        want = "eps" if self.prediction == "score" else want

        def moved(x: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
            own_t, own_s = _own_time(here, process, t), _own_time(here, process, s)
            state = x * expand(_norm(here, own_t) / _norm(process, t), x)
            value = self.function(state, own_t, own_s, **cond)
            return convert(value, state, own_t, here, self.prediction, want)

        return FlowMap(moved, process, want)


def _own_time(here: Process, process: Process, t: Tensor) -> Tensor:
    """The time of the process ``here`` at which sigma / alpha is that of the other one at t, infinite or not."""
    pure = process.alpha(t) == 0
    found = here.time(process.ratio(torch.where(pure, torch.full_like(t, process.t_min), t)))
    return torch.where(pure, torch.full_like(t, here.t_max), found)


def _norm(process: Process, t: Tensor) -> Tensor:
    return torch.hypot(process.alpha(t), process.sigma(t))


def ddim_step(x: Tensor, value: Tensor, t: Tensor, s: Tensor, process: Process, prediction: Prediction) -> Tensor:
    """The first-order step from t to s by a prediction made for x [batch, ...] at t: alpha_s x0 + sigma_s eps.

    DDIM (arXiv:2010.02502, equation 12) without noise; in the prediction's own form, so that it is exact at alpha = 0
    and at sigma = 0 alike, and is x where s = t.
    """
    t, s = expand(t, x), expand(s, x)
    keep, gain = step_factors(t, s, process, prediction)
    return keep * x + gain * value


def step_factors(t: Tensor, s: Tensor, process: Process, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(keep, gain) with `ddim_step` = keep x + gain prediction; keep is 1 and gain 0 where s = t."""
    alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    p, q = weights(prediction, process, t)
    det = alpha_t * q - sigma_t * p
    return (alpha_s * q - sigma_s * p) / det, (alpha_t * sigma_s - sigma_t * alpha_s) / det


def consistency_map(
    network: Callable[..., Tensor], process: Process, sigma_data: float = 0.5, sigma_min: float | None = None
) -> FlowMap:
    """A raw network F(x, c_noise, **cond) as a consistency model, whatever s it is asked for.

    f(x) = c_skip x + c_out F(c_in x) with Song et al.'s c_skip and c_out (arXiv:2303.01469, appendix C), which are 1
    and 0 at sigma / alpha = ``sigma_min`` (by default the process's); there the map ends, and s is not looked at.
    c_noise is log(sigma / alpha) / 4, at most that of `NOISE_TOP` on a process that ends in pure noise.
    """
    lowest, highest = process.ratio(torch.tensor([process.t_min, process.t_max], dtype=torch.float64)).tolist()
    least, most = lowest if sigma_min is None else sigma_min, NOISE_TOP if math.isinf(highest) else math.inf

    def predict(x: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
        alpha, sigma = expand(process.alpha(t), x), expand(process.sigma(t), x)
        above = sigma - least * alpha
        total = torch.sqrt(sigma**2 + (alpha * sigma_data) ** 2)
        skip = alpha * sigma_data**2 / (above**2 + (alpha * sigma_data) ** 2)  # c_skip / alpha: 0 in pure noise
        out = sigma_data * above / total
        raw = network(x / total, (process.ratio(t).clamp(max=most).log() / 4).expand(len(x)), **cond)
        return skip * x + out * raw

    return FlowMap(predict, process, "x0")


def exact_map(gaussian: GaussianMixture) -> FlowMap:
    """The exact flow map of Gaussian data (a mixture of one component), in closed form, as a map in flow form.

    Along each axis of the covariance the state keeps its distance from the mean in standard deviations. Raises
    ValueError for more than one component.
    """
    if len(gaussian.weights) != 1:
        raise ValueError("only a single Gaussian's map has a closed form; use ode_map for a mixture")
    process, mean = gaussian.process, gaussian.means[0]
    values, vectors = torch.linalg.eigh(gaussian.covariances[0])

    def moved(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        (at, st), (as_, ss) = ((process.alpha(u).reshape(-1, 1), process.sigma(u).reshape(-1, 1)) for u in (t, s))
        scale = torch.sqrt((as_**2 * values + ss**2) / (at**2 * values + st**2))
        return as_ * mean + ((x - at * mean) @ vectors * scale) @ vectors.T

    def predict(x: Tensor, t: Tensor, s: Tensor, **_: Any) -> Tensor:
        t_x, s_x = expand(t, x), expand(s, x)
        keep, gain = step_factors(t_x, s_x, process, "flow")
        near = gain.abs() < 1e-9
        far = (moved(x, t, s) - keep * x) / torch.where(near, torch.ones_like(gain), gain)
        return torch.where(near, gaussian.predict("flow", x, t), far)

    return FlowMap(predict, process, "flow")


def derivative(
    f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...], how: Jvp = "exact", step: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """(f(*at), its derivative along ``along``), the tangents of all arguments; both the shape of f's value.

    ``exact`` is forward-mode differentiation, with scaled-dot-product attention in its math kernel, the one that has a
    forward mode; ``finite`` the central difference with ``step``, for networks with an operation that has none, which
    ``exact`` refuses with RuntimeError. All passes of ``finite`` drop the same units. For a
    derivative of a derivative take `torch.func.jvp` outside.
    """
    if how == "exact":
        try:
            with forward_mode():
                return _dual(f, at, along)
        except NotImplementedError as error:
            raise RuntimeError(
                f"the network has an operation without forward-mode differentiation ({str(error).splitlines()[0]}): "
                'use jvp="finite", or torch.nn.functional.scaled_dot_product_attention, whose math kernel is taken here'
            ) from error
    with same_state():
        ahead = f(*(x + step * v for x, v in zip(at, along, strict=True)))
    with same_state():
        behind = f(*(x - step * v for x, v in zip(at, along, strict=True)))
    return f(*at), (ahead - behind) / (2 * step)


def _dual(f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    inside = torch._C._functorch.peek_interpreter_stack() is not None  # of another transform, such as vmap
    if inside or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        # plain dual numbers do not nest, lose what the backward of softmax needs, and are 0 without autograd
        found: tuple[Tensor, Tensor] = torch.func.jvp(f, at, along)  # type: ignore[assignment]
        return found
    with forward_ad.dual_level():  # less time than torch.func.jvp in small networks
        value, slope = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, at, along)))  # type: ignore[no-untyped-call]
    return value, torch.zeros_like(value) if slope is None else slope


@contextmanager
def forward_mode() -> Iterator[None]:
    """Attention here takes the kernels that have a forward mode: the math one, and no fused multi-head layer."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def same_state() -> Iterator[None]:
    """Random numbers drawn here are drawn again afterwards: the global generators are put back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=list(devices)):
        yield


def angle(process: Process, t: Tensor) -> Tensor:
    """arctan(sigma / alpha), the time in which every process is TrigFlow with unit data: pi / 2 at pure noise."""
    return torch.atan2(process.sigma(t), process.alpha(t)).clamp(max=math.pi / 2)
