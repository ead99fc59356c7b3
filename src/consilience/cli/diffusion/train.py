"""``consilience diffusion train``."""

from __future__ import annotations

import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from consilience.cli.diffusion.extra import extra
from consilience.errors import InputError


def run(config: Path | None, flags: dict[str, Any], *, as_json: bool) -> None:
    """Follow the recipe of the file and the flags, and say where the model is."""
    settings = ({} if config is None else _read(config)) | flags
    out = settings.pop("out", "diffusion-run")
    where = "flags" if config is None else str(config)
    if not isinstance(out, str):
        raise InputError(f"{where}: out = {out!r}: expected text")
    with extra():
        from consilience.diffusion.pictures import read
        from consilience.diffusion.recipe import Recipe, follow

        recipe = Recipe.of(settings, where)
        data = read(recipe.data)
        shape = " x ".join(map(str, data.x.shape[1:]))
        classes = "no classes" if recipe.unconditional or data.classes is None else f"{data.classes} classes"
        print(f"{data.source}: {len(data.x)} images of {shape}, {classes}", file=sys.stderr)
        start = time.process_time()
        made = follow(recipe, data, Path(out))
        seconds = time.process_time() - start
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
