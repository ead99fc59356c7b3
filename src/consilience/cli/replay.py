"""``consilience replay``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from consilience import policy, record
from consilience.errors import InputError
from consilience.replay import Replayed, replay, stopped_early, tabulate
from consilience.text.answers import compile_pattern


def run(
    path: Path,
    specs: list[str],
    *,
    repeats: int,
    seed: int,
    kind: str | None,
    extract: str | None,
    report: Path | None,
    as_json: bool,
) -> int:
    """Replay every policy and print the figures; returns the exit code."""
    rules = [policy.parse(spec) for spec in specs]
    try:
        pattern = None if extract is None else compile_pattern(extract)
    except ValueError as error:
        raise InputError(f"extract: {error}") from error
    problems = list(record.read(path))
    needs = tuple(dict.fromkeys(name for rule in rules for name in rule.needs))
    table = tabulate(problems, kind=kind, pattern=pattern, needs=needs)
    notes = []
    if by := stopped_early(problems):
        notes.append(f"this record was collected by {by}, which stopped early: random orders of it are biased")
    if table.undecided:
        notes.append(f"{table.undecided} answers could not be compared with the gold answer and count as wrong")
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    results = [replay(table, rule, repeats=repeats, seed=seed) for rule in rules]
    pages: list[Path] = []
    if report is not None:
        from consilience.pages import recorded_rows, replay_page
        from consilience.report import write

        command = shlex.join(["consilience", *sys.argv[1:]])
        questions = recorded_rows(problems, rules[0], kind, pattern)
        pages = write(replay_page(path, problems, table, results, questions, command, notes), report)
    if as_json:
        print(json.dumps({"policies": [result.summary() for result in results]}))
    else:
        _print(results, path, pages)
    return 0


def _print(results: list[Replayed], path: Path, pages: list[Path]) -> None:
    console = Console(highlight=False)
    first = results[0].summary()
    title = f"{path}: {first['problems']} problems, {first['repeats']} orders"
    table = Table(title=title)
    table.add_column("policy", overflow="fold", min_width=12)
    for name in ("accuracy", "95 % interval", "draws", "agreement", "decided", "short"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        row = result.summary()
        interval = row["accuracy_ci"]
        table.add_row(
            row["policy"],
            _share(row["accuracy"]),
            "-" if interval is None else f"{100 * interval[0]:.1f} - {100 * interval[1]:.1f}",
            f"{row['mean_draws']:.2f}",
            _share(row["agreement_with_full_vote"]),
            _share(row["decided"]),
            _share(row["short"]),
        )
    console.print(table)
    if pages:
        console.print(f"report: {pages[0]}", markup=False)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
