"""Action laws given an observation: a consistency model, a mean velocity, a solved diffusion, and a Gaussian.

Actions are [batch, actions] in [-1, 1], observations [batch, observations]. Every law draws actions through which a
gradient can flow, says how many evaluations of its network a draw takes, and has its own behaviour-cloning loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from consilience.diffusion.consistency.curriculum import ect_decay, karras_levels, sqrt_levels
from consilience.diffusion.consistency.maps import FlowMap, consistency_map
from consilience.diffusion.consistency.objectives.cm import neighbours
from consilience.diffusion.consistency.objectives.ect import ect
from consilience.diffusion.consistency.objectives.meanflow import meanflow
from consilience.diffusion.consistency.samplers import multistep, one_step
from consilience.diffusion.consistency.shared import Result, compared, ends, gap, squared
from consilience.diffusion.denoisers import Denoiser, precondition
from consilience.diffusion.losses import Times, Weight, denoising_loss, edm_weight, lognormal_times, uniform_times
from consilience.diffusion.processes import EDM, Process, RectifiedFlow, standard_normal
from consilience.diffusion.solve import solve

HUBER = 0.1
"""The constant of easy consistency tuning's distance: small beside actions in [-1, 1]."""

Cloned = Mapping[str, Tensor]
"""Actions under ``x`` and their observations under ``obs``: a batch as the objectives take it."""


class Policy(Protocol):
    """What training and control ask of a policy, an ``nn.Module`` besides."""

    evaluations: int

    def sample(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One action in [-1, 1] per observation [batch, observations], differentiable in the weights."""

    def clone(
        self, batch: Cloned, generator: torch.Generator | None = None, *, target: Any = None, done: float = 0.0
    ) -> Result:
        """The behaviour-cloning loss; ``target`` is the policy's own average, ``done`` the part of training done."""


class ConsistencyPolicy(nn.Module):
    """A consistency model of actions, f(x, t; obs), sampled in ``steps`` evaluations: one, or two with new noise.

    Consistency policies of Ding and Jin 2023, arXiv:2309.16984: sigma from 0.002 to 80, sigma_data 0.5, two steps by
    way of sigma 2 (the authors' code). ``training`` is their consistency training, "ct" (2 to 150 levels, squared
    distance over the levels' gap, the averaged policy as target), or easy consistency tuning from the start, "ect",
    which learns in far fewer updates. ``network`` is F(x, t, obs=obs). Raises ValueError for other steps or trainings.
    """

    def __init__(
        self, network: nn.Module, actions: int, steps: int = 2, training: Literal["ect", "ct"] = "ect"
    ) -> None:
        if steps not in (1, 2) or training not in ("ect", "ct"):
            raise ValueError(f"a consistency policy takes 1 or 2 steps and ect or ct, got {steps} and {training!r}")
        super().__init__()
        self.network, self.actions, self.evaluations, self.training_by = network, actions, steps, training
        self.process = EDM()
        self.grid = torch.tensor([80.0, 2.0, 0.0] if steps == 2 else [80.0, 0.0], dtype=torch.float64)

    @property
    def map(self) -> FlowMap:
        """The consistency model, whose end is the action whatever it is asked for."""
        return consistency_map(self.network, self.process, 0.5)

    def sample(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Multistep consistency sampling, kept in bounds."""
        x = self.process.prior((len(obs), self.actions), generator, dtype=obs.dtype, device=obs.device)
        least = self.process.sigma_min
        return multistep(self.map, x, self.grid, sigma_min=least, generator=generator, obs=obs).x.clamp(-1, 1)

    def clone(
        self,
        batch: Cloned,
        generator: torch.Generator | None = None,
        *,
        target: ConsistencyPolicy | None = None,
        done: float = 0.0,
    ) -> Result:
        """The consistency loss of the logged actions."""
        step = round(1000 * done)
        if self.training_by == "ect":
            return ect(self.map, None, batch, generator, decay=ect_decay(step, 1000), c=HUBER)
        grid = karras_levels(self.process, sqrt_levels(step, 1000))
        device = None if generator is None else generator.device
        lower = torch.randint(len(grid) - 1, (len(batch["x"]),), generator=generator, device=device)
        p = neighbours(self.map, batch, grid, lower, generator)
        near, far = ends(self.map, None if target is None else target.map, p, generator)
        return compared(self.process, p, near, far, squared, 1 / gap(self.process, p.t, p.s))


class MeanFlowPolicy(nn.Module):
    """One-step flow: a = e - u(e, 0, 1; obs) with u the average velocity, cloned by the MeanFlow identity.

    One-Step Flow Q-Learning (arXiv:2508.13904): the plain squared error to the identity's stopped right side, times of
    logit-normal law (-0.4, 1), equal for a share ``instantaneous`` of the samples. ``network`` is F(x, t, s, obs=obs).
    """

    evaluations = 1

    def __init__(self, network: nn.Module, actions: int, instantaneous: float = 0.5) -> None:
        super().__init__()
        self.network, self.actions, self.instantaneous = network, actions, instantaneous
        self.process = RectifiedFlow()

    @property
    def map(self) -> FlowMap:
        """The flow map whose prediction is u."""
        return FlowMap(self.network, self.process, "flow")

    def sample(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One jump from noise, kept in bounds."""
        x = self.process.prior((len(obs), self.actions), generator, dtype=obs.dtype, device=obs.device)
        return one_step(self.map, x, obs=obs).x.clamp(-1, 1)

    def clone(
        self, batch: Cloned, generator: torch.Generator | None = None, *, target: Any = None, done: float = 0.0
    ) -> Result:
        """The MeanFlow objective without its adaptive weight."""
        return meanflow(self.map, None, batch, generator, instantaneous=self.instantaneous, power=0.0)


class SolvedPolicy(nn.Module):
    """A diffusion or flow policy drawn by Euler steps of its ODE: what the two above shorten.

    On EDM's process a preconditioned denoiser (Diffusion Q-Learning, arXiv:2208.06193, with this library's solver in
    place of ancestral sampling); on rectified flow a velocity, of which one step is the one-Euler-step flow policy.
    ``network`` is F(x, t, obs=obs).
    """

    def __init__(self, network: nn.Module, actions: int, process: Process, steps: int) -> None:
        super().__init__()
        self.network, self.actions, self.process, self.evaluations = network, actions, process, steps

    @property
    def model(self) -> Denoiser:
        """The network as a denoiser."""
        if isinstance(self.process, RectifiedFlow):
            return Denoiser(self.network, self.process, "flow")
        return precondition(self.network, self.process, 0.5)

    def sample(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The ODE's end from fresh noise, kept in bounds."""
        x = self.process.prior((len(obs), self.actions), generator, dtype=obs.dtype, device=obs.device)
        return solve(self.model, x, self.evaluations, "ddim", obs=obs).x.clamp(-1, 1)

    def clone(
        self, batch: Cloned, generator: torch.Generator | None = None, *, target: Any = None, done: float = 0.0
    ) -> Result:
        """Denoising, or flow matching."""
        times: Times = uniform_times
        weight: Weight | None = None
        if not isinstance(self.process, RectifiedFlow):
            times, weight = lognormal_times(), edm_weight()
        loss = denoising_loss(self.model, batch, generator, times=times, weight=weight)
        return loss, {"loss": float(loss.detach())}


class GaussianPolicy(nn.Module):
    """Independent normal actions whose mean and standard deviation depend on the observation: the usual actor.

    Cloned by likelihood; ``deterministic`` it is its mean, cloned by squared error as in TD3+BC (arXiv:2106.06860).
    """

    evaluations = 1

    def __init__(self, network: nn.Module, actions: int, deterministic: bool = False) -> None:
        """``network`` maps observations to [batch, 2 actions]."""
        super().__init__()
        self.network, self.actions, self.deterministic = network, actions, deterministic

    def law(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean in [-1, 1] and logarithm of the standard deviation, [batch, actions] each."""
        mean, log_std = self.network(obs).chunk(2, 1)
        return mean.tanh(), log_std.clamp(-5, 0)

    def sample(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw kept in bounds, or the mean."""
        mean, log_std = self.law(obs)
        if self.deterministic:
            return torch.as_tensor(mean)
        noise = standard_normal(mean.shape, mean, generator)
        return torch.as_tensor((mean + log_std.exp() * noise).clamp(-1, 1))

    def clone(
        self, batch: Cloned, generator: torch.Generator | None = None, *, target: Any = None, done: float = 0.0
    ) -> Result:
        """The negative log-likelihood per action dimension, or the squared error."""
        mean, log_std = self.law(batch["obs"])
        error = (batch["x"] - mean).square()
        if not self.deterministic:
            error = error * (-2 * log_std).exp() / 2 + log_std + math.log(2 * math.pi) / 2
        loss = error.mean()
        return loss, {"loss": float(loss.detach())}
