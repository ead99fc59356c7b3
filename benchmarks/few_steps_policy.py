"""Few-step policies against Gaussian, one-Euler-step and many-step ones: a bandit with two best actions, a car.

Every policy gets the same logged data, a network and critics of the same size and the same processor seconds. On the
bandit they are cloned; the car is gymnasium's MountainCarContinuous-v0 in chunks of 20 actions, learned offline.

    python benchmarks/few_steps_policy.py [--cache runs.json] [--plot plot.png]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from _common import COLOURS, emit, parser, picture, table
from scipy.stats import t as student
from torch import Tensor

from consilience.diffusion import EDM, RectifiedFlow
from consilience.diffusion.applications.policies import (
    ActionNetwork,
    ConsistencyPolicy,
    Critics,
    GaussianPolicy,
    Learner,
    MeanFlowPolicy,
    Settings,
    SolvedPolicy,
    Transitions,
    perceptron,
    transitions,
)
from consilience.diffusion.applications.policies.control import Chunks, logged, returns

WIDTH, CHUNK, DISCOUNT, REWARD = 64, 20, 0.95, 0.01
MODE, SPREAD, PEAK, INSIDE = 0.7, 0.05, 0.15, 0.25
NOISE = EDM(sigma_min=0.02, sigma_max=20.0)


@dataclass(frozen=True)
class Method:
    """A row of the tables: how the policy is made for (observations, actions), and its weight of the value."""

    make: Callable[[int, int], Any]
    eta: float = 0.0


def gaussian(deterministic: bool) -> Callable[[int, int], GaussianPolicy]:
    return lambda obs, act: GaussianPolicy(perceptron(obs, 2 * act, WIDTH), act, deterministic)


def solved(process: Any, steps: int) -> Callable[[int, int], SolvedPolicy]:
    return lambda obs, act: SolvedPolicy(ActionNetwork(obs, act, WIDTH), act, process, steps)


def consistency(steps: int) -> Callable[[int, int], ConsistencyPolicy]:
    return lambda obs, act: ConsistencyPolicy(ActionNetwork(obs, act, WIDTH), act, steps)


def mean_flow(obs: int, act: int) -> MeanFlowPolicy:
    return MeanFlowPolicy(ActionNetwork(obs, act, WIDTH, two_times=True), act)


METHODS = {
    "Gaussian, cloned": Method(gaussian(False)),
    "flow, one Euler step, cloned": Method(solved(RectifiedFlow(), 1)),
    "diffusion, 50 steps, cloned": Method(solved(NOISE, 50)),
    "consistency, cloned": Method(consistency(2)),
    "mean flow, cloned": Method(mean_flow),
    "Gaussian actor (TD3+BC)": Method(gaussian(True), 1.0),
    "flow, one Euler step, with Q": Method(solved(RectifiedFlow(), 1), 0.03),
    "diffusion, 5 steps, with Q": Method(solved(NOISE, 5), 0.03),
    "diffusion, 50 steps, with Q": Method(solved(NOISE, 50), 0.03),
    "`consistency-ac`": Method(consistency(2), 0.03),
    "`ofql`": Method(mean_flow, 0.03),
}
"""The weights of the value are the best of a few on the car with training seed 100, which is not among those shown."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(method: Method, data: Transitions, seed: int, seconds: float) -> tuple[Any, int]:
    """(the averaged policy, updates made) after so many processor seconds."""
    torch.manual_seed(seed)
    obs, act = data.obs.shape[1], data.action.shape[1]
    settings = Settings(method.eta, rate=3e-3, batch=256, follow=0.01)
    learner = Learner(method.make(obs, act), Critics(obs, act, WIDTH), settings, seeded(seed))
    start, updates = time.process_time(), 0
    while (done := (time.process_time() - start) / seconds) < 1:
        learner.update(data, done)
        updates += 1
    return learner.average, updates


# -------------------------------------------------------------------------------------------------------- the bandit


def modes(obs: Tensor) -> Tensor:
    """The two best actions of contexts [count, 1], (0.7, c / 2) and its opposite: [2, count, 2]."""
    best = torch.cat([torch.full_like(obs, MODE), obs / 2], 1)
    return torch.stack([best, -best])


def reward(obs: Tensor, action: Tensor) -> Tensor:
    """exp(-d^2 / (2 0.15^2)) of the distance to the nearer of the two best actions."""
    near = (modes(obs) - action).square().sum(2).min(0).values
    return torch.exp(-near / (2 * PEAK**2))


def contexts(count: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(count, 1, generator=generator) - 1


def bandit(count: int) -> Transitions:
    """Logged by two experts, one per best action (spread 0.05), and in three of ten cases by chance."""
    g = seeded(11)
    obs = contexts(count, g)
    which = torch.randint(2, (count,), generator=g)
    expert = modes(obs)[which, torch.arange(count)] + SPREAD * torch.randn(count, 2, generator=g)
    blind = 2 * torch.rand(count, 2, generator=g) - 1
    action = torch.where(torch.rand(count, 1, generator=g) < 0.3, blind, expert).clamp(-1, 1)
    return Transitions(obs, action, reward(obs, action), obs, torch.zeros(count))


@torch.no_grad()
def judged_bandit(policy: Any, seed: int) -> dict[str, float]:
    """Mean reward, and over contexts the mean share of draws near the rarer of the two modes and near neither."""
    g = seeded(seed)
    obs = contexts(40, g)
    each = obs.repeat_interleave(100, 0)
    action = policy.sample(each, g)
    near = ((modes(each) - action).norm(dim=2) < INSIDE).float().reshape(2, 40, 100).mean(2)
    return {
        "reward": float(reward(each, action).mean()),
        "rarer": float(near.min(0).values.mean()),
        "neither": float(1 - near.sum(0).mean()),
    }


# ----------------------------------------------------------------------------------------------------------- the car


def car() -> Chunks:
    return Chunks(gymnasium.make("MountainCarContinuous-v0"), CHUNK)


Rule = Callable[[float, float], float]


def swing(first: float, strength: float) -> Rule:
    """Push the way the car rolls; while it hardly moves in the valley, push the way ``first``."""

    def rule(x: float, v: float) -> float:
        energy = v * v / 2 + 0.0025 / 3 * (math.sin(3 * x) + 1)
        return strength * (first if energy < 1.5e-4 else math.copysign(1, v))

    return rule


def brake(x: float, v: float) -> float:
    """Push against the car's way."""
    return -max(-1.0, min(1.0, 50 * v))


def carried_out(obs: Any, rule: Rule) -> list[float]:
    """The chunk that a rule makes from here on, by the task's own equations of motion."""
    x, v, chunk = float(obs[0] + 1) * 0.9 - 1.2, float(obs[1]) * 0.07, []
    for _ in range(CHUNK):
        chunk.append(rule(x, v))
        v = max(-0.07, min(0.07, v + 0.0015 * chunk[-1] - 0.0025 * math.cos(3 * x)))
        x = max(-1.2, min(0.6, x + v))
        v = 0.0 if x == -1.2 else v
    return chunk


def driver(rng: np.random.Generator) -> Callable[[Any], Any]:
    """A style per episode: 30 % left first, 30 % right first, 20 % of 0.4 strength, 20 % braking; noise 0.1 on all."""
    kind, first = rng.random(), float(rng.choice([-1, 1]))
    rule = swing(first, 1.0) if kind < 0.6 else swing(first, 0.4) if kind < 0.8 else brake
    return lambda obs: np.clip(np.array(carried_out(obs, rule)) + 0.1 * rng.standard_normal(CHUNK), -1, 1)


def log_of_drives(episodes: int) -> tuple[Transitions, float]:
    """(the transitions, the drivers' mean return); rewards are scaled by 0.01 for the critics."""
    env, rng = car(), np.random.default_rng(0)
    drives = [logged(env, driver(rng), seed) for seed in range(episodes)]
    scaled = [drive._replace(rewards=REWARD * drive.rewards) for drive in drives]
    return transitions(scaled, DISCOUNT), float(np.mean([drive.rewards.sum() for drive in drives]))


def judged_car(policy: Any, envs: Sequence[Chunks], rounds: int) -> list[float]:
    """Returns of ``rounds`` evaluation seeds, an episode per environment each, the same starts for every policy."""
    found: list[float] = []
    for k in range(rounds):
        starts = range(10_000 + k * len(envs), 10_000 + (k + 1) * len(envs))
        found += returns(envs, policy, starts, seeded(k)).tolist()
    return found


# ------------------------------------------------------------------------------------------------------- the run


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % t interval) over training seeds."""
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(half)


def measure(o: Namespace, names: Sequence[str]) -> dict[str, Any]:
    """All trainings, the methods in turn within each training seed; those in the cache are not done again."""
    duel, (drives, drivers) = bandit(o.bandit_cases), log_of_drives(o.drives)
    envs = [car() for _ in range(o.episodes)]
    known = json.loads(Path(o.cache).read_text()) if o.cache and Path(o.cache).exists() else {}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(o.seeds):
        for name in names:
            key = f"{name}, seed {seed}, {o.seconds:g} s, {o.bandit_seconds:g} s"
            if key not in known:
                known[key] = one(METHODS[name], seed, duel, drives, envs, o)
                print(f"{key}: {known[key]['return']:.1f}", file=sys.stderr, flush=True)
                if o.cache:
                    Path(o.cache).write_text(json.dumps(known))
            rows[name].append(known[key])
    return {"rows": rows, "times": times(names), "drivers": drivers, "decisions": len(drives.obs)}


def one(
    method: Method, seed: int, duel: Transitions, drives: Transitions, envs: Sequence[Chunks], o: Namespace
) -> dict[str, Any]:
    """What one training seed of a method gives: on the bandit if it is cloned, and on the car."""
    row: dict[str, Any] = {}
    if method.eta == 0:
        policy, _ = trained(method, duel, seed, o.bandit_seconds)
        row |= judged_bandit(policy, 100 + seed) | {"draws": drawn(policy)}
    policy, row["updates"] = trained(method, drives, seed, o.seconds)
    scores = np.array(judged_car(policy, envs, o.rounds))
    row |= {"return": float(scores.mean()), "reached": float((scores > 0).mean())}
    if isinstance(policy, GaussianPolicy) and not policy.deterministic:
        policy.deterministic = True
        row["by mean"] = float(np.mean(judged_car(policy, envs, o.rounds)))
    return row


@torch.no_grad()
def drawn(policy: Any) -> list[list[float]]:
    """300 draws for the context 0.5."""
    return list(policy.sample(torch.tensor([[0.5]]).expand(300, 1), seeded(5)).tolist())


@torch.no_grad()
def times(names: Sequence[str]) -> dict[str, float]:
    """Seconds per action for one observation, the policies in turn: the median of 40."""
    policies = {name: METHODS[name].make(2, CHUNK) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(40):
        for name, policy in policies.items():
            start = time.process_time()
            policy.sample(torch.zeros(1, 2), seeded(0))
            spent[name].append(time.process_time() - start)
    return {name: float(np.median(values)) for name, values in spent.items()}


def markdown(result: dict[str, Any]) -> str:
    drives, duels = [], []
    first = next(iter(result["times"].values()))
    for name, row in result["rows"].items():
        mean, half = interval([each["return"] for each in row])
        seeds = ", ".join(f"{each['return']:.1f}" for each in row)
        reached = f"{np.mean([each['reached'] for each in row]):.2f}"
        cost = f"{result['times'][name] / first:.1f}"
        calls, updates = METHODS[name].make(2, CHUNK).evaluations, round(np.mean([each["updates"] for each in row]))
        score = f"{mean:.1f} ± {half:.1f}"
        drives.append([name, f"{METHODS[name].eta:g}", score, seeds, reached, calls, cost, updates])
        if "reward" in row[0]:
            got = [interval([each[key] for each in row]) for key in ("reward", "rarer", "neither")]
            duels.append([name, *(f"{mean:.3f} ± {half:.3f}" for mean, half in got)])
    head = ["policy", "eta", "return", "per training seed", "reached", "evaluations", "time per action", "updates"]
    lines = [f"The drivers' mean return: {result['drivers']:.1f}, {result['decisions']} logged decisions."]
    by_mean = [each["by mean"] for row in result["rows"].values() for each in row if "by mean" in each]
    if by_mean:
        lines += ["", f"The cloned Gaussian acting by its mean: {np.mean(by_mean):.1f}."]
    lines += ["", table(head, drives), "", table(["policy", "reward", "rarer mode", "neither"], duels)]
    return "\n".join(lines)


def plot(path: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Returns by policy, one dot per training seed; draws of cloned policies for one context of the bandit."""
    with picture(path, 8.6, 3.6) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
        axis = left.subplots()
        for i, (name, row) in enumerate(rows.items()):
            few = name in ("consistency, cloned", "mean flow, cloned", "`consistency-ac`", "`ofql`")
            axis.plot(
                [each["return"] for each in row], [-i] * len(row), "o", ms=5, c=COLOURS[1 if few else 0], alpha=0.8
            )
        axis.set_yticks([-i for i in range(len(rows))], [name.strip("`") for name in rows])
        axis.set(xlabel="return of MountainCarContinuous-v0", xlim=(-105, 102))
        axis.grid(axis="x", lw=0.4)
        best = modes(torch.tensor([[0.5]]))[:, 0].numpy()
        for panel, (name, row) in zip(
            right.subplots(2, 2, sharex=True, sharey=True).flat,
            ((name, row[0]) for name, row in rows.items() if "draws" in row[0] and "50" not in name),
            strict=False,
        ):
            panel.plot(*np.array(row["draws"]).T, ".", ms=2, c=COLOURS[0])
            panel.plot(*best.T, "x", c=COLOURS[1], ms=7)
            panel.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
            panel.set_title(name, fontsize=7)


def main() -> None:
    options = parser(
        __doc__, seconds=5.0, bandit_seconds=4.0, seeds=3, rounds=5, episodes=8, drives=400, bandit_cases=8000
    )
    options.add_argument("--only", nargs="*", choices=list(METHODS), help="these policies alone")
    options.add_argument("--cache", help="keep finished trainings here, and go on from them")
    options.add_argument("--plot", help="write the picture here")
    o = options.parse_args()
    torch.set_num_threads(1)
    result = measure(o, o.only or list(METHODS))
    if o.plot:
        plot(o.plot, result["rows"])
    emit(o, result, markdown(result))


if __name__ == "__main__":
    main()
