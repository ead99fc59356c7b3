"""One-step synthesis of spectrograms: a consistency student against its teacher, and against regression.

Scores of two or three notes are performed with vibrato, tremolo, attack and loudness that differ each time. A teacher
(encoder, prior mean, EDM decoder) is trained, its decoder distilled to one step as in CoMoSpeech, and a network of the
same size is taught to predict the spectrogram at once. All play scores that none has seen, 16 times each.

    python benchmarks/few_steps_speech.py [--picture plot.png]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import platform
import sys
import time
from argparse import Namespace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from _common import emit, parser, picture, table
from torch import Tensor

from consilience.diffusion.applications.speech.model import Voice, speech_denoiser
from consilience.diffusion.applications.speech.tones import Score, logarithm, random_score, recordings
from consilience.diffusion.applications.speech.training import (
    regressed,
    regression_loss,
    spoken,
    student_loss,
    taught,
    teacher_loss,
)
from consilience.diffusion.metrics import energy_distance
from consilience.diffusion.training import Decay, cosine, train

PLAYED = 16
BEST = 50
"""Steps of the teacher that its student is held against."""


def fitted(model: Any, loss: Any, data: Any, steps: int, lr: float, seed: int, ema: Any) -> tuple[Any, float]:
    """The last average of a training run, and its CPU seconds."""
    begun = time.process_time()
    trained = train(
        model, loss, data, steps=steps, batch_size=32, lr=cosine(lr, steps, steps // 20), seed=seed, ema=ema, clip=1.0,
        log_every=steps, progress=False,
    )  # fmt: skip
    return trained.averages[-1], time.process_time() - begun


def one(options: Namespace, seed: int) -> dict[str, Any]:
    """Teacher, student and regression of one seed, their measures, and a few spectrograms."""
    rng = np.random.default_rng(seed)
    data = recordings([random_score(rng) for _ in range(options.recordings)], rng)
    torch.manual_seed(seed)
    fresh, other = Voice(), Voice()
    voice, teaching = fitted(fresh, teacher_loss, data, options.steps, 2e-3, seed, Decay(0.995))
    regression, regressing = fitted(other, regression_loss, data, options.regression_steps, 2e-3, seed, Decay(0.99))
    with torch.no_grad():
        mean = voice.encoder(data["score"])
    student, distilling = fitted(
        copy.deepcopy(voice.decoder).requires_grad_(True),
        student_loss(speech_denoiser(voice.decoder), options.levels),
        {"x": data["x"], "mean": mean},
        options.student_steps,
        1e-3,
        seed,
        (Decay(0.95, warmup=False), Decay(0.99)),
    )
    seconds = {"teacher": teaching, "student": distilling, "regression": regressing}
    rows, shown = compared(options, voice, student, regression, seed)
    return {"seed": seed, "cpu_seconds": seconds, "rows": rows, "shown": shown}


@torch.no_grad()
def compared(options: Namespace, voice: Voice, student: Any, regression: Voice, seed: int) -> Any:
    """The measures of every way to play the held-out scores, and two performances of two of them for the picture."""
    rng = np.random.default_rng(10_000)  # the same scores and performances for all seeds
    scores = [random_score(rng) for _ in range(options.scores)]
    real, again = played(scores, rng), played(scores, rng)
    table_of = torch.from_numpy(np.stack([score.table() for score in scores])).repeat_interleave(PLAYED, 0)
    mean, generator = voice.encoder(table_of), torch.Generator().manual_seed(seed)
    noise = torch.randn(mean.shape, generator=generator)
    ways = {
        "performances themselves": again,
        "regression": regressed(regression, table_of),
        "encoder's mean": mean,
        **{f"teacher, {n}": taught(voice.decoder, mean, noise, n) for n in (1, 2, 4, BEST)},
        **{f"student, {n}": spoken(student, mean, noise, n, generator) for n in (1, 2, 4)},
    }
    best = ways[f"teacher, {BEST}"]
    rows = {name: measures(x, real, best) for name, x in ways.items()}
    shown = {name: [x[i].tolist() for i in (0, 1, PLAYED, PLAYED + 1)] for name, x in ways.items()}
    return rows, shown


def played(scores: list[Score], rng: np.random.Generator) -> Tensor:
    """Performances [scores * PLAYED, bands, frames], those of a score together."""
    return recordings([score for score in scores for _ in range(PLAYED)], rng)["x"]


def measures(x: Tensor, real: Tensor, best: Tensor) -> dict[str, float]:
    """Against the performances of the same score, and against the teacher's best from the same noise."""
    mine, true = (y.unflatten(0, (-1, PLAYED)) for y in (x, real))
    distance = np.mean([energy_distance(a, b) for a, b in zip(mine, true, strict=True)])
    decibels = 10 / np.log(10) * (logarithm(x) - logarithm(best)).square().mean(1).sqrt().mean()
    return {
        "energy distance": float(distance),
        "spread": float(mine.std(1).mean() / true.std(1).mean()),
        "to teacher": float(decibels),
        "squared error": 100 * float((mine[:, :, None] - true[:, None]).square().mean()),
    }


# --------------------------------------------------------------------------------------------------------- output


def measure(options: Namespace) -> dict[str, Any]:
    """All seeds, one after the other."""
    torch.set_num_threads(1)
    runs = []
    for seed in range(options.seeds):
        runs.append(one(options, seed))
        print(f"seed {seed} done, {time.process_time():.0f} CPU seconds so far", file=sys.stderr)
    return {
        "settings": {name: getattr(options, name) for name in SIZES},
        "runs": runs,
        "cpu_seconds": time.process_time(),
    }


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and range."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(result: dict[str, Any]) -> str:
    """The table of the results page."""
    runs, settings = result["runs"], result["settings"]
    rows = []
    for name in runs[0]["rows"]:
        cells = {key: spread([run["rows"][name][key] for run in runs]) for key in runs[0]["rows"][name]}
        if name == "performances themselves" or name in ("student, 2", "student, 4"):
            cells["to teacher"] = ""  # fresh noise: another performance
        rows.append([name, *cells.values()])
    seconds = ", ".join(
        f"{name} {np.mean([run['cpu_seconds'][name] for run in runs]):.0f}" for name in runs[0]["cpu_seconds"]
    )
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    head = ["evaluations", "energy distance", "spread", "dB to the teacher's 50", "squared error x 100"]
    return (
        f"{sizes}. CPU seconds of training, one thread: {seconds}; {result['cpu_seconds']:.0f} in all. Python "
        f"{platform.python_version()}, torch {version('torch')}. Mean and range over {len(runs)} training seeds.\n\n"
        + table(head, rows)
    )


def draw(result: dict[str, Any], path: str) -> None:
    """Two performances of two scores by each."""
    names = ["performances themselves", "regression", "teacher, 1", "student, 1", f"teacher, {BEST}"]
    shown = result["runs"][0]["shown"]
    with picture(path, 9.0, 7.0) as figure:
        axes = figure.subplots(len(names), 4)
        for row, name in zip(axes, names, strict=True):
            for axis, values in zip(row, shown[name], strict=True):
                axis.imshow(values, origin="lower", aspect="auto", vmin=-0.6, vmax=1.5, cmap="viridis")
                axis.set(xticks=[], yticks=[])
            row[0].set_ylabel(name.replace("performances themselves", "performances").replace(", ", ",\n"), fontsize=8)
        for axis, title in zip(axes[0], ("score 1", "score 1, again", "score 2", "score 2, again"), strict=True):
            axis.set_title(title, fontsize=9)


SIZES = {
    "steps": 520, "student_steps": 260, "regression_steps": 200, "levels": 20, "recordings": 3000, "scores": 24,
}  # fmt: skip

if __name__ == "__main__":
    options = parser(__doc__, seeds=3, picture="", **SIZES).parse_args()
    result = measure(options)
    emit(options, result, markdown(result))
    if options.picture:
        draw(result, options.picture)
