"""Models of few steps trained for equal time beside those of rectified-flow-pytorch, all in one run.

Every method trains the same network from the same weights on the same data for the same seconds of one thread's CPU
time, in turns of a fraction of a second. Data: a mixture of five Gaussians in the plane, and one half of scikit-learn's
8 x 8 digits without labels; the other half judges. The common recipe is Adam at 1e-3 under a cosine to zero, and an
average of weights that is sampled from; the peer's own recipe, that of its Trainer, stands beside it.

    python benchmarks/few_steps_peer.py [--plot docs/images/few-steps-peer.png]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import math
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _common import COLOURS, ROOT, emit, parser, picture, table
from torch import Tensor, nn

from consilience.diffusion import RectifiedFlow, metrics
from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.samplers import phased, segmented
from consilience.diffusion.consistency.setups import SETUPS, few_grid

PEERS = ROOT / ".venv-few-steps" / "bin" / "python"
NO_PEERS = "rectified-flow-pytorch was skipped: it is not installed (`make .venv-few-steps/.ready` installs it)."
FLOW = RectifiedFlow()
STEPS = 10_000
"""What the schedules of objectives here count to in a run."""
TURN = 0.25
"""Seconds of CPU time in a turn."""
SAME = (
    ("meanflow", "meanflow, the peer's settings"),
    ("meanflow", "meanflow, by differences"),
    ("meanflow, tuned", "meanflow, tuned"),
    ("consistency-fm", "consistency-fm, 1 segment"),
)
"""Methods of the peer, and what the same objective is called here."""
MEANFLOWS = ("meanflow", "meanflow, the peer's settings")
PEER_METHODS = {
    "plane": ("meanflow", "meanflow, tuned", "consistency-fm", "soflow"),
    "digits": ("meanflow", "soflow"),
}
METHODS = {
    "plane": (*MEANFLOWS, "meanflow, tuned", "consistency-fm, 1 segment", "ect", "sct"),
    "digits": (*MEANFLOWS, "meanflow, by differences", "ect", "sct"),
}
TUNED = (0.0, 0.5)
"""What came out best in the plane on other seeds, of as many trials as the peer got: the share of samples with s = t,
and the power of MeanFlow's weight.
"""
VARIANTS: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "consistency-fm, 1 segment": ("consistency-fm", 1, {}),
    "meanflow, the peer's settings": ("meanflow", None, {"instantaneous": 0.5, "power": 0.5}),
    "meanflow, by differences": ("meanflow", None, {"instantaneous": 0.5, "power": 0.5, "jvp": "finite"}),
    "meanflow, tuned": ("meanflow", None, {"instantaneous": TUNED[0], "power": TUNED[1], "jvp": "finite"}),
}
"""Setups in another number of phases, or with other arguments than the paper's."""
TICKS = {"plane": ((0.02, 0.05, 0.1, 0.2, 0.5), "lower right"), "digits": ((0.1, 0.3, 1, 3), "center left")}
LABELS = {"plane": "energy distance", "digits": "Fréchet distance, 16 features"}


# ------------------------------------------------------------------------------------------------- data and networks


class Plane(nn.Module):
    """A multilayer perceptron of x [batch, 2], t and the gap."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = (2 + 32, width, width, width)
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))
        self.register_buffer("waves", torch.arange(1, 9) * math.pi / 4)

    def forward(self, x: Tensor, t: Tensor, gap: Tensor) -> Tensor:
        angles = torch.stack([t, gap], 1)[:, :, None] * self.waves
        return self.layers(torch.cat([x, angles.sin().flatten(1), angles.cos().flatten(1)], 1))


class Digits(nn.Module):
    """A small UNet2DModel of diffusers, without attention, with an embedding for t and another for the gap."""

    def __init__(self, width: int = 16) -> None:
        from diffusers.models.unets.unet_2d import UNet2DModel

        super().__init__()
        self.unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
            class_embed_type="timestep",
        )

    def forward(self, x: Tensor, t: Tensor, gap: Tensor) -> Tensor:
        return self.unet(x, 10 * t, class_labels=10 * gap, return_dict=False)[0]


@dataclass(frozen=True)
class Task:
    """Data [n, ...] to train on, the network, the batch, what samples are judged by, at which evaluations."""

    name: str
    data: Tensor
    network: Callable[[], nn.Module]
    batch: int
    judge: Callable[[Tensor, int], dict[str, float]]
    noise: Tensor
    evaluations: tuple[int, ...]
    sigma_data: float
    floor: dict[str, float]


def plane_task(count: int = 4096, mapped: int = 512) -> Task:
    """The five Gaussians of the comparison of samplers; energy distance, and the error of the map in one step."""
    from solver_error import plane

    mixture = plane().on(FLOW)
    generator = torch.Generator().manual_seed(1)
    data = mixture.sample(1 << 17, generator).float()
    real, noise = mixture.sample(count, generator), torch.randn(count, 2, generator=generator)
    exact = mixture.ode_map(noise[:mapped].double(), 1.0, 0.0)

    def judge(x: Tensor, evaluations: int) -> dict[str, float]:
        error = (x[:mapped].double() - exact).norm(dim=1)
        return {"distance": metrics.energy_distance(x, real), "map": float(error.median())}

    floor = {"distance": metrics.energy_distance(mixture.sample(count, generator), real), "map": 0.0}
    return Task("plane", data, Plane, 256, judge, noise, (1, 2), float(data.std()), floor)


def digits_task() -> Task:
    """Half of the digits; Frechet distance of the features of a small classifier to the other half."""
    from consilience.diffusion.pictures import read
    from consilience.diffusion.quality import classifier, halves, quality

    data = read("digits")
    known = classifier(data)
    first, second = (half.x for half in halves(data))

    def judge(x: Tensor, evaluations: int) -> dict[str, float]:
        found = quality(known, second, x)
        return {"distance": found.frechet, "confidence": found.confidence, "entropy": found.entropy}

    noise = torch.randn(len(second), 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return Task("digits", first, Digits, 32, judge, noise, (1, 2, 4), float(first.std()), judge(first, 0))


# ---------------------------------------------------------------------------------------------------------- the sides


class Recipe:
    """Adam at 1e-3 under a cosine to zero, and an average of the weights."""

    def __init__(self, module: nn.Module, network: nn.Module, decay: float = 0.99) -> None:
        self.optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
        self.module, self.decay = module, decay
        self.live = list(network.parameters())
        self.kept = [parameter.detach().clone() for parameter in self.live]

    @torch.no_grad()
    def step(self, loss: Tensor, progress: float) -> None:
        self.optimiser.param_groups[0]["lr"] = 1e-3 * (0.5 + 0.5 * math.cos(math.pi * progress))
        self.optimiser.zero_grad()
        with torch.enable_grad():
            loss.backward()
        self.optimiser.step()
        torch._foreach_lerp_(self.kept, self.live, 1 - self.decay)

    @torch.no_grad()
    def sampled(self) -> nn.Module:
        """The module with the average for weights; training is over."""
        torch._foreach_copy_(self.live, self.kept)
        return self.module


class Here:
    """An objective of this package by its setup, or one of the `VARIANTS`."""

    def __init__(self, network: nn.Module, name: str, sigma_data: float, seed: int) -> None:
        base, phases, self.parts = VARIANTS.get(name, (name, None, {}))
        self.setup = SETUPS[base] if phases is None else replace(SETUPS[base], phases=phases)
        self.module, self.sigma_data = network, sigma_data
        self.profile = self.setup.average(STEPS)
        self.average = deepcopy(network).requires_grad_(False) if self.profile else None
        self.generator, self.updates = torch.Generator().manual_seed(seed), 0

    def loss(self, data: Tensor, progress: float) -> Tensor:
        step = min(int(STEPS * progress), STEPS - 1)
        more = self.parts | {"target": None if self.average is None else self.map(self.average)}
        student = self.map(self.module)
        return self.setup.loss(student, None, data, self.generator, step=step, steps=STEPS, **more)[0]

    @torch.no_grad()
    def updated(self) -> None:
        """The average of weights that is the target, of objectives that have one."""
        self.updates += 1
        if self.average is not None and self.profile is not None:
            kept, live = (list(net.parameters()) for net in (self.average, self.module))
            torch._foreach_lerp_(kept, live, 1 - self.profile.beta(self.updates))

    def map(self, network: nn.Module) -> FlowMap:
        return two_times(network) if self.setup.two_times else one_time(network)

    def sample(self, network: nn.Module, noise: Tensor, evaluations: int) -> Tensor:
        """By the setup's sampler; in segments by the midpoint rule, or for one evaluation by Euler's."""
        model, setup = self.map(network), self.setup
        if setup.within:
            method, steps = ("euler", evaluations) if evaluations == 1 else ("flow-midpoint", evaluations // 2)
            return segmented(model, noise, setup.grid(FLOW, steps), setup.phases, method).x
        return setup.sample(model, noise, evaluations, torch.Generator().manual_seed(0), self.sigma_data).x


def two_times(network: nn.Module) -> FlowMap:
    """Told t and how far it is to jump."""

    def flow(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        t, s = (u.to(x).expand(len(x)) for u in (t, s))
        return network(x, t, t - s)

    return FlowMap(flow, FLOW, "flow")


def one_time(network: nn.Module) -> FlowMap:
    """Told t alone."""

    def flow(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        t = t.to(x).expand(len(x))
        return network(x, t, t)

    return FlowMap(flow, FLOW, "flow")


@dataclass(frozen=True)
class Row:
    """A method of one side; ``own`` is the peer under its Trainer's recipe, ``parts`` are arguments of ours."""

    side: str
    name: str
    own: bool = False

    @property
    def label(self) -> str:
        """As tables name it."""
        return f"{self.name}{', its trainer' if self.own else ''}"


class Trainee:
    """A row at work: its network, its seconds and its steps."""

    def __init__(self, row: Row, task: Task, seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        network = task.network()
        self.row, self.task, self.spent, self.steps = row, task, 0.0, 0
        self.draw = torch.Generator().manual_seed(100 + seed)
        if row.side == "here":
            self.side: Any = Here(network, row.name, task.sigma_data, seed)
        else:
            from peers import rectified_flow_side as peer

            self.side = peer.SIDES[row.name](network)
            if row.own:
                self.recipe: Any = peer.OwnRecipe(self.side.module, network, average=row.name != "consistency-fm")
        self.batch = peer.OwnRecipe.batch if row.own else task.batch
        if not row.own:
            self.recipe = Recipe(self.side.module, network)

    def turn(self, seconds: float, budget: float) -> None:
        """Train for that much CPU time, or what is left of the budget."""
        begun = time.process_time()
        limit = min(seconds, budget - self.spent)
        while (now := time.process_time() - begun) < limit:
            rows = torch.randint(len(self.task.data), (self.batch,), generator=self.draw)
            progress = min(1.0, (self.spent + now) / budget)
            self.recipe.step(self.side.loss(self.task.data[rows], progress), progress)
            self.side.updated()
            self.steps += 1
        self.spent += time.process_time() - begun

    @torch.no_grad()
    def judged(self) -> dict[str, dict[int, dict[str, float]]]:
        """What the task's judge says of its own sampler at each number of evaluations, and of jumps of equal length."""
        module, task = self.recipe.sampled().eval(), self.task
        samplers: dict[str, Any] = {"own": lambda n: self.side.sample(module, task.noise, n)}
        if self.row in (Row("peer", "meanflow"), Row("peer", "meanflow, tuned")):
            model = two_times(module.model.network)
            samplers["jumps"] = lambda n: phased(model, task.noise, few_grid(FLOW, n, 1.0)).x
        return {name: {n: task.judge(draw(n), n) for n in task.evaluations} for name, draw in samplers.items()}


def run(task: Task, rows: Sequence[Row], seconds: float, seed: int) -> list[dict[str, Any]]:
    """Train all rows in turns, and judge them."""
    for row in rows:  # what torch does once is nobody's time
        Trainee(row, task, seed).turn(TURN, TURN)
    trainees = [Trainee(row, task, seed) for row in rows]
    while left := [one for one in trainees if one.spent < seconds]:
        for one in left:
            one.turn(TURN, seconds)
    found = []
    for one in trainees:
        made = {"task": task.name, "side": one.row.side, "method": one.row.label, "seed": seed}
        made |= {"steps": one.steps, "seconds": one.spent}
        found += [made | {"sampler": name, "at": at} for name, at in one.judged().items()]
    print(f"{task.name}: seed {seed} is done", file=sys.stderr, flush=True)
    return found


# ------------------------------------------------------------------------------------------------------------- output


def groups(found: Sequence[dict[str, Any]], task: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The seeds of each side and method of a task, in the order of the rows."""
    made: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in found:
        if one["task"] == task:
            name = one["method"] + (", sampled by jumps" if one["sampler"] == "jumps" else "")
            made.setdefault((one["side"], name), []).append(one)
    return made


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the smallest and greatest of the seeds."""
    mean, low, high = (f"{value:.{digits}f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def quality_table(found: Sequence[dict[str, Any]], task: Task) -> str:
    """Steps and distances of every row, the data's own last."""
    names = {"peer": "rectified-flow-pytorch", "here": "here"}
    digits = 4 if task.name == "plane" else 2
    head = ["method", "side", "steps", *(f"{n} evaluation{'s' * (n > 1)}" for n in task.evaluations)]
    head += ["map error, 1"] if task.name == "plane" else ["confidence, 1", "entropy, 1"]
    rows = []
    for (side, name), seeds in groups(found, task.name).items():
        cells = [spread([one["at"][n]["distance"] for one in seeds], digits) for n in task.evaluations]
        for key in ("map",) if task.name == "plane" else ("confidence", "entropy"):
            cells.append(f"{sum(one['at'][1][key] for one in seeds) / len(seeds):.2f}")
        rows.append([name, names[side], round(sum(one["steps"] for one in seeds) / len(seeds)), *cells])
    floor = [f"{task.floor['distance']:.{digits}f}"] * len(task.evaluations)
    rest = [f"{task.floor[key]:.2f}" for key in task.floor if key != "distance"]
    return table(head, [*rows, ["data", "", "", *floor, *rest]])


def pairs(found: Sequence[dict[str, Any]], tasks: Sequence[Task]) -> list[list[str]]:
    """The same objective on both sides: steps in equal time and distance after one evaluation, ours over the peer's."""
    rows = []
    for task in tasks:
        by = groups(found, task.name)
        for name, here in SAME:
            if ("peer", name) not in by or ("here", here) not in by:
                continue
            theirs, ours = by["peer", name], by["here", here]
            steps, distances = (
                (sum(map(of, ours)) / sum(map(of, theirs)))
                for of in (lambda one: one["steps"], lambda one: one["at"][1]["distance"])
            )
            wins = sum(a["at"][1]["distance"] < b["at"][1]["distance"] for a, b in zip(ours, theirs, strict=True))
            rows.append([f"{task.name}, {here}", f"{steps:.2f}", f"{distances:.2f}", f"{wins} of {len(ours)}"])
    return rows


def draw(path: str, found: Sequence[dict[str, Any]], tasks: Sequence[Task]) -> None:
    """One line of dots per method and side, a dot per seed, a colour per number of evaluations."""
    with picture(path, 8.6, 3.9) as figure:
        for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            by = groups(found, task.name)
            for place, seeds in enumerate(reversed(by.values())):
                for colour, n in zip(COLOURS, task.evaluations, strict=False):
                    values = [one["at"][n]["distance"] for one in seeds]
                    axis.plot(values, [place] * len(values), "o", ms=4, alpha=0.8, color=colour)
                    axis.plot(sum(values) / len(values), place, "|", ms=11, mew=2, color=colour)
            shown = [f"{name} ({'peer' if side == 'peer' else 'here'})" for side, name in reversed(by)]
            axis.set_yticks(range(len(shown)), shown, fontsize=7)
            for label, (side, _) in zip(axis.get_yticklabels(), reversed(by), strict=True):
                label.set_fontweight("bold" if side == "here" else "normal")
            for colour, n in zip(COLOURS, task.evaluations, strict=False):
                axis.plot([], [], "o", ms=4, color=colour, label=f"{n} evaluation{'s' * (n > 1)}")
            axis.set(xscale="log", xlabel=LABELS[task.name], title=task.name)
            if task.floor["distance"] > 0:
                axis.axvline(task.floor["distance"], color="0.6", lw=0.8, ls="--")
            axis.grid(axis="y", color="0.9", lw=0.6)
            marks, place = TICKS[task.name]
            axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
            axis.set_xticks([], minor=True)
            axis.legend(frameon=False, fontsize=7, loc=place)


def rows_of(task: str, peer: bool) -> list[Row]:
    """What runs on a task: the peer's methods, in the plane also under its own recipe, then ours."""
    theirs = [Row("peer", name) for name in PEER_METHODS[task]]
    if task == "plane":
        theirs.append(Row("peer", "meanflow", own=True))
    return [*(theirs if peer else []), *(Row("here", name) for name in METHODS[task])]


def trained(
    tasks: Sequence[Task], peer: bool, seconds: dict[str, float], seeds: int, cache: Path | None
) -> list[dict[str, Any]]:
    """All rows of all tasks, a seed of everything before the next; a task's seed is kept as a whole."""
    kept: list[dict[str, Any]] = []
    if cache is not None and cache.exists():
        kept = json.loads(cache.read_text(encoding="utf-8"))
    for one in kept:  # JSON's names are text
        one["at"] = {int(n): value for n, value in one["at"].items()}
    for seed in range(seeds):
        for task in tasks:
            if any(one["task"] == task.name and one["seed"] == seed for one in kept):
                continue
            kept += run(task, rows_of(task.name, peer), seconds[task.name], seed)
            if cache is not None:
                cache.write_text(json.dumps(kept), encoding="utf-8")
    return [one for one in kept if one["seed"] < seeds]


def main() -> None:
    """Run both tasks and print the tables, where need be under the Python that has the peer."""
    options = parser(__doc__, seeds=3, plane_seconds=5.0, digits_seconds=6.0)
    options.add_argument("--plot", help="write the plot here")
    options.add_argument("--cache", help="keep what was trained in this file, and train only what it lacks")
    o = options.parse_args()
    peer = find_spec("rectified_flow_pytorch") is not None
    if not peer and PEERS.exists():
        sys.exit(subprocess.run([PEERS, __file__, *sys.argv[1:]]).returncode)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tasks = [plane_task(), digits_task()]
    seconds = {"plane": o.plane_seconds, "digits": o.digits_seconds}
    found = trained(tasks, peer, seconds, o.seeds, Path(o.cache) if o.cache else None)
    if o.plot:
        draw(o.plot, found, tasks)
    named = ("torch", "diffusers", *(("rectified-flow-pytorch",) if peer else ()))
    parts = ["" if peer else NO_PEERS, ", ".join(f"{name} {version(name)}" for name in named) + "."]
    for task in tasks:
        count = sum(parameter.numel() for parameter in task.network().parameters())
        seeds = f"{o.seeds} seed{'s' * (o.seeds > 1)}"
        text = f"{task.name.capitalize()}: {seconds[task.name]:g} seconds, {seeds}, {count} weights, batches of"
        parts += [f"{text} {task.batch}.", quality_table(found, task)]
    if peer:
        head = ("the same objective", "steps here / peer", "distance here / peer, 1 evaluation", "seeds won")
        parts.append(table(head, pairs(found, tasks)))
    emit(o, {"rows": found, "floors": {task.name: task.floor for task in tasks}}, "\n\n".join(filter(None, parts)))


if __name__ == "__main__":
    main()
