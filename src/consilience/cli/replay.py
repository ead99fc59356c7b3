"""``consilience replay``."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid

from consilience import policy, record
from consilience.cli.progress import Counter
from consilience.draws import Problem
from consilience.errors import InputError
from consilience.replay import Replayed, replay_many, replay_procedure
from consilience.rules import Rule
from consilience.table import Table, tabulate
from consilience.text.answers import compile_pattern
from consilience.views import kind_of

if TYPE_CHECKING:
    from consilience.text.asking import Asker


def run(
    path: Path,
    specs: list[str],
    *,
    repeats: int,
    seed: int,
    kind: str | None,
    extract: str | None,
    arms: list[str] | None,
    asking: dict[str, Any],
    report: Path | None,
    as_json: bool,
) -> int:
    """Replay every policy and print the figures; returns the exit code.

    ``asking`` holds the settings of the model that procedures may ask (``model``, ``ledger``, ``budget``, ...).
    """
    rules = [policy.parse(spec) for spec in specs]
    _check_arms(rules, arms)
    asks = [rule for rule in rules if rule.procedure is not None and rule.procedure.asks]
    if asking["model"] and not asks and not any(rule.traits for rule in rules):
        print("warning: no policy asks a model: --model is not used", file=sys.stderr)
    if asks and not asking["model"]:
        raise InputError(f"policy {asks[0].name}: asks a model; name it with --model")
    try:
        pattern = None if extract is None else compile_pattern(extract)
    except ValueError as error:
        raise InputError(f"extract: {error}") from error
    keeps = report is not None or any(rule.procedure is not None or rule.traits for rule in rules)
    table, kept = _read(path, rules, keeps, asking, kind, pattern, arms)
    notes = _notes(table)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    plain = [rule for rule in rules if rule.procedure is None]
    with Counter("replaying", "orders", repeats) as counter:
        replayed = replay_many(table, plain, repeats=repeats, seed=seed, on_orders=counter.update)
    found = {result.rule.name: result for result in replayed}
    if len(plain) < len(rules):
        found |= asyncio.run(_procedures(kept, table, rules, asking, repeats, seed, kind, pattern))
    results = [found[rule.name] for rule in rules]
    for result in results:
        if result.fell_back is not None and result.fell_back.any():
            share = f"{result.fell_back.mean():.0%}"
            print(
                f"warning: {result.rule.name}: the procedure left {share} of the verdicts to the vote", file=sys.stderr
            )
    pages: list[Path] = []
    if report is not None:
        from consilience.pages import replay_page
        from consilience.report import write

        command = shlex.join(["consilience", *sys.argv[1:]])
        pages = write(replay_page(path, kept, table, results, command, notes, kind, pattern), report)
    if as_json:
        print(json.dumps({"policies": [result.summary() for result in results]}))
    else:
        _print(results, path, pages)
    return 0


def _read(
    path: Path,
    rules: list[Rule],
    keeps: bool,
    asking: dict[str, Any],
    kind: str | None,
    pattern: re.Pattern[str] | None,
    arms: list[str] | None,
) -> tuple[Table, list[Problem]]:
    """The record as arrays and, where texts are needed, its problems; without them it may be larger than the memory."""
    traits = tuple(dict.fromkeys(name for rule in rules for name in rule.traits))
    needs = tuple(dict.fromkeys(name for rule in rules for name in rule.needs))
    with Counter("reading", "problems") as counter:
        problems: Iterable[Problem] = counter.count(record.read(path))
        if keeps:
            problems = kept = list(problems)
            if traits:
                asyncio.run(_prepare(kept, rules, asking))
        table = tabulate(problems, kind=kind, pattern=pattern, needs=needs, traits=traits, arms=arms)
    return table, kept if keeps else []


def _check_arms(rules: list[Rule], arms: list[str] | None) -> None:
    if arms is None:
        return
    for rule in rules:
        if rule.arms not in (1, len(arms)):
            raise InputError(f"policy {rule.name}: draws from {rule.arms} arms, --arm names {len(arms)}")


def _notes(table: Table) -> list[str]:
    notes = []
    if table.stopped_by:
        notes.append(
            f"this record was collected by {table.stopped_by}, which stopped early: random orders of it are biased"
        )
    if table.undecided:
        notes.append(f"{table.undecided} answers could not be compared with the gold answer and count as wrong")
    return notes


async def _prepare(problems: list[Problem], rules: list[Rule], asking: dict[str, Any]) -> None:
    """Numbers per problem that a rule reads and the record lacks: asked of the model, where one is named."""
    from consilience.driver import prepare
    from consilience.run import Settings, asking_with

    async with AsyncExitStack() as stack:
        line = None
        if asking["model"]:
            line = (await stack.enter_async_context(asking_with(Settings(**asking))))()
        for rule in rules:
            for warning in await prepare(problems, rule, line):
                print(f"warning: {warning}", file=sys.stderr)


async def _procedures(
    problems: list[Problem],
    table: Table,
    rules: list[Rule],
    asking: dict[str, Any],
    repeats: int,
    seed: int,
    kind: str | None,
    pattern: re.Pattern[str] | None,
) -> dict[str, Replayed]:
    """The policies that end in a procedure, with progress on standard error."""
    from consilience.run import Settings, asking_with

    found = {}
    async with AsyncExitStack() as stack:
        line: Callable[[], Asker | None] = lambda: None  # noqa: E731
        if asking["model"]:
            line = await stack.enter_async_context(asking_with(Settings(**asking)))
        for rule in rules:
            if rule.procedure is None:
                continue
            with Counter(rule.name, "conclusions", len(problems) * repeats) as bar:
                found[rule.name] = await replay_procedure(
                    problems,
                    table,
                    rule,
                    line,
                    repeats=repeats,
                    seed=seed,
                    kind_of=lambda problem: kind_of(problem, kind),
                    pattern=pattern,
                    concurrency=asking["concurrency"] or 8,
                    on_done=bar.update,
                )
    return found


def _print(results: list[Replayed], path: Path, pages: list[Path]) -> None:
    console = Console(highlight=False)
    first = results[0].summary()
    title = f"{path}: {first['problems']} problems, {first['repeats']} orders"
    table = Grid(title=title)
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
