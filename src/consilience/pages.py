"""From runs and replays to the rows of a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from consilience import policy
from consilience.draws import Draw, Problem, Verdict
from consilience.driver import Finished
from consilience.montecarlo.estimators import proportion_interval
from consilience.replay import Replayed, Table, judge, tabulate
from consilience.report import Curve, Page, Point, PolicyRow, QuestionRow, ReplyRow, Tradeoff, TradeoffRow
from consilience.rules import Rule
from consilience.run import Outcome, Settings
from consilience.tune import Figures, Tuned
from consilience.tune.results import LEVEL
from consilience.views import answer_of, entry_point_of, kind_of

REPORTED = ("answered", "abstained", "draws", "failed", "seconds")


def now() -> str:
    """The time a page is made, for its head."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def live_row(name: str, finished: Sequence[Finished]) -> PolicyRow:
    """A policy as it ran: one value per question."""
    verdicts = [_verdict(one.problem) for one in finished]
    right = [None if one.right is None else float(one.right) for one in finished]
    known = [value for value in right if value is not None]
    count = max(len(verdicts), 1)
    return PolicyRow(
        name=name,
        origin="live",
        accuracy=float(np.mean(known)) if known else None,
        accuracy_ci=proportion_interval(known) if known else None,
        mean_draws=sum(v.draws for v in verdicts) / count,
        mean_tokens=sum(v.usage.tokens for v in verdicts) / count,
        mean_cost=sum(v.cost for v in verdicts) / count or None,
        decided=sum(v.decided for v in verdicts) / count,
        abstained=sum(v.abstained for v in verdicts) / count,
        draws_used=[float(v.draws) for v in verdicts],
        confidence=[v.confidence for v in verdicts],
        right=right,
    )


def replay_row(result: Replayed) -> PolicyRow:
    """A replayed policy: each question's values are means over the orders."""
    row = result.summary()
    right = [float(value) if known else None for value, known in zip(result.right.mean(0), result.known, strict=True)]
    return PolicyRow(
        name=row["policy"],
        origin="replay",
        accuracy=row["accuracy"],
        accuracy_ci=None if row["accuracy_ci"] is None else (row["accuracy_ci"][0], row["accuracy_ci"][1]),
        mean_draws=row["mean_draws"],
        mean_tokens=row["mean_tokens"],
        mean_cost=row["mean_cost"],
        decided=row["decided"],
        abstained=float((~result.answered).mean()),
        draws_used=result.draws.mean(0).tolist(),
        confidence=result.confidence.mean(0).tolist(),
        right=right,
    )


def question_row(one: Finished) -> QuestionRow:
    """A question with its verdict and every draw."""
    problem, verdict = one.problem, _verdict(one.problem)
    fixed = (problem.collected_by or "").startswith(("sc:", "one"))
    return QuestionRow(
        id=problem.id,
        question=problem.question,
        gold=problem.answer,
        answer=verdict.answer,
        right=one.right,
        confidence=verdict.confidence,
        draws=verdict.draws,
        votes=verdict.votes,
        stopped_because=verdict.stopped_because,
        replies=[_reply(draw, judged=index < verdict.draws) for index, draw in enumerate(problem.draws)],
        decided=verdict.decided or fixed,
    )


def _reply(draw: Draw, *, judged: bool) -> ReplyRow:
    return ReplyRow(draw.text, draw.answer, draw.error, judged)


def curve_of(table: Table) -> Curve | None:
    """Accuracy of the vote of k draws; of draws that a rule stopped early only the ones that all problems have."""
    labels, drawn = table.labels[table.known], table.counts[table.known]
    if not len(labels):
        return None
    if table.stopped_by:
        labels = labels[:, : int(drawn.min())]
        drawn = np.minimum(drawn, labels.shape[1])
    if labels.shape[1] == 0:
        return None
    right = np.zeros((len(labels), int(labels.max(initial=0)) + 1), bool)
    rows, columns = np.nonzero(labels >= 0)
    right[rows, labels[rows, columns]] = table.right[table.known][rows, columns]
    return Curve.estimate(labels, right, drawn=drawn, generator=np.random.default_rng(0))


def solve_page(finished: Sequence[Finished], outcome: Outcome, command: str, settings: Settings) -> Page:
    """The page of one live run."""
    problems = [one.problem for one in finished]
    table = tabulate(problems, kind=settings.kind) if any(p.draws for p in problems) else None
    return Page(
        title="Answers by agreement",
        model=outcome.model,
        command=command,
        created=now(),
        policies=[live_row(outcome.policy, finished)],
        questions=[question_row(one) for one in finished],
        curve=None if table is None else curve_of(table),
        totals=run_totals(outcome.totals),
        duplicate_share=outcome.totals["duplicate_share"],
        notes=outcome.notes,
        verdicts_of=outcome.policy,
        fixed_draws=outcome.most,
    )


def run_totals(totals: dict[str, Any]) -> dict[str, int | float | None]:
    """The totals of a run under the names that a page knows."""
    usage, spent = totals["usage"], totals["spent"]
    chosen = {name: totals[name] for name in REPORTED}
    return {
        "questions": totals["problems"],
        **chosen,
        "requests": spent["requests"],
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "cost": usage["cost"] or None,
    }


def recorded_rows(
    problems: Sequence[Problem], rule: Rule, kind: str | None = None, pattern: re.Pattern[str] | None = None
) -> list[QuestionRow]:
    """Each question with the verdict of ``rule`` on its draws in recorded order."""
    rows = []
    for problem in problems:
        kind_here = kind_of(problem, kind)
        verdict, right = judge(problem, rule, kind_here, pattern)
        entry_point = entry_point_of(problem, kind_here)
        found = [answer_of(draw, kind_here, pattern, entry_point) for draw in problem.draws]
        draws = [draw.model_copy(update={"answer": answer}) for draw, answer in zip(problem.draws, found, strict=True)]
        shown = problem.model_copy(update={"verdict": verdict, "draws": draws, "collected_by": rule.name})
        rows.append(question_row(Finished(shown, kind_here, right)))
    return rows


def replay_page(
    path: Path,
    problems: Sequence[Problem],
    table: Table,
    results: Sequence[Replayed],
    command: str,
    notes: Sequence[str],
    kind: str | None = None,
    pattern: re.Pattern[str] | None = None,
) -> Page:
    """The page of a replay; the questions show the verdicts, in recorded order, of the first policy that can give them.

    That is one of one arm that neither couples its questions nor asks; the vote of all draws where there is none.
    """
    rules = (result.rule for result in results)
    alone = (r for r in rules if r.arms == 1 and not r.coupled and r.procedure is None)
    shown = next(alone, None) or policy.parse(f"sc:n={table.labels.shape[1]}")
    models = sorted({draw.model for p in problems for draw in p.draws if draw.model})
    return Page(
        title=f"Replay of {path.name}",
        model=", ".join(models[:5]) + (" ..." if len(models) > 5 else "") or "not recorded",
        command=command,
        created=now(),
        policies=[replay_row(result) for result in results],
        questions=recorded_rows(problems, shown, kind, pattern),
        curve=curve_of(table),
        totals={"questions": len(problems), "draws": int(table.counts.sum())},
        notes=list(notes),
        verdicts_of=shown.name,
    )


def tune_page(path: Path, tuned: Tuned, command: str) -> Tradeoff:
    """The page of a search for a policy."""
    rows = [
        TradeoffRow(one.rule.name, (_point(one.search), _point(one.held_out)), one.frontier) for one in tuned.candidates
    ]
    names = [row.name for row in rows]
    fitted = tuned.calibration
    return Tradeoff(
        title=f"A policy for {path.name}",
        command=command,
        created=now(),
        rows=rows,
        full=names.index(tuned.full.rule.name),
        chosen=names.index(tuned.chosen.rule.name),
        found=tuned.found,
        accuracy=tuned.measure,
        unit=f"{'USD' if tuned.cost == 'usd' else tuned.cost} per question",
        sizes=(tuned.full.search.problems, tuned.full.held_out.problems),
        max_drop=tuned.max_drop,
        level=LEVEL,
        knots=None if fitted is None else (fitted.confidence, fitted.accuracy),
        ece=None if fitted is None else (fitted.ece_before, fitted.ece_after),
        notes=tuned.notes,
    )


def _point(figures: Figures) -> Point:
    return Point(
        cost=figures.cost,
        accuracy=figures.accuracy,
        accuracy_ci=figures.accuracy_ci,
        drop=figures.drop,
        drop_ci=figures.drop_ci,
        drop_bound=figures.drop_bound,
        saved=figures.saved,
    )


def _verdict(problem: Problem) -> Verdict:
    assert problem.verdict is not None, f"problem {problem.id} has no verdict"
    return problem.verdict
