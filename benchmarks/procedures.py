"""Procedures: minimum Bayes risk on recorded draws, and those that ask a model on scripted models of stated ability.

A scripted model is right as often as it is told to be. It shows how the outcome follows from the model's ability and
from which ability on a procedure is worth its call; it shows nothing about any language model.

    python benchmarks/procedures.py esc-last-letters-a.jsonl.gz game24-gpt4-cot.jsonl.gz humaneval-codegen16b.jsonl.gz \
        cruxeval-output-codellama7b.jsonl.gz [--draws 20] [--questions 400] [--texts 100] [--queries 30]

A size of 0 leaves its part out.
"""

from __future__ import annotations

import asyncio
import random
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import emit, environment, parser, table

from consilience import record
from consilience.draws import Budget, Draw, Problem, Usage, Verdict
from consilience.ledger import Ledger
from consilience.text.asking import Asker
from consilience.text.budget import Account
from consilience.text.session import Session
from consilience.text.sources.base import Deliver, Meter, Request
from consilience.text.voting.a2c import AskToChoose
from consilience.text.voting.chops import ChecklistedSelection
from consilience.text.voting.csc_sql import CorrectiveSelfConsistency
from consilience.text.voting.fsc import FineGrainedSelfConsistency
from consilience.text.voting.mbr import MinimumBayesRisk
from consilience.text.voting.similarity import METRICS
from consilience.text.voting.usc import UniversalSelfConsistency
from consilience.views import answer_of, right_answer

BOOTSTRAPS = 10_000
ABILITIES = (0.2, 0.4, 0.6, 0.8, 1.0)
CODE_END = re.compile(r"^(?=def|class|#|if|print|import|from|@)", re.MULTILINE)

# ---------------------------------------------------------------------------------- (a) recorded draws


def judged(problem: Problem, draws: int) -> tuple[Problem, list[Draw]]:
    """The problem and its first draws with their answers; code is compared as text, cut where its function ends."""
    by_text = problem.kind == "code"
    kept = []
    for draw in problem.draws[:draws]:
        text = CODE_END.split(draw.text, maxsplit=1)[0].rstrip() if by_text else draw.text
        answer = (text.strip() or None) if by_text else answer_of(draw, problem.kind)
        kept.append(draw.model_copy(update={"text": text, "answer": answer}))
    return problem.model_copy(update={"kind": "open"} if by_text else {}), kept


async def right_by_risk(path: Path, draws: int) -> dict[str, list[float]]:
    """For each metric and what it compares, whether the chosen draw is right, by question."""
    rules = {"plurality (exact)": MinimumBayesRisk("exact")}
    rules |= {f"{metric}, text": MinimumBayesRisk(metric) for metric in METRICS if metric != "exact"}
    rules |= {f"{metric}, answer": MinimumBayesRisk(metric, over="answer") for metric in METRICS if metric != "exact"}
    found: dict[str, list[float]] = {name: [] for name in ("single draw", "any draw", *rules)}
    for problem in record.read(path):
        problem, kept = judged(problem, draws)
        single = [is_right(problem, draw) for draw in kept]
        found["single draw"].append(float(np.mean(single)))
        found["any draw"].append(float(any(single)))
        for name, rule in rules.items():
            verdict = await rule(None, problem, kept)
            chosen = None if verdict.abstained else kept[verdict.chosen]  # type: ignore[attr-defined]
            found[name].append(float(chosen is not None and is_right(problem, chosen)))
    return found


def is_right(problem: Problem, draw: Draw) -> bool:
    """Whether a draw's answer is right, by its recorded check or the gold answer."""
    return bool(right_answer(draw.answer, draw, problem, problem.kind))


def with_interval(difference: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The mean difference over questions in points and its 95 % percentile bootstrap interval."""
    values = np.array(difference)
    rows = np.random.default_rng(seed).integers(0, len(values), (BOOTSTRAPS, len(values)))
    low, high = np.quantile(values[rows].mean(1), [0.025, 0.975])
    return 100 * float(values.mean()), 100 * float(low), 100 * float(high)


def risk_rows(found: dict[str, list[float]]) -> list[list[str]]:
    base = found["plurality (exact)"]
    rows = []
    for name, values in found.items():
        row = [name, f"{100 * np.mean(values):.1f}", "", ""]
        if name not in ("single draw", "any draw", "plurality (exact)"):
            mean, low, high = with_interval([a - b for a, b in zip(values, base, strict=True)])
            row[2:] = [f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}"]
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------- (b) scripted models


class ScriptedModel:
    """A source whose reply is a function of the prompt and of this draw's own random numbers."""

    name = endpoint = model = "scripted"
    priced = False

    def __init__(self, reply: Callable[[str, random.Random], str]) -> None:
        self.reply, self.notes, self.calls, self.words = reply, list[str](), 0, 0

    async def draw(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
        """One reply per index."""
        for index in indices:
            text = self.reply(request.question, random.Random(request.call_seed(index)))
            self.calls += 1
            self.words += len(request.question.split())
            async with meter.attempt(1) as attempt:
                attempt.settle(Usage(requests=1))
            deliver(index, Draw(text=text, finish_reason="stop"))

    async def close(self) -> None:
        """Nothing to give back."""


def verdicts(procedure: Any, model: ScriptedModel, problems: Sequence[Problem]) -> list[Verdict]:
    """The procedure's verdicts on the problems' own draws, over a session and a ledger of their own."""

    async def run(work: Callable[[Asker], Awaitable[list[Verdict]]]) -> list[Verdict]:
        with tempfile.TemporaryDirectory() as folder, Ledger(str(Path(folder) / "ledger.db")) as store:
            session = Session(model, store, Account(Budget()))
            return await work(Asker(session, params={"temperature": 0.7, "max_tokens": 1024}))

    async def all_of_them(asker: Asker) -> list[Verdict]:
        return list(await asyncio.gather(*(procedure(asker, problem, problem.draws) for problem in problems)))

    return asyncio.run(run(all_of_them))


def shown(prompt: str, name: str) -> dict[str, str]:
    """The texts that a prompt shows under names beginning with ``name``."""
    mark = re.search(r"with the mark (\w{8})\.", prompt)
    assert mark is not None
    pattern = rf"^\[({name}[^\n]*) {mark[1]}\]\n(.*?)\n\[end of \1 {mark[1]}\]$"
    return dict(re.findall(pattern, prompt, re.DOTALL | re.MULTILINE))


def pool(rng: random.Random, rights: Sequence[float], lure: float) -> list[Draw]:
    """A draw per probability of being right; a wrong one is the same lure with probability ``lure``, else its own."""
    answers = [
        "right" if rng.random() < right else "lure" if rng.random() < lure else f"wrong {n}"
        for n, right in enumerate(rights)
    ]
    return [Draw(text=f"After some thought: {answer}", answer=answer) for answer in answers]


def questions(count: int, rights: Sequence[float], lure: float, seed: int = 0) -> list[Problem]:
    """Questions whose draws are right with the given probabilities."""
    rng = random.Random(seed)
    return [
        Problem(question=f"Question {n}?", kind="text", answer="right", draws=pool(rng, rights, lure))
        for n in range(count)
    ]


def chooser(ability: float) -> Callable[[str, random.Random], str]:
    """Names a right text among those shown with probability ``ability``, if there are right and wrong ones."""

    def reply(prompt: str, rng: random.Random) -> str:
        options = shown(prompt, "Option") or shown(prompt, "Response")
        good = [name for name, text in options.items() if "right" in text]
        bad = [name for name in options if name not in good]
        name = rng.choice(good if good and (not bad or rng.random() < ability) else bad)
        if name.startswith("Option"):
            return f"The answer is {name}."
        return f"The {'best' if 'best response' in prompt else 'most consistent'} response is {name}."

    return reply


CHOOSERS = {"usc": UniversalSelfConsistency(), "a2c": AskToChoose(), "hedged-chops": ChecklistedSelection()}
SETTINGS = {
    "five draws, each right 50 %, no lure": ([0.5] * 5, 0.0),
    "five draws, each right 50 %, always the same lure": ([0.5] * 5, 1.0),
    "five draws, each right 30 %, half of the others the same lure": ([0.3] * 5, 0.5),
    "the same, but the first is greedy and right 50 %": ([0.5] + [0.3] * 4, 0.5),
}


def choosing(count: int) -> list[dict[str, Any]]:
    """The share of right verdicts by setting, procedure and ability, beside the plurality and the break-even."""
    rows = []
    for name, (rights, lure) in SETTINGS.items():
        problems = questions(count, rights, lure)
        answers = [[draw.answer for draw in problem.draws] for problem in problems]
        plurality = np.mean([Counter(given).most_common(1)[0][0] == "right" for given in answers])
        sure = np.mean([set(given) == {"right"} for given in answers])
        open_ = np.mean([{"right"} < set(given) for given in answers])
        row: dict[str, Any] = {"setting": name, "plurality": plurality, "break_even": (plurality - sure) / open_}
        row["any"] = sure + open_
        for key, procedure in CHOOSERS.items():
            for ability in ABILITIES:
                said = verdicts(procedure, ScriptedModel(chooser(ability)), problems)
                row[f"{key} {ability}"] = float(np.mean([verdict.answer == "right" for verdict in said]))
                assert all("fallback" not in (verdict.model_extra or {}) for verdict in said)
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------ fsc: facts

FACTS = [f"Fact {n} holds." for n in range(10)]


def telling(rng: random.Random) -> str:
    """A text that tells each of ten facts with probability 0.7, and three rumours of its own."""
    told = [fact for fact in FACTS if rng.random() < 0.7]
    return " ".join(told + [f"Rumour {rng.randrange(10**9)} spreads." for _ in range(3)])


def integrator(ability: float) -> Callable[[str, random.Random], str]:
    """Sees of each sentence with probability ``ability`` whether most responses have it, else tosses a coin."""

    def reply(prompt: str, rng: random.Random) -> str:
        counts: Counter[str] = Counter()
        total = 0
        for name, text in shown(prompt, "Response").items():
            many = re.search(r"stands for (\d+)", name)
            weight = int(many[1]) if many else 1
            total += weight
            counts.update(dict.fromkeys(re.findall(r"\S[^.]*\.", text), weight))
        return " ".join(
            sentence
            for sentence, count in sorted(counts.items())
            if (2 * count > total if rng.random() < ability else rng.random() < 0.5)
        )

    return reply


def fact_f1(text: str | None) -> float:
    """F1 of a text's sentences against the ten facts."""
    told = set(re.findall(r"\S[^.]*\.", text or ""))
    return 2 * len(told & set(FACTS)) / (len(told) + len(FACTS))


def integrating(count: int) -> dict[str, dict[str, float]]:
    """Mean fact F1 of single draws, of what mbr selects, and of fsc by ability, with words sent."""
    rng = random.Random(0)
    problems = []
    for n in range(count):
        texts = [telling(rng) for _ in range(9)]
        problems.append(
            Problem(question=f"What holds ({n})?", kind="open", draws=[Draw(text=t, answer=t) for t in texts])
        )
    singles = [[fact_f1(draw.text) for draw in problem.draws] for problem in problems]
    found = {"mean draw": {"f1": float(np.mean(singles))}, "best draw": {"f1": float(np.mean(np.max(singles, 1)))}}
    chosen = verdicts(MinimumBayesRisk("token-f1"), ScriptedModel(integrator(1)), problems)
    found["mbr:metric=token-f1"] = {"f1": float(np.mean([fact_f1(verdict.answer) for verdict in chosen]))}
    variants = {"fsc": {}, "fsc:keep=0.6": {"keep": 0.6}, "fsc:merge=4": {"merge": 4}}
    for name, given in variants.items():
        for ability in (0.6, 0.8, 1.0):
            model = ScriptedModel(integrator(ability))
            said = verdicts(FineGrainedSelfConsistency(**given), model, problems)  # type: ignore[arg-type]
            f1 = float(np.mean([fact_f1(verdict.answer) for verdict in said]))
            found[f"{name}, ability {ability}"] = {"f1": f1, "words": model.words / count}
    return found


# --------------------------------------------------------------------------------------- csc-sql: queries


def make_shop(path: Path) -> None:
    """A database of 60 articles."""
    rng = random.Random(0)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE article (name TEXT, price INTEGER, stock INTEGER)")
        rows = [(f"article {n}", rng.randrange(1, 100), rng.randrange(20)) for n in range(60)]
        connection.executemany("INSERT INTO article VALUES (?, ?, ?)", rows)
    connection.close()


def queries(n: int) -> tuple[str, list[str]]:
    """The right query of question n (written in two ways at random elsewhere), and usual mistakes."""
    price, stock = 10 + n, n % 15
    right = f"SELECT name FROM article WHERE price < {price} AND stock > {stock}"
    wrong = [
        f"SELECT name FROM article WHERE price < {price}",
        f"SELECT name FROM article WHERE price < {price} OR stock > {stock}",
        f"SELECT name FROM article WHERE price > {price} AND stock > {stock}",
        f"SELECT nam FROM article WHERE price < {price}",
    ]
    return right, wrong


def written(right: str, rng: random.Random) -> str:
    """The right query, worded in one of two ways that give the same rows."""
    return right if rng.random() < 0.5 else right + " ORDER BY price"


def drawn_queries(n: int, right: float, rng: random.Random, count: int = 8) -> list[str]:
    """Queries of a generator that is right with probability ``right`` and has a favourite mistake."""
    good, wrong = queries(n)
    weights = [4, 2, 1, 1]
    return [written(good, rng) if rng.random() < right else rng.choices(wrong, weights)[0] for _ in range(count)]


def reviser(ability: float) -> Callable[[str, random.Random], str]:
    """Right with probability ``ability`` where a draft is right, else half as often; else it repeats a wrong draft."""

    def reply(prompt: str, rng: random.Random) -> str:
        number = int(shown(prompt, "Question")["Question"].split()[-1])
        good, _ = queries(number)
        drafts = list(shown(prompt, "Draft").values())
        there = any(draft.startswith(good) for draft in drafts)
        chance = ability if there else ability / 2
        wrong = [draft for draft in drafts if not draft.startswith(good)]
        query = written(good, rng) if rng.random() < chance or not wrong else rng.choice(wrong)
        return f"The drafts differ in their conditions.\n```sql\n{query}\n```"

    return reply


def revising(count: int) -> list[dict[str, Any]]:
    """Execution accuracy of the plurality by results and of csc-sql by the reviser's ability."""
    from consilience.text.answers.behaviour import BehaviourClasses

    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "shop.sqlite"
        make_shop(database)
        problems = []
        for n in range(count):
            draws = [Draw(text=query, answer=query) for query in drawn_queries(n, 0.35, rng)]
            given = {"question": f"Which articles? Number {n}", "kind": "sql", "database": str(database)}
            problems.append(Problem(**given, answer=queries(n)[0], draws=draws))

        def right(problem: Problem, answer: str | None) -> bool:
            return bool(BehaviourClasses(problem, "sql").equal_to_gold(answer, problem.answer or ""))

        plain = verdicts(MinimumBayesRisk("exact"), ScriptedModel(reviser(1)), problems)
        base = [right(problem, verdict.answer) for problem, verdict in zip(problems, plain, strict=True)]
        rows = [{"what": "plurality by results", "right": float(np.mean(base)), "calls": 0.0}]
        for ability in ABILITIES:
            model = ScriptedModel(reviser(ability))
            said = verdicts(CorrectiveSelfConsistency(), model, problems)
            shares = [right(problem, verdict.answer) for problem, verdict in zip(problems, said, strict=True)]
            rows.append(
                {"what": f"csc-sql, ability {ability}", "right": float(np.mean(shares)), "calls": model.calls / count}
            )
    return rows


# ------------------------------------------------------------------------------------------------ output


def markdown(result: dict[str, Any]) -> str:
    """The tables of the results page."""
    parts = []
    for name, found in result["risk"].items():
        parts.append(f"**{name}**, {len(found['any draw'])} questions\n")
        parts.append(table(["what chooses", "right %", "over plurality", "95 % interval"], risk_rows(found)) + "\n")
    for row in result["choosing"]:
        parts.append(
            f"**{row['setting']}**: plurality {100 * row['plurality']:.1f} %, any draw {100 * row['any']:.1f} %, "
            f"break-even at ability {row['break_even']:.2f}\n"
        )
        body = [[key, *(f"{100 * row[f'{key} {ability}']:.1f}" for ability in ABILITIES)] for key in CHOOSERS]
        parts.append(table(["right %, by the chooser's ability", *map(str, ABILITIES)], body) + "\n")
    if told := result["integrating"]:
        body = [[k, f"{v['f1']:.3f}", f"{v['words']:.0f}" if "words" in v else ""] for k, v in told.items()]
        parts.append(table(["text", "fact F1", "words sent"], body) + "\n")
    if result["revising"]:
        body = [[row["what"], f"{100 * row['right']:.1f}", f"{row['calls']:.1f}"] for row in result["revising"]]
        parts.append(table(["what decides", "right %", "calls per question"], body) + "\n")
    return "\n".join(parts) + f"\nTaken with {environment()}"


def main() -> None:
    """Run everything and print it."""
    shown_parser = parser(__doc__, draws=20, questions=400, texts=100, queries=30)
    shown_parser.add_argument("records", nargs="*", type=Path, help="records for minimum Bayes risk")
    options = shown_parser.parse_args()
    risk = {path.name.split(".")[0]: asyncio.run(right_by_risk(path, options.draws)) for path in options.records}
    result = {
        "risk": risk,
        "choosing": choosing(options.questions) if options.questions else [],
        "integrating": integrating(options.texts) if options.texts else {},
        "revising": revising(options.queries) if options.queries else [],
    }
    emit(options, result, markdown(result))


if __name__ == "__main__":
    main()
