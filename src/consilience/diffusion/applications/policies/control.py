"""Policies in gymnasium: action chunks, logging a behaviour, and returns of many episodes at once.

Needs the package gymnasium (the extra ``control``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import nn

from consilience.diffusion.applications.policies.actors import Policy
from consilience.diffusion.applications.policies.learning import Array, Episode

Behaviour = Callable[[Array], NDArray[Any]]
"""An action in [-1, 1] for an observation."""


class Chunks(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A decision is ``length`` actions, each in [-1, 1] per dimension, carried out blindly one after the other.

    The reward is the sum over the chunk, which an episode's end cuts short; observations and actions are scaled from
    the environment's boxes to [-1, 1]. Predicting chunks is the usual interface of generative policies (Diffusion
    Policy, arXiv:2303.04137). Raises ValueError for unbounded boxes or a length below 1.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], length: int) -> None:
        super().__init__(env)
        act, obs = env.action_space, env.observation_space
        if length < 1 or not (isinstance(act, spaces.Box) and isinstance(obs, spaces.Box)):
            raise ValueError(f"need length >= 1 and boxes of actions and observations, got {length}, {act} and {obs}")
        if not (act.is_bounded() and obs.is_bounded()):
            raise ValueError("actions and observations must be bounded to be scaled to [-1, 1]")
        self.length, self._act, self._obs = length, act, obs
        self.action_space = spaces.Box(-1.0, 1.0, (length * int(np.prod(act.shape)),), np.float32)
        self.observation_space = spaces.Box(-1.0, 1.0, obs.shape, np.float32)

    def reset(self, **options: Any) -> tuple[Array, dict[str, Any]]:
        """The first observation, scaled."""
        obs, info = self.env.reset(**options)
        return self._scaled(obs), info

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Carry a chunk [length * actions] out."""
        low, high, total = self._act.low, self._act.high, 0.0
        for each in np.clip(np.asarray(action, np.float32), -1, 1).reshape(self.length, *self._act.shape):
            obs, reward, ended, cut, info = self.env.step(low + (each + 1) / 2 * (high - low))
            total += float(reward)
            if ended or cut:
                break
        return self._scaled(obs), total, ended, cut, info

    def _scaled(self, obs: Any) -> Array:
        low, high = self._obs.low, self._obs.high
        return np.asarray(2 * (obs - low) / (high - low) - 1, np.float32)


def logged(env: gymnasium.Env[Any, Any], behaviour: Behaviour, seed: int) -> Episode:
    """One episode of a behaviour."""
    obs, _ = env.reset(seed=seed)
    seen, actions, rewards, ended, cut = [obs], [], [], False, False
    while not (ended or cut):
        action = np.asarray(behaviour(obs), np.float32)
        obs, reward, ended, cut, _ = env.step(action)
        seen.append(obs)
        actions.append(action)
        rewards.append(float(reward))
    return Episode(np.asarray(seen), np.asarray(actions), np.asarray(rewards, np.float32), ended)


@torch.no_grad()
def returns(
    envs: Sequence[gymnasium.Env[Any, Any]], policy: Policy, seeds: Sequence[int], generator: torch.Generator
) -> Array:
    """The undiscounted return of one episode per environment [len(envs)], the policy called once for all of them.

    Raises ValueError unless there is a seed for each environment.
    """
    seen = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    total, running = np.zeros(len(envs), np.float32), list(range(len(envs)))
    device = next((part.device for part in cast(nn.Module, policy).parameters()), None)
    while running:
        obs = torch.as_tensor(np.stack([seen[i] for i in running]), device=device)
        actions = policy.sample(obs, generator).cpu().numpy()
        going = []
        for i, action in zip(running, actions, strict=True):
            seen[i], reward, ended, cut, _ = envs[i].step(action)
            total[i] += float(reward)
            if not (ended or cut):
                going.append(i)
        running = going
    return total
