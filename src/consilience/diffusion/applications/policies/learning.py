"""Offline actor-critic for any of the policies: behaviour cloning and the gradient of twin critics in one loss."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consilience.diffusion.applications.policies.actors import Policy
from consilience.diffusion.applications.policies.networks import Critics
from consilience.diffusion.consistency.shared import Log, Result, through

Array = NDArray[np.float32]


class Transitions(NamedTuple):
    """Logged decisions: [count, ...] each; ``bootstrap`` is what the value at ``after`` is worth, 0 at an end."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    after: Tensor
    bootstrap: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Transitions:
        """A batch, with replacement."""
        rows = torch.randint(len(self.obs), (count,), generator=generator, device=generator.device).to(self.obs.device)
        return Transitions(*(part[rows] for part in self))


class Episode(NamedTuple):
    """One episode of n decisions: obs [n + 1, observations], actions [n, actions], rewards [n].

    ``terminated`` says that the last observation has no future; a time limit is no such end.
    """

    obs: Array
    actions: Array
    rewards: Array
    terminated: bool


def transitions(episodes: list[Episode], discount: float, steps: int = 1) -> Transitions:
    """Episodes as ``steps``-step transitions, shorter ones at an episode's end.

    Raises ValueError unless 0 <= discount <= 1, steps >= 1 and there is a decision.
    """
    if not 0 <= discount <= 1 or steps < 1 or not any(len(e.rewards) for e in episodes):
        raise ValueError(f"need decisions, 0 <= discount <= 1 and steps >= 1, got {discount} and {steps}")
    found: list[tuple[Any, ...]] = []
    for episode in episodes:
        last = len(episode.rewards)
        for i in range(last):
            j = min(i + steps, last)
            reward = sum(discount**k * float(r) for k, r in enumerate(episode.rewards[i:j]))
            worth = 0.0 if j == last and episode.terminated else discount ** (j - i)
            found.append((episode.obs[i], episode.actions[i], reward, episode.obs[j], worth))
    return Transitions(*(torch.as_tensor(np.asarray(part, np.float32)) for part in zip(*found, strict=True)))


def critic_loss(
    critics: Critics, target_critics: Critics, target: Policy, batch: Transitions, generator: torch.Generator
) -> Tensor:
    """The squared TD errors of both critics against r + bootstrap min_i Q'_i(s', a'), a' of the target policy; 0-d.

    Where nothing in the batch has a future, as in a bandit, no action is drawn.
    """
    goal = batch.reward
    if bool(batch.bootstrap.any()):
        with torch.no_grad():
            value = target_critics(batch.after, target.sample(batch.after, generator)).min(0).values
            goal = goal + batch.bootstrap * value
    return torch.as_tensor((critics(batch.obs, batch.action) - goal).square().mean(1).sum())


def actor_loss(
    policy: Policy,
    critics: Callable[[Tensor, Tensor], Tensor],
    batch: Transitions,
    eta: float,
    generator: torch.Generator,
    *,
    target: Policy | None = None,
    done: float = 0.0,
) -> Result:
    """Behaviour cloning less eta times the value of the policy's own actions, relative to the values' size; 0-d.

    The value is that of one critic, drawn anew, over the mean absolute value of the other (Diffusion Q-Learning,
    arXiv:2208.06193, and its followers). It reaches the actor through the action; the critics get no gradient. At
    ``eta`` 0 it is behaviour cloning, and no action is drawn.
    """
    loss, log = policy.clone({"x": batch.action, "obs": batch.obs}, generator, target=target, done=done)
    if eta == 0:
        return loss, log
    action = policy.sample(batch.obs, generator)
    q = through(lambda a: critics(batch.obs, a), action)
    one = int(torch.randint(2, (), generator=generator, device=generator.device))
    value = q[one].mean() / q[1 - one].abs().mean().detach().clamp(min=1e-6)
    return loss - eta * value, log | {"value": float(q.detach().mean())}


@dataclass(frozen=True, slots=True)
class Settings:
    """Weight of the value, learning rate, batch, and how fast the target networks follow.

    Raises ValueError for a negative eta or rates outside (0, 1].
    """

    eta: float = 1.0
    rate: float = 1e-3
    batch: int = 256
    follow: float = 0.005

    def __post_init__(self) -> None:
        if self.eta < 0 or not 0 < self.rate <= 1 or not 0 < self.follow <= 1 or self.batch < 1:
            raise ValueError(f"need eta >= 0, rates in (0, 1] and a batch, got {self}")


class Learner:
    """Updates a policy and its critics from logged transitions; ``average`` is the policy to act with.

    Every update is one step of the critics, one of the actor, and one of both targets, moving averages.
    """

    def __init__(self, policy: Any, critics: Critics, settings: Settings, generator: torch.Generator) -> None:
        self.policy, self.critics, self.settings, self.generator = policy, critics, settings, generator
        self.average, self.target_critics = deepcopy(policy), deepcopy(critics)
        for network in (self.average, self.target_critics):
            network.requires_grad_(False)
        self._actor = torch.optim.Adam(policy.parameters(), settings.rate, fused=True)
        self._critic = torch.optim.Adam(critics.parameters(), settings.rate, fused=True)

    def update(self, data: Transitions, done: float) -> Log:
        """One update of everything from a batch drawn here; ``done`` is the part of training that is done, 0 to 1."""
        batch, settings = data.draw(self.settings.batch, self.generator), self.settings
        log: Log = {}
        if settings.eta > 0:
            error = critic_loss(self.critics, self.target_critics, self.average, batch, self.generator)
            log["td"] = _step(self._critic, self.critics, error)
            follow(self.target_critics, self.critics, settings.follow)
        loss, more = actor_loss(
            self.policy, self.critics, batch, settings.eta, self.generator, target=self.average, done=done
        )
        log["actor"] = _step(self._actor, self.policy, loss)
        follow(self.average, self.policy, settings.follow)
        return log | more


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, share: float) -> None:
    """Move the average's parameters by ``share`` of the way to the network's."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), share)


def _step(optimiser: torch.optim.Optimizer, network: nn.Module, loss: Tensor) -> float:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optimiser.step()
    return float(loss.detach())
