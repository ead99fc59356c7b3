"""``consilience diffusion distill``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from consilience.cli.diffusion.extra import extra
from consilience.cli.diffusion.train import report, say_data, settings_of


def run(config: Path | None, flags: dict[str, Any], *, as_json: bool) -> None:
    """Make the student of the file and the flags, and say where it is and how it is sampled."""
    settings, out, where = settings_of(config, flags, "diffusion-student")
    with extra():
        from consilience.diffusion.pictures import read
        from consilience.diffusion.recipe import distil
        from consilience.diffusion.settings import Distillation

        recipe = Distillation.of(settings, where)
        data = read(recipe.data)
        say_data(data, False)
        start = time.process_time()
        made = distil(recipe, data, Path(out))
        seconds = time.process_time() - start
    config_of = made.pipe.scheduler.config
    best = ", ".join((config_of["levels"] or {}).keys())
    print(f"sampled by {config_of['method']} at levels of its own for {best} evaluations", file=sys.stderr)
    report(made, out, seconds, as_json)
