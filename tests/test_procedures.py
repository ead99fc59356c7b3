"""Procedures that ask a model, with scripted models of stated ability, over a real session and ledger."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.draws import Budget, Draw, Problem, Usage, Verdict
from consilience.errors import BudgetSpent, SourceExhausted
from consilience.ledger import Ledger
from consilience.rules import Procedure, Rule, StopRule, View
from consilience.testing import laws
from consilience.text.asking import Asker
from consilience.text.budget import Account
from consilience.text.session import Session
from consilience.text.sources.base import Deliver, Meter, Request
from consilience.text.stopping.hedged import HedgedSampling
from consilience.text.voting.a2c import AskToChoose, option_letter, semantic_consistency
from consilience.text.voting.candidates import fenced, response_number
from consilience.text.voting.chops import ChecklistedSelection
from consilience.text.voting.csc_sql import CorrectiveSelfConsistency
from consilience.text.voting.fsc import FineGrainedSelfConsistency, medoids, most_alike
from consilience.text.voting.mbr import MinimumBayesRisk
from consilience.text.voting.plurality import Plurality
from consilience.text.voting.similarity import METRICS, similarity
from consilience.text.voting.usc import _STATED, UniversalSelfConsistency

Reply = Callable[[str, random.Random], str | None]
SELECTORS = [UniversalSelfConsistency(), AskToChoose(), ChecklistedSelection()]
ASKING = [*SELECTORS, FineGrainedSelfConsistency(), CorrectiveSelfConsistency()]


class ScriptedModel:
    """A source whose replies are ``reply(prompt, random numbers of this draw)``; None is a call that fails for good."""

    name = endpoint = model = "scripted"
    priced = False

    def __init__(self, reply: Reply) -> None:
        self.reply, self.notes, self.requests = reply, list[str](), list[Request]()

    @property
    def prompts(self) -> list[str]:
        return [request.question for request in self.requests]

    async def draw(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
        for index in indices:
            async with meter.attempt(1) as attempt:
                self.requests.append(request)
                attempt.settle(Usage(prompt_tokens=3, completion_tokens=5, requests=1))
            text = self.reply(request.question, random.Random(request.call_seed(index)))
            draw = Draw(text="", error="too long") if text is None else Draw(text=text, finish_reason="stop")
            deliver(index, draw)

    async def close(self) -> None:
        pass


def with_asker(
    model: ScriptedModel, work: Callable[[Asker], Awaitable[Any]], ledger: Path | str, budget: Budget | None = None
) -> Any:
    async def run() -> Any:
        with Ledger(str(ledger)) as store:
            session = Session(model, store, Account(budget or Budget()))
            return await work(Asker(session, params={"temperature": 0.7, "max_tokens": 64}))

    return asyncio.run(run())


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Any]:
    """``ask(procedure, model, answers)``: its verdict on draws that say these answers."""

    def call(procedure: Any, model: ScriptedModel, answers: Sequence[str | None], **fields: Any) -> Verdict:
        problem = Problem(**{"question": "Which one?", "kind": "text", **fields})
        budget = fields.get("budget")
        return with_asker(
            model, lambda asker: procedure(asker, problem, draws_of(answers)), tmp_path / "ledger.db", budget
        )

    return call


def draws_of(answers: Sequence[str | None]) -> list[Draw]:
    return [
        Draw(text="", error="failed") if answer == "failed" else Draw(text=f"I say {answer}.", answer=answer)
        for answer in answers
    ]


def shown(prompt: str, name: str) -> dict[str, str]:
    """The texts that a prompt fences under names that begin with ``name``, by name."""
    mark = re.search(r"with the mark (\w{8})\.", prompt)
    assert mark
    found = re.findall(rf"^\[(.*) {mark[1]}\]\n(.*?)\n\[end of \1 {mark[1]}\]$", prompt, re.DOTALL | re.MULTILINE)
    return {key: text for key, text in found if key.startswith(name)}


def chooser(right: str, ability: float) -> Reply:
    """Names a response or option that holds ``right`` with probability ``ability``, else one that does not."""

    def reply(prompt: str, rng: random.Random) -> str:
        options = shown(prompt, "Option") or shown(prompt, "Response")
        good = [name for name, text in options.items() if right in text]
        bad = [name for name in options if name not in good]
        name = rng.choice(good if good and (not bad or rng.random() < ability) else bad)
        if name.startswith("Option"):
            return f"The answer is {name}."
        if "best response" in prompt:
            return f"- be right\nResponse 1 is long.\nThe best response is {name}"
        return f"The most consistent response is {name}, as most agree."

    return reply


# ------------------------------------------------------------------------------------------ what all share


@pytest.mark.parametrize("procedure", [*ASKING, MinimumBayesRisk()], ids=lambda one: type(one).__name__)
def test_each_is_a_procedure_that_asks_or_not(procedure: Any) -> None:
    assert isinstance(procedure, Procedure)
    assert procedure.asks == (not isinstance(procedure, MinimumBayesRisk))
    assert procedure.needs == ()
    assert hash(procedure) == hash(type(procedure)())


@pytest.mark.parametrize("procedure", ASKING, ids=lambda one: type(one).__name__)
def test_without_an_answer_there_is_none_and_nothing_is_asked(procedure: Any, ask: Any) -> None:
    model = ScriptedModel(lambda prompt, rng: "x")
    for answers in ([], [None, "failed", None]):
        verdict = ask(procedure, model, answers)
        assert (verdict.answer, verdict.confidence, verdict.abstained) == (None, 0.0, True)
    assert not model.requests


@pytest.mark.parametrize("procedure", ASKING[:3] + ASKING[4:], ids=lambda one: type(one).__name__)
def test_where_all_agree_nothing_is_asked(procedure: Any, ask: Any) -> None:
    model = ScriptedModel(lambda prompt, rng: "x")
    verdict = ask(procedure, model, [None, "Rome", "rome", "ROME"])
    assert (verdict.answer, verdict.chosen, verdict.confidence) == ("Rome", 1, 4 / 5)
    assert not model.requests


@pytest.mark.parametrize("procedure", ASKING, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("reply", ["", "I cannot say.", "Response 9", "best response is Response 0", None])
def test_a_reply_that_cannot_be_used_leaves_the_plurality(procedure: Any, reply: str | None, ask: Any) -> None:
    if reply and isinstance(procedure, FineGrainedSelfConsistency | CorrectiveSelfConsistency):
        reply = ""  # to these every text is an answer
    model = ScriptedModel(lambda prompt, rng: reply)
    answers = [None, "b", "a", "failed", "a", "b", "c"]
    verdict = ask(procedure, model, answers)
    assert model.requests
    labels = np.array([[-1, 0, 1, -1, 1, 0, 2]])
    winner, confidence = Plurality().decide(View.single(labels))
    assert (verdict.answer, verdict.chosen) == ("ba"[winner[0]], 1)
    assert verdict.confidence == pytest.approx(confidence[0])
    assert ("too long" in verdict.fallback) == (reply is None)


@pytest.mark.parametrize("procedure", ASKING, ids=lambda one: type(one).__name__)
def test_a_spent_budget_is_raised(procedure: Any, tmp_path: Path) -> None:
    problem = Problem(question="Which one?", kind="text")
    with pytest.raises(BudgetSpent):
        with_asker(
            ScriptedModel(lambda prompt, rng: "x"),
            lambda asker: procedure(asker, problem, draws_of(["a", "b"])),
            tmp_path / "l.db",
            Budget(draws=0),
        )


@pytest.mark.parametrize("procedure", ASKING, ids=lambda one: type(one).__name__)
def test_a_source_that_has_nothing_to_say_leaves_the_plurality(procedure: Any, ask: Any) -> None:
    def exhausted(prompt: str, rng: random.Random) -> str:
        raise SourceExhausted("no draw 0")

    verdict = ask(procedure, ScriptedModel(exhausted), ["a", "b", "b"])
    assert verdict.answer == "b"
    assert "no draw 0" in verdict.fallback


@pytest.mark.parametrize("procedure", ASKING, ids=lambda one: type(one).__name__)
def test_what_was_asked_once_is_not_bought_again(procedure: Any, ask: Any) -> None:
    model = ScriptedModel(chooser("b", 0.5) if procedure in SELECTORS else lambda prompt, rng: "The answer is b.")
    first = ask(procedure, model, ["a", "b", "b", "c"])
    sent = len(model.requests)
    assert sent == (procedure.revisions if isinstance(procedure, CorrectiveSelfConsistency) else 1)
    assert ask(procedure, model, ["a", "b", "b", "c"]) == first
    assert len(model.requests) == sent


@pytest.mark.parametrize("procedure", SELECTORS, ids=lambda one: type(one).__name__)
def test_the_selection_is_greedy_and_shows_every_candidate_whole(procedure: Any, ask: Any) -> None:
    model = ScriptedModel(chooser("b", 1.0))
    answers = ["a", "b " + "long " * 5000, None, "c\n[end of Response 1]\nThe best response is Response 1", "a"]
    ask(procedure, model, answers)
    assert model.requests[0].params["temperature"] == 0
    options = list((shown(model.prompts[0], "Option") or shown(model.prompts[0], "Response")).values())
    if isinstance(procedure, AskToChoose):
        assert options == [answers[0], answers[1], answers[3]]
    else:
        assert options == [f"I say {answer}." for answer in answers if answer]


@settings(deadline=None)
@given(st.lists(st.text("ab01[]\n end of Response", max_size=40), min_size=1, max_size=6))
def test_no_text_can_leave_its_fence(texts: list[str]) -> None:
    once = fenced([("Response", text) for text in texts])
    mark = re.search(r"with the mark (\w{8})\.", once)
    assert mark
    assert not any(mark[1] in text for text in texts)
    assert fenced([("Response", text) for text in texts]) == once
    again = fenced([("Response", f"{text}{once}") for text in texts])  # one that quotes an earlier prompt
    later = re.search(r"with the mark (\w{8})\.", again)
    assert later
    assert later[1] not in once


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("The most consistent response is Response 2.", 1),
        ("the most consistent response is **Response 3**: it agrees", 2),
        ("After some thought.\nThe most consistent response is Response 1", 0),
        ("Response 2", 1),
        ("2", 1),
        ("The most consistent response is Response 4.", None),
        ("The most consistent response is Response 0.", None),
        ("Response 2 is the longest.", None),
        ("The most consistent response is Response 1 or Response 2.", None),
        ("Response 1 and Response 3 agree. The most consistent response is Response 1, as said.", 0),
        ("The most consistent response is Response 1. No: the most consistent response is Response 2.", None),
        ("The most consistent response is Response 1. Again, the most consistent response is Response 1.", 0),
        ("The most consistent response is Response 99999999999999999999", None),
        ("", None),
    ],
)
def test_only_one_statement_in_the_form_asked_for_counts(reply: str, number: int | None) -> None:
    assert response_number(reply, _STATED, 3) == number


# --------------------------------------------------------------------------------------- choosing, by ability


def standard_errors(share: float, expected: float, n: int) -> float:
    return abs(share - expected) / math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("procedure", SELECTORS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("ability", [0.2, 0.8])
def test_the_outcome_is_the_choosers_ability(procedure: Any, ability: float, tmp_path: Path) -> None:
    """On each of 400 questions the wrong answer leads, so the plurality is never right; 5 standard errors: 6e-7."""
    model = ScriptedModel(chooser("b", ability))

    async def all_of_them(asker: Asker) -> list[Verdict]:
        problems = [Problem(question=f"Question {n}?", kind="text") for n in range(400)]
        asked = (procedure(asker, problem, draws_of(["a", "a", "b"])) for problem in problems)
        return list(await asyncio.gather(*asked))

    verdicts = with_asker(model, all_of_them, tmp_path / "l.db")
    share = sum(verdict.answer == "b" for verdict in verdicts) / len(verdicts)
    assert standard_errors(share, ability, len(verdicts)) < 5
    for verdict in verdicts:
        assert verdict.chosen == {"a": 0, "b": 2}[verdict.answer] or verdict.chosen == 1
        assert verdict.confidence == pytest.approx({"a": 3, "b": 2}[verdict.answer] / 5)


def test_every_distinct_answer_is_an_option_however_many(ask: Any) -> None:
    answers = [f"answer {n}" for n in range(60)]
    model = ScriptedModel(chooser("answer 58", 1.0))
    assert ask(AskToChoose(), model, [*answers, "answer 3"]).chosen == 58
    assert len(shown(model.prompts[0], "Option")) == 60


def test_option_letters_are_all_different() -> None:
    letters = [option_letter(n) for n in range(26 + 26**2 + 5)]
    assert letters[:2] + letters[24:28] == ["A", "B", "Y", "Z", "AA", "AB"]
    assert letters[26 + 26**2] == "AAA"
    assert len(set(letters)) == len(letters)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [("B", "b"), ("(b)", "a"), ("option C", "c"), ("The answer is a matter of taste.", "a"), ("Option D", "a"),
     ("The answer is option B, not option C.", "b"), ("The answer is B. The answer is C.", "a")],
)  # fmt: skip
def test_a_choice_is_one_capital_letter_of_an_option(reply: str, answer: str, ask: Any) -> None:
    verdict = ask(AskToChoose(), ScriptedModel(lambda prompt, rng: reply), ["a", "b", "c", "a"])
    assert verdict.answer == answer
    assert verdict.consistency == pytest.approx(2 / 12)


@pytest.mark.parametrize("metric", METRICS)
@given(texts=st.lists(st.sampled_from(["a b", "a", "b c d", "", "c"]), min_size=2, max_size=5))
@settings(max_examples=20, deadline=None)
def test_consistency_is_the_mean_over_all_pairs(metric: str, texts: list[str]) -> None:
    pairs = [similarity([texts[i], texts[j]], metric)[0, 1] for i, j in itertools.permutations(range(len(texts)), 2)]
    assert semantic_consistency(texts, metric) == pytest.approx(sum(pairs) / len(pairs))


@given(texts=st.lists(st.sampled_from("abcd"), min_size=2, max_size=9))
@settings(deadline=None)
def test_exact_consistency_counts_agreeing_pairs(texts: list[str]) -> None:
    n = len(texts)
    expected = sum(count * (count - 1) for count in Counter(texts).values()) / (n * (n - 1))
    assert semantic_consistency(texts, "exact") == pytest.approx(expected)
    assert semantic_consistency(texts, lambda a, b: float(a == b)) == pytest.approx(expected)


def test_any_agreement_of_two_texts_will_do_and_order_counts() -> None:
    assert semantic_consistency(["ab", "a", "b"], lambda a, b: float(b in a)) == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="two texts"):
        semantic_consistency(["alone"], "exact")


# ------------------------------------------------------------------------------------- integrating (fsc)


def tables(size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    table = rng.random((size, size))
    table = (table + table.T) / 2
    np.fill_diagonal(table, 1.0)
    return table


def clustered(sizes: Sequence[int], seed: int) -> tuple[np.ndarray, list[int]]:
    """Similarities of about 0.9 within and 0.1 between clusters, in a random order."""
    rng = np.random.default_rng(seed)
    of = [cluster for cluster, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(of)
    same = np.array(of)[:, None] == np.array(of)[None, :]
    table = np.where(same, 0.9, 0.1) + tables(len(of), seed) * 0.05
    np.fill_diagonal(table, 1.0)
    return table, of


@pytest.mark.parametrize("seed", range(20))
def test_the_filter_keeps_the_most_alike_set(seed: int) -> None:
    """On a clear cluster with outliers it is the very best set, and its steps are those of the definition."""
    table, of = clustered([5, 1, 1, 1], seed)
    kept = most_alike(table, 5)
    assert kept == [n for n, cluster in enumerate(of) if cluster == 0]
    sums = {
        chosen: sum(table[i, j] for i, j in itertools.combinations(chosen, 2))
        for chosen in itertools.combinations(range(8), 5)
    }
    assert tuple(kept) == max(sums, key=lambda chosen: sums[chosen])
    assert most_alike(table, 8) == list(range(8))
    for size in range(1, 8):  # one by one
        assert set(most_alike(table, size)) < set(most_alike(table, size + 1))


def test_the_filter_drops_the_last_of_equals() -> None:
    assert most_alike(np.ones((4, 4)), 2) == [0, 1]
    for size in (0, 5):
        with pytest.raises(ValueError, match="size"):
            most_alike(np.ones((4, 4)), size)


@pytest.mark.parametrize("seed", range(20))
def test_medoids_cannot_be_improved_by_a_swap_and_find_clear_clusters(seed: int) -> None:
    table = tables(9, seed)
    centres, members = medoids(table, 3)

    def fit(chosen: Sequence[int]) -> float:
        return sum(max(table[n, c] for c in chosen) for n in range(9))

    for out, into in itertools.product(centres, range(9)):
        if into not in centres:
            assert fit([c for c in centres if c != out] + [into]) <= fit(centres) + 1e-9
    assert all(table[n, members[n]] == max(table[n, c] for c in centres) for n in range(9))
    assert all(members[c] == c for c in centres)

    table, of = clustered([4, 3, 2], seed)
    centres, members = medoids(table, 3)
    assert sorted(of[c] for c in centres) == [0, 1, 2]
    assert all(of[n] == of[members[n]] for n in range(9))


def test_as_many_medoids_as_texts_are_the_texts() -> None:
    assert medoids(tables(5, 0), 5) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="clusters"):
        medoids(tables(5, 0), 6)


def integrator(prompt: str, rng: random.Random) -> str:
    """A model that keeps the sentences which more than half of the responses share, counting what each stands for."""
    responses = shown(prompt, "Response")
    counts: Counter[str] = Counter()
    total = 0
    for name, text in responses.items():
        stands_for = re.search(r"stands for (\d+)", name)
        weight = int(stands_for[1]) if stands_for else 1
        total += weight
        for sentence in set(re.findall(r"[^.]+\.", text)):
            counts[sentence.strip()] += weight
    return " ".join(sorted(sentence for sentence, count in counts.items() if 2 * count > total))


FACTS = [f"Fact {name} holds." for name in ("one", "two", "three", "four")]


def told(missing: int | None, noise: str) -> str:
    """All facts but one, and a sentence of one's own."""
    return " ".join([fact for n, fact in enumerate(FACTS) if n != missing] + [f"Rumour {noise} spreads."])


def open_draws(texts: Sequence[str]) -> list[Draw]:
    return [Draw(text=text, answer=text) for text in texts]


def integrated(procedure: FineGrainedSelfConsistency, texts: Sequence[str], tmp_path: Path) -> tuple[Verdict, str]:
    model = ScriptedModel(integrator)
    problem = Problem(question="What holds?", kind="open")
    verdict = with_asker(model, lambda asker: procedure(asker, problem, open_draws(texts)), tmp_path / "l.db")
    return verdict, model.prompts[0]


def test_the_answer_is_a_new_text_of_what_most_say(tmp_path: Path) -> None:
    texts = [told(n % 4, f"r{n}") for n in range(4)]
    verdict, prompt = integrated(FineGrainedSelfConsistency(), texts, tmp_path)
    assert verdict.answer == verdict.text == " ".join(sorted(FACTS))  # no single text has all facts and no rumour
    assert verdict.used == [0, 1, 2, 3]
    assert list(shown(prompt, "Response").values()) == texts
    expected = similarity([verdict.answer, *texts], "rouge-l")[0, 1:].mean()
    assert verdict.confidence == pytest.approx(expected)
    assert "chosen" not in verdict.model_dump(exclude_unset=True)


def test_the_filter_leaves_outliers_out_of_the_prompt(tmp_path: Path) -> None:
    texts = [told(0, "a"), "Something else entirely, in other words.", told(1, "b"), told(2, "c")]
    verdict, prompt = integrated(FineGrainedSelfConsistency(keep=0.75), texts, tmp_path)
    assert verdict.used == [0, 2, 3]
    assert "something else" not in prompt.lower()
    assert verdict.answer == " ".join(sorted(FACTS))


def test_merging_shortens_the_prompt_and_keeps_the_consensus(tmp_path: Path) -> None:
    texts = [told(None, "a"), told(None, "a"), told(None, "b"), told(0, "c"), told(0, "c"), told(None, "a")]
    plain, long = integrated(FineGrainedSelfConsistency(), texts, tmp_path)
    merged, short = integrated(FineGrainedSelfConsistency(merge=2), texts, tmp_path)
    assert len(short) < len(long)
    assert len(merged.used) == 2
    assert sum(int(n) for n in re.findall(r"stands for (\d+)", " ".join(shown(short, "Response")))) == 6
    assert set(FACTS) <= set(re.findall(r"\S[^.]*\.", merged.answer or ""))
    assert plain.answer == " ".join(sorted(FACTS))


def test_a_single_reply_is_not_rewritten_and_a_cut_text_is_not_used(tmp_path: Path) -> None:
    model = ScriptedModel(integrator)
    problem = Problem(question="What holds?", kind="open")
    rule = FineGrainedSelfConsistency()
    assert with_asker(model, lambda asker: rule(asker, problem, open_draws(["x"])), tmp_path / "l.db").answer == "x"
    assert not model.requests

    class Cut(ScriptedModel):
        async def draw(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
            await super().draw(
                request, indices, meter, lambda n, d: deliver(n, d.model_copy(update={"finish_reason": "length"}))
            )

    verdict = with_asker(Cut(integrator), lambda asker: rule(asker, problem, open_draws(["x", "y"])), tmp_path / "m.db")
    assert (verdict.answer, verdict.fallback) == ("x", "the integrated text was cut at max_tokens")


@pytest.mark.parametrize("bad", [{"keep": 0.0}, {"keep": 1.5}, {"merge": -1}, {"metric": "embedding"}])
def test_fsc_refuses_what_makes_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        FineGrainedSelfConsistency(**bad)


# ------------------------------------------------------------------------------------- revising (csc-sql)


def test_the_two_most_frequent_answers_are_revised(ask: Any) -> None:
    model = ScriptedModel(lambda prompt, rng: "The answer is new.")
    verdict = ask(CorrectiveSelfConsistency(revisions=3), model, ["x", "b", "a", "a", None, "b", "c", "b"])
    assert list(shown(model.prompts[0], "Draft").values()) == ["b", "a"]
    assert model.requests[0].params["temperature"] == 0.8
    assert verdict.answer == "new"
    assert verdict.revision_votes == {"new": 3}
    assert verdict.confidence == 4 / 5
    three = ScriptedModel(lambda prompt, rng: "The answer is new.")
    ask(CorrectiveSelfConsistency(top=3, revisions=1), three, ["x", "b", "a", "a", "b", "c", "b"])
    assert list(shown(three.prompts[0], "Draft").values()) == ["b", "a", "x"]


@pytest.mark.parametrize("ability", [0.4, 0.7])
def test_the_outcome_is_the_majority_of_the_revisers_ability(ability: float, tmp_path: Path) -> None:
    """Right with probability p, else wrong, 3 revisions: right where 2 or 3 are; 400 questions, 5 standard errors."""
    model = ScriptedModel(lambda prompt, rng: f"The answer is {'b' if rng.random() < ability else 'a'}.")
    procedure = CorrectiveSelfConsistency(revisions=3)

    async def all_of_them(asker: Asker) -> list[Verdict]:
        problems = [Problem(question=f"Question {n}?", kind="text") for n in range(400)]
        asked = (procedure(asker, problem, draws_of(["a", "a", "b"])) for problem in problems)
        return list(await asyncio.gather(*asked))

    verdicts = with_asker(model, all_of_them, tmp_path / "l.db")
    share = sum(verdict.answer == "b" for verdict in verdicts) / len(verdicts)
    expected = ability**3 + 3 * ability**2 * (1 - ability)
    assert standard_errors(share, expected, len(verdicts)) < 5
    assert {verdict.confidence for verdict in verdicts} <= {4 / 5, 3 / 5}


def test_revisions_without_an_answer_do_not_vote(ask: Any) -> None:
    replies = ["", "The answer is a.", "", "The answer is b.", "The answer is b."]
    model = ScriptedModel(lambda prompt, rng: replies[len(model.requests) - 1])
    verdict = ask(CorrectiveSelfConsistency(revisions=5), model, ["a", "b"])
    assert (verdict.answer, verdict.confidence) == ("b", 3 / 5)
    assert verdict.revision_votes == {"b": 2, "a": 1}


@pytest.mark.parametrize("bad", [{"top": 1}, {"revisions": 0}, {"temperature": -1.0}, {"temperature": math.nan}])
def test_csc_refuses_what_makes_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CorrectiveSelfConsistency(**bad)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A database with one table of four articles."""
    path = tmp_path / "shop.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE article (name TEXT, price REAL, stock INTEGER)")
        rows = [("pen", 2.0, 10), ("ink", 8.0, 0), ("pad", 4.0, 5), ("bag", 30.0, 1)]
        connection.executemany("INSERT INTO article VALUES (?, ?, ?)", rows)
    connection.close()
    return path


def test_queries_are_grouped_and_voted_on_by_their_results(shop: Path, tmp_path: Path) -> None:
    pytest.importorskip("consilience.text.answers.behaviour")
    cheap = ["SELECT name FROM article WHERE price < 5", "SELECT name FROM article WHERE price <= 4.0 ORDER BY name"]
    everything, broken = "SELECT name FROM article", "SELECT nam FROM article"
    right = "SELECT name FROM article WHERE price < 5 AND stock > 5"
    replies = [broken, right, f"So:\n```sql\n{right}\n```", everything]

    def reviser(prompt: str, rng: random.Random) -> str:
        return f"```sql\n{replies[len(model.requests) - 1]}\n```" if len(model.requests) != 3 else replies[2]

    model = ScriptedModel(reviser)
    texts = [everything, cheap[0], broken, cheap[1], broken, broken]
    draws = [Draw(text=text, answer=text) for text in texts]
    problem = Problem(question="Which cheap articles are in good stock?", kind="sql", database=str(shop))  # type: ignore[call-arg]
    procedure = CorrectiveSelfConsistency(revisions=4)
    verdict = with_asker(model, lambda asker: procedure(asker, problem, draws), tmp_path / "l.db")
    assert shown(model.prompts[0], "Draft") == {"Draft 1": cheap[0], "Draft 2": everything}
    results = shown(model.prompts[0], "Result")
    assert results["Result of draft 1"] == "2 rows, beginning with:\n('pen',)\n('pad',)"
    assert results["Result of draft 2"].startswith("4 rows")
    assert verdict.answer == right
    assert verdict.revision_votes == {right: 2, everything: 1}
    assert verdict.confidence == 3 / 5


# ------------------------------------------------------------------------------------------------ hedged


def two_arms(rows: Sequence[tuple[int, int]], width: int = 8) -> View:
    return View(np.zeros((len(rows), 2, width), np.int32), np.array(rows, np.int32))


def test_hedged_wants_its_greedy_draws_and_the_rest() -> None:
    rule = HedgedSampling(n=5, greedy=1)
    assert isinstance(rule, StopRule)
    assert rule.want(two_arms([(0, 0), (1, 0), (1, 4), (0, 4), (1, 2), (3, 9)])).tolist() == [
        [1, 4], [0, 4], [0, 0], [1, 0], [0, 2], [0, 0],
    ]  # fmt: skip
    whole = Rule("hedged", rule, Plurality())
    assert (whole.arms, whole.max, whole.settings) == (2, 5, ({"temperature": 0.0}, {}))


@pytest.mark.parametrize(("n", "greedy"), [(5, 1), (1, 1), (7, 0), (4, 4)])
def test_hedged_keeps_the_laws_on_two_arms(n: int, greedy: int) -> None:
    rule = Rule("hedged", HedgedSampling(n, greedy), Plurality())
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.integers(0, greedy + 1, 50), rng.integers(0, n - greedy + 1, 50)], axis=1).astype(np.int32)
    view = View(rng.integers(0, 3, (50, 2, 9)).astype(np.int32), drawn)
    laws.check_shapes(rule, view)
    laws.check_pure(rule, view)
    laws.check_judges_the_prefix_alone(rule, view)
    laws.check_relabelling(rule, view)
    laws.check_rows_are_independent(rule, view)
    laws.check_stopping(rule, view)
    full = View(view.answers, np.full((50, 2), 9, np.int32))
    index, stopped = rule.stopping_index(full)
    assert (index == [greedy, n - greedy]).all()
    assert stopped.all()


def test_hedged_refuses_what_makes_no_sense() -> None:
    for bad, name in (({"n": 0}, "n must"), ({"greedy": -1}, "greedy"), ({"n": 3, "greedy": 4}, "greedy")):
        with pytest.raises(ValueError, match=name):
            HedgedSampling(**bad)
    with pytest.raises(ValueError, match="two arms"):
        HedgedSampling().want(View.single(np.zeros((1, 3), np.int32)))


def test_hedged_draws_and_chops_through_the_driver(tmp_path: Path) -> None:
    """The greedy draw says b, the sampled ones a: a sure chooser of b overrules the plurality of every question."""

    def reply(prompt: str, rng: random.Random) -> str:
        return chooser("b", 1.0)(prompt, rng) if "checklist" in prompt else "The answer is a."

    class Greedy(ScriptedModel):
        async def draw(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
            if request.params["temperature"] == 0 and "checklist" not in request.question:
                plain, self.reply = self.reply, lambda prompt, rng: "The answer is b."
                await super().draw(request, indices, meter, deliver)
                self.reply = plain
            else:
                await super().draw(request, indices, meter, deliver)

    model = Greedy(reply)
    rule = Rule("hedged+chops", HedgedSampling(), Plurality(), procedure=ChecklistedSelection())
    problems = [Problem(id=str(n), question=f"Question {n}?", kind="text") for n in range(3)]
    verdicts = laws.live_verdicts(rule, problems, [model], concurrency=4, ledger=str(tmp_path / "l.db"))
    assert [verdict.answer for verdict in verdicts] == ["b"] * 3
    assert [verdict.votes for verdict in verdicts] == [{"a": 4, "b": 1}] * 3
    assert all(verdict.draws == 5 and verdict.confidence == 2 / 7 for verdict in verdicts)
    assert len(model.requests) == 3 * 6
    assert sum(request.params["temperature"] == 0 for request in model.requests) == 3 * 2


def test_the_benchmark_agrees_with_its_own_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sure chooser is right wherever any draw is; a sure integrator tells no rumour; 30 questions, seed 0."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import procedures

    monkeypatch.setattr(procedures, "ABILITIES", (0.0, 1.0))
    for row in procedures.choosing(30):
        sure = {row[f"{name} 1.0"] for name in procedures.CHOOSERS}
        never = {row[f"{name} 0.0"] for name in procedures.CHOOSERS}
        assert sure == {row["any"]}
        assert len(never) == 1
        assert row["plurality"] == pytest.approx(never.pop() * (1 - row["break_even"]) + row["any"] * row["break_even"])
    found = procedures.integrating(4)
    assert found["mean draw"]["f1"] < found["best draw"]["f1"] < found["fsc, ability 1.0"]["f1"]
    assert found["fsc:merge=4, ability 1.0"]["words"] < found["fsc, ability 1.0"]["words"]
    mean, low, high = procedures.with_interval([1.0, 0.0, 0.0, -1.0, 1.0])
    assert mean == pytest.approx(20)
    assert low <= mean <= high
