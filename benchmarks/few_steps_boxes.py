"""Finding objects by denoising boxes in one and four steps: consistency between noise levels against plain denoising.

Generated scenes of rectangles and ellipses, 32 x 32 pixels. The same detector is trained for the same CPU seconds as a
consistency model and as DiffusionDet is, by the set loss at one time of the cosine schedule; beside them the former
without the distance of its outputs, and the latter with as many optimizer steps as the former made. Found are objects
in scenes that none has seen, from random boxes, in one step and in four. With `--cache` a finished run is kept.

    python benchmarks/few_steps_boxes.py [--picture plot.png] [--cache runs.json]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import math
import platform
import sys
import time
from argparse import Namespace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import COLOURS, emit, parser, picture, table

from consilience.diffusion.applications.boxes.geometry import corners
from consilience.diffusion.applications.boxes.matching import Detections, average_precision, mean_iou
from consilience.diffusion.applications.boxes.model import CONSISTENCY, DIFFUSION, Detector
from consilience.diffusion.applications.boxes.sampling import detect
from consilience.diffusion.applications.boxes.scenes import SIZE, Scenes, scenes
from consilience.diffusion.applications.boxes.training import consistency_loss, diffusion_loss
from consilience.diffusion.training.ema import EMA, Decay
from consilience.record import replacing

STEPS = (1, 4)
SHOWN = 4
BATCH, RATE = 16, 3e-3
WAYS = {
    "consistency": (consistency_loss, CONSISTENCY),
    "diffusion, DDIM": (diffusion_loss, DIFFUSION),
    "consistency, no distance": (partial(consistency_loss, weight=0.0), CONSISTENCY),
    "diffusion, equal steps": (diffusion_loss, DIFFUSION),
}


def fitted(loss: Any, made: Scenes, seed: int, seconds: float, steps: int | None) -> tuple[Detector, int]:
    """The averaged detector after so many CPU seconds, or steps where they are given, and the steps it made."""
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(100 + seed)
    detector, names = Detector(), ("x", "boxes", "labels", "counts")
    optimizer = torch.optim.Adam(detector.parameters(), lr=RATE)
    average, done, begun = EMA(detector, Decay(0.99)), 0, time.process_time()
    while (share := done / steps if steps else (time.process_time() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, share / 0.05 + 1e-2) * (1 + math.cos(math.pi * share)) / 2
        rows = torch.randint(len(made.images), (BATCH,), generator=draws)
        result = loss(detector, {name: part[rows] for name, part in zip(names, made, strict=True)}, draws)
        optimizer.zero_grad(set_to_none=True)
        (result[0] if isinstance(result, tuple) else result).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        done += 1
        average.update(detector, done)
    return average.module, done


def one(options: Namespace, name: str, made: Scenes, held_out: Scenes, seed: int, steps: int | None) -> dict[str, Any]:
    """One training run and what it finds; taken from the cache where it is there."""
    file = Path(options.cache) / f"{name}-{seed}.json" if options.cache else None
    if file is not None and file.exists():
        return dict(json.loads(file.read_text()))
    loss, noising = WAYS[name]
    begun = time.process_time()
    detector, done = fitted(loss, made, seed, options.seconds, steps)
    result: dict[str, Any] = {"way": name, "seed": seed, "steps": done, "cpu_seconds": time.process_time() - begun}
    truth = held_out.boxes, held_out.labels, held_out.counts
    for count in STEPS:
        found = detect(detector, held_out.images, noising, count, torch.Generator().manual_seed(1000 + seed))
        result[str(count)] = {
            "AP50": average_precision(found, *truth, 0.5),
            "AP75": average_precision(found, *truth, 0.75),
            "IoU": mean_iou(found, held_out.boxes, held_out.counts),
            "shown": [kept(seen) for seen in found[:SHOWN]],
        }
    print(f"{name}, seed {seed}: {result['cpu_seconds']:.0f} CPU seconds", file=sys.stderr)
    if file is not None:
        with replacing(file) as out:
            out.write(json.dumps(result).encode())
    return result


def kept(seen: Detections) -> list[list[float]]:
    """The detections scored at least half the scene's best, for the picture: corners and class."""
    good = seen.scores >= seen.scores.max() / 2
    return torch.cat([corners(seen.boxes[good]), seen.labels[good, None].float()], 1).tolist()


def measure(options: Namespace) -> dict[str, Any]:
    """All ways and seeds, the ways taking turns."""
    torch.set_num_threads(1)
    made = scenes(options.scenes, np.random.default_rng(0))
    held_out = scenes(options.held_out, np.random.default_rng(1))
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        first = one(options, "consistency", made, held_out, seed, None)
        rest = [name for name in WAYS if name != "consistency"]
        equal = {"diffusion, equal steps": first["steps"]}
        runs += [first, *(one(options, name, made, held_out, seed, equal.get(name)) for name in rest)]
    return {
        "settings": {name: getattr(options, name) for name in SIZES},
        "runs": runs,
        "pictures": held_out.images[:SHOWN].permute(0, 2, 3, 1).tolist(),
        "cpu_seconds": sum(run["cpu_seconds"] for run in runs),
    }


# --------------------------------------------------------------------------------------------------------- output


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and range."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(result: dict[str, Any]) -> str:
    """The table of the results page."""
    rows = []
    for name in WAYS:
        runs = [run for run in result["runs"] if run["way"] == name]
        for count in STEPS:
            cells = [spread([run[str(count)][key] for run in runs]) for key in ("AP50", "AP75", "IoU")]
            made, seconds = (f"{np.mean([run[key] for run in runs]):.0f}" for key in ("steps", "cpu_seconds"))
            rows.append([name, count, *cells, made, seconds])
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["settings"].items())
    seeds = len({run["seed"] for run in result["runs"]})
    head = ["trained as", "steps", "AP50", "AP75", "mean IoU", "optimizer steps", "CPU s"]
    return (
        f"{sizes}; {result['cpu_seconds']:.0f} CPU seconds of training in all. Python {platform.python_version()}, "
        f"torch {version('torch')}, one thread. Mean and range over {seeds} training seeds.\n\n" + table(head, rows)
    )


def draw(result: dict[str, Any], path: str) -> None:
    """What the first seed's detectors find in four scenes, in one step."""
    names = ("consistency", "diffusion, DDIM")
    first = {run["way"]: run for run in reversed(result["runs"])}
    with picture(path, 7.0, 7.4) as figure:
        axes = figure.subplots(SHOWN, 2 * len(names))
        for place, (name, count) in enumerate((name, count) for name in names for count in STEPS):
            for axis, image, seen in zip(
                axes[:, place], result["pictures"], first[name][str(count)]["shown"], strict=True
            ):
                axis.imshow((np.array(image) / 2 + 0.5).clip(0, 1), extent=(0, SIZE, SIZE, 0), interpolation="nearest")
                axis.set(xticks=[], yticks=[], xlim=(0, SIZE), ylim=(SIZE, 0))
                for x0, y0, x1, y1, label in seen:
                    style = "-" if label == 0 else ":"
                    edge = np.array([[x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0]]) * SIZE
                    axis.plot(*edge, style, color="white", linewidth=2.6)
                    axis.plot(*edge, style, color=COLOURS[0] if label == 0 else COLOURS[1], linewidth=1.3)
            axes[0, place].set_title(f"{name.split(',')[0]},\n{count} step{'s' if count > 1 else ''}", fontsize=9)


SIZES = {"seconds": 25.0, "scenes": 2500, "held_out": 300}

if __name__ == "__main__":
    options = parser(__doc__, seeds=3, picture="", cache="", **SIZES).parse_args()
    result = measure(options)
    emit(options, result, markdown(result))
    if options.picture:
        draw(result, options.picture)
