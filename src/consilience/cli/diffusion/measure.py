"""``consilience diffusion measure``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from consilience.cli.diffusion.extra import check_steps, extra, load
from consilience.cli.progress import Counter
from consilience.errors import InputError

if TYPE_CHECKING:
    from consilience.diffusion.quality import Measured

METHODS = "auto,ddim,dpmpp-2m,unipc2,flow-heun"
FEW = 256
"""Images below which distances say little."""


def run(
    model: Path | None,
    *,
    steps: str,
    methods: str | None,
    count: int,
    reference: str,
    seeds: int,
    out: Path,
    as_json: bool,
) -> None:
    """Measure, print the table, and write it with the plot."""
    evaluations = _counts(steps)
    names = [name.strip() for name in (METHODS if methods is None else methods).split(",") if name.strip()]
    if not names:
        raise InputError("methods: name one at least")
    with extra():
        from consilience.diffusion.pictures import read
        from consilience.diffusion.quality import classifier, halves, measure

        pipe, name = load(model, max(evaluations))
        if pipe.scheduler.config.get("guidance") is not None:
            names = names if methods else [str(pipe.scheduler.config["method"])]
            print(
                "warning: a few-step student: map and switch compare with an ODE that it was not trained to follow",
                file=sys.stderr,
            )
        data = read(reference)
        count = _possible(count, len(halves(data)[1].x), data.source)
        judge = classifier(data, out / "classifier.npz")
        with Counter("measuring", "rows", None) as counter:
            measured = measure(
                pipe,
                data,
                judge,
                names,
                evaluations,
                count=count,
                seeds=seeds,
                on_row=lambda done, _all: counter.update(done),
            )
        facts = {"model": name, "reference": data.source} | measured.summary()
        _write(measured, f"{name}, {measured.count} images x {measured.seeds}", out, facts)
    if as_json:
        print(json.dumps(facts))
    else:
        _print(measured, name)
    print(f"plot and table: {out}", file=sys.stderr)


def _possible(count: int, half: int, source: str) -> int:
    """As many images as half of the data has, at most, with a warning where that is fewer, or where they are few."""
    used = min(count, half)
    if used < count:
        print(
            f"warning: {source}: half of the data are {half} images, so {used} are drawn, not {count}", file=sys.stderr
        )
    if used < FEW:
        print(
            f"warning: {used} images: below about {FEW} the distances are mostly chance; "
            "read them beside those of the row data, or average over more --seeds",
            file=sys.stderr,
        )
    return used


def _counts(steps: str) -> list[int]:
    try:
        found = sorted({int(part) for part in steps.split(",")})
    except ValueError as error:
        raise InputError(f"steps {steps}: expected whole numbers, such as 4,8,16") from error
    for count in found:
        check_steps(count)
    return found


def _write(measured: Measured, title: str, out: Path, facts: dict[str, object]) -> None:
    from consilience.diffusion.folders import filling
    from consilience.diffusion.quality import plot

    with filling(out) as folder:
        plot(measured, title).savefig(folder / "quality.png", dpi=110)
        (folder / "quality.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _print(measured: Measured, name: str) -> None:
    console = Console(highlight=False)
    table = Table(title=f"{name}: {measured.count} images, {measured.seeds} seed(s)")
    table.add_column("method", no_wrap=True)
    heads = ("nfe", "FD", "prec.", "recall", "conf.", "entropy", "map", "switch")
    for head in heads:
        table.add_column(head, justify="right")
    for row in measured.rows:
        table.add_row(
            row.method,
            str(row.nfe),
            f"{row.frechet:.3f}",
            f"{row.precision:.3f}",
            f"{row.recall:.3f}",
            f"{row.confidence:.3f}",
            f"{row.entropy:.3f}",
            f"{row.map_median:.2g}",
            f"{row.switched:.1%}",
        )
    floor = measured.floor
    values = (floor.frechet, floor.precision, floor.recall, floor.confidence, floor.entropy)
    table.add_row("data", "", *(f"{value:.3f}" for value in values), f"{measured.fine_error:.2g}", "")
    console.print(table)
