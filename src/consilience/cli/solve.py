"""``consilience solve``."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from consilience import policy, record
from consilience.cli.progress import ProgressLine
from consilience.driver import Finished
from consilience.run import Outcome, Settings, stream

SHOWN = 20
"""The most questions whose answers are printed one by one."""


def run(questions: Path, given: dict[str, Any], *, out: Path | None, report: Path | None, as_json: bool) -> int:
    """Run, write what was asked for, print the summary, and return the exit code."""
    settings = Settings(**given)
    shown, _ = settings.resolved()
    if not given["model"] and shown.models == ("house",):
        _say("model: house, the small model inside consilience (for your own: --model openai:MODEL@URL)")
    most = policy.parse(str(shown.policy)).max
    finished: list[Finished] = []
    signal.signal(signal.SIGTERM, _terminate)
    with ExitStack() as stack:
        stream_out = stack.enter_context(record.replacing(out)) if out else None
        line = stack.enter_context(ProgressLine(most))

        def keep(one: Finished) -> None:
            if stream_out is not None:
                stream_out.write(one.problem.model_dump_json(exclude_unset=True).encode() + b"\n")
            if report is None:
                one.problem.draws = []
            finished.append(one)

        try:
            outcome = asyncio.run(stream(questions, settings, keep, on_progress=line.update, warn=line.warn))
        except KeyboardInterrupt:
            _say(f"interrupted: {line.line or 'nothing drawn yet'}")
            _say("every finished draw is in the ledger: run the same command again to go on")
            raise
    for note in outcome.notes:
        _say(f"note: {note}")
    pages = _write_report(report, settings, outcome, finished) if report else []
    if as_json:
        verdicts = [(one.problem.id, one.problem.verdict) for one in finished]
        rows = [{"id": name, "verdict": verdict.model_dump()} for name, verdict in verdicts if verdict]
        print(json.dumps({"problems": rows, "totals": outcome.totals}, ensure_ascii=False))
    else:
        _print_summary(finished, outcome, out, pages)
    spent = outcome.totals["budget_spent"] is not None
    return 3 if spent or outcome.totals["abstained"] else 0


def _terminate(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write_report(path: Path, settings: Settings, outcome: Outcome, finished: list[Finished]) -> list[Path]:
    from consilience.pages import solve_page
    from consilience.report import write

    command = shlex.join(["consilience", *sys.argv[1:]])
    return write(solve_page(finished, outcome, command, settings), path)


def _print_summary(finished: list[Finished], outcome: Outcome, out: Path | None, pages: list[Path]) -> None:
    console = Console(highlight=False)
    if len(finished) <= SHOWN:
        console.print(_answers(finished))
    console.print(_totals(outcome))
    if out:
        console.print(f"record: {out}", markup=False)
    if pages:
        console.print(f"report: {pages[0]}", markup=False)


def _answers(finished: list[Finished]) -> Table:
    table = Table("id", "answer", "confidence", "draws", "votes", "right")
    for one in finished:
        verdict = one.problem.verdict
        assert verdict is not None
        votes = ", ".join(f"{answer}: {count:g}" for answer, count in list(verdict.votes.items())[:4])
        right = {True: "yes", False: "no", None: ""}[one.right]
        shown = "(none)" if verdict.answer is None else verdict.answer
        row = (one.problem.id, shown, f"{verdict.confidence:.2f}", str(verdict.draws), votes, right)
        table.add_row(*(_plain(cell) for cell in row))
    return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text if len(text) <= 60 else text[:57] + "...")


def _totals(outcome: Outcome) -> Table:
    totals = outcome.totals
    table = Table(show_header=False, title=f"{outcome.policy} on {outcome.model}")
    bought = f"{totals['draws_bought']:,} bought, {totals['draws_from_ledger']:,} from the ledger"
    rows: list[tuple[str, str]] = [
        ("answered", f"{totals['answered']} of {totals['problems']}"),
        ("accuracy", "no gold answers" if totals["accuracy"] is None else f"{totals['accuracy']:.1%}"),
        ("draws per question", f"{totals['mean_draws']:.2f}"),
        ("draws", f"{totals['draws']:,} ({bought})"),
        ("saved against the maximum", f"{totals['draws_saved']:,} draws"),
        ("tokens", f"{totals['usage']['prompt_tokens']:,} in, {totals['usage']['completion_tokens']:,} out"),
    ]
    if totals["asks_bought"]:
        rows.append(("asked by the procedure", f"{totals['asks_bought']:,} replies"))
    if totals["spent"]["cost"]:
        rows.append(("money, this run", f"${totals['spent']['cost']:.6f}"))
    if totals["failed"]:
        rows.append(("failed draws", str(totals["failed"])))
    if totals["duplicate_share"] is not None:
        rows.append(("repeated texts", f"{totals['duplicate_share']:.1%}"))
    if totals["budget_spent"]:
        rows.append(("stopped by the budget", totals["budget_spent"]))
    for row in rows:
        table.add_row(*row)
    return table
