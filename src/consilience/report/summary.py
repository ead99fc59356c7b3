"""The cards, the facts of the run and the table of policies."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from consilience.report.charts import key
from consilience.report.measures import fixed_draws
from consilience.report.rows import Page, PolicyRow
from consilience.report.words import duration, interval, known, letter, money, number, percent, redact

_SHOWN_ELSEWHERE = ("questions", "answered", "abstained", "undecided", "draws", "failed", "cost", "tokens")
_LABELS = {
    "requests": "Requests",
    "prompt_tokens": "Prompt tokens",
    "completion_tokens": "Completion tokens",
    "seconds": "Time",
}


@dataclass(frozen=True, slots=True)
class Card:
    """One figure of the summary."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class PolicyLine:
    """A policy with its place on the page. ``saved``: share of draws saved against the fixed vote."""

    index: int
    row: PolicyRow
    letter: str
    key: Markup
    saved: float | None


def policy_lines(page: Page) -> list[PolicyLine]:
    """The policies in the order given."""
    fixed = fixed_draws(page)
    return [
        PolicyLine(
            index,
            row,
            letter(index),
            key(index, row.origin),
            1 - row.mean_draws / fixed if known(row.mean_draws) else None,
        )
        for index, row in enumerate(page.policies)
    ]


def lead_policy(page: Page) -> PolicyRow | None:
    """The policy whose verdicts the page lists, else the first live one, else the first."""
    named = [row for row in page.policies if row.name == page.verdicts_of]
    live = [row for row in page.policies if row.origin == "live"]
    found = [row for row in named if row.origin == "live"] + named + live + list(page.policies)
    return found[0] if found else None


def cards(page: Page) -> list[Card]:
    """The figures at the top; what is not known is left out."""
    totals, lead, shown = page.totals, lead_policy(page), []
    asked = totals.get("questions", len(page.questions))
    state = [f"{number(totals[name])} {name}" for name in ("answered", "undecided", "abstained") if totals.get(name)]
    shown.append(Card("Questions", number(asked), " · ".join(state)))
    if lead and lead.accuracy is not None and known(lead.accuracy):
        band = interval(lead.accuracy_ci)
        shown.append(Card("Right", percent(lead.accuracy), f"95 % interval {band}" if band else ""))
    if lead and known(lead.mean_draws):
        saved = 1 - lead.mean_draws / fixed_draws(page)
        note = f"{percent(saved, 0) if saved > 0.0005 else 'none'} saved against {fixed_draws(page)}"
        shown.append(Card("Draws per question", number(lead.mean_draws), note))
    shown += _counted(page)
    return shown


def _counted(page: Page) -> list[Card]:
    totals, shown = page.totals, []
    draws, failed = totals.get("draws"), totals.get("failed")
    if draws is not None:
        shown.append(Card("Draws made", number(draws)))
    if failed is not None:
        share = f"{percent(failed / draws)} of the draws" if draws else ""
        shown.append(Card("Failed draws", number(failed), share))
    if totals.get("tokens") is not None:
        per = totals["tokens"] / draws if draws and totals["tokens"] is not None else None
        shown.append(Card("Tokens", number(totals["tokens"]), f"{number(per, 0)} per draw" if per else ""))
    if totals.get("cost") is not None:
        shown.append(Card("Cost", money(totals["cost"])))
    if known(page.duplicate_share):
        shown.append(
            Card("Duplicate texts", percent(page.duplicate_share), "draws repeating another of their question")
        )
    return shown


def facts(page: Page) -> list[tuple[str, str, bool]]:
    """Label, value and whether the value is code, for the list below the cards."""
    rows = [("Model", redact(page.model), True), ("Command", redact(page.command), True)]
    if page.ledger:
        rows.append(("Ledger", redact(page.ledger), True))
    rows.append(("Created", page.created, False))
    for name, value in page.totals.items():
        if name in _SHOWN_ELSEWHERE or value is None:
            continue
        label = _LABELS.get(name, name.replace("_", " ").capitalize())
        rows.append((label, duration(value) if name == "seconds" else number(value), False))
    return [row for row in rows if row[1]]
