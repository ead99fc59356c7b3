"""The main job on the model that ships inside: 240 questions under three policies, replayed with other limits.

Writes demo/report.html (with plots beside it), demo/summary.json and demo/record.jsonl; a second run draws nothing.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from consilience import policy, record
from consilience.cli.progress import ProgressLine
from consilience.driver import Finished
from consilience.pages import curve_of, live_row, now, question_row, replay_row, run_totals
from consilience.replay import replay, tabulate
from consilience.report import Page, PolicyRow, write
from consilience.run import Outcome, Settings, stream

HERE = Path(__file__).parent
OUT = Path("demo")
LIVE = ("sc:n=40", "esc:window=5,max=40", "asc:threshold=0.95,max=40")
OTHER_LIMITS = (
    "one",
    "sc:n=10",
    "sc:n=20",
    "esc:window=4,max=20",
    "asc:threshold=0.8,max=40",
    "asc:threshold=0.99,max=40",
)
COMMAND = "make demo"


def run(spec: str) -> tuple[list[Finished], Outcome]:
    """One live run; the draws of an earlier policy are in the ledger and are used again."""
    finished: list[Finished] = []
    settings = Settings(model="house", policy=spec, temperature=1.0, ledger=str(OUT / "ledger.db"))
    with ProgressLine(policy.parse(spec).max) as line:
        questions = HERE / "house-questions.jsonl"
        outcome = asyncio.run(stream(questions, settings, finished.append, on_progress=line.update, warn=line.warn))
    return finished, outcome


def table(rows: list[PolicyRow], most: int) -> Table:
    """The figures of every policy, with the draws saved against always taking ``most``."""
    shown = Table()
    shown.add_column("policy", overflow="fold", min_width=25)
    for name in ("", "accuracy", "95 % interval", "draws", "saved"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        assert row.accuracy is not None, "the demo's questions have gold answers"
        assert row.accuracy_ci is not None
        low, high = row.accuracy_ci
        saved = f"{1 - row.mean_draws / most:.0%}"
        shown.add_row(
            row.name,
            row.origin,
            f"{row.accuracy:.1%}",
            f"{100 * low:.1f} - {100 * high:.1f}",
            f"{row.mean_draws:.2f}",
            saved,
        )
    return shown


def main() -> None:
    """Run, replay, write the page, print where it is."""
    console = Console(highlight=False)
    OUT.mkdir(exist_ok=True)
    runs = {}
    for spec in LIVE:
        console.print(f"solving 240 questions with the house model under {spec}")
        runs[spec] = run(spec)
        totals = runs[spec][1].totals
        console.print(
            f"  {totals['answered']} answered, {totals['accuracy']:.1%} right, {totals['mean_draws']:.2f} draws each, "
            f"{totals['draws_bought']:,} drawn now, {totals['draws_from_ledger']:,} from the ledger, "
            f"{totals['seconds']:.0f} s"
        )
    fixed, adaptive = LIVE[0], LIVE[-1]
    record.write(OUT / "record.jsonl", [one.problem for one in runs[fixed][0]])
    problems = list(record.read(OUT / "record.jsonl"))
    draws = tabulate(problems)
    console.print(
        f"replaying {len(OTHER_LIMITS)} other policies on the record, 100 random orders each, no further draw"
    )
    replayed = [replay_row(replay(draws, policy.parse(spec), repeats=100)) for spec in OTHER_LIMITS]
    rows = [live_row(spec, finished) for spec, (finished, _) in runs.items()] + replayed
    console.print(table(rows, most=40))
    page = Page(
        title="The house model, asked until its draws agree",
        model=runs[fixed][1].model,
        command=COMMAND,
        created=now(),
        policies=rows,
        questions=[question_row(one) for one in runs[adaptive][0]],
        curve=curve_of(draws),
        totals=run_totals(runs[fixed][1].totals),
        duplicate_share=runs[fixed][1].totals["duplicate_share"],
        notes=["The live policies share one ledger: each draw was made once."],
        verdicts_of=adaptive,
        fixed_draws=40,
    )
    pages = write(page, OUT / "report.html")
    summary = [
        {"policy": row.name, "accuracy": row.accuracy, "mean_draws": row.mean_draws, "origin": row.origin}
        for row in rows
    ]
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    console.print(f"figures: {OUT / 'summary.json'}   record: {OUT / 'record.jsonl'}")
    console.print(f"page:    {pages[0].resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
