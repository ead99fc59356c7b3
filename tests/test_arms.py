"""Several models, coupled questions and procedures under the live driver; the same rules in replay."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from consilience import policy, record
from consilience.draws import Budget, Draw, Problem, Verdict
from consilience.driver import Asking, Driver, Finished
from consilience.errors import EndpointError, InputError
from consilience.ledger import Ledger
from consilience.replay import replay, replay_orders, replay_procedure, tabulate
from consilience.rules import Int, Procedure, Rule, View
from consilience.testing import laws
from consilience.testing.laws import ShuffledSource
from consilience.text.asking import Asker
from consilience.text.budget import Account
from consilience.text.routing.modelswitch import ModelSwitch
from consilience.text.session import Session
from consilience.text.stopping.fixed import SelfConsistency
from consilience.text.stopping.hedged import HedgedSampling
from consilience.text.voting.plurality import Plurality
from consilience.views import kind_of

ASKING = Asking(params={"temperature": 1.0, "max_tokens": 16}, template="{question}")


@dataclass(frozen=True, slots=True)
class Contested:
    """Two draws each, then single draws for the questions whose votes are split, until ``mean`` per question."""

    mean: int = 5
    max: int = 12
    needs: ClassVar[tuple[str, ...]] = ()
    coupled: ClassVar[bool] = True

    def want(self, view: View) -> Int:
        if (view.drawn < 2).any():
            return (2 - view.drawn).clip(min=0)
        left = self.mean * len(view.drawn) - int(view.drawn.sum())
        votes = view.judged()[:, 0]
        split = np.array([len(set(row[row >= 0].tolist())) for row in votes])
        order = np.lexsort((np.arange(len(split)), view.drawn[:, 0], -split))
        order = order[view.drawn[order, 0] < self.max][: max(min(left, len(split) // 4 + 1), 0)]
        want = np.zeros_like(view.drawn)
        want[order] = 1
        return want


@dataclass(frozen=True, slots=True)
class Judge:
    """Asks which answer is right, twice, and takes the second reply."""

    asks: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    async def __call__(self, session: Asker, problem: Problem, draws: Sequence[Draw]) -> Verdict:
        seen = sorted({draw.answer for draw in draws if draw.answer is not None})
        replies = await session.ask(f"judge {problem.id}", n=2, temperature=0.5)
        assert seen
        return Verdict(answer=replies[1].text, confidence=0.25, judged_by="Judge")


@dataclass(frozen=True, slots=True)
class LastText:
    """The last draw's text, whatever the votes: asks nobody."""

    asks: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    async def __call__(self, session: Asker, problem: Problem, draws: Sequence[Draw]) -> Verdict:
        return Verdict(answer=draws[-1].answer, confidence=1.0, chosen=len(draws) - 1)


def switch(**settings: float) -> Rule:
    return Rule("modelswitch", ModelSwitch(**settings), Plurality())  # type: ignore[arg-type]


def judged_by(procedure: Procedure, n: int = 4) -> Rule:
    return Rule("judged", SelfConsistency(n), Plurality(), procedure=procedure)


def noisy(name: str, questions: int, right: float, draws: int = 20) -> dict[str, list[str]]:
    lots = random.Random(name)
    answers = lambda: "right" if lots.random() < right else f"wrong {lots.randrange(12)}"  # noqa: E731
    return {f"question {n}": [f"The answer is {answers()}." for _ in range(draws)] for n in range(questions)}


def live(
    sources: list[ShuffledSource],
    rule: Rule,
    ledger: Path,
    *,
    budget: Budget | None = None,
    concurrency: int = 8,
    questions: list[str] | None = None,
) -> tuple[list[Finished], Driver]:
    finished: list[Finished] = []
    asked = questions or list(sources[0].texts)
    problems = [Problem(id=question, question=question, answer="right") for question in asked]

    async def work() -> Driver:
        with Ledger(str(ledger)) as store:
            account = Account(budget or Budget())
            sessions = [Session(source, store, account) for source in sources]
            driver = Driver(sessions, rule, ASKING, concurrency=concurrency)
            await driver.run(problems, finished.append)
            return driver

    return finished, asyncio.run(work())


def verdict_of(one: Finished) -> Verdict:
    assert one.problem.verdict is not None
    return one.problem.verdict


@pytest.mark.parametrize("rule", [switch(models=3, draws=4), switch(models=2, draws=3, threshold=0.6)])
def test_several_models_live_as_in_replay(rule: Rule) -> None:
    laws.check_live_equals_replay(rule, problems=20)


def test_settings_of_one_model_live_as_in_replay() -> None:
    laws.check_live_equals_replay(Rule("hedged", HedgedSampling(), Plurality()), problems=20)


def test_coupled_questions_live_as_in_replay() -> None:
    laws.check_live_equals_replay(Rule("contested", Contested(), Plurality()))


def test_the_second_model_is_asked_only_where_the_first_disagrees(tmp_path: Path) -> None:
    small, large = (ShuffledSource(noisy(name, 40, right), name=name) for name, right in (("s", 0.8), ("l", 0.95)))
    finished, driver = live([small, large], switch(models=2, draws=3), tmp_path / "l.db")
    assert small.sent == 120
    split = [one for one in finished if verdict_of(one).draws == 6]
    assert large.sent == 3 * len(split) > 0
    for one in finished:
        arms = [(draw.model_extra or {})["arm"] for draw in one.problem.draws]
        assert arms == sorted(arms)
        agreed = len({draw.answer for draw in one.problem.draws[:3]}) == 1
        assert verdict_of(one).draws == (3 if agreed else 6)
        assert verdict_of(one).stopped_because == ("rule" if agreed else "max")
        assert sum(verdict_of(one).votes.values()) == verdict_of(one).draws
    again = [ShuffledSource(source.texts, name=source.name) for source in (small, large)]
    live(again, switch(models=2, draws=3), tmp_path / "l.db")
    assert [source.sent for source in again] == [0, 0]
    assert sum(session.bought for session in driver.sessions) == small.sent + large.sent


def test_a_record_of_several_models_is_replayed_by_arm(tmp_path: Path) -> None:
    sources = [ShuffledSource(noisy(name, 30, right), name=name) for name, right in (("s", 0.6), ("l", 0.9))]
    rule = switch(models=2, draws=4, threshold=1.0)
    whole = Rule("all", ModelSwitch(models=2, draws=4, threshold=1.0), Plurality())
    finished, _ = live(sources, whole, tmp_path / "l.db")
    record.write(tmp_path / "r.jsonl", [one.problem for one in finished])
    table = tabulate(record.read(tmp_path / "r.jsonl"))
    assert table.arms == ("0", "1")
    replayed = replay(table, rule, repeats=3)
    assert replayed.draws[0].tolist() == [verdict_of(one).draws for one in finished]  # four of four agree in any order
    with pytest.raises(InputError, match="no draws of 'x'"):
        tabulate(record.read(tmp_path / "r.jsonl"), arms=["x"])
    with pytest.raises(InputError, match="3 arms, the record holds 2"):
        replay(table, switch(models=3, draws=4))


def test_the_number_of_models_must_be_that_of_the_policy(tmp_path: Path) -> None:
    source = ShuffledSource(noisy("s", 2, 0.5))
    with pytest.raises(InputError, match="draws from 2 models, but 1 model given"):
        live([source], switch(models=2, draws=3), tmp_path / "l.db")
    with pytest.raises(InputError, match="draws from 1 model, but 2 models given"):
        live([source, source], Rule("sc", SelfConsistency(2), Plurality()), tmp_path / "l.db")
    assert source.sent == 0


@pytest.mark.parametrize("limit", [0, 5, 61, 100])
def test_a_draw_budget_over_several_models_is_kept(limit: int, tmp_path: Path) -> None:
    sources = [ShuffledSource(noisy(name, 20, 0.5), name=name) for name in "sl"]
    finished, driver = live(sources, switch(models=2, draws=3), tmp_path / "l.db", budget=Budget(draws=limit))
    assert sum(source.sent for source in sources) == limit
    assert driver.budget_spent == "draws"
    assert len(finished) == 20
    assert all(verdict_of(one).draws == sum(verdict_of(one).votes.values()) for one in finished)


@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_a_coupled_rule_spends_its_total_and_no_more(concurrency: int, tmp_path: Path) -> None:
    source = ShuffledSource(noisy("s", 40, 0.6))
    finished, _ = live(
        [source], Rule("contested", Contested(), Plurality()), tmp_path / "l.db", concurrency=concurrency
    )
    assert source.sent == 5 * 40
    drawn = [verdict_of(one).draws for one in finished]
    assert sum(drawn) == 5 * 40
    assert len(set(drawn)) > 1


def test_a_coupled_run_outlives_the_budget_and_a_source_that_ends(tmp_path: Path) -> None:
    source = ShuffledSource(noisy("s", 20, 0.6))
    finished, driver = live(
        [source], Rule("contested", Contested(), Plurality()), tmp_path / "l.db", budget=Budget(draws=70)
    )
    assert source.sent == 70
    assert driver.budget_spent == "draws"
    assert all(not verdict_of(one).abstained for one in finished)
    short = ShuffledSource({q: drawn[: 2 + n % 2] for n, (q, drawn) in enumerate(noisy("t", 20, 0.3).items())})
    finished, _ = live([short], Rule("contested", Contested(), Plurality()), tmp_path / "m.db")
    assert {verdict_of(one).stopped_because for one in finished} >= {"source exhausted"}
    assert len(finished) == 20


class Judging(ShuffledSource):
    """Draws as told, and replies to what is asked of it."""

    async def draw(self, request, indices, meter, deliver) -> None:
        if request.question.startswith("judge"):
            self.texts.setdefault(request.question, ["maybe", "right"])
            self._fails.setdefault(request.question, [False, False])
        await super().draw(request, indices, meter, deliver)


def test_a_procedure_has_the_last_word_and_its_asks_are_counted_and_kept(tmp_path: Path) -> None:
    texts = noisy("s", 12, 0.3)
    finished, driver = live([Judging(dict(texts))], judged_by(Judge()), tmp_path / "l.db", questions=list(texts))
    for one in finished:
        verdict = verdict_of(one)
        assert (verdict.answer, verdict.confidence, one.right) == ("right", 0.25, True)
        assert (verdict.model_extra or {})["judged_by"] == "Judge"
        assert verdict.draws == 4 == sum(verdict.votes.values())
        assert verdict.usage.requests == 4 + 2
    assert (driver.session.bought, driver.session.asked) == (12 * 4, 12 * 2)
    again = Judging(dict(texts))
    live([again], judged_by(Judge()), tmp_path / "l.db", questions=list(texts))
    assert again.sent == 0


def test_without_money_for_the_procedure_the_vote_stands(tmp_path: Path) -> None:
    texts = noisy("s", 6, 0.9)
    source = Judging(dict(texts))
    rule = judged_by(Judge())
    finished, driver = live(
        [source], rule, tmp_path / "l.db", budget=Budget(draws=6 * 4 + 2), questions=list(texts), concurrency=1
    )
    assert driver.budget_spent == "draws"
    said = [verdict_of(one).stopped_because for one in finished]
    assert said.count("budget: draws") >= 4
    assert all(verdict_of(one).answer is not None for one in finished if verdict_of(one).draws)


def test_a_procedure_that_asks_nobody_is_replayed_without_a_model(tmp_path: Path) -> None:
    texts = noisy("s", 25, 0.5, draws=6)
    problems = [
        Problem(id=q, question=q, answer="right", draws=[Draw(text=text, completion_tokens=3) for text in drawn])
        for q, drawn in texts.items()
    ]
    table = tabulate(problems)
    rule = judged_by(LastText(), n=4)
    found = asyncio.run(
        replay_procedure(problems, table, rule, lambda: None, repeats=40, seed=3, kind_of=lambda p: kind_of(p))
    )
    share = np.mean([["right" in text for text in drawn] for drawn in texts.values()])
    assert found.right.shape == (40, 25)
    assert found.right.mean() == pytest.approx(share, abs=0.06)  # 1,000 draws without replacement: 4 standard errors
    assert (found.tokens == 12).all()
    assert found.summary()["mean_draws"] == 4
    with pytest.raises(InputError, match="procedure"):
        replay(table, rule)


def test_a_procedure_in_replay_asks_once_for_the_same_thing(tmp_path: Path) -> None:
    texts = noisy("s", 8, 0.5, draws=4)
    problems = [
        Problem(id=q, question=q, answer="right", draws=[Draw(text=text) for text in drawn])
        for q, drawn in texts.items()
    ]
    table = tabulate(problems)
    source = Judging({})

    async def work() -> object:
        with Ledger(str(tmp_path / "l.db")) as store:
            session = Session(source, store, Account(Budget()))
            return await replay_procedure(
                problems,
                table,
                judged_by(Judge()),
                lambda: Asker(session, params={"temperature": 1.0, "max_tokens": 16}),
                repeats=5,
                kind_of=lambda p: kind_of(p),
            )

    found = asyncio.run(work())
    assert found.right.all()  # type: ignore[attr-defined]
    assert source.sent == 2 * 8


def test_one_model_given_twice_is_refused(tmp_path: Path) -> None:
    texts = noisy("s", 2, 0.5)
    with pytest.raises(InputError, match="'s' is given twice"):
        live(
            [ShuffledSource(texts, name="s"), ShuffledSource(texts, name="s")],
            switch(models=2, draws=3),
            tmp_path / "l.db",
        )


def test_short_counts_the_draws_of_each_arm() -> None:
    draws = [Draw(text="The answer is 1.", arm=arm) for arm in (0, 1, 1)]
    table = tabulate([Problem(question="q", draws=draws)])
    greedy = Rule("hedged", HedgedSampling(n=3, greedy=2), Plurality())
    assert replay(table, greedy, repeats=2).short == 1.0
    assert replay(table, Rule("hedged", HedgedSampling(n=3, greedy=1), Plurality()), repeats=2).short == 0.0


def test_arms_are_named_by_number_or_model() -> None:
    draws = [Draw(text=f"The answer is {arm}.", arm=arm, model=name) for arm, name in ((0, "small"), (1, "large"))]
    problem = Problem(question="q", draws=draws)
    assert tabulate([problem], arms=["large", "small"]).arm.tolist() == [[1, 0]]
    assert tabulate([problem], arms=["1", "0"]).arm.tolist() == [[1, 0]]


def test_replay_says_how_often_a_procedure_left_it_at_the_vote() -> None:
    @dataclass(frozen=True, slots=True)
    class Undecided:
        asks: ClassVar[bool] = False
        needs: ClassVar[tuple[str, ...]] = ()

        async def __call__(self, session: Asker, problem: Problem, draws: Sequence[Draw]) -> Verdict:
            plural = Verdict(answer=draws[0].answer, confidence=0.5)
            return plural.model_copy(update={"fallback": "no reply"}) if problem.id == "a" else plural

    problems = [
        Problem(id=name, question=name, answer="1", draws=[Draw(text="The answer is 1.")] * 2) for name in "abcd"
    ]
    found = asyncio.run(
        replay_procedure(
            problems,
            tabulate(problems),
            judged_by(Undecided(), n=2),
            lambda: None,
            repeats=3,
            kind_of=lambda p: kind_of(p),
        )
    )
    assert found.summary()["fallback"] == 0.25
    assert "fallback" not in replay(tabulate(problems), Rule("sc", SelfConsistency(2), Plurality())).summary()


@pytest.mark.parametrize("spec", ["dsc:run=4,neighbours=3,max=12", "knowledge-gradient:mean=5,max=12"])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_question_that_runs_dry_holds_up_no_other(spec: str, concurrency: int, tmp_path: Path) -> None:
    texts = noisy("r", 24, 0.6, draws=12)
    texts = {q: drawn[: n % 4] if n % 5 == 0 else drawn for n, (q, drawn) in enumerate(texts.items())}
    ranks = np.random.default_rng(5).random(len(texts)).tolist()
    problems = [
        Problem(id=q, question=q, answer="right", difficulty=rank, draws=[Draw(text=text) for text in texts[q]])
        for q, rank in zip(texts, ranks, strict=True)
    ]
    rule = policy.parse(spec)
    finished: list[Finished] = []

    async def work() -> None:
        with Ledger(str(tmp_path / "l.db")) as store:
            session = Session(ShuffledSource(texts), store, Account(Budget()))
            asked = [problem.model_copy(update={"draws": []}) for problem in problems]
            await Driver(session, rule, ASKING, concurrency=concurrency).run(asked, finished.append)

    asyncio.run(work())
    replayed = replay_orders(tabulate(problems, traits=rule.traits), rule, [np.tile(np.arange(12), (24, 1))])
    assert [verdict_of(one).draws for one in finished] == replayed.draws[0].tolist()
    assert [verdict_of(one).decided for one in finished] == replayed.decided[0].tolist()
    if spec.startswith("knowledge"):
        assert replayed.draws.sum() == 5 * 24
    dry = np.array([len(drawn) < 12 for drawn in texts.values()])
    assert (replayed.draws[0][~dry] >= 1).all()
    assert replayed.draws[0][~dry].max() > 4  # a hard question among the others is not cut short


class Refused(ShuffledSource):
    """Refuses the greedy arm after a while; the other arm's draws are on their way by then."""

    async def draw(self, request, indices, meter, deliver) -> None:
        if request.params["temperature"] == 0:
            raise EndpointError("no greedy draws here")
        await asyncio.sleep(0.05)
        await super().draw(request, indices, meter, deliver)


def test_the_draws_of_one_arm_outlive_the_refusal_of_another(tmp_path: Path) -> None:
    texts = noisy("s", 1, 0.5)
    source = Refused(texts)
    with pytest.raises(EndpointError, match="no greedy"):
        live([source], Rule("hedged", HedgedSampling(), Plurality()), tmp_path / "l.db")
    assert source.sent == 4
    again = ShuffledSource(texts)
    live([again], Rule("hedged", HedgedSampling(), Plurality()), tmp_path / "l.db")
    assert again.sent == 1


def test_a_budget_spent_on_the_ranking_still_ends_in_verdicts(tmp_path: Path) -> None:
    source = ShuffledSource(noisy("s", 10, 0.5))

    class Ranking(ShuffledSource):
        async def draw(self, request, indices, meter, deliver) -> None:
            if request.question not in source.texts:
                self.texts.setdefault(request.question, ["1, 2"] * 3)
                self._fails.setdefault(request.question, [False] * 3)
            await super().draw(request, indices, meter, deliver)

    finished, driver = live(
        [Ranking(dict(source.texts))],
        policy.parse("dsc"),
        tmp_path / "l.db",
        budget=Budget(draws=2),
        questions=list(source.texts),
    )
    assert driver.budget_spent == "draws"
    assert len(finished) == 10


def test_agreement_of_a_procedure_is_by_the_draw_it_chose(tmp_path: Path) -> None:
    drawn = [Draw(text="", answer=answer) for answer in ("1", "2", "2", "2")]
    problems = [Problem(id="a", question="a", answer="2", kind="number", draws=drawn), Problem(id="b", question="b")]
    problems[1].draws = [Draw(text="no idea")] * 2
    table = tabulate(problems)
    found = asyncio.run(
        replay_procedure(
            problems,
            table,
            policy.parse("sc:n=4+mbr:metric=exact"),
            lambda: None,
            repeats=3,
            kind_of=lambda p: kind_of(p),
        )
    )
    assert found.agrees.all()
    assert found.right[:, 0].all()
    assert not found.answered[:, 1].any()
