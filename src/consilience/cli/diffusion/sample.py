"""``consilience diffusion sample``."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.cli.diffusion.extra import check_steps, extra, load
from consilience.cli.progress import Counter
from consilience.errors import InputError
from consilience.record import check_place

if TYPE_CHECKING:
    from torch import Tensor

    from consilience.diffusion.pipeline import ImagePipeline
    from consilience.diffusion.sampling import Drawn, Guidance

KEPT = 8
"""Images whose trajectory a folder gets."""


def run(
    model: Path | None,
    *,
    steps: int,
    count: int,
    seed: int,
    out: Path,
    method: str | None,
    label: str | None,
    guidance: float,
    apg: bool,
    as_json: bool,
) -> None:
    """Draw the images and write them."""
    picture = _is_picture(out)
    check_steps(steps)
    _check_guidance(guidance, apg)
    with extra():
        from consilience.diffusion.sampling import Guidance, noise_of

        pipe, name = load(model, steps, few=guidance == 1 and method in (None, "consistency"))
        noise = noise_of(pipe, count, seed)
        labels = _labels(pipe, label, count)
        limit = float("inf") if not apg or labels is None else _norm(pipe, labels)
        how = Guidance(guidance, apg, limit)
        start = time.perf_counter()
        drawn = _drawn(pipe, noise, labels, how, steps=steps, method=method, seed=seed, states=not picture)
        _check_finite(drawn, name, guidance)
        seconds = round(time.perf_counter() - start, 3)
        facts = {"model": name, "count": count, "seed": seed, "method": drawn.method, "why": drawn.why}
        facts |= {"nfe": drawn.nfe, "guidance": guidance, "apg": round(limit, 4) if apg else None}
        facts |= {"seconds": seconds, "out": str(out)}
        columns = _columns(pipe, label, count)
        _write_picture(drawn, out, columns) if picture else _write_folder(drawn, out, columns, facts)
    why = f" ({drawn.why})" if drawn.why else ""
    print(f"{name}: {drawn.method}{why}, nfe {drawn.nfe}, {seconds} s", file=sys.stderr)
    print(json.dumps(facts) if as_json else f"{count} images: {out}")


def _check_guidance(guidance: float, apg: bool) -> None:
    if apg and guidance == 1:
        raise InputError("--apg changes how --guidance acts: give a scale, such as --guidance 8")
    if not math.isfinite(guidance):
        raise InputError(f"guidance {guidance}: must be a finite number")


def _drawn(
    pipe: ImagePipeline,
    noise: Tensor,
    labels: Tensor | None,
    how: Guidance,
    *,
    steps: int,
    method: str | None,
    seed: int,
    states: bool,
) -> Drawn:
    from consilience.diffusion.sampling import draw

    keep = min(KEPT, len(noise)) if states else 0
    with Counter("sampling", "images", len(noise)) as counter:
        return draw(pipe, noise, steps, method, labels, how, seed=seed, keep=keep, on_images=counter.update)


def _check_finite(drawn: Drawn, name: str, guidance: float) -> None:
    """Raise InputError where images are no numbers, so that nothing is written."""
    broken = int((~drawn.x.isfinite().flatten(1).all(1)).sum())
    if broken:
        why = "the weights may be damaged" if guidance == 1 else f"guidance {guidance:g} may be more than it bears"
        raise InputError(f"{name}: {broken} of {len(drawn.x)} images are not finite; {why}, or try another method")


def _is_picture(out: Path) -> bool:
    if out.suffix.lower() == ".png":
        check_place(out)
        return True
    if out.suffix and not out.is_dir():
        raise InputError(f"{out}: expected the name of a .png file, or of a folder")
    return False


def _labels(pipe: ImagePipeline, label: str | None, count: int) -> Tensor | None:
    """The class of each image: those named in turn, all by default."""
    import torch

    if not pipe.classes:
        if label not in (None, "none"):
            raise InputError(f"label {label}: this model has no classes")
        return None
    if label == "none":
        return None
    if label is None:
        return torch.arange(count) % pipe.classes
    try:
        named = [int(part) for part in label.split(",")]
    except ValueError:
        named = [-1]
    if not all(0 <= one < pipe.classes for one in named):
        raise InputError(f"label {label}: expected classes from 0 to {pipe.classes - 1}, such as 0,3,7, or none")
    return torch.tensor(named)[torch.arange(count) % len(named)]


def _columns(pipe: ImagePipeline, label: str | None, count: int) -> int | None:
    """As many as there are classes in turn, so that each has a column."""
    turn = 1 if label == "none" else len(label.split(",")) if label else pipe.classes
    return turn if 1 < turn <= 16 and count > turn else None


def _norm(pipe: ImagePipeline, labels: Tensor) -> float:
    """The limit that `apg` is run with: how far apart the two predictions are half-way of a plain run, the median."""
    from consilience.diffusion.sampling import usual_difference

    return usual_difference(pipe, labels[:32])


def _write_picture(drawn: Drawn, out: Path, columns: int | None) -> None:
    from consilience.diffusion.pictures import grid, save

    save(grid(drawn.x, columns), out)


def _write_folder(drawn: Drawn, out: Path, columns: int | None, facts: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    from consilience.diffusion.folders import filling
    from consilience.diffusion.pictures import grid, strip

    tensors = {"images": drawn.x, "noise": drawn.noise}
    if drawn.labels is not None:
        tensors["labels"] = drawn.labels
    path = {"states": torch.stack(drawn.states), "times": torch.tensor(drawn.times, dtype=torch.float64)}
    with filling(out) as folder:
        save_file({name: part.contiguous() for name, part in tensors.items()}, folder / "samples.safetensors")
        save_file(path, folder / "trajectory.safetensors")
        if drawn.x.shape[1] in (1, 3):
            grid(drawn.x, columns).save(folder / "samples.png")
            strip(drawn.states, drawn.scales).save(folder / "trajectory.png")
        (folder / "samples.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
