"""A teacher and few-step students of MNIST or CIFAR-10, made in one command, on a GPU where there is one.

The tables of docs/results/few-steps-images.md. The teacher is a class-conditional UNet2DModel with EDM's
preconditioning, the students are what `consilience diffusion distill` makes of it. How many steps each gets follows
from its speed on this device and its share of the minutes. Finished runs are kept in the cache folder, others taken up
where they stopped.

    python benchmarks/few_steps_images.py --images folder [--dataset mnist|cifar10] [--device auto|cpu|cuda]
        [--minutes m] [--cache folder] [--picture picture.png]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from _common import COLOURS, emit, parser, picture, table
from _image_files import WHERE, Sets, read_sets
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from torch import Tensor, nn

from consilience.diffusion import metrics
from consilience.diffusion.digits import network
from consilience.diffusion.few_steps import FewStepLoss, setup_of, student_of
from consilience.diffusion.huggingface import from_diffusers
from consilience.diffusion.losses import denoising_loss, edm_weight, lognormal_times
from consilience.diffusion.pictures import grid
from consilience.diffusion.pipeline import ImagePipeline, load
from consilience.diffusion.quality import halves
from consilience.diffusion.recipe import DROP, distil, follow
from consilience.diffusion.sampling import BATCH, draw, noise_of
from consilience.diffusion.settings import Distillation, Recipe
from consilience.diffusion.training import train
from consilience.errors import InputError

TEACHER_EVALUATIONS = (5, 9, 17, 35)
FEW = (1, 2, 4)
SHARES = {"teacher": 0.5, "ect": 0.22, "lsd": 0.17, "tcd": 0.11}
"""Of the minutes of training, by the names of the runs. `lsd` is a flow map, `tcd` a consistency trajectory model."""
OTHER = 0.15
"""The share of an objective that is not named there."""
EPOCHS = 10
"""Of the classifier."""
WARM, TIMED = 3, 6
"""Steps that are not timed, and that are, to find a run's speed."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large all is: pixels of a side, the network's width, batch, minutes of training, images drawn."""

    side: int
    width: int
    batch: int
    minutes: float
    count: int


SIZES = {
    ("mnist", "cpu"): Size(16, 24, 64, 30, 1000),
    ("cifar10", "cpu"): Size(16, 32, 64, 40, 1000),
    ("mnist", "cuda"): Size(32, 64, 256, 6, 2000),
    ("cifar10", "cuda"): Size(32, 128, 256, 6.5, 2000),
}


@dataclass(frozen=True, slots=True)
class Device:
    """Where all is computed; time on a CPU is this process's own, on a GPU the clock's."""

    torch: torch.device
    name: str

    def clock(self) -> float:
        """Seconds, once the device has done what it was asked."""
        if self.torch.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> float | None:
        """GiB of the GPU's memory that were held at most."""
        return None if self.torch.type == "cpu" else torch.cuda.max_memory_allocated() / 2**30


def device_of(wanted: str) -> Device:
    """The device asked for, and its name; the trainer is told to stay on the CPU where that was asked for."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: there is no GPU that torch can use; leave --device out, or ask for cpu")
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        torch.set_float32_matmul_precision("high")
        return Device(torch.device("cuda"), torch.cuda.get_device_name())
    os.environ["ACCELERATE_USE_CPU"] = "true"  # read by accelerate, which chooses where the trainer computes
    torch.set_num_threads(1)
    return Device(torch.device("cpu"), f"{_cpu()}, one thread")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------- classifier


class Network(nn.Module):
    """Three convolutions, 64 features, classes."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        widths = (channels, 24, 32, 48)
        parts: list[nn.Module] = []
        for before, after in pairwise(widths):
            parts += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*parts, nn.Flatten(), nn.Linear(48 * (-(-side // 8)) ** 2, 64), nn.SiLU())
        self.last = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return cast(Tensor, self.last(self.body(x)))


class Judge:
    """A classifier of the training images; images kept back to compare with (``real``), and as many more."""

    def __init__(self, sets: Sets, size: Size, device: Device, cache: Path) -> None:
        assert sets.train.labels is not None
        torch.manual_seed(0)
        net = Network(sets.train.x.shape[1], size.side, int(sets.train.classes or 0))
        rows = {"x": sets.train.x, "label": sets.train.labels}
        done = train(
            net,
            lambda net, batch, generator: nn.functional.cross_entropy(net(batch["x"]), batch["label"]),
            rows,
            steps=max(1, EPOCHS * len(sets.train.x) // 128),
            batch_size=128,
            lr=1e-3,
            ema=0.99,
            out=cache / "classifier",
        )
        self.net, self.device = cast(Network, done.best), device
        self.scale = torch.ones(64, dtype=torch.float64)
        self.scale = self._asked(sets.train.x[:4096])[0].std(0).clamp(min=1e-3)
        one, other = halves(sets.kept)
        count = min(size.count, len(one.x), len(other.x))
        assert other.labels is not None
        self.real, self.other, self.labels = one.x[:count], other.x[:count], other.labels[:count]

    @torch.no_grad()
    def _asked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, 64], each of unit variance among the training images, and probabilities [n, classes]."""
        found = [self.net.body(part.to(self.device.torch)) for part in x.split(1024)]
        logits = torch.cat([self.net.last(part).double().cpu() for part in found])
        return torch.cat([part.double().cpu() for part in found]) / self.scale, logits.softmax(1)

    def of(self, x: Tensor) -> dict[str, float]:
        """What images [n, ...] of `labels` are like beside the real ones."""
        (own, probabilities), (real, _) = self._asked(x), self._asked(self.real)
        precision, recall = metrics.precision_recall(real, own)
        return {
            "frechet": metrics.frechet_distance(own, real),
            "precision": precision,
            "recall": recall,
            "confidence": metrics.confidence(probabilities),
            "entropy": metrics.class_entropy(probabilities),
            "right": float((probabilities.argmax(1) == self.labels).double().mean()),
        }


# ------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, slots=True)
class Work:
    """What all runs share."""

    sets: Sets
    size: Size
    device: Device
    cache: Path

    def teacher(self, steps: int) -> Recipe:
        """Its settings."""
        precision = "float32" if self.device.torch.type == "cpu" else "bf16"
        return Recipe(
            data=self.sets.train.source,
            width=self.size.width,
            process="edm",
            steps=steps,
            batch=self.size.batch,
            ema=0.997,
            precision=precision,
            sample_every=steps,
        )

    def student(self, objective: str, steps: int, teacher: Path) -> Distillation:
        """Its settings."""
        return Distillation(
            teacher=str(teacher),
            objective=objective,
            data=self.sets.train.source,
            steps=steps,
            batch=self.size.batch,
            sample_every=steps,
        )

    def speeds(self, objectives: list[str]) -> dict[str, float]:
        """Seconds for a step of the teacher and of each objective, of short runs of untrained networks."""
        sigma_data = round(float(self.sets.train.x.std()), 4)
        stock, classes = EDMEulerScheduler(sigma_data=sigma_data), self.sets.train.classes
        net = network(self.size.side, self.sets.train.x.shape[1], classes, self.size.width)

        def denoising(net: Any, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
            model = from_diffusers(net, stock)
            return denoising_loss(model, batch, generator, times=lognormal_times(), weight=edm_weight(sigma_data))

        found = {"teacher": self._speed(copy.deepcopy(net), denoising, self.teacher(1).precision)}
        teacher = from_diffusers(net.requires_grad_(False).to(self.device.torch), stock)
        for name in objectives:
            setup = setup_of(name, taught=True)
            taught = None if setup.teacher == "none" else teacher
            averaged = setup.average(1, taught is not None) is not None
            loss = FewStepLoss(setup, stock, taught, sigma_data, classes, DROP, averaged)
            found[name] = self._speed(student_of(copy.deepcopy(net).requires_grad_(True), setup, name), loss, "float32")
        return found

    def _speed(self, net: Any, loss: Callable[..., Any], precision: Any) -> float:
        stamps: list[float] = []
        train(
            net,
            loss,
            {"x": self.sets.train.x, "class_labels": self.sets.train.labels},
            steps=WARM + TIMED,
            batch_size=self.size.batch,
            lr=1e-5,
            ema=0.9,
            precision=precision,
            on_step=lambda _step, _model: stamps.append(self.device.clock()),
            progress=False,
        )
        return (stamps[-1] - stamps[WARM - 1]) / TIMED


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: the model, its steps, the minutes that they took, and the GPU's memory."""

    name: str
    pipe: ImagePipeline
    steps: int
    minutes: float
    gib: float | None
    folder: Path


def planned(work: Work, objectives: list[str]) -> dict[str, int]:
    """Steps of the teacher and of each student: their share of the minutes over the seconds that one step takes here.

    The speeds are kept in the cache, so that a command that is given again goes on with the same runs.
    """
    kept = work.cache / "speeds.json"
    settings = {"device": work.device.name, **asdict(work.size)}
    found = json.loads(kept.read_text()) if kept.exists() else {}
    speeds = found["seconds"] if found.get("settings") == settings else {}
    if not {"teacher", *objectives} <= set(speeds):
        speeds = work.speeds(objectives) | speeds
        work.cache.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"settings": settings, "seconds": speeds}, indent=1))
    steps = {
        name: max(2, round(60 * work.size.minutes * SHARES.get(name, OTHER) / speeds[name]))
        for name in ("teacher", *objectives)
    }
    told = ", ".join(f"{name} {count} steps of {speeds[name]:.3f} s" for name, count in steps.items())
    print(f"{work.device.name}: {told}", file=sys.stderr)
    return steps


def carried_out(work: Work, name: str, steps: int, teacher: Path | None) -> Run:
    """A run, made now, taken up, or taken from the cache."""
    folder = work.cache / f"{name}-{steps}"
    kept = folder / "run" / "spent.json"
    spent = json.loads(kept.read_text()) if kept.exists() else {"seconds": 0.0, "gib": None}
    if not (folder / "model_index.json").exists():
        print(f"{name}: {steps} steps", file=sys.stderr)
        if work.device.torch.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = work.device.clock()
        try:
            if teacher is None:
                follow(work.teacher(steps), work.sets.train, folder)
            else:
                distil(work.student(name, steps, teacher), work.sets.train, folder)
        finally:
            spent = {"seconds": spent["seconds"] + work.device.clock() - start, "gib": work.device.peak()}
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(spent))
    pipe = load(folder).to(work.device.torch)
    return Run(name, pipe, steps, spent["seconds"] / 60, spent["gib"], folder)


# ------------------------------------------------------------------------------------------------------------- rows


def rows_of(run: Run, judge: Judge, asked: tuple[int, ...], method: str | None, device: Device) -> list[dict[str, Any]]:
    """Quality, and images per second, at each of these numbers of evaluations; of one noise for all."""
    kept = run.folder / "run" / f"rows-{len(judge.labels)}.json"
    if kept.exists():
        return list(json.loads(kept.read_text()))
    found, noise = [], noise_of(run.pipe, len(judge.labels), 0)
    draw(run.pipe, noise[:BATCH], 1, labels=judge.labels[:BATCH])  # what a device does once is not timed
    for evaluations in asked:
        print(f"{run.name}: {evaluations} evaluations", file=sys.stderr)
        start = device.clock()
        drawn = draw(run.pipe, noise, evaluations, method, judge.labels)
        rate = len(noise) / (device.clock() - start)
        found.append({"model": run.name, "nfe": drawn.nfe, **judge.of(drawn.x), "per_second": rate})
    kept.write_text(json.dumps(found))
    return found


def measured(work: Work, objectives: list[str]) -> tuple[dict[str, Any], list[Run]]:
    """Everything: runs, then rows of data, teacher and students."""
    steps = planned(work, objectives)
    judge = Judge(work.sets, work.size, work.device, work.cache)
    runs = [carried_out(work, "teacher", steps["teacher"], None)]
    folder = work.cache / f"teacher-{steps['teacher']}"
    runs += [carried_out(work, name, steps[name], folder) for name in objectives]
    rows: list[dict[str, Any]] = [{"model": "data", "nfe": "", **judge.of(judge.other), "per_second": None}]
    rows += rows_of(runs[0], judge, (*FEW, *TEACHER_EVALUATIONS), "auto", work.device)
    for run in runs[1:]:
        rows += rows_of(run, judge, FEW, None, work.device)
    return {
        "device": work.device.name,
        "rows": rows,
        "runs": [{"name": run.name, "steps": run.steps, "minutes": run.minutes, "gib": run.gib} for run in runs],
        "size": asdict(work.size),
        "trained_on": len(work.sets.train.x),
        "compared": len(judge.labels),
        "parameters": sum(part.numel() for part in runs[0].pipe.network.parameters()),
        "torch": torch.__version__,
    }, runs


FIELDS = ("frechet", "precision", "recall", "confidence", "entropy", "right")


def reference(found: dict[str, Any]) -> float:
    """The teacher's distance at the most evaluations."""
    return float([row["frechet"] for row in found["rows"] if row["model"] == "teacher"][-1])


def markdown(found: dict[str, Any]) -> str:
    """The tables of quality and of training."""
    best, shown = reference(found), []
    for row in found["rows"]:
        values = [f"{100 * row[name]:.1f}" if name == "right" else f"{row[name]:.3f}" for name in FIELDS]
        gap = [f"{row['frechet'] / best:.2f}", f"{row['per_second']:.0f}"] if row["nfe"] else ["", ""]
        shown.append([row["model"], row["nfe"], *values, *gap])
    head = (
        "model",
        "nfe",
        "Fréchet",
        "precision",
        "recall",
        "confidence",
        "entropy",
        "right, %",
        "over teacher's",
        "images/s",
    )
    size = found["size"]
    trained = [
        [run["name"], run["steps"], f"{run['minutes']:.1f}", "" if run["gib"] is None else f"{run['gib']:.2f}"]
        for run in found["runs"]
    ]
    return "\n\n".join(
        [
            table(head, shown),
            f"{found['compared']} images of {size['side']} x {size['side']} pixels, one noise; the network has "
            f"{found['parameters']:,} parameters and saw {found['trained_on']:,} images.",
            table(("run", "steps", "minutes", "GiB at most"), trained),
            f"Device: {found['device']}; torch {found['torch']}; batches of {size['batch']}.",
        ]
    )


# ---------------------------------------------------------------------------------------------------------- picture


def drawn_of(runs: list[Run], classes: int) -> dict[str, Tensor]:
    """A row of images for each model: one noise, one class after the other."""
    labels = torch.arange(2 * classes) % classes
    teacher, *students = runs
    noise = noise_of(teacher.pipe, len(labels), 1)
    found = {f"teacher, {n}": draw(teacher.pipe, noise, n, "auto", labels).x for n in (TEACHER_EVALUATIONS[-1], 2)}
    for run in students:
        found |= {f"{run.name}, {n}": draw(run.pipe, noise, n, labels=labels).x for n in (2, 1)}
    return found


def plot(path: str, found: dict[str, Any], drawn: dict[str, Tensor]) -> None:
    """Frechet distance against evaluations, and below it a row of images for each model."""
    columns = len(next(iter(drawn.values())))
    shape = next(iter(drawn.values())).shape
    with picture(path, 7.5, 3.2 + 0.4 * len(drawn)) as figure:
        above, below = figure.subplots(2, 1, height_ratios=(3.2, 0.4 * len(drawn)))
        for colour, run in zip(("0.4", *COLOURS), found["runs"], strict=False):
            own = [row for row in found["rows"] if row["model"] == run["name"]]
            above.plot(
                [row["nfe"] for row in own], [row["frechet"] for row in own], "o-", ms=4, c=colour, label=run["name"]
            )
        above.axhline(found["rows"][0]["frechet"], color="0.7", lw=0.8, ls=":", label="data")
        counts = sorted({row["nfe"] for row in found["rows"] if row["nfe"]})
        above.set(xscale="log", yscale="log", xlabel="evaluations per image", ylabel="Fréchet distance, 64 features")
        above.set_xticks(counts, [str(n) for n in counts])
        above.set_xticks([], minor=True)
        above.legend(frameon=False, fontsize=7)
        page = grid(torch.cat(list(drawn.values())), columns)
        below.imshow(page, cmap="gray", extent=(0, columns, len(drawn), 0), aspect=shape[2] / shape[3])
        below.set_yticks([row + 0.5 for row in range(len(drawn))], list(drawn), fontsize=7)
        below.set_xticks([])
        below.tick_params(length=0)


def main() -> None:
    options = parser(__doc__, side=0, width=0, batch=0, count=0, minutes=0.0, objectives="ect,lsd,tcd")
    options.add_argument("--images", help="the folder with the data set's files; without it nothing is run")
    options.add_argument("--dataset", choices=("mnist", "cifar10"), default="mnist")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument("--cache", help="keep the runs in this folder")
    options.add_argument("--picture", help="write plot and images here")
    o = options.parse_args()
    if o.images is None:
        print(
            f"few_steps_images was skipped: --images names no folder with the files of {o.dataset}: {WHERE[o.dataset]}"
        )
        return
    try:
        device = device_of(o.device)
        given = {name: getattr(o, name) for name in ("side", "width", "batch", "count", "minutes") if getattr(o, name)}
        size = replace(SIZES[o.dataset, device.torch.type], **given)
        sets = read_sets(Path(o.images), o.dataset, size.side)
        with tempfile.TemporaryDirectory() as scratch:
            work = Work(sets, size, device, Path(o.cache or scratch) / o.dataset)
            found, runs = measured(work, o.objectives.split(","))
            if o.picture:
                plot(o.picture, found, drawn_of(runs, int(sets.train.classes or 0)))
    except InputError as error:
        sys.exit(f"error: {error}")
    emit(o, found, markdown(found))


if __name__ == "__main__":
    main()
