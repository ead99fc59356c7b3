"""``consilience tune``."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from consilience import policy, record
from consilience.cli.progress import PLAIN_EVERY
from consilience.errors import InputError
from consilience.text.answers import compile_pattern
from consilience.tune import Candidate, Cost, Tuned, tune
from consilience.tune.results import LEVEL


def run(
    path: Path,
    *,
    max_drop: float,
    cost: str,
    specs: list[str],
    families: str | None,
    repeats: int,
    seed: int,
    kind: str | None,
    extract: str | None,
    out: Path | None,
    report: Path | None,
    as_json: bool,
) -> int:
    """Find the cheapest policy within ``max_drop`` points, print and write it; returns the exit code."""
    if cost not in get_args(Cost):
        raise InputError(f"cost {cost!r}: expected one of {', '.join(get_args(Cost))}")
    try:
        pattern = None if extract is None else compile_pattern(extract)
    except ValueError as error:
        raise InputError(f"extract: {error}") from error
    own = [policy.parse(spec) for spec in specs]
    for place in (out, report):  # before the search, not after it
        if place is not None:
            record.check_place(place)
    with _Line() as line:
        tuned = tune(
            list(record.read(path)),
            max_drop=max_drop / 100,
            cost=cost,  # type: ignore[arg-type]
            families=None if families is None else [name.strip() for name in families.split(",")],
            own=own,
            repeats=repeats,
            seed=seed,
            kind=kind,
            pattern=pattern,
            progress=line.update,
        )
    for note in tuned.notes:
        print(f"warning: {note}", file=sys.stderr)
    if out is not None:
        tuned.save(out, path.name)
    pages = [] if report is None else _write_page(path, tuned, report)
    if as_json:
        print(json.dumps(tuned.summary()))
    else:
        _print(path, tuned, out, pages)
    return 0


def _write_page(path: Path, tuned: Tuned, report: Path) -> list[Path]:
    from consilience.pages import tune_page
    from consilience.report import write_tradeoff

    return write_tradeoff(tune_page(path, tuned, shlex.join(["consilience", *sys.argv[1:]])), report)


def _print(path: Path, tuned: Tuned, out: Path | None, pages: list[Path]) -> None:
    console = Console(highlight=False)
    console.print(_table(path, tuned))
    for line in _conclusion(tuned):
        console.print(line, markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"policy file: {out} (use it as --policy @{out})", markup=False, soft_wrap=True)
    if pages:
        console.print(f"report: {pages[0]}", markup=False, soft_wrap=True)


def _table(path: Path, tuned: Tuned) -> Table:
    """The frontier: what the search half shows, and what the held-out half says of it."""
    full = tuned.full
    title = (
        f"{path}: {full.search.problems} problems searched, {full.held_out.problems} held out; {tuned.repeats} orders, "
        f"{len(tuned.candidates)} policies; points lost against the full vote"
    )
    table = Table(title=title, caption=f"* chosen; {full.rule.name} is the full vote")
    table.add_column("frontier", overflow="fold", min_width=20)
    for name in (tuned.cost, tuned.measure, "at most", "held out", "saved"):
        table.add_column(name, justify="right", no_wrap=True)
    listed = {one.rule.name: one for one in (*tuned.frontier, tuned.chosen, tuned.full)}
    for candidate in sorted(listed.values(), key=lambda one: one.search.cost):
        star = "*" if candidate.rule == tuned.chosen.rule else ""
        table.add_row(star + candidate.rule.name, *_cells(candidate))
    return table


def _cells(candidate: Candidate) -> list[str]:
    search, held = candidate.search, candidate.held_out
    return [
        _amount(search.cost),
        f"{search.accuracy:.1%}",
        f"{100 * search.drop_bound:+.2f}",
        f"{100 * held.drop:+.2f} ± {50 * (held.drop_ci[1] - held.drop_ci[0]):.2f}",
        f"{held.saved:.0%}",
    ]


def _conclusion(tuned: Tuned) -> list[str]:
    chosen, limit = tuned.chosen, 100 * tuned.max_drop
    held = chosen.held_out
    if not tuned.found:
        return [
            f"No policy that is cheaper than the full vote is shown to lose at most {limit:g} points of "
            f"{tuned.measure}; recommended: {chosen.rule.name}, the full vote."
        ]
    lines = [
        f"Chosen: {chosen.rule.name}",
        f"Search half: at most {100 * chosen.search.drop_bound:.2f} points of {tuned.measure} lost, by a one-sided "
        f"{LEVEL:.0%} bound (limit {limit:g}).",
        f"Held-out half: {100 * held.drop:+.2f} points lost ({_interval(held.drop_ci)}), {tuned.cost} "
        f"{_amount(held.cost)} instead of {_amount(tuned.full.held_out.cost)}, {held.saved:.0%} saved.",
    ]
    if tuned.calibration is not None:
        before, after = tuned.calibration.ece_before, tuned.calibration.ece_after
        lines.append(f"Calibration error of its confidence there: {before:.1%} raw, {after:.1%} calibrated.")
    return lines


def _interval(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:+.2f} to {100 * pair[1]:+.2f}"


def _amount(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.3g}"


class _Line:
    """How many policies have been replayed, on standard error: redrawn in a terminal, a line now and then in a log."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._bar = Progress(console=Console(stderr=True), transient=True, disable=not self._tty)
        self._task = self._bar.add_task("policies replayed", total=None)
        self._last = time.monotonic()

    def __enter__(self) -> _Line:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Take in how far the search is."""
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if not self._tty and now - self._last >= PLAIN_EVERY:
            self._last = now
            print(f"policies replayed: {done}/{total}", file=sys.stderr, flush=True)
