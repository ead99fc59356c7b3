"""``consilience diffusion train``."""

from __future__ import annotations

import json
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.cli.diffusion.extra import extra
from consilience.errors import InputError

if TYPE_CHECKING:
    from consilience.diffusion.pictures import Images
    from consilience.diffusion.recipe import Made


def run(config: Path | None, flags: dict[str, Any], *, as_json: bool) -> None:
    """Follow the recipe of the file and the flags, and say where the model is."""
    settings, out, where = settings_of(config, flags, "diffusion-run")
    with extra():
        from consilience.diffusion.pictures import read
        from consilience.diffusion.recipe import follow
        from consilience.diffusion.settings import Recipe

        recipe = Recipe.of(settings, where)
        data = read(recipe.data)
        say_data(data, recipe.unconditional)
        start = time.process_time()
        made = follow(recipe, data, Path(out))
        seconds = time.process_time() - start
    report(made, out, seconds, as_json)


def settings_of(config: Path | None, flags: dict[str, Any], folder: str) -> tuple[dict[str, Any], str, str]:
    """The settings of the file and the flags, the folder to write to (by default ``folder``), and what to call them."""
    settings = ({} if config is None else _read(config)) | flags
    out = settings.pop("out", folder)
    where = "flags" if config is None else str(config)
    if not isinstance(out, str):
        raise InputError(f"{where}: out = {out!r}: expected text")
    return settings, out, where


def say_data(data: Images, unconditional: bool) -> None:
    """What is learned from, on standard error."""
    shape = " x ".join(map(str, data.x.shape[1:]))
    classes = "no classes" if unconditional or data.classes is None else f"{data.classes} classes"
    print(f"{data.source}: {len(data.x)} images of {shape}, {classes}", file=sys.stderr)


def report(made: Made, out: str, seconds: float, as_json: bool) -> None:
    """What came out of a run."""
    parameters = sum(part.numel() for part in made.pipe.network.parameters())
    said = f"{made.steps} steps, {seconds:.0f} CPU seconds, {parameters:,} parameters, loss {made.loss:.4g}"
    print(said, file=sys.stderr)
    facts = {"out": out, "steps": made.steps, "cpu_seconds": round(seconds, 1), "loss": made.loss}
    print(json.dumps(facts | {"parameters": parameters}) if as_json else f"model: {out}")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{path}: cannot be read ({reason}); expected settings in TOML, or in JSON as .json"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected settings by name")
    return found
