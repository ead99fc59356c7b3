"""Finding objects by denoising boxes in one and four steps: consistency between noise levels against plain denoising.

Generated scenes of rectangles and ellipses among lines and blobs, 48 x 48 pixels. One backbone is trained beforehand
for all. From it the same detector is trained for the same CPU seconds as a consistency model, by the set loss at two
noise levels and the distance between them, and as DiffusionDet is, by the set loss at one time of the cosine schedule.
Controls: both with more boxes, the former without the distance, the latter with two times of each scene, and with as
many optimizer steps as the consistency model made. Found are objects in scenes that none has seen, from random boxes,
in one step and in four. With `--cache` a finished run is kept.

    python benchmarks/few_steps_boxes.py [--picture plot.png] [--cache DIR]
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
from typing import Any, TypeVar, cast

import numpy as np
import torch
from _common import COLOURS, emit, parser, picture, table
from scipy import stats  # type: ignore[import-untyped]

from consilience.diffusion.applications.boxes.geometry import corners
from consilience.diffusion.applications.boxes.matching import Detections, average_precision, mean_iou
from consilience.diffusion.applications.boxes.model import CONSISTENCY, DIFFUSION, Detector, Noising
from consilience.diffusion.applications.boxes.pretraining import Dense, dense_loss
from consilience.diffusion.applications.boxes.sampling import detect
from consilience.diffusion.applications.boxes.scenes import SIZE, Scenes, scenes
from consilience.diffusion.applications.boxes.training import consistency_loss, diffusion_loss
from consilience.diffusion.training.ema import EMA, Decay
from consilience.record import replacing

M = TypeVar("M", bound=torch.nn.Module)
STEPS = (1, 4)
SHOWN = 4
BATCH, RATE = 8, 3e-3
MEASURES = ("AP", "AP50", "AP75", "IoU")
OVERLAPS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
FIRST, BASELINE = "consistency", "diffusion, DDIM"
TWO_LOOKS, EQUAL, MORE = "diffusion, two looks", "diffusion, equal steps", ", 32 boxes"
WAYS = {
    FIRST: (consistency_loss, CONSISTENCY, 24),
    BASELINE: (diffusion_loss, DIFFUSION, 24),
    TWO_LOOKS: (partial(diffusion_loss, looks=2), DIFFUSION, 24),
    FIRST + MORE: (partial(consistency_loss, proposals=32), CONSISTENCY, 32),
    BASELINE + MORE: (partial(diffusion_loss, proposals=32), DIFFUSION, 32),
    "consistency, no distance": (partial(consistency_loss, weight=0.0), CONSISTENCY, 24),
    EQUAL: (diffusion_loss, DIFFUSION, 24),
}
"""How it is trained, how boxes are noised, and how many random boxes it has, in training and afterwards."""


def fitted(model: M, loss: Any, made: Scenes, seed: int, seconds: float, steps: int | None = None) -> tuple[M, int]:
    """The averaged model after so many CPU seconds, or steps where they are given, and the steps it made."""
    draws, names = torch.Generator().manual_seed(seed), ("x", "boxes", "labels", "counts")
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    average, done, begun = EMA(model, Decay(0.99)), 0, time.process_time()
    while (share := done / steps if steps else (time.process_time() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, share / 0.05 + 1e-2) * (1 + math.cos(math.pi * share)) / 2
        rows = torch.randint(len(made.images), (BATCH,), generator=draws)
        result = loss(model, {name: part[rows] for name, part in zip(names, made, strict=True)}, draws)
        optimizer.zero_grad(set_to_none=True)
        (result[0] if isinstance(result, tuple) else result).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 1
        average.update(model, done)
    return cast(M, average.module), done


def pretrained(options: Namespace, made: Scenes) -> dict[str, Any]:
    """The weights of the backbone that all detectors begin from and what they took; from the cache if it is there."""
    file = Path(options.cache) / "backbone.pt" if options.cache else None
    if file is not None and file.exists():
        return dict(torch.load(file))
    torch.manual_seed(0)
    begun = time.process_time()
    dense, _ = fitted(Dense(), dense_loss, made, 0, options.backbone_seconds)
    result = {"backbone": dense.backbone.state_dict(), "cpu_seconds": time.process_time() - begun}
    if file is not None:
        with replacing(file) as out:
            torch.save(result, out)
    return result


def trained(
    options: Namespace, name: str, made: Scenes, backbone: dict[str, Any], seed: int, steps: int | None
) -> tuple[Detector, dict[str, Any]]:
    """A detector trained in one way from the pretrained backbone, and what that took."""
    torch.manual_seed(seed)
    detector = Detector()
    detector.backbone.load_state_dict(backbone)
    begun = time.process_time()
    found, done = fitted(detector, WAYS[name][0], made, 100 + seed, options.seconds, steps)
    return found, {"way": name, "seed": seed, "steps": done, "cpu_seconds": time.process_time() - begun}


def judged(detector: Detector, held_out: Scenes, noising: Noising, boxes: int, steps: int, seed: int) -> dict[str, Any]:
    """The measures of what a detector finds in so many steps, and some of it for the picture."""
    found = detect(detector, held_out.images, noising, steps, torch.Generator().manual_seed(1000 + seed), boxes)
    truth = held_out.boxes, held_out.labels, held_out.counts
    precisions = [average_precision(found, *truth, threshold) for threshold in OVERLAPS]
    return {
        "AP": float(np.mean(precisions)),
        "AP50": precisions[OVERLAPS.index(0.5)],
        "AP75": precisions[OVERLAPS.index(0.75)],
        "IoU": mean_iou(found, held_out.boxes, held_out.counts),
        "shown": [kept(seen) for seen in found[:SHOWN]],
    }


def one(
    options: Namespace, name: str, made: Scenes, held_out: Scenes, backbone: Any, seed: int, steps: int | None = None
) -> dict[str, Any]:
    """One training run and what it finds; taken from the cache where it is there."""
    file = Path(options.cache) / f"{name}-{seed}.json" if options.cache else None
    if file is not None and file.exists():
        return dict(json.loads(file.read_text()))
    detector, result = trained(options, name, made, backbone, seed, steps)
    result |= {str(count): judged(detector, held_out, *WAYS[name][1:], count, seed) for count in STEPS}
    seen = ", ".join(f"AP {result[str(count)]['AP']:.3f} in {count}" for count in STEPS)
    print(f"{name}, seed {seed}: {result['cpu_seconds']:.0f} CPU seconds, {seen}", file=sys.stderr, flush=True)
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
    begun = pretrained(options, made)
    run = partial(one, options, made=made, held_out=held_out, backbone=begun["backbone"])
    runs: list[dict[str, Any]] = []
    for seed in range(10, 10 + options.seeds):
        first = run(FIRST, seed=seed)
        equal = {EQUAL: first["steps"]}
        runs += [first, *(run(name, seed=seed, steps=equal.get(name)) for name in WAYS if name != FIRST)]
    return {
        "settings": {name: getattr(options, name) for name in SIZES},
        "runs": runs,
        "pictures": held_out.images[:SHOWN].permute(0, 2, 3, 1).tolist(),
        "cpu_seconds": begun["cpu_seconds"] + sum(run["cpu_seconds"] for run in runs),
    }


# --------------------------------------------------------------------------------------------------------- output


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and range."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def of_way(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The runs of one way, by seed."""
    return sorted((run for run in result["runs"] if run["way"] == name), key=lambda run: run["seed"])


def markdown(result: dict[str, Any]) -> str:
    """The tables of the results page."""
    rows = []
    for name in WAYS:
        runs = of_way(result, name)
        made, seconds = (f"{np.mean([run[key] for run in runs]):.0f}" for key in ("steps", "cpu_seconds"))
        for count in STEPS:
            cells = [spread([run[str(count)][key] for run in runs]) for key in MEASURES]
            rows.append([name, len(runs), count, *cells, made, seconds])
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["settings"].items())
    head = ["trained as", "seeds", "steps", "AP", "AP50", "AP75", "mean IoU", "optimizer steps", "CPU s"]
    return (
        f"{sizes}; {result['cpu_seconds']:.0f} CPU seconds of training in all. Python {platform.python_version()}, "
        f"torch {version('torch')}, one thread. Mean and range over training seeds.\n\n"
        + "\n\n".join([table(head, rows), leads(result)])
    )


def leads(result: dict[str, Any]) -> str:
    """How far one way is ahead of another in AP, seed by seed: 95 % intervals by Student's t from three seeds on."""
    compared = [(FIRST, name) for name in WAYS if name != FIRST and not name.endswith(MORE)]
    compared += [(FIRST + MORE, BASELINE + MORE), (TWO_LOOKS, BASELINE), (BASELINE + MORE, BASELINE)]
    rows: list[list[object]] = []
    for name, other in compared:
        for count in STEPS:
            found = {run["seed"]: run[str(count)]["AP"] for run in of_way(result, other)}
            both = [run for run in of_way(result, name) if run["seed"] in found]
            ahead = np.array([run[str(count)]["AP"] - found[run["seed"]] for run in both])
            half = stats.t.ppf(0.975, len(ahead) - 1) * ahead.std(ddof=1) / math.sqrt(len(ahead))
            interval = f" ({ahead.mean() - half:+.3f} to {ahead.mean() + half:+.3f})" if len(ahead) > 2 else ""
            rows.append(
                [
                    f"{name} over {other}",
                    count,
                    f"{ahead.mean():+.3f}{interval}",
                    f"{int((ahead > 0).sum())} of {len(ahead)}",
                ]
            )
    return table(["lead of", "steps", "AP, mean and 95 % interval", "seeds ahead"], rows)


def draw(result: dict[str, Any], path: str) -> None:
    """What the first seed's detectors find in four scenes, in one step."""
    names = (FIRST, BASELINE)
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
                    axis.plot(*edge, color="white", linewidth=2.6)
                    axis.plot(*edge, style, color=COLOURS[0] if label == 0 else COLOURS[1], linewidth=1.3)
            axes[0, place].set_title(f"{name.split(',')[0]},\n{count} step{'s' if count > 1 else ''}", fontsize=9)


SIZES = {"seconds": 40.0, "backbone_seconds": 60.0, "scenes": 3000, "held_out": 300}

if __name__ == "__main__":
    options = parser(__doc__, seeds=5, picture="", cache="", **SIZES).parse_args()
    result = measure(options)
    emit(options, result, markdown(result))
    if options.picture:
        draw(result, options.picture)
