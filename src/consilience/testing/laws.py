"""The laws a rule must satisfy, as checks for your own rules: each raises AssertionError saying what was broken.

    from consilience.testing import laws
    laws.check_rule(MyRule(...))            # the pure laws, on random views
    laws.check_live_equals_replay(rule)     # the driver: concurrency and arrival order change no verdict

All randomness comes from ``seed``.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consilience.draws import Budget, Draw, Problem, Usage, Verdict
from consilience.errors import SourceExhausted
from consilience.rules import Rule, View

if TYPE_CHECKING:
    from consilience.text.sources.base import Deliver, Meter, Request


def random_views(rule: Rule, *, trials: int = 200, classes: int = 4, seed: int = 0) -> View:
    """A view of ``trials`` problems with random answers, some missing, and random numbers of judged draws.

    Of several arms these are numbers that the rule itself can come to.
    """
    generator = np.random.default_rng(seed)
    skew = generator.dirichlet(np.full(classes, 0.5), size=trials)
    most = min(rule.max, 64)
    size = (rule.arms, most + 3)
    answers = np.array([generator.choice(classes, size=size, p=p) for p in skew], dtype=np.int32)
    answers[generator.random(answers.shape) < 0.05] = -1
    drawn = generator.integers(0, most + 1, size=(trials, 1)).astype(np.int32)
    fields = {name: generator.normal(size=answers.shape) for name in rule.needs}
    traits = {name: generator.normal(size=trials) for name in rule.traits}
    if rule.arms > 1:
        steps = drawn[:, 0]
        drawn = np.zeros((trials, rule.arms), np.int32)
        for _ in range(most):
            want = rule.want(View(answers, drawn, fields, traits))
            arm = np.where(want > 0, generator.random(want.shape), -1).argmax(1)
            moves = want.any(1) & (drawn.sum(1) < steps)
            drawn = drawn + ((np.arange(rule.arms) == arm[:, None]) & moves[:, None]).astype(np.int32)
    return View(answers, drawn, fields, traits)


def check_rule(rule: Rule, *, trials: int = 200, seed: int = 0) -> None:
    """All the pure laws below that apply to the rule: one that couples its problems is spared the two about rows."""
    view = random_views(rule, trials=trials, seed=seed)
    check_shapes(rule, view)
    check_pure(rule, view)
    check_judges_the_prefix_alone(rule, view)
    check_relabelling(rule, view, seed=seed)
    if not rule.coupled:
        check_rows_are_independent(rule, view)
        check_stopping(rule, view)
    check_stopping_index(rule, view)


def check_shapes(rule: Rule, view: View) -> None:
    """``want`` is int [problems, arms], never negative or past ``max``; ``decide`` a class and a share each."""
    want = rule.want(view)
    assert want.shape == view.drawn.shape, f"want must have shape {view.drawn.shape}, got {want.shape}"
    assert np.issubdtype(want.dtype, np.integer), f"want must be integers, got {want.dtype}"
    assert (want >= 0).all(), "want must not be negative"
    judged, asked = view.drawn.sum(1), want.sum(1)
    assert (judged + asked <= np.maximum(rule.max, judged)).all(), "want must not pass max"
    answer, confidence = rule.decide(view)
    assert answer.shape == confidence.shape == (len(view.drawn),), "decide must give one value per problem"
    assert ((confidence >= 0) & (confidence <= 1)).all(), "confidence must lie in [0, 1]"
    seen = [set(row.ravel().tolist()) for row in view.judged()]
    assert all(int(a) in labels | {-1} for a, labels in zip(answer, seen, strict=True)), "an answer nobody gave won"


def check_pure(rule: Rule, view: View) -> None:
    """The same view gives the same result, and is left as it was."""
    before = (view.answers.copy(), view.drawn.copy())
    first, second = _outcome(rule, view), _outcome(rule, view)
    assert _same(first, second), "the rule gave two results for one view"
    assert np.array_equal(before[0], view.answers), "the rule changed view.answers"
    assert np.array_equal(before[1], view.drawn), "the rule changed view.drawn"


def check_judges_the_prefix_alone(rule: Rule, view: View) -> None:
    """What lies past ``drawn`` (draws that ran ahead) changes nothing."""
    past = np.arange(view.answers.shape[2]) >= view.drawn[:, :, None]
    other = np.where(past, np.int32(0), view.answers)
    fields = {name: np.where(past, 7.0, values) for name, values in view.fields.items()}
    changed = View(other, view.drawn, fields, view.traits)
    assert _same(_outcome(rule, view), _outcome(rule, changed)), "draws past `drawn` changed the result"


def check_relabelling(rule: Rule, view: View, *, seed: int = 0) -> None:
    """Labels carry no meaning: under a permutation of them the same answer wins, and the rule wants the same."""
    classes = int(view.answers.max(initial=0)) + 1
    names = np.random.default_rng(seed).permutation(classes).astype(np.int32)
    renamed = np.where(view.answers >= 0, names[view.answers.clip(min=0)], np.int32(-1))
    want, answer, confidence = _outcome(rule, view)
    expected = np.where(answer >= 0, names[answer.clip(min=0)], -1)
    got = _outcome(rule, View(renamed, view.drawn, view.fields, view.traits))
    assert _same((want, expected, confidence), got), "relabelling the answers changed the result"


def check_rows_are_independent(rule: Rule, view: View) -> None:
    """A problem's result does not depend on the other problems of the view."""
    together = _outcome(rule, view)
    for row in range(0, len(view.drawn), max(1, len(view.drawn) // 16)):
        alone = _outcome(rule, _row(view, row))
        expected = tuple(part[row : row + 1] for part in together)
        assert _same(expected, alone), "a problem's result depended on its neighbours"


def check_stopping(rule: Rule, view: View) -> None:
    """``want`` is certain: taking it in one step or draw by draw stops at the same index, at the latest at max.

    So stopping never un-stops and no stop is missed, and a driver that buys what is wanted buys nothing in vain.
    """
    whole = View(view.answers, np.full_like(view.drawn, view.answers.shape[2]), view.fields, view.traits)
    (strides, _), (singles, _) = (_stopping_index(rule, whole, one_by_one=alone) for alone in (False, True))
    assert (strides.sum(1) <= rule.max).all(), "the rule asked for more than max"
    assert np.array_equal(strides, singles), "a shorter prefix would have stopped: `want` was not certain"


def check_stopping_index(rule: Rule, view: View) -> None:
    """``stopping_index`` says where asking and giving what is wanted ends, with all draws there or only some."""
    for drawn in (np.full_like(view.drawn, view.answers.shape[2]), view.drawn):
        there = View(view.answers, drawn, view.fields, view.traits)
        index, stopped = rule.stopping_index(there)
        expected, closed = _stopping_index(rule, there, one_by_one=False)
        assert np.array_equal(index, expected), "stopping_index differs from asking and giving"
        wants = rule.want(View(view.answers, index, view.fields, view.traits, closed)).any(1)
        assert np.array_equal(stopped, ~wants & ~closed), "stopping_index: stopped is not where the rule wants no more"


def _stopping_index(rule: Rule, view: View, *, one_by_one: bool) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Where asking and giving ends, and which problems a coupled rule was told to be closed on the way."""
    drawn, closed = np.zeros_like(view.drawn), np.zeros(len(view.drawn), np.bool_)
    while True:
        want = rule.want(View(view.answers, drawn, view.fields, view.traits, closed))
        step = np.minimum(want, view.drawn - drawn)
        ended = closed | (want > view.drawn - drawn).any(1) if rule.coupled else closed
        if not step.any() and np.array_equal(ended, closed):
            return drawn, closed
        closed = ended
        if one_by_one:  # one draw of one arm
            step = np.where(np.arange(step.shape[1]) == (step > 0).argmax(1)[:, None], np.minimum(step, 1), 0)
        drawn = drawn + step.astype(np.int32)


def _row(view: View, row: int) -> View:
    """One problem of a view."""
    only = slice(row, row + 1)
    return View(
        view.answers[only],
        view.drawn[only],
        {name: values[only] for name, values in view.fields.items()},
        {name: values[only] for name, values in view.traits.items()},
    )


def _outcome(rule: Rule, view: View) -> tuple[NDArray[Any], ...]:
    answer, confidence = rule.decide(view)
    return rule.want(view), answer, confidence


def _same(first: Sequence[NDArray[Any]], second: Sequence[NDArray[Any]]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


class ShuffledSource:
    """A source whose draws are fixed in advance and arrive in a random order; ``failing`` is the share that fails."""

    endpoint = "shuffled"
    priced = False

    def __init__(
        self, texts: dict[str, list[str]], *, seed: int = 0, failing: float = 0.0, name: str = "shuffled"
    ) -> None:
        self.name = self.model = name
        self.texts, self.notes, self.sent = texts, list[str](), 0
        self._arrival = random.Random(f"arrival {seed}")
        self._fails = {
            question: [lot < failing for lot in _lots(f"{question} {failing}", len(drawn))]
            for question, drawn in texts.items()
        }

    async def draw(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
        """Deliver the fixed draws, each after a pause of its own."""

        async def one(index: int) -> None:
            if index >= len(self.texts[request.question]):
                raise SourceExhausted(f"no draw {index}")
            self.sent += 1
            async with meter.attempt(1) as attempt:
                for _ in range(self._arrival.randrange(8)):
                    await asyncio.sleep(0)
                attempt.settle(Usage(prompt_tokens=3, completion_tokens=5, requests=1))
            deliver(index, self.recorded(request.question)[index])

        outcomes = await asyncio.gather(*(one(index) for index in indices), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def recorded(self, question: str) -> list[Draw]:
        """All draws of a question, in order."""
        pairs = zip(self.texts[question], self._fails[question], strict=True)
        return [Draw(text="", error="failed for good") if failed else Draw(text=text) for text, failed in pairs]

    async def close(self) -> None:
        """Nothing to give back."""


def _lots(seed: str, count: int) -> list[float]:
    generator = random.Random(seed)
    return [generator.random() for _ in range(count)]


def live_verdicts(
    rule: Rule,
    problems: Sequence[Problem],
    source: ShuffledSource | Sequence[ShuffledSource],
    *,
    concurrency: int,
    ledger: str,
) -> list[Verdict]:
    """The verdicts of the live driver on ``problems`` drawn from ``source`` (several for several models)."""
    from consilience.driver import Asking, Driver, Finished
    from consilience.ledger import Ledger
    from consilience.text.budget import Account
    from consilience.text.session import Session

    sources = [source] if isinstance(source, ShuffledSource) else list(source)

    async def work() -> list[Finished]:
        finished: list[Finished] = []
        with Ledger(ledger) as store:
            account = Account(Budget())
            sessions = [Session(one, store, account) for one in sources]
            asking = Asking(params={"temperature": 1.0, "max_tokens": 16})
            await Driver(sessions, rule, asking, concurrency=concurrency).run(problems, finished.append)
        return finished

    return [one.problem.verdict for one in asyncio.run(work()) if one.problem.verdict is not None]


def check_live_equals_replay(
    rule: Rule,
    *,
    problems: int = 30,
    classes: int = 4,
    concurrencies: Sequence[int] = (1, 3, 8, 32),
    failing: float = 0.1,
    seed: int = 0,
) -> None:
    """Live verdicts are the same at every concurrency and arrival order, and equal those of a replay of the draws.

    A rule of several arms gets that many models, or one model where its arms are settings. ``failing`` calls fail.
    """
    from consilience.replay import replay_orders, tabulate

    models = 1 if rule.settings is not None else rule.arms
    texts = _random_texts(rule, models, problems, classes, seed)
    traits = np.random.default_rng([seed, 1]).normal(size=(problems, len(rule.traits)))
    asked = [
        Problem(id=question, question=question, **dict(zip(rule.traits, row, strict=True)))
        for question, row in zip(texts[0], traits.tolist(), strict=True)
    ]

    def sources(number: int) -> list[ShuffledSource]:
        return [
            ShuffledSource(own, seed=seed + number, failing=failing, name=f"shuffled {model}")
            for model, own in enumerate(texts)
        ]

    results = []
    for number, concurrency in enumerate(concurrencies):
        with tempfile.TemporaryDirectory() as folder:
            url = str(Path(folder) / "ledger.db")
            fresh = [problem.model_copy() for problem in asked]
            results.append(live_verdicts(rule, fresh, sources(number), concurrency=concurrency, ledger=url))
    for concurrency, verdicts in zip(concurrencies, results, strict=True):
        different = [a for a, b in zip(results[0], verdicts, strict=True) if _essence(a) != _essence(b)]
        assert not different, f"concurrency {concurrency} changed a verdict of concurrency {concurrencies[0]}"
    drawn = [[source.recorded(problem.question) for problem in asked] for source in sources(0)]
    by_arm = drawn * (rule.arms // models)
    recorded = [
        problem.model_copy(update={"draws": [_of_arm(d, arm) for arm, own in enumerate(by_arm) for d in own[number]]})
        for number, problem in enumerate(asked)
    ]
    table = tabulate(recorded, traits=rule.traits)
    replayed = replay_orders(table, rule, [np.tile(np.arange(table.labels.shape[1]), (len(recorded), 1))])
    for number, verdict in enumerate(results[0]):
        assert verdict.draws == replayed.draws[0, number], f"problem {number}: live and replay stop elsewhere"
        assert np.isclose(verdict.confidence, replayed.confidence[0, number]), "live and replay confidence differ"


def _random_texts(rule: Rule, models: int, problems: int, classes: int, seed: int) -> list[dict[str, list[str]]]:
    generator = np.random.default_rng(seed)
    texts: list[dict[str, list[str]]] = [{} for _ in range(models)]
    for number in range(problems):
        for own in texts:
            shares = generator.dirichlet(np.full(classes, 0.6))
            drawn = generator.choice(classes, size=min(rule.max, 64), p=shares)
            own[f"question {number}"] = [f"The answer is {label}." for label in drawn]
    return texts


def _of_arm(draw: Draw, arm: int) -> Draw:
    return draw.model_copy(update={"arm": arm})


def _essence(verdict: Verdict) -> tuple[object, ...]:
    return (verdict.answer, verdict.confidence, tuple(verdict.votes.items()), verdict.draws, verdict.stopped_because)
