"""Every few-step objective with what is known of it on Gaussian data: `CASES`, for `few_steps_identities.py`.

The name starts with an underscore so that `make bench` does not take it for a benchmark.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from consilience.diffusion import EDM, GaussianMixture, Process, RectifiedFlow, TrigFlow, VPLinear
from consilience.diffusion import consistency as c
from consilience.diffusion.consistency import FlowMap, consistency_map, exact_map, squared
from consilience.diffusion.consistency.maps import angle
from consilience.diffusion.consistency.objectives.scm import draw_times, scaled, tangent
from consilience.diffusion.consistency.objectives.slct import adaptive_c, little_noise
from consilience.diffusion.consistency.objectives.trajectory import Route
from consilience.diffusion.consistency.shared import Pair, dropout_seed, pair
from consilience.diffusion.consistency.straight import logit_normal_pair
from consilience.diffusion.losses import edm_weight
from consilience.testing import few_steps as laws

DOUBLE = torch.float64
MODULES = "consilience.diffusion.consistency.objectives."
Plant = Callable[[], AbstractContextManager[Any]]
"""A mistake to plant: a context in which the library has it."""


class Network(nn.Module):
    """A small network in float64 of two coordinates and the times it is told, as a perceptron or by attention."""

    def __init__(self, told: int, attention: bool = False, width: int = 12) -> None:
        super().__init__()
        self.attention = attention
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inner = 1 if attention else 2
            self.up = nn.Linear(inner + told, width)
            self.middle: nn.Module = nn.Linear(width, width)
            if attention:
                self.middle = nn.MultiheadAttention(width, 2, batch_first=True)
            self.down = nn.Linear(width, inner)
        self.double()

    def forward(self, x: Tensor, *told: Tensor) -> Tensor:
        """[batch, 2] of x and times [batch] each."""
        known = torch.stack([t.expand(len(x)).to(x) for t in told], 1)
        if not self.attention:
            found: Tensor = self.down(torch.tanh(self.middle(torch.tanh(self.up(torch.cat([x, known], 1))))))
            return found
        hidden = torch.tanh(self.up(torch.cat([x[:, :, None], known[:, None, :].expand(-1, 2, -1)], 2)))
        mixed, _ = self.middle(hidden, hidden, hidden, need_weights=False)
        out: Tensor = self.down(torch.tanh(hidden + mixed))[:, :, 0]
        return out


@dataclass(frozen=True)
class Case:
    """One objective and what is known of it; None where there is no such thing.

    ``loss(student, taught, x0, generator, target, **more)`` is its loss; ``zero(exact)`` that at the exact map of
    ``source`` with its teacher, without a discretisation's error where it can be had, below ``bound``; ``floor(calls,
    x0)`` the mean of ``untaught`` at the exact map without a teacher, given the times that it asked, over ``sizes``
    (batch, batches); ``weight()`` the weight found and the published one; ``times()`` whether the calls of the map are
    those that the paper compares. ``stuck`` and ``swap`` plant two mistakes that are planted in its module.
    """

    name: str
    process: Process
    loss: Callable[..., tuple[Tensor, dict[str, float]]]
    zero: Callable[[FlowMap], float] | None = None
    bound: float = 1e-9
    floor: Callable[[list[laws.Call], Tensor], float] | None = None
    untaught: Callable[..., tuple[Tensor, dict[str, float]]] | None = None
    sizes: tuple[int, int] = (100, 60)
    weight: Callable[[], tuple[float, float]] | None = None
    times: Callable[[], bool] | None = None
    source: Callable[[Process], GaussianMixture] = laws.gaussian
    one_time: bool = False
    gradient: Callable[[], laws.Gradient] | None = None
    jvp: Callable[[nn.Module, str], float] | None = None
    stuck: Plant | None = None
    swap: Plant | None = None

    def map(self, net: nn.Module) -> FlowMap:
        """A network as the objective's kind of map."""
        if self.one_time:
            return consistency_map(net, self.process, 0.5)
        return two_time(net, self.process)

    def free(self, net: nn.Module) -> FlowMap:
        """The same without the boundary (planted): the network's value is where the map goes."""
        if self.one_time:
            return FlowMap(lambda x, t, s, **_: net(x, self.process.ratio(t).log() / 4), self.process, "x0")
        return Free(two_time(net, self.process).function, self.process)


class Free(FlowMap):
    """A map without a step in it."""

    def __call__(self, x: Tensor, t: Tensor | float, s: Tensor | float, **cond: Any) -> Tensor:
        """The function's value."""
        return self.function(x, torch.as_tensor(t).expand(len(x)), torch.as_tensor(s).expand(len(x)), **cond)


def two_time(net: nn.Module, process: Process) -> FlowMap:
    """A network of x and two angles as a flow map."""

    def function(x: Tensor, t: Tensor, s: Tensor, **_: Any) -> Tensor:
        norm = torch.hypot(process.alpha(t), process.sigma(t)).reshape(-1, 1)
        found: Tensor = net(x / norm, 3 * angle(process, t), 3 * angle(process, s))
        return found

    return FlowMap(function, process, "velocity" if isinstance(process, TrigFlow) else "flow")


def data(process: Process, count: int, seed: int = 0) -> Tensor:
    """Samples of the Gaussian."""
    return laws.gaussian(process).sample(count, laws.generator(seed))


def replaced(module: str, name: str, by: Callable[[Any], Any]) -> Plant:
    """Plant ``by(honest)`` for a name of an objective's module."""

    def plant() -> AbstractContextManager[Any]:
        target = __import__(MODULES + module, fromlist=[name])
        return patch.object(target, name, by(getattr(target, name)))

    return plant


# --- consistency models: the data from two neighbouring times, whose states share datum and noise


def earlier(ratio: Tensor, decay: float) -> Tensor:
    """ECT's earlier sigma / alpha, by its formula."""
    return (ratio - ratio * decay * (1 + 8 / (1 + torch.exp(ratio)))).clamp(min=0)


def stuck_pair(honest: Callable[..., Pair]) -> Callable[..., Pair]:
    """The earlier state is always the datum."""

    def by(process: Process, batch: Any, t: Tensor, s: Tensor, *rest: Any) -> Pair:
        return honest(process, batch, t, process.time(torch.zeros_like(s)), *rest)

    return by


def swapped_ends(honest: Callable[..., Any]) -> Callable[..., Any]:
    """The student learns at the earlier state from the later one."""

    def by(student: FlowMap, target: FlowMap | None, p: Pair, clock: Any) -> Any:
        return honest(student, target, p._replace(t=p.s, s=p.t, x_t=p.x_s, x_s=p.x_t), clock)

    return by


def ends_case(name: str, h: Callable[[Tensor], Tensor], taught: bool = True, **settings: Any) -> Case:
    """An objective of two ends, whose distance is h(|d|^2) and whose weight is 1 (cm) or one over the gap."""
    process, decay, objective = EDM(), settings.get("decay"), getattr(c, name)
    exact = exact_map(laws.gaussian(process))

    def loss(student: FlowMap, teacher: Any, x0: Tensor, g: Any, target: FlowMap | None = None, **more: Any) -> Any:
        return objective(student, teacher, x0, g, target=target, **{**settings, **more})

    def before(t: Tensor) -> Tensor:
        if decay is not None:
            return earlier(t, decay)
        grid = c.karras_levels(process, settings["levels"])
        return grid[torch.searchsorted(grid, t * (1 - 1e-9)) - 1]

    def floor(calls: list[laws.Call], x0: Tensor) -> float:
        t, s = calls[0].t, before(calls[0].t)
        values = laws.expected(h, laws.difference(process, t, s, torch.zeros_like(t)))
        found = float((values if name == "cm" else values / (t - s)).mean())
        if name == "slct":  # and five times the denoising, weighted as EDM's, of the lowest quarter of the levels
            levels = settings["levels"]
            highest = c.karras_levels(process, levels)[little_noise(levels)]
            v, low = laws.EIGENVALUES[:, None], t[t <= highest * (1 + 1e-9)]
            error = (2 * v * (1 - torch.sqrt(v / (v + low**2)))).mean(0) * edm_weight(0.5)(low)
            found += 5 * float(error.mean()) if len(low) else 0.0
        return found

    def compared() -> bool:
        # alone a sample of sct has no other datum to take the mean over
        x0, recorder = data(process, 1 if name == "sct" else 64), laws.Recorder(exact)
        loss(recorder.map, None, x0, laws.generator(1))
        one, other = recorder.calls[:2]
        s = before(one.t)
        asked = s > 0
        noises = [laws.noise_of(process, x0, call.x, call.t)[asked] for call in (one, other)]
        right = torch.allclose(other.t[asked], s[asked], rtol=1e-9) and torch.allclose(*noises, atol=1e-6)
        return right and one.learning and not other.learning

    def weight() -> tuple[float, float]:
        least = 1.0 if decay is None else 1.25 * (1 - 1e-12)
        narrow = EDM(sigma_min=least, sigma_max=1.25)  # one gap, or one time
        more = {"levels": 2} if decay is None else {}
        found, log = loss(exact_map(laws.gaussian(narrow)), None, data(narrow, 1), laws.generator(1), **more)
        value, distance = float(found) - log.get("diffusion", 0.0), log["distance"]
        if name == "epg":  # it logs the square
            distance /= math.sqrt(distance + 0.08**2)
        gap = 0.25 if decay is None else 1.25 - float(earlier(torch.tensor(1.25, dtype=DOUBLE), decay))
        return value / distance, 1 / gap

    def zero(model: FlowMap) -> float:
        fine = {"levels": 1280} if decay is None else {"decay": 2.0**-10}
        x0, teacher = data(process, 200), laws.gaussian(process)
        with_, without = (float(loss(model, who, x0, laws.generator(1), **fine)[0]) for who in (teacher, None))
        return with_ / without

    def gradient() -> laws.Gradient:
        # epg's denominator has no gradient: with a great c it does not move
        more, scale, x0 = ({"c": 1e6}, 1e6, data(process, 16)) if name == "epg" else ({}, 1.0, data(process, 16))
        case = CASES[name]
        return laws.gradient(
            lambda net, other: scale * loss(case.map(net), None, x0, laws.generator(3), case.map(other), **more)[0],
            Network(1),
        )

    module = "cm" if decay is None else "ect"
    return Case(
        name,
        process,
        loss,
        zero if taught else None,
        1e-2,
        floor,
        loss,
        (1, 600) if name in ("sct", "slct") else (100, 60),
        None if name == "cm" else weight,
        compared,
        one_time=True,
        gradient=gradient,
        stuck=replaced(module, "pair", stuck_pair),
        swap=replaced(name, "ends", swapped_ends),
    )


def standard(x0: Tensor) -> tuple[Tensor, Tensor]:
    """An encoder to the standard normal."""
    return torch.zeros_like(x0), torch.ones_like(x0)


# --- jumps from t and from u, one step of the teacher on, that end together at s


def stuck_route(honest: Callable[..., Any]) -> Callable[..., Any]:
    """u is always s."""

    def by(student: FlowMap, teacher: Any, batch: Any, clock: Any, route: Route, **rest: Any) -> Any:
        return honest(student, teacher, batch, clock, Route((route.path[0], route.s), route.s), **rest)

    return by


def held_samples() -> AbstractContextManager[Any]:
    """The student's own samples, which have no gradient, stay as they are while differences move its weights."""
    noise = torch.randn(16, 2, dtype=DOUBLE, generator=laws.generator(5))
    return replaced("tlcm", "own_samples", lambda _: lambda _student, batch, *_rest: (batch, noise))()


def jump_case(name: str, needs: bool = False, **settings: Any) -> Case:
    """An objective of two jumps; ``needs``: it has no loss without a teacher."""
    process, objective = VPLinear(), getattr(c, name)
    sampling = 4 if name == "tlcm" else 0  # calls by which the student draws its samples first
    grid, exact = torch.linspace(process.t_max, 0, 13, dtype=DOUBLE), exact_map(laws.gaussian(process))
    plain = {} if name == "multistepcm" else {"distance": squared}

    def told(model: FlowMap) -> FlowMap:
        return FlowMap(lambda x, t, s, **_: model.function(x, t, s), process, model.prediction)

    def loss(student: FlowMap, teacher: Any, x0: Tensor, g: Any, target: FlowMap | None = None, **more: Any) -> Any:
        arguments = {"grid": grid, **settings, **more}
        if name == "lcm" and teacher is not None:
            arguments = {"null": {}, "w": (0.0, 0.0), **arguments}
        return objective(told(student), teacher, x0, g, target=target and told(target), **arguments)

    def zero(model: FlowMap) -> float:
        def step(_teacher: Any, x: Tensor, t: Tensor, u: Tensor, **_: Any) -> Tensor:
            return exact(x, t, u)

        more = {"eta": 0.0, "substeps": 60} if name == "scott" else {"step": step}
        teacher = laws.gaussian(process)
        return float(loss(model, teacher, data(process, 60), laws.generator(1), **more, **plain)[0])

    def route(calls: list[laws.Call], x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, u and s; where there is no noise left at u the map was not asked."""
        one, other = calls[:2]
        still = (other.x == x0).all(1) if not needs else (other.t == process.t_min) & (one.s < process.t_min)
        return one.t, torch.where(still, one.s, other.t), one.s

    def floor(calls: list[laws.Call], x0: Tensor) -> float:
        t, u, s = route(calls, x0)
        variances = laws.difference(process, t, u, torch.zeros_like(s) if name == "ctm" else s)
        if name != "multistepcm":
            return float(variances.sum(0).mean())
        gain = process.alpha(s) - process.alpha(t) * process.sigma(s) / process.sigma(t)
        return float(((1 + process.ratio(t) ** -2) * laws.expected(torch.sqrt, variances / gain**2)).mean())

    def compared() -> bool:
        x0, recorder = data(process, 64), laws.Recorder(exact)
        loss(recorder.map, laws.gaussian(process) if needs else None, x0, laws.generator(1))
        one, other = recorder.calls[sampling:][:2]
        t, u, s = route(recorder.calls[sampling:], x0)
        at, to = ((row[:, None] - grid).abs().argmin(1) for row in (t, u))
        steps, longest = to - at, settings.get("longest", 1)
        jumped = bool((grid[at] == t).all()) and bool((grid[to] - u).abs().max() < 1e-12)
        ordered = bool((steps >= 1).all()) and int(steps.max()) <= longest and bool((u >= s).all())
        if needs or not (jumped and ordered):
            return jumped and ordered and one.learning and not other.learning
        asked = (u > s) & (to < 12)
        noises = [laws.noise_of(process, x0, call.x, call.t)[asked] for call in (one, other)]
        return one.learning and not other.learning and torch.allclose(*noises, atol=1e-6)

    def weight() -> tuple[float, float]:
        two = torch.tensor([0.6, 0.0], dtype=DOUBLE)
        found, log = c.multistepcm(exact, None, data(process, 8), laws.generator(1), segments=1, grid=two)
        return float(found) / log["distance"], 1 + float(process.ratio(two[0])) ** -2

    def gradient() -> laws.Gradient:
        case, teacher = CASES[name], laws.gaussian(process)
        more = {"longest": 1} if name == "ctm" else {}
        x0 = data(process, 16)
        with held_samples() if name == "tlcm" else nullcontext():
            return laws.gradient(
                lambda net, other: loss(case.map(net), teacher, x0, laws.generator(3), case.map(other), **more)[0],
                Network(2),
            )

    def untaught(student: FlowMap, _teacher: Any, x0: Tensor, g: Any) -> Any:
        return loss(student, None, x0, g, **plain)

    return Case(
        name,
        process,
        loss,
        zero,
        1e-6 if name in ("multistepcm", "scott") else 1e-9,
        None if needs else floor,
        None if needs else untaught,
        weight=weight if name == "multistepcm" else None,
        times=compared,
        gradient=gradient,
        stuck=replaced(name, "pair", stuck_at_t) if name == "tlcm" else replaced(name, "matched", stuck_route),
    )


# --- the straight path: derivatives of the map, and agreements along it


def spread(t: Tensor) -> Tensor:
    """The variances of noise - x0 given x_t along both axes, [2, batch]."""
    v = laws.EIGENVALUES[:, None]
    return v / ((1 - t) ** 2 * v + t**2)


def stretch(t: Tensor, s: Tensor) -> Tensor:
    """The squared derivative of the exact map from t to s along both axes, [2, batch]."""
    v = laws.EIGENVALUES[:, None]
    return ((1 - s) ** 2 * v + s**2) / ((1 - t) ** 2 * v + t**2)


def straight_case(
    name: str, objective: Callable[..., Any], process: Process | None = None, *, own: bool = False, **parts: Any
) -> Case:
    """An objective on the straight path; ``own``: the exact map's loss is taken without its teacher, on a point."""
    process = process or RectifiedFlow()
    at_zero, at_gradient = parts.pop("at_zero", {}), parts.pop("at_gradient", {})
    taught_gradient = parts.pop("taught_gradient", True)
    source = parts.setdefault("source", laws.gaussian)
    differentiated = parts.pop("differentiated", False)

    def loss(student: FlowMap, teacher: Any, x0: Tensor, g: Any, target: FlowMap | None = None, **more: Any) -> Any:
        return objective(student, teacher, x0, g, target=target, **more)

    def zero(model: FlowMap) -> float:
        teacher = source(process)
        more = {"fake": teacher} if name == "rcm" else {}
        x0 = teacher.sample(64, laws.generator())
        return float(loss(model, None if own else teacher, x0, laws.generator(1), **at_zero, **more)[0])

    def gradient() -> laws.Gradient:
        teacher = laws.gaussian(process) if taught_gradient else None
        x0 = data(process, 16)
        return laws.gradient(
            lambda net, other: loss(
                two_time(net, process), teacher, x0, laws.generator(3), two_time(other, process), **at_gradient
            )[0],
            Network(2),
        )

    def jvp(net: nn.Module, how: str) -> float:
        teacher = laws.gaussian(process)
        return float(loss(two_time(net, process), teacher, data(process, 16), laws.generator(3), jvp=how)[0].detach())

    parts = {"zero": zero, "gradient": gradient, "jvp": jvp if differentiated else None, **parts}
    return Case(name, process, loss, **parts)


def asked(objective: Callable[..., Any], process: Process, teacher: bool = True, **settings: Any) -> list[laws.Call]:
    """The calls of one loss of the exact map."""
    recorder = laws.Recorder(exact_map(laws.gaussian(process)))
    objective(
        recorder.map, laws.gaussian(process) if teacher else None, data(process, 400), laws.generator(1), **settings
    )
    return recorder.calls


def stuck_at_t(honest: Callable[..., Pair]) -> Callable[..., Pair]:
    """s is always t: plain flow matching."""

    def by(process: Process, batch: Any, t: Tensor, s: Tensor, *rest: Any, **more: Any) -> Pair:
        return honest(process, batch, t, t, *rest, **more)

    return by


def picked(*order: int) -> Callable[[Any], Any]:
    """Some of what the honest function returns in place of others."""
    return lambda honest: lambda *rest: _pick(honest(*rest), order)


def _pick(values: Any, order: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(values[i] for i in order)


def stuck_down(honest: Callable[..., Any]) -> Callable[..., Any]:
    """SCFlow's lower time is always the data's."""

    def by(*rest: Any) -> Any:
        tau, down, up = honest(*rest)
        return tau, torch.zeros_like(down), up

    return by


def trig_floor(calls: list[laws.Call], x0: Tensor) -> float:
    """Of `scm` without a teacher: cos times the map's derivative times the spread of the velocity, per value."""
    process, t, v = TrigFlow(), calls[0].t, laws.EIGENVALUES[:, None]
    a, b = process.alpha(t), process.sigma(t)
    velocity = (process.alpha_dot(t) - process.sigma_dot(t) * a / b) ** 2 * v * b**2 / (a**2 * v + b**2)
    found = a**2 * v / (a**2 * v + b**2) * velocity
    return float(found.sum(0).mean() / 2)


def scm_gradient() -> laws.Gradient:
    """The residual is 0 in value: against differences of |F / sigma_d - (F^- / sigma_d + g)|^2 with F^- and g held."""
    process = TrigFlow()
    teacher, x0 = laws.gaussian(process), data(process, 16)

    def loss(net: nn.Module, other: nn.Module) -> Tensor:
        g = laws.generator(3)
        t = draw_times(process, 16, g, -1.0, 1.4)
        p = pair(process, x0, t, torch.zeros_like(t), g)
        seed = dropout_seed(g)
        moving = teacher.velocity(p.x_t, t)
        still, _ = tangent(two_time(other, process), p.x_t, t, moving, 1.0, "exact", seed)
        with torch.no_grad():
            before = scaled(two_time(other, process), p.x_t, t)
        error = (scaled(two_time(net, process), p.x_t, t) - before) / process.sigma_data - still
        return error.square().flatten(1).mean(1).mean()

    mine = Network(2)
    found = laws.gradient(loss, mine)
    # and the objective's own gradient is that one
    own = torch.autograd.grad(
        c.scm(two_time(mine, process), teacher, x0, laws.generator(3), c=None)[0], list(mine.parameters())
    )
    by_hand = torch.autograd.grad(loss(mine, mine), list(mine.parameters()))
    whole = max(float(b.abs().max()) for b in by_hand)
    copied = max(float((a - b).abs().max()) for a, b in zip(own, by_hand, strict=True)) / whole
    return found._replace(copied=max(found.copied, copied))


def meanflow_weight() -> tuple[float, float]:
    """The loss over the error of one sample is 1 / (error + 0.001)."""
    process = RectifiedFlow()
    model = two_time(Network(2), process)
    found, log = c.meanflow(model, None, data(process, 1), laws.generator(1))
    return float(found.detach()) / log["error"], 1 / (log["error"] + 1e-3)


def share_times() -> bool:
    """A quarter of MeanFlow's samples has s below t, within 5 standard errors."""
    one = next(call for call in asked(c.meanflow, RectifiedFlow()) if call.learning)
    share = float((one.s < one.t).double().mean())
    return abs(share - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5 and bool((one.s <= one.t).all())


def diagonal_times() -> bool:
    """Three quarters of self-distillation's rows have s = t, the others s below t."""
    calls = asked(functools.partial(c.self_distillation, kind="progressive"), RectifiedFlow())
    rest = [call for call in calls if len(call.t) == 100 and call.learning]
    return bool((calls[0].s == calls[0].t).all()) and len(calls[0].t) == 300 and bool((rest[0].s < rest[0].t).all())


def below_times(objective: Callable[..., Any], **settings: Any) -> Callable[[], bool]:
    """All calls that learn are for an s below t."""

    def check() -> bool:
        calls = [call for call in asked(objective, RectifiedFlow(), **settings) if call.learning]
        return bool(calls) and all(bool((call.s < call.t).all()) for call in calls)

    return check


def step_times() -> bool:
    """Consistency-FM compares tau with tau - step, or the segment's end."""
    calls = asked(c.consistency_fm, RectifiedFlow(), False)
    one, other = (call for call in calls if len(call.t) == 400)
    expected = torch.maximum(one.t - 1e-3, torch.floor(one.t * 2) / 2).clamp(min=RectifiedFlow().t_min)
    return torch.allclose(other.t, expected, atol=1e-9) and one.learning and not other.learning


def window_times() -> bool:
    """SCFlow's lower time is below t by at most the window, for all but its share of no length."""
    calls = asked(c.scflow, RectifiedFlow())
    one, other = calls[:2]
    length = one.t - other.t
    return (
        bool((length >= 0).all()) and 0.03 < float(length.mean()) < 0.06 and float(length.max()) <= 0.1 and one.learning
    )


def level_times() -> bool:
    """DCM compares neighbouring ones of its 50 levels."""
    calls = asked(functools.partial(c.dcm, boundary=0.5), RectifiedFlow())
    one, other = calls[:2]
    return torch.allclose(one.t - other.t, torch.full_like(one.t, 1 / 50), atol=1e-9) and one.learning


# --- noise consistency: no path, but noises of one law


def nct_loss(adapted: Any, _teacher: Any, noise: Tensor, g: Any, target: Any = None, **more: Any) -> Any:
    """Of an adapted generator that is asked for what the identity makes, on the condition of a coordinate."""
    return c.nct(adapted, lambda z: z, lambda x: x[:, :1], noise, g, target=target, **more)


class Adapted(nn.Module):
    """Data of noise and condition."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network(1)

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        """[batch, 2]."""
        found: Tensor = self.net(noise, condition[:, 0])
        return found


def nct_floor(calls: list[laws.Call], x0: Tensor) -> float:
    """Of f(z, c) = z, whose boundary term is 0: E |z_n - z_{n-1}|^2 = 2 D (1 - cos(pi / 2 levels))."""
    return 4 * (1 - math.cos(math.pi / 20))


def nct_times() -> bool:
    """The call that learns is further from z_0 than the one that does not."""
    noise, seen = torch.randn(4000, 2, dtype=DOUBLE, generator=laws.generator()), []

    def adapted(z: Tensor, condition: Tensor) -> Tensor:
        seen.append((float((z * noise).sum(1).mean()), torch.is_grad_enabled()))
        return z

    nct_loss(adapted, None, noise, laws.generator(1))
    return seen[0][1] and not seen[1][1] and seen[0][0] < seen[1][0]


def nct_gradient() -> laws.Gradient:
    """Of the consistency term."""
    noise = torch.randn(16, 2, dtype=DOUBLE, generator=laws.generator())
    return laws.gradient(
        lambda net, other: nct_loss(net, None, noise, laws.generator(3), other, boundary=0.0, levels=3)[0], Adapted()
    )


def fresh_spread(honest: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Every noise that is mixed in is another one."""

    def by(noise: Tensor, fresh: Tensor, n: Tensor, levels: int) -> Tensor:
        draws = laws.generator(int(n.sum()))
        return honest(noise, torch.randn(fresh.shape, generator=draws, dtype=DOUBLE), n, levels)

    return by


def swapped_levels(honest: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """n - 1 for n and n for n - 1: the first two calls of three."""
    asked_for: list[int] = []

    def by(noise: Tensor, fresh: Tensor, n: Tensor, levels: int) -> Tensor:
        asked_for.append(1)
        return honest(noise, fresh, n - 1 if len(asked_for) % 2 else n + 1, levels)

    return by


SELF = {kind: functools.partial(c.self_distillation, kind=kind) for kind in ("lagrangian", "eulerian", "progressive")}


def self_zero(model: FlowMap) -> float:
    """The greatest of the three kinds' losses."""
    process = RectifiedFlow()
    teacher = laws.gaussian(process)
    x0 = data(process, 64)
    return max(float(kind(model, teacher, x0, laws.generator(1), diagonal=0.5)[0]) for kind in SELF.values())


def self_gradient() -> laws.Gradient:
    """The worst of the three kinds, off the diagonal."""
    process, x0 = RectifiedFlow(), data(RectifiedFlow(), 16)
    found = [
        laws.gradient(
            lambda net, other, kind=kind: kind(
                two_time(net, process), None, x0, laws.generator(3), target=two_time(other, process), diagonal=0.0
            )[0],
            Network(2),
        )
        for kind in SELF.values()
    ]
    return laws.Gradient(max(g.held for g in found), min(g.moving for g in found), max(g.copied for g in found))


def half_diagonal(student: FlowMap, _teacher: Any, x0: Tensor, g: Any) -> Any:
    """Self-distillation without a teacher, half of the rows at s = t."""
    return c.self_distillation(student, None, x0, g, diagonal=0.5)


def half_floor(calls: list[laws.Call], x0: Tensor) -> float:
    """Flow matching's spread at the rows with s = t, and nothing at the others."""
    return float(spread(calls[0].t).sum() / len(x0))


def mean_floor(calls: list[laws.Call], x0: Tensor) -> float:
    """MeanFlow's residual is the map's derivative times the spread of the flow."""
    one = next(call for call in calls if call.learning)
    return float((stretch(one.t, one.s) * spread(one.t)).sum(0).mean())


def _root(c2: float) -> Callable[[Tensor], Tensor]:
    return lambda u: torch.sqrt(u + c2) - math.sqrt(c2)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        ends_case("cm", lambda u: u, levels=18),
        ends_case("ict", _root(0.00054**2 * 2), levels=11),
        ends_case("ect", _root(0.0), decay=0.05),
        ends_case("sct", _root(0.0), taught=False, decay=0.05),
        ends_case("slct", lambda u: torch.log1p(u / 2 / (2 * adaptive_c(11) ** 2)), taught=False, levels=11),
        straight_case(
            "scm",
            c.scm,
            TrigFlow(),
            at_zero={"c": None},
            gradient=scm_gradient,
            differentiated=True,
            floor=trig_floor,
            untaught=functools.partial(c.scm, c=None),
            sizes=(4000, 30),
        ),
        ends_case("vct", _root(0.0), taught=False, decay=0.05, encoder=standard),
        jump_case("ctm", longest=3, denoising=0.0),
        jump_case("tcd"),
        jump_case("multistepcm"),
        jump_case("pcm"),
        jump_case("mlcm", needs=True),
        jump_case("tlcm", needs=True, segments=12),
        jump_case("tdd"),
        jump_case("scott", needs=True),
        jump_case("lcm", skip=1),
        straight_case(
            "consistency-fm",
            c.consistency_fm,
            own=True,
            source=laws.point,
            at_zero={"weight": 1.0, "step": 0.01},
            at_gradient={"anchored": 0.0, "step": 0.1},
            taught_gradient=False,
            times=step_times,
            stuck=replaced("consistency_fm", "levels", picked(0, 1, 1)),
        ),
        straight_case(
            "traflow",
            c.traflow,
            source=laws.point,
            at_gradient={"steps": 4, "weights": (0.1, 0.1, 1.0)},
            differentiated=True,
            times=below_times(c.traflow, steps=2),
            stuck=replaced("traflow", "pair", stuck_at_t),
        ),
        straight_case(
            "meanflow",
            c.meanflow,
            at_zero={"instantaneous": 0.0, "power": 0.0},
            at_gradient={"instantaneous": 0.0, "power": 0.0},
            differentiated=True,
            floor=mean_floor,
            untaught=functools.partial(c.meanflow, power=0.0, intervals=logit_normal_pair()),
            weight=meanflow_weight,
            times=share_times,
            stuck=replaced("meanflow", "pair", stuck_at_t),
        ),
        straight_case(
            "flow-map-self-distillation",
            c.self_distillation,
            zero=self_zero,
            gradient=self_gradient,
            differentiated=True,
            floor=half_floor,
            untaught=half_diagonal,
            times=diagonal_times,
            stuck=replaced("self_distillation", "pair", stuck_at_t),
        ),
        straight_case(
            "ayf",
            c.ayf,
            at_zero={"constant": None},
            differentiated=True,
            times=below_times(c.ayf),
            stuck=replaced("ayf", "pair", stuck_at_t),
        ),
        straight_case("rcm", c.rcm, differentiated=True),
        straight_case(
            "scflow",
            c.scflow,
            source=laws.point,
            at_gradient={"backward": 0.5, "reflow": 0.0},
            times=window_times,
            stuck=replaced("scflow", "levels", stuck_down),
        ),
        ends_case("epg", lambda u: u / torch.sqrt(u + 0.08**2), decay=0.5),
        Case(
            "nct",
            RectifiedFlow(),
            nct_loss,
            floor=nct_floor,
            untaught=nct_loss,
            times=nct_times,
            gradient=nct_gradient,
            swap=replaced("nct", "spread", swapped_levels),
        ),
        straight_case(
            "dcm",
            functools.partial(c.dcm, boundary=0.5),
            at_zero={"levels": 10240},
            at_gradient={"levels": 8},
            bound=1e-6,
            times=level_times,
            stuck=replaced("dcm", "part", picked(0, 2, 2)),
        ),
    )
}
