"""Every few-step objective on one mixture of Gaussians, 60 CPU seconds each, against the exact map of its ODE.

Same network, optimizer, batch, averaging and seconds for all; those settings were chosen on another mixture
(`--mixture other`). The best five without a teacher get three seeds. Energy distances are unbiased; 0 is two samples of
data. With `--cache` every finished run is kept, and the command goes on where it was ended.

    python benchmarks/few_steps_mixture.py [--picture plot.png] [--cache runs.json]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import json
import math
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import COLOURS, emit, parser, picture, table
from torch import Tensor, nn

from consilience.diffusion import Denoiser, GaussianMixture, Process, RectifiedFlow
from consilience.diffusion.consistency import FlowMap
from consilience.diffusion.consistency.objectives.rcm import fake_score_loss
from consilience.diffusion.consistency.setups import SETUPS, Setup
from consilience.diffusion.consistency.shared import pseudo_huber
from consilience.diffusion.metrics import energy_distance, map_error
from consilience.diffusion.training import Power
from consilience.diffusion.training.ema import Profile
from consilience.record import replacing

STEPS = 10_000
"""A run's progress is its share of the seconds, told to the schedules in these parts."""
OWN = RectifiedFlow()
SAMPLES, MAPPED = 6000, 2048
HUBER = 0.03
"""c of every pseudo-Huber distance, see `MEANS`."""
EARLIER = (0.013, 0.016)
"""Energy distance of easy consistency tuning after 60 CPU seconds in the code that this project was measured against
first: the range of its runs.
"""


@dataclass(frozen=True)
class Row:
    """A line of the table: a setup by name, with the exact teacher or without, what it is given besides, and a
    learning rate of its own where it cannot bear that of all.
    """

    name: str
    taught: bool = False
    parts: Callable[[Namespace], Parts] | None = None
    lr: float | None = None
    note: str = ""

    @property
    def label(self) -> str:
        rate = f", lr {self.lr:g}" if self.lr else ""
        return self.name + (" + exact teacher" if self.taught else "") + rate + self.note

    @property
    def setup(self) -> Setup:
        """In two phases where it is a phased one."""
        found = SETUPS[self.name]
        return replace(found, phases=2) if found.edges else found


@dataclass
class Parts:
    """Further networks: arguments of the loss, parameters trained along, and what is trained beside the student."""

    arguments: dict[str, Any] = field(default_factory=dict)
    modules: list[nn.Module] = field(default_factory=list)
    beside: Callable[[FlowMap, Tensor, torch.Generator], Tensor] | None = None


# --------------------------------------------------------------------------------------------------------- the data


def mixture_of(means: Any, shares: Any, shapes: Any, dtype: torch.dtype = torch.float32) -> GaussianMixture:
    """Components of given means, weights, and (long axis, short axis, angle)."""
    covariances = []
    for long, short, angle in shapes:
        turn = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
        )
        covariances.append(turn @ torch.diag(torch.tensor([long**2, short**2], dtype=torch.float64)) @ turn.T)
    weights, centres = torch.tensor(shares), torch.tensor(means)
    return GaussianMixture(weights.to(dtype), centres.to(dtype), torch.stack(covariances).to(dtype), OWN)


def judged(dtype: torch.dtype = torch.float32) -> GaussianMixture:
    """The five components that the page is about."""
    return mixture_of(
        [[1.0, 0.2], [-0.9, 0.8], [-0.4, -1.1], [0.7, -0.9], [0.3, 1.3]],
        [0.30, 0.25, 0.20, 0.15, 0.10],
        [(0.20, 0.08, 0.3), (0.15, 0.15, 0.0), (0.25, 0.06, 1.1), (0.10, 0.10, 0.0), (0.12, 0.05, 2.0)],
        dtype,
    )


def other(dtype: torch.dtype = torch.float32) -> GaussianMixture:
    """Six other components, which the settings were chosen on."""
    return mixture_of(
        [[0.0, 0.0], [1.3, 0.6], [-1.2, -0.2], [0.4, -1.2], [-0.5, 1.2], [1.1, -0.6]],
        [0.22, 0.20, 0.18, 0.16, 0.14, 0.10],
        [(0.3, 0.07, 0.8), (0.1, 0.1, 0.0), (0.12, 0.2, 0.4), (0.22, 0.05, 2.6), (0.08, 0.16, 1.2), (0.06, 0.06, 0.0)],
        dtype,
    )


MIXTURES = {"judged": judged, "other": other}


def spread(mixture: GaussianMixture) -> float:
    """The standard deviation per axis."""
    return float((mixture.covariance.trace() / mixture.dim).sqrt())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------ the network


class Net(nn.Module):
    """An MLP of a state and one angle, or two, which enter as sines and cosines."""

    def __init__(self, width: int, times: int, out: int = 2) -> None:
        super().__init__()
        self.times = times
        self.register_buffer("frequencies", 2.0 ** torch.arange(5))
        sizes = [2 + 10 * times, width, width, width]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(width, out))

    def forward(self, y: Tensor, *angles: Tensor) -> Tensor:
        waves = [angle[:, None] * self.frequencies for angle in angles[: self.times]]
        return self.body(torch.cat([y, *(f(wave) for wave in waves for f in (torch.sin, torch.cos))], 1))


def flow_map(net: nn.Module, process: Process, scale: float) -> FlowMap:
    """The network as a map: F = cos eps - sin x0 / scale on the angle of data of unit size (sCM's form) as a flow."""

    def function(x: Tensor, t: Tensor, s: Tensor, **_: Any) -> Tensor:
        t, s = t.expand(len(x)), s.expand(len(x))
        alpha, sigma = scale * process.alpha(t), process.sigma(t)
        y = x / torch.hypot(alpha, sigma)[:, None]
        angle, end = torch.atan2(sigma, alpha), torch.atan2(process.sigma(s), scale * process.alpha(s))
        cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
        return (sin - scale * cos) * y + (cos + scale * sin) * net(y, angle, end)

    return FlowMap(function, process, "flow")


def encoded(options: Namespace) -> Parts:
    """The encoder of variational consistency training, learned with the student."""
    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)

    def encoder(x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log = net(x).chunk(2, 1)
        return loc, torch.exp(log)

    return Parts({"encoder": encoder, "c": HUBER}, [net])


def scored(options: Namespace) -> Parts:
    """The fake score of rCM, trained on the student's samples in every step."""
    net = Net(options.width, 1)
    fake = flow_map(net, OWN, 1.0).denoiser

    def beside(student: FlowMap, batch: Tensor, draws: torch.Generator) -> Tensor:
        return fake_score_loss(fake, student, batch, draws)[0]

    return Parts({"fake": fake}, [net], beside)


def rows() -> list[Row]:
    """Every setup that trains a map on data without conditions; with the exact teacher where it needs one, and
    of the others once for each way of distilling.
    """
    alone = ["ect", "sct", "scm", "cm", "ict", "slct", "epg", "lcm", "ctm", "tcd", "tdd", "pcm", "multistepcm"]
    alone += ["consistency-fm", "meanflow", "lsd", "esd", "psd"]
    taught = ["ect", "scm", "ayf", "scott", "mlcm", "tlcm", "traflow", "scflow"]
    return [
        *(Row(name, parts=MEANS.get(name)) for name in alone),
        *(Row(name, note=", published c") for name in ("ect", "ict")),
        Row("esd", lr=1e-3),
        Row("vct", parts=encoded),
        *(Row(name, True, SAME.get(name)) for name in taught),
        Row("ayf", True, lr=1e-3),
        Row("rcm", True, scored),
    ]


def given(**arguments: Any) -> Callable[[Namespace], Parts]:
    """Arguments of the loss."""
    return lambda options: Parts(arguments)


SAME = dict.fromkeys(("ict", "ect", "sct"), given(c=HUBER))
SAME |= dict.fromkeys(("lcm", "tdd", "pcm", "multistepcm", "scott"), given(distance=pseudo_huber(HUBER)))
MEANS = SAME | {"meanflow": given(power=0.0), "scm": given(c=None)}
"""What differs from the papers, for one reason: a target that is noisy is met in the mean. Lengths of differences, or
differences divided by their own length, have another minimiser; of many coordinates the length hardly varies and it is
the same, of two it is not. With the exact teacher the targets of scm are not noisy, and its tangent is divided."""


# ----------------------------------------------------------------------------------------------------------- a run


class Average:
    """A copy of a network whose weights follow it."""

    def __init__(self, net: nn.Module, profile: Profile) -> None:
        self.profile, self.net = profile, copy.deepcopy(net).requires_grad_(False)
        self.mine, self.its = list(self.net.parameters()), list(net.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.mine, self.its, 1 - self.profile.beta(step))


def trained(row: Row, options: Namespace, seed: int) -> tuple[nn.Module, int, float]:
    """The averaged network after ``options.seconds`` CPU seconds, the steps done, and the last loss."""
    torch.manual_seed(seed)
    mixture, setup, draws = MIXTURES[options.mixture](), row.setup, generator(100 + seed)
    scale = spread(mixture)
    process = setup.process(OWN, scale)
    data = mixture.sample(2**19, generator(200 + seed))
    net = Net(options.width, 2 if setup.two_times else 1)
    parts = Parts() if row.parts is None else row.parts(options)
    kept, profile = Average(net, Power(options.ema)), setup.average(STEPS)
    held = None if profile is None else Average(net, profile)
    student = flow_map(net, process, scale)
    target = None if held is None else flow_map(held.net, process, scale)
    teacher: Denoiser | None = mixture.on(process) if row.taught else None
    weights = [*net.parameters(), *(p for part in parts.modules for p in part.parameters())]
    rate = row.lr or options.lr
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.99), fused=True)
    done, loss, start = 0, torch.zeros(()), time.process_time()
    while (share := (time.process_time() - start) / options.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, share / 0.01 + 1e-3) * (1 + math.cos(math.pi * share)) / 2
        batch = data[torch.randint(len(data), (options.batch,), generator=draws)]
        loss, _ = setup.loss(
            student, teacher, batch, draws, step=int(share * STEPS), steps=STEPS, target=target, **parts.arguments
        )
        if parts.beside is not None:
            loss = loss + parts.beside(student, batch, draws)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        done += 1
        kept.update(done)
        if held is not None:
            held.update(int(share * STEPS) + 1)
    return kept.net, done, float(loss.detach())


@cache
def reference(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Noise [MAPPED, 2], where the exact ODE takes it, and held-out data [SAMPLES, 2], in float64."""
    mixture = MIXTURES[name](torch.float64)
    noise = torch.randn(MAPPED, 2, generator=generator(1), dtype=torch.float64)
    return noise, mixture.ode_map(noise, 1.0, 0.0, 1e-8, 1e-10), mixture.sample(SAMPLES, generator(2))


@torch.no_grad()
def judge(row: Row, net: nn.Module, options: Namespace) -> dict[str, Any]:
    """Map error and energy distance in one step and in two; None for what the objective does not define."""
    mixture = MIXTURES[options.mixture](torch.float64)
    scale, setup = spread(mixture), row.setup
    model = flow_map(net, OWN, scale)
    noise, exact, data = reference(options.mixture)
    fresh = torch.randn(SAMPLES, 2, generator=generator(3))
    found: dict[str, Any] = {}
    for steps in (1, 2):
        if setup.edges is not None and steps != setup.phases:
            found[str(steps)] = None
            continue
        made = setup.sample(model, fresh, steps, generator(4), scale).x
        error = map_error(
            setup.sample(model, noise.float(), steps, generator(5), scale).x,
            exact,
            lambda x: mixture.responsibilities(x.double(), 0.0).argmax(1),
        )
        mapped = steps == 1 or setup.sampler in ("chain", "phased")
        found[str(steps)] = {
            "energy": energy_distance(made, data),
            "median": error.median if mapped else None,
            "switched": error.switched if mapped else None,
            "samples": made[:1500].tolist() if steps == 1 else None,
        }
    if setup.edges is not None:
        found["2"]["samples"] = setup.sample(model, fresh[:1500], 2, generator(4), scale).x.tolist()
    return found


def run(row: Row, options: Namespace, seed: int, store: Store) -> dict[str, Any]:
    """One training and its measures, from the store where it is there."""
    names = ("mixture", "seconds", "width", "batch", "lr", "ema")
    key = json.dumps([row.label, seed, *(getattr(options, name) for name in names)])
    if key not in store.runs:
        start = time.time()
        net, done, loss = trained(row, options, seed)
        store.add(key, {"row": row.label, "seed": seed, "steps": done, "loss": loss, **judge(row, net, options)})
        took = time.time() - start
        shown = [(part["energy"], part["median"]) if (part := store.runs[key][n]) else None for n in ("1", "2")]
        print(f"{row.label} seed {seed}: {done} steps, {shown}, {took:.0f} s", file=sys.stderr, flush=True)
    return store.runs[key]


class Store:
    """Finished runs, in a file if one is named."""

    def __init__(self, path: str) -> None:
        self.path = Path(path) if path else None
        known = self.path is not None and self.path.exists()
        self.runs: dict[str, Any] = json.loads(self.path.read_text()) if known and self.path else {}

    def add(self, key: str, value: dict[str, Any]) -> None:
        self.runs[key] = value
        if self.path is not None:
            with replacing(self.path) as file:
                file.write(json.dumps(self.runs).encode())


# -------------------------------------------------------------------------------------------------------- measuring


def measure(options: Namespace) -> dict[str, Any]:
    """All rows with one seed, the best five without a teacher with more, and what two samples of data are apart."""
    torch.set_num_threads(1)
    store, listed = Store(options.cache), rows()
    alone = [row for row in listed if not row.taught]
    first = {row.label: run(row, options, 0, store) for row in alone}
    one_step = [row for row in alone if first[row.label]["1"] is not None]
    best = sorted(one_step, key=lambda row: first[row.label]["1"]["energy"])[: options.best]
    seeds = {row.label: [run(row, options, seed, store) for seed in range(options.seeds)] for row in best}
    first |= {row.label: run(row, options, 0, store) for row in listed if row.taught}
    return {
        "seconds": options.seconds,
        "rows": [first[row.label] | {"taught": row.taught} for row in listed],
        "seeds": seeds,
        "floor": floor(options.mixture),
        "settings": {name: getattr(options, name) for name in ("width", "batch", "lr", "ema")},
    }


def floor(name: str) -> dict[str, Any]:
    """Energy distances between two samples of data, ten times, and of the exact map's samples."""
    mixture, (_, exact, data) = MIXTURES[name](torch.float64), reference(name)
    apart = [energy_distance(mixture.sample(SAMPLES, generator(50 + i)), data) for i in range(10)]
    return {"mean": float(np.mean(apart)), "sd": float(np.std(apart, ddof=1)), "exact": energy_distance(exact, data)}


# ----------------------------------------------------------------------------------------------------------- output


def number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value < 100 else "diverged"


def cells(found: dict[str, Any]) -> list[str]:
    """Map error, switches and energy distance, in one step and in two."""
    shown: list[str] = []
    for steps in ("1", "2"):
        part = found[steps] or {"median": None, "switched": None, "energy": None}
        switched = "" if part["switched"] is None else f"{100 * part['switched']:.1f} %"
        shown += [number(part["median"], 3), switched, number(part["energy"])]
    return shown


HEAD = ["steps", "map, 1", "switched, 1", "energy, 1", "map, 2", "switched, 2", "energy, 2"]


def markdown(result: dict[str, Any]) -> str:
    """The tables of the results page."""
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    low, far = result["floor"], sorted(result["rows"], key=lambda row: (row["taught"], energy(row)))
    heading = (
        f"{result['seconds']:g} CPU seconds a run, one thread; {settings}. {SAMPLES} samples against as many data: "
        f"two samples of data are {low['mean']:.5f} apart (standard deviation {low['sd']:.5f}), the exact map's and "
        f"data {low['exact']:.5f}. Python {platform.python_version()}, torch {version('torch')}."
    )
    one = table(["objective", *HEAD], [[row["row"], row["steps"], *cells(row)] for row in far])
    return "\n\n".join([heading, one, seed_table(result["seeds"]), verdict(result)])


def energy(row: dict[str, Any], steps: str = "1") -> float:
    return math.inf if row[steps] is None else float(row[steps]["energy"])


def seed_table(seeds: dict[str, list[dict[str, Any]]]) -> str:
    shown = []
    for name, runs in seeds.items():
        line: list[str] = [name, f"{np.mean([r['steps'] for r in runs]):.0f}"]
        for steps, part, digits in (("1", "median", 3), ("1", "energy", 4), ("2", "energy", 4)):
            values = [r[steps][part] for r in runs]
            line.append(f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})")
        shown.append(line)
    return table(["best without a teacher", "steps", "map, 1", "energy, 1", "energy, 2"], shown)


def verdict(result: dict[str, Any]) -> str:
    name, mean = min(
        ((name, float(np.mean([energy(r) for r in runs]))) for name, runs in result["seeds"].items()),
        key=lambda pair: pair[1],
    )
    middle = sum(EARLIER) / 2
    return (
        f"Best without a teacher, mean of {len(result['seeds'][name])} seeds: {name}, {mean:.4f}, {mean / middle:.2f} "
        f"of the {middle:.4f} that easy consistency tuning came to before (0.013 to 0.016; map 0.087 to 0.173)."
    )


def draw(result: dict[str, Any], path: str) -> None:
    """Energy distances in one step and in two, shown within 0.0001 and 3, and samples of four objectives and data."""
    shown = sorted((row for row in result["rows"]), key=lambda row: min(energy(row), energy(row, "2")), reverse=True)
    data = reference("judged")[2][:1500]
    alone = sorted((row for row in result["rows"] if not row["taught"] and row["1"]), key=energy)
    taught = sorted((row for row in result["rows"] if row["taught"] and row["1"]), key=energy)
    tuned = next(row for row in alone if row["row"] == "ect")
    with picture(path, 10.0, 6.2) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=(1.0, 1.1))
        axes = left.subplots()
        for place, row in enumerate(shown):
            for steps, mark in (("1", "o"), ("2", "D")):
                if row[steps] is not None:
                    colour = COLOURS[1] if row["taught"] else COLOURS[0]
                    face = colour if steps == "1" else "none"
                    at = min(max(energy(row, steps), 1e-4), 3.0)
                    axes.plot(at, place, mark, color=colour, mfc=face, markersize=5)
        axes.axvspan(*EARLIER, color=COLOURS[5], alpha=0.25, lw=0)
        axes.set(xscale="log", xlabel="energy distance: one step filled, two open; grey: the earlier ECT, one step")
        axes.set_yticks(range(len(shown)), [row["row"].replace(" + exact teacher", " + teacher") for row in shown])
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="x", alpha=0.3)
        for axis, row in zip(right.subplots(2, 2).flat, (alone[0], alone[1], tuned, taught[0]), strict=True):
            samples = np.array(row["1"]["samples"])
            axis.plot(*data.T.numpy(), ".", color=COLOURS[5], markersize=1.2, alpha=0.5)
            axis.plot(*samples.T, ".", color=COLOURS[1] if row["taught"] else COLOURS[0], markersize=1.2)
            axis.set(xlim=(-1.8, 1.9), ylim=(-2, 2), xticks=[], yticks=[], aspect="equal")
            axis.set_title(f"{row['row']}: {energy(row):.4f}", fontsize=8)


def main() -> None:
    """Measure, print, draw."""
    flags = parser(__doc__, seconds=60.0, seeds=3, best=5, width=128, batch=512, lr=5e-3, ema=0.08)
    flags.add_argument("--mixture", choices=sorted(MIXTURES), default="judged")
    flags.add_argument("--cache", default="", help="a JSON file that finished runs are kept in")
    flags.add_argument("--picture", default="", help="where to draw")
    options = flags.parse_args()
    result = measure(options)
    if options.picture:
        draw(result, options.picture)
    emit(options, result, markdown(result))


if __name__ == "__main__":
    main()
