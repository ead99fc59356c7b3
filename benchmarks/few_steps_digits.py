"""Few-step students of the digits model: made by `consilience diffusion distill`, measured at 1, 2 and 4 evaluations.

The tables of docs/results/few-steps-digits.md. Images are compared with half of scikit-learn's digits by 16 features of
a small classifier, as in benchmarks/digits.py; all models see the same noise and classes. The first objective is
trained from several seeds, the others from one. Runs are kept in the cache folder, and taken up where they stopped.

    python benchmarks/few_steps_digits.py [--cache folder] [--plot plot.png] [--pictures folder]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from _common import COLOURS, emit, parser, picture, table
from scipy import stats
from torch import Tensor

from consilience.diffusion.digits import teacher
from consilience.diffusion.pictures import Images, grid, read, save
from consilience.diffusion.pipeline import ImagePipeline, load
from consilience.diffusion.quality import Classifier, classifier, halves, quality
from consilience.diffusion.recipe import distil
from consilience.diffusion.sampling import draw, noise_of
from consilience.diffusion.settings import Distillation

EVALUATIONS = (1, 2, 4)
MANY = 35
TEACHER_METHODS = {"teacher, heun": "heun", "teacher, auto": "auto"}


def student(objective: str, seed: int, steps: int, data: Images, cache: Path) -> tuple[ImagePipeline, float]:
    """A student and the CPU seconds that it took, made now or taken from the cache."""
    folder = cache / f"{objective}-{steps}-{seed}"
    spent = folder / "run" / "cpu_seconds.json"
    before = json.loads(spent.read_text()) if spent.exists() else 0.0
    if not (folder / "model_index.json").exists():
        recipe = Distillation(objective=objective, seed=seed, steps=steps, sample_every=steps)
        start = time.process_time()
        try:
            distil(recipe, data, folder)
        finally:
            before += time.process_time() - start
            spent.write_text(json.dumps(before))
    return load(folder), before


class Judge:
    """Measures what a pipeline draws of one noise and one set of classes."""

    def __init__(self, data: Images, count: int) -> None:
        self.judge: Classifier = classifier(data)
        real, other = halves(data)
        assert other.labels is not None
        self.real, self.other, self.labels = real.x, other.x[:count], other.labels[:count]

    def row(self, name: str, pipe: ImagePipeline, evaluations: int, method: str | None = None) -> dict[str, Any]:
        """Quality at a number of evaluations."""
        drawn = draw(pipe, noise_of(pipe, len(self.labels), 0), evaluations, method, self.labels)
        return {"model": name, "nfe": drawn.nfe, **self.of(drawn.x)}

    def of(self, x: Tensor) -> dict[str, Any]:
        """Of images."""
        right = (self.judge.probabilities(x).argmax(1) == self.labels[: len(x)]).double().mean()
        return asdict(quality(self.judge, self.real, x)) | {"right": float(right)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of the 95 % interval of Student's t for the mean)."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values), half


def measured(objectives: dict[str, int], seeds: int, count: int, data: Images, cache: Path) -> dict[str, Any]:
    """All rows: data, teacher, students."""
    judge, source = Judge(data, count), teacher()
    rows = [{"model": "data", "nfe": "", **judge.of(judge.other)}]
    rows += [judge.row(name, source, MANY, method) for name, method in TEACHER_METHODS.items()]
    rows += [judge.row("teacher, auto", source, n, "auto") for n in EVALUATIONS]
    students: list[dict[str, Any]] = []
    seconds: dict[str, list[float]] = {name: [] for name in objectives}
    levels: dict[str, list[Any]] = {name: [] for name in objectives}
    for place, (objective, steps) in enumerate(objectives.items()):
        for seed in range(seeds if place == 0 else 1):
            pipe, spent = student(objective, seed, steps, data, cache)
            seconds[objective].append(spent)
            levels[objective].append(pipe.scheduler.config["levels"])
            students += [{"seed": seed} | judge.row(objective, pipe, n) for n in EVALUATIONS]
    return {
        "rows": rows,
        "students": students,
        "seconds": seconds,
        "levels": levels,
        "steps": objectives,
        "count": count,
    }


FIELDS = ("frechet", "precision", "recall", "confidence", "entropy", "right")


def markdown(found: dict[str, Any]) -> str:
    """The tables: all models, and the seeds of the first objective."""
    best, reference = _reference(found)
    shown = [
        [row["model"], row["nfe"], *_values(row), f"{row['frechet'] / reference:.2f}" if row["nfe"] else ""]
        for row in found["rows"]
    ]
    for objective, steps in found["steps"].items():
        for n in EVALUATIONS:
            own = [row for row in found["students"] if row["model"] == objective and row["nfe"] == n]
            mean = {name: fmean(row[name] for row in own) for name in FIELDS}
            label = f"{objective}, {steps} steps" + (f", {len(own)} seeds" if len(own) > 1 else "")
            shown.append([label, n, *_values(mean), f"{mean['frechet'] / reference:.2f}"])
    head = ("model", "nfe", "Fréchet", "precision", "recall", "confidence", "entropy", "right, %", "over teacher's")
    spread = []
    for n in EVALUATIONS:
        own = [row["frechet"] for row in found["students"] if row["model"] == best and row["nfe"] == n]
        mean, half = interval(own) if len(own) > 1 else (own[0], math.nan)
        low, high = mean - half, mean + half
        gap = f"{mean - reference:+.3f}"
        spread.append([n, *(f"{v:.3f}" for v in own), f"{mean:.3f}", f"{low:.3f} to {high:.3f}", gap])
    seeds = len(spread[0]) - 4
    costs = ", ".join(f"{name} {fmean(spent):.0f} s" for name, spent in found["seconds"].items())
    return "\n\n".join(
        [
            table(head, shown),
            f"{found['count']} images, one noise. CPU seconds for a student, with the search for levels: {costs}.",
            table(("nfe", *(f"seed {i}" for i in range(seeds)), "mean", "95 % interval", "minus teacher's"), spread),
            f"{best}: Fréchet distance by seed; the interval is Student's t for the mean of the seeds.",
        ]
    )


def _values(row: dict[str, Any]) -> list[str]:
    return [f"{100 * row[name]:.1f}" if name == "right" else f"{row[name]:.3f}" for name in FIELDS]


def _reference(found: dict[str, Any]) -> tuple[str, float]:
    """The first objective, and the best distance of the teacher at many evaluations."""
    return next(iter(found["steps"])), min(row["frechet"] for row in found["rows"] if row["nfe"] and row["nfe"] > 30)


def plot(path: str, found: dict[str, Any]) -> None:
    """Frechet distance against evaluations: the teacher, the students, the data."""
    best, reference = _reference(found)
    with picture(path, 6.0, 3.4) as figure:
        axis = figure.subplots()
        line = [row for row in found["rows"] if row["model"] == "teacher, auto" and row["nfe"] in EVALUATIONS]
        line.sort(key=lambda row: row["nfe"])
        axis.plot([row["nfe"] for row in line], [row["frechet"] for row in line], "s--", c="0.4", label="teacher, auto")
        for colour, objective in zip(COLOURS, found["steps"], strict=False):
            own = [
                [r["frechet"] for r in found["students"] if (r["model"], r["nfe"]) == (objective, n)]
                for n in EVALUATIONS
            ]
            means = [fmean(values) for values in own]
            axis.plot(EVALUATIONS, means, "o-", ms=4, c=colour, label=objective)
            if objective == best and len(own[0]) > 1:
                axis.errorbar(
                    EVALUATIONS, means, [interval(values)[1] for values in own], fmt="none", c=colour, capsize=3
                )
        axis.axhline(reference, color="0.4", lw=0.8, label=f"teacher, {MANY}")
        axis.axhline(found["rows"][0]["frechet"], color="0.7", lw=0.8, ls=":", label="data")
        axis.set(xscale="log", xlabel="evaluations per image", ylabel="Fréchet distance, 16 features", ylim=(0, None))
        axis.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
        axis.set_xticks([], minor=True)
        axis.legend(frameon=False, fontsize=7)


def pictures(folder: Path, objectives: dict[str, int], data: Images, cache: Path) -> None:
    """Digits of one noise: of the teacher after many evaluations, of the first student after one and two."""
    source = teacher()
    best, steps = next(iter(objectives.items()))
    pipe, _ = student(best, 0, steps, data, cache)
    labels = torch.arange(40) % 10
    noise = noise_of(source, 40, 1)
    save(grid(draw(source, noise, MANY, "heun", labels).x, 10), folder / f"few-steps-digits-teacher-{MANY}.png")
    for n in (1, 2):
        save(grid(draw(source, noise, n, "auto", labels).x, 10), folder / f"few-steps-digits-teacher-{n}.png")
        save(grid(draw(pipe, noise, n, labels=labels).x, 10), folder / f"few-steps-digits-{n}.png")


def main() -> None:
    options = parser(__doc__, count=512, seeds=5, objectives="ect:250,sct:250,cm:150,lsd:100")
    options.add_argument("--cache", help="keep the students in this folder")
    options.add_argument("--plot", help="write the plot here")
    options.add_argument("--pictures", help="write pictures of digits into this folder")
    o = options.parse_args()
    torch.set_num_threads(1)
    objectives = {name: int(steps) for name, steps in (part.split(":") for part in o.objectives.split(","))}
    data = read("digits")
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(o.cache or scratch)
        found = measured(objectives, o.seeds, o.count, data, cache)
        if o.plot:
            plot(o.plot, found)
        if o.pictures:
            pictures(Path(o.pictures), objectives, data, cache)
    emit(o, found, markdown(found))


if __name__ == "__main__":
    main()
