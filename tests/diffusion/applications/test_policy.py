"""Policies: bounds, evaluations, where gradients go, targets, point-mass laws, n-step returns, and two modes kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor, nn

from consilience.diffusion import EDM, RectifiedFlow
from consilience.diffusion.applications.policies import (
    ActionNetwork,
    ConsistencyPolicy,
    Critics,
    Episode,
    GaussianPolicy,
    Learner,
    MeanFlowPolicy,
    Settings,
    SolvedPolicy,
    Transitions,
    actor_loss,
    critic_loss,
    perceptron,
    transitions,
)
from consilience.diffusion.applications.policies.learning import follow

torch.set_num_threads(1)

OBS, ACT, WIDTH = 3, 2, 16
FLOW, NOISE = RectifiedFlow(), EDM(sigma_min=0.02, sigma_max=20.0)
KINDS = ("cm1", "cm2", "ct", "meanflow", "flow1", "edm5", "edm50", "gauss", "mean")
CALLS = {"cm1": 1, "cm2": 2, "ct": 2, "meanflow": 1, "flow1": 1, "edm5": 5, "edm50": 50, "gauss": 1, "mean": 1}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy(kind: str, seed: int = 0, width: int = WIDTH) -> Any:
    torch.manual_seed(seed)
    one, two = ActionNetwork(OBS, ACT, width), ActionNetwork(OBS, ACT, width, two_times=True)
    made = {
        "cm1": lambda: ConsistencyPolicy(one, ACT, steps=1),
        "cm2": lambda: ConsistencyPolicy(one, ACT),
        "ct": lambda: ConsistencyPolicy(one, ACT, training="ct"),
        "meanflow": lambda: MeanFlowPolicy(two, ACT),
        "flow1": lambda: SolvedPolicy(one, ACT, FLOW, 1),
        "edm5": lambda: SolvedPolicy(one, ACT, NOISE, 5),
        "edm50": lambda: SolvedPolicy(one, ACT, NOISE, 50),
        "gauss": lambda: GaussianPolicy(perceptron(OBS, 2 * ACT, width), ACT),
        "mean": lambda: GaussianPolicy(perceptron(OBS, 2 * ACT, width), ACT, deterministic=True),
    }
    return made[kind]()


def random_data(count: int = 64, dtype: torch.dtype = torch.float32) -> Transitions:
    g = seeded(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    return Transitions(
        normal(count, OBS), normal(count, ACT).tanh(), normal(count), normal(count, OBS), 0.9 * torch.ones(count)
    )


# ------------------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("kind", KINDS)
def test_actions_stay_in_bounds(kind: str) -> None:
    law = policy(kind)
    with torch.no_grad():
        for parameter in law.parameters():
            parameter.mul_(4)
        actions = law.sample(torch.randn(500, OBS, generator=seeded()), seeded())
    assert actions.shape == (500, ACT)
    assert float(actions.abs().max()) <= 1
    assert float(actions.abs().max()) > 0.99  # the weights are large enough for the bound to matter


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_takes_the_stated_evaluations(kind: str) -> None:
    law, calls = policy(kind), []
    law.network.register_forward_hook(lambda *_: calls.append(1))
    law.sample(torch.zeros(4, OBS), seeded())
    assert len(calls) == law.evaluations == CALLS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_generator(kind: str) -> None:
    law, obs = policy(kind), torch.ones(6, OBS)
    assert torch.equal(law.sample(obs, seeded(1)), law.sample(obs, seeded(1)))
    assert torch.equal(law.sample(obs, seeded(1)), law.sample(obs, seeded(2))) == (kind == "mean")


def test_one_flow_step_and_one_mean_velocity_jump_are_noise_less_the_network() -> None:
    obs, noise = torch.ones(5, OBS), torch.randn(5, ACT, generator=seeded(3))
    ends = torch.ones(5), torch.zeros(5)
    jump, step = policy("meanflow"), policy("flow1")
    assert torch.allclose(
        jump.sample(obs, seeded(3)), (noise - jump.network(noise, *ends, obs=obs)).clamp(-1, 1), atol=1e-6
    )
    assert torch.allclose(
        step.sample(obs, seeded(3)), (noise - step.network(noise, ends[0], obs=obs)).clamp(-1, 1), atol=1e-6
    )


# ----------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_through_a_draw_agrees_with_finite_differences(kind: str) -> None:
    law = policy(kind, width=8).double()
    obs = torch.randn(8, OBS, generator=seeded(1), dtype=torch.float64)
    slope = torch.randn(8, ACT, generator=seeded(2), dtype=torch.float64)
    with torch.no_grad():  # small actions: the clamp's kink stays far
        law.network = _halved(law.network) if kind in ("gauss", "mean") else law.network

    def value() -> Tensor:
        return (law.sample(obs, seeded(4)) * slope).sum()

    parameters = list(law.parameters())
    along = [torch.randn(p.shape, generator=seeded(i), dtype=torch.float64) for i, p in enumerate(parameters)]
    found = sum(float((g * v).sum()) for g, v in zip(torch.autograd.grad(value(), parameters), along, strict=True))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, along, strict=True):
                p.add_(v, alpha=sign * 1e-6)
            ends.append(float(value()))
            for p, v in zip(parameters, along, strict=True):
                p.sub_(v, alpha=sign * 1e-6)
    assert found == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-6)


def _halved(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        parameter.mul_(0.5)
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_reaches_the_actor_and_not_the_critics(kind: str) -> None:
    data, critics = random_data(), Critics(OBS, ACT, WIDTH)

    def gradients(eta: float) -> list[Tensor]:
        law = policy(kind)
        loss, _ = actor_loss(law, critics, data, eta, seeded(9), target=policy(kind), done=0.5)
        loss.backward()
        # the Gaussian's standard deviation is not used by its mean alone
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in law.parameters()]

    with_value, without = gradients(2.0), gradients(0.0)
    assert any(not torch.allclose(a, b) for a, b in zip(with_value, without, strict=True))
    assert all(p.grad is None for p in critics.parameters())


@pytest.mark.parametrize("kind", ["cm2", "meanflow", "edm5"])
def test_the_value_term_is_that_of_plain_automatic_differentiation(kind: str) -> None:
    """-eta Q_i / mean |Q_j| with stopped denominator, by hand, on the same random numbers."""
    data, critics, eta = random_data(), Critics(OBS, ACT, WIDTH), 3.0
    law = policy(kind)
    loss, _ = actor_loss(law, critics, data, eta, seeded(9))
    found = torch.autograd.grad(loss, list(law.parameters()))
    g = seeded(9)
    clone, _ = law.clone({"x": data.action, "obs": data.obs}, g)
    q = critics.requires_grad_(False)(data.obs, law.sample(data.obs, g))
    one = int(torch.randint(2, (), generator=g))
    by_hand = clone - eta * q[one].mean() / float(q[1 - one].detach().abs().mean())
    for a, b in zip(found, torch.autograd.grad(by_hand, list(law.parameters())), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)


def test_without_value_no_action_is_drawn() -> None:
    law, calls = policy("gauss"), []
    law.network.register_forward_hook(lambda *_: calls.append(1))
    loss, _ = actor_loss(law, Critics(OBS, ACT), random_data(), 0.0, seeded(1))
    assert len(calls) == 1  # the clone's own pass
    clone, _ = law.clone({"x": random_data().action, "obs": random_data().obs})
    assert float(loss.detach()) == pytest.approx(float(clone.detach()))


# ------------------------------------------------------------------------------------------------------- critics


class Constant(nn.Module):
    """Twin values that look at nothing."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.values[:, None].expand(2, len(obs))


def test_td_error_is_against_the_lesser_target_value() -> None:
    data, now, later = random_data(), Constant(1.0, 2.0), Constant(5.0, 3.0)
    loss = critic_loss(now, later, policy("cm1"), data, seeded())  # type: ignore[arg-type]
    goal = data.reward + 0.9 * 3.0
    assert float(loss.detach()) == pytest.approx(float(((1 - goal) ** 2).mean() + ((2 - goal) ** 2).mean()), rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert now.values.grad is not None
    assert later.values.grad is None


def test_the_critics_are_two_perceptrons_side_by_side() -> None:
    critics, data = Critics(OBS, ACT, WIDTH), random_data()
    for head in range(2):
        x = torch.cat([data.obs, data.action], 1)
        for i, (weight, bias) in enumerate(zip(critics.weights, critics.biases, strict=True)):
            x = (nn.functional.mish(x) if i else x) @ weight[head] + bias[head]
        assert torch.allclose(critics(data.obs, data.action)[head], x[:, 0], atol=1e-6)
    critics(data.obs, data.action)[0].sum().backward()
    for part in critics.parameters():
        assert part.grad is not None
        assert float(part.grad[0].abs().max()) > 0
        assert float(part.grad[1].abs().max()) == 0
    assert not torch.allclose(*critics(data.obs, data.action))


def test_at_an_end_the_critics_regress_on_the_reward() -> None:
    data = random_data()._replace(bootstrap=torch.zeros(64))
    loss = critic_loss(Constant(0.0, 0.0), Constant(1e6, 1e6), policy("cm1"), data, seeded())  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(2 * float(data.reward.square().mean()), rel=1e-5)


def test_no_action_is_drawn_where_nothing_has_a_future() -> None:
    law, calls = policy("cm1"), []
    law.network.register_forward_hook(lambda *_: calls.append(1))
    critic_loss(Critics(OBS, ACT), Critics(OBS, ACT), law, random_data(), seeded())
    assert len(calls) == 1
    critic_loss(Critics(OBS, ACT), Critics(OBS, ACT), law, random_data()._replace(bootstrap=torch.zeros(64)), seeded())
    assert len(calls) == 1


def test_targets_move_by_their_share_alone() -> None:
    law, critics = policy("cm2"), Critics(OBS, ACT, WIDTH)
    learner = Learner(law, critics, Settings(batch=16, follow=0.25), seeded())
    before = [p.clone() for p in (*learner.average.parameters(), *learner.target_critics.parameters())]
    learner.update(random_data(), 0.1)
    after = [*learner.average.parameters(), *learner.target_critics.parameters()]
    trained = [*law.parameters(), *critics.parameters()]
    for old, new, source in zip(before, after, trained, strict=True):
        assert not new.requires_grad
        assert new.grad is None
        assert torch.allclose(new, old + 0.25 * (source - old), atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))


def test_following_wholly_is_a_copy() -> None:
    a, b = policy("cm1", 0), policy("cm1", 1)
    follow(a, b, 1.0)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["cm2", "ct", "meanflow", "edm5", "gauss"])
def test_training_is_a_function_of_its_seeds(kind: str) -> None:
    def trained(seed: int) -> list[Tensor]:
        torch.manual_seed(0)
        learner = Learner(policy(kind), Critics(OBS, ACT, WIDTH), Settings(batch=16), seeded(seed))
        for step in range(3):
            learner.update(random_data(), step / 3)
        return list(learner.average.parameters())

    first, same, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# ------------------------------------------------------------------------------------- the laws of a point mass

HOME = torch.tensor([0.4, -0.7], dtype=torch.float64)


class Point(nn.Module):
    """The exact network of data that is always HOME, for a preconditioned form or a flow."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, *, obs: Tensor) -> Tensor:
        if self.form == "flow":  # the straight line to HOME: the same velocity all along it
            return (x - HOME) / t.expand(len(x))[:, None]
        r = (4 * t.expand(len(x))[:, None]).exp()
        total = torch.sqrt(r**2 + 0.25)
        state = x * total
        if self.form == "edm":
            return (HOME - state * 0.25 / total**2) / (r * 0.5 / total)
        near = r - 0.002
        return (HOME - 0.25 / (near**2 + 0.25) * state) / (0.5 * near / total)


@pytest.mark.parametrize(
    ("law", "form"),
    [
        (ConsistencyPolicy(Point("cm"), ACT), "cm"),
        (ConsistencyPolicy(Point("cm"), ACT, steps=1), "cm"),
        (MeanFlowPolicy(Point("flow"), ACT), "flow"),
        (SolvedPolicy(Point("flow"), ACT, FLOW, 1), "flow"),
        (SolvedPolicy(Point("edm"), ACT, NOISE, 5), "edm"),
    ],
)
def test_the_exact_policy_of_one_action_draws_it_at_no_loss(law: Any, form: str) -> None:
    obs = torch.zeros(128, OBS, dtype=torch.float64)
    batch = {"x": HOME.expand(128, ACT), "obs": obs}
    floor = 5e-3 if form == "cm" else 1e-9  # a consistency model leaves the noise of sigma 0.002 where it is
    for done in (0.0, 0.5, 1.0):
        assert float(law.clone(batch, seeded(), done=done)[0]) == pytest.approx(0, abs=floor)
    assert torch.allclose(law.sample(obs, seeded()), HOME.expand(128, ACT), atol=1e-5)
    moved = batch | {"x": HOME.expand(128, ACT) + 0.1}
    assert float(law.clone(moved, seeded())[0]) > 10 * floor + 1e-3


def test_the_gaussian_loss_is_the_negative_log_likelihood_and_the_mean_s_the_squared_error() -> None:
    data = random_data()
    batch = {"x": data.action, "obs": data.obs}
    law = policy("gauss")
    mean, log_std = law.law(data.obs)
    wanted = -torch.distributions.Normal(mean, log_std.exp()).log_prob(data.action).mean()
    assert float(law.clone(batch)[0].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    law.deterministic = True
    assert float(law.clone(batch)[0].detach()) == pytest.approx(float((mean - data.action).square().mean()), rel=1e-5)


# -------------------------------------------------------------------------------------------------- transitions


def episode(rewards: list[float], terminated: bool) -> Episode:
    n = len(rewards)
    obs = np.arange(n + 1, dtype=np.float32)[:, None]
    return Episode(obs, np.zeros((n, ACT), np.float32), np.asarray(rewards, np.float32), terminated)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=9), st.booleans(), st.integers(1, 12), st.floats(0, 1))
def test_n_step_returns_telescope(rewards: list[float], terminated: bool, steps: int, discount: float) -> None:
    """With the true values at their ends all transitions of an episode return the true values at their starts."""
    tail = 0.0 if terminated else 2.5
    values = [tail]
    for reward in reversed(rewards):
        values.insert(0, reward + discount * values[0])
    data = transitions([episode(rewards, terminated)], discount, steps)
    at, after = data.obs[:, 0].long(), data.after[:, 0].long()
    wanted, ends = torch.tensor(values), torch.tensor([*values[:-1], 2.5])
    assert torch.allclose(data.reward + data.bootstrap * ends[after], wanted[at], atol=1e-4)
    assert bool((after - at <= steps).all())


def test_a_time_limit_is_no_end() -> None:
    assert transitions([episode([1.0, 2.0], True)], 0.5).bootstrap.tolist() == [0.5, 0.0]
    assert transitions([episode([1.0, 2.0], False)], 0.5).bootstrap.tolist() == [0.5, 0.5]


def test_what_cannot_be_is_refused() -> None:
    network = ActionNetwork(OBS, ACT)
    with pytest.raises(ValueError, match="1 or 2 steps"):
        ConsistencyPolicy(network, ACT, steps=3)
    with pytest.raises(ValueError, match="ect or ct"):
        ConsistencyPolicy(network, ACT, training="vct")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eta >= 0"):
        Settings(eta=-1)
    with pytest.raises(ValueError, match="need decisions"):
        transitions([], 0.9)
    with pytest.raises(ValueError, match="steps >= 1"):
        transitions([episode([1.0], True)], 0.9, 0)


# ----------------------------------------------------------------------------------------------------- gymnasium


NEEDS = "needs gymnasium: pip install 'consilience[control]'"


def mountain_car(length: int) -> Any:
    gymnasium = pytest.importorskip("gymnasium", reason=NEEDS)
    from consilience.diffusion.applications.policies.control import Chunks

    return Chunks(gymnasium.make("MountainCarContinuous-v0"), length)


def test_a_chunk_is_its_actions_one_by_one() -> None:
    chunked, plain = mountain_car(7), mountain_car(1)
    first, _ = chunked.reset(seed=3)
    assert np.array_equal(first, plain.reset(seed=3)[0])
    chunk = np.linspace(-1.2, 1.0, 7)
    seen, reward, *_ = chunked.step(chunk)
    steps = [plain.step(each[None]) for each in chunk]
    assert np.allclose(seen, steps[-1][0])
    assert reward == pytest.approx(sum(step[1] for step in steps))
    raw = chunked.unwrapped.state
    assert np.allclose(seen, [(raw[0] + 1.2) / 0.9 - 1, raw[1] / 0.07], atol=1e-6)


def test_an_episode_s_end_cuts_a_chunk_short() -> None:
    env = mountain_car(50)
    env.reset(seed=0)
    env.unwrapped.state = np.array([0.44, 0.05], np.float32)
    _, reward, ended, cut, _ = env.step(np.ones(50))
    assert (ended, cut) == (True, False)
    assert reward == pytest.approx(100 - 0.1)


def test_unbounded_boxes_are_refused() -> None:
    gymnasium = pytest.importorskip("gymnasium", reason=NEEDS)
    from consilience.diffusion.applications.policies.control import Chunks

    with pytest.raises(ValueError, match="boxes of actions"):
        Chunks(gymnasium.make("CartPole-v1"), 2)
    with pytest.raises(ValueError, match="length >= 1"):
        Chunks(gymnasium.make("Pendulum-v1"), 0)


def test_returns_of_many_environments_are_those_of_each() -> None:
    pytest.importorskip("gymnasium", reason=NEEDS)
    from consilience.diffusion.applications.policies import control

    law = policy("mean")
    law.network = perceptron(2, 2 * 40, WIDTH)

    def act(obs: Any) -> Any:
        return law.sample(torch.as_tensor(obs)[None])[0].detach().numpy()

    alone = [control.logged(mountain_car(40), act, seed) for seed in (1, 2, 3)]
    together = control.returns([mountain_car(40) for _ in range(3)], law, (1, 2, 3), seeded())
    assert np.allclose(together, [e.rewards.sum() for e in alone], rtol=1e-4, atol=1e-3)
    assert all(len(e.obs) == len(e.actions) + 1 for e in alone)
    with pytest.raises(ValueError, match="zip"):
        control.returns([mountain_car(40)], law, (1, 2), seeded())


# ------------------------------------------------------------------------------------------------------- training

MODE, SPREAD, INSIDE = 0.7, 0.05, 0.25


def best(context: Tensor) -> Tensor:
    """One of the two best actions of contexts [count, 1]; the other is its opposite."""
    return torch.cat([torch.full_like(context, MODE), context / 2], 1)


def seen(context: Tensor) -> Tensor:
    return torch.cat([context, torch.zeros(len(context), OBS - 1)], 1)


def bandit(count: int, generator: torch.Generator) -> Transitions:
    """A contextual bandit logged by two experts, each of whom knows one of the two best actions."""
    context = 2 * torch.rand(count, 1, generator=generator) - 1
    sign = torch.randint(2, (count, 1), generator=generator) * 2.0 - 1
    actions = (sign * best(context) + SPREAD * torch.randn(count, ACT, generator=generator)).clamp(-1, 1)
    return Transitions(seen(context), actions, torch.ones(count), seen(context), torch.zeros(count))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cm2", "meanflow", "gauss", "flow1"])
def test_both_modes_are_kept_by_the_few_step_policies_alone(kind: str) -> None:
    """Of 2000 draws at one context, how many fall within 0.25 of each of its two modes (5 standard deviations).

    A policy passes unless the rarer count is improbable, at 1e-9, under a true share of 0.2: a policy with at least
    that share on each mode is refused with that chance at most. The Gaussian and the one Euler step must fail: they
    average.
    """
    draws, steps = 2000, 800
    chosen = Settings(eta=0.0, batch=256, rate=3e-3, follow=0.01)
    learner = Learner(policy(kind, width=64), Critics(OBS, ACT), chosen, seeded(1))
    data = bandit(20000, seeded(2))
    for step in range(steps):
        learner.update(data, step / steps)
    context = torch.full((draws, 1), 0.5)
    with torch.no_grad():
        actions = learner.average.sample(seen(context), seeded(3))
    counts = [int(((actions - sign * best(context)).norm(dim=1) < INSIDE).sum()) for sign in (1, -1)]
    least = int(binom.ppf(1e-9, draws, 0.2))
    assert (min(counts) >= least) == (kind in ("cm2", "meanflow")), counts
