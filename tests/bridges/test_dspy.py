"""The module in DSPy programs: a real language model client against a scripted HTTP endpoint."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal

import pytest

from .conftest import needed

dspy = needed("dspy")

from pydantic import BaseModel

from consilience.bridges.dspy import SelfConsistency
from consilience.errors import InputError
from consilience.testing import ScriptedServer

FORM = "[[ ## reasoning ## ]]\nI add.\n\n[[ ## answer ## ]]\n{answer}\n\n[[ ## completed ## ]]"


def in_turn(*answers: str):
    """A script that gives these answers one after the other, in the form that DSPy asks for."""
    left = list(answers)
    return lambda question, rng: FORM.format(answer=left.pop(0))


@pytest.fixture
def lm() -> Iterator[Any]:
    """Points DSPy at an endpoint for the length of a test, without its cache unless asked for."""
    with ExitStack() as stack:

        def use(upstream: ScriptedServer, **more: Any) -> None:
            model = dspy.LM("openai/m", api_base=upstream.url, api_key="x", **({"cache": False} | more))
            stack.enter_context(dspy.context(lm=model, trace=[]))

        yield use


def test_the_prediction_is_the_first_that_supports_the_winner(lm) -> None:
    with ScriptedServer(answers={"42": 0.7, "41": 0.3}, reply=FORM) as upstream:
        lm(upstream)
        made = SelfConsistency("question -> answer", policy="sc:n=15")(question="6 x 7?")
        drawn = upstream.counts["draws"]
        temperatures = {entry["body"]["temperature"] for entry in upstream.requests}
    told = made.consilience
    assert drawn == told["draws"] == sum(told["votes"].values()) == 15
    assert made.answer == told["answer"] == max(told["votes"], key=told["votes"].get)
    leader = max(told["votes"].values())
    assert told["confidence"] == pytest.approx((leader + 1) / (15 + 2))
    assert made.reasoning == "I add."
    assert temperatures == {0.7}


def test_an_adaptive_policy_stops_early_and_the_vote_is_by_equality(lm) -> None:
    script = in_turn("1/2", "0.5", "2", "2", "4/2", "2.0")
    with ScriptedServer(answers=script, supports_n=False) as upstream:
        lm(upstream)
        made = SelfConsistency("question -> answer", policy="esc:window=3,max=12", kind="math")(question="?")
        assert upstream.counts["draws"] == 6
    assert sorted(made.consilience["votes"].values()) == [2.0, 4.0]
    assert made.consilience["stopped_because"] == "rule"
    assert made.answer in ("2", "4/2", "2.0")


def test_the_same_under_an_event_loop_and_beside_one(lm) -> None:
    async def both(module: Any) -> list[Any]:
        made = await asyncio.gather(*(module.acall(question=f"q{n}?") for n in range(4)))
        return [*made, module(question="beside?")]

    with ScriptedServer(answers={"42": 0.9, "41": 0.1}, reply=FORM) as upstream:
        lm(upstream)
        made = asyncio.run(both(SelfConsistency("question -> answer", policy="sc:n=5")))
        assert upstream.counts["draws"] == 25
    assert [sum(one.consilience["votes"].values()) for one in made] == [5.0] * 5


def test_dspys_cache_keeps_the_draws_apart_and_finds_them_again(lm) -> None:
    with ScriptedServer(answers={"42": 0.5, "41": 0.5}, reply=FORM) as upstream:
        lm(upstream, cache=True)
        module = SelfConsistency("question -> answer", policy="sc:n=20")
        first, again = module(question=f"{upstream.url}?"), module(question=f"{upstream.url}?")
        assert upstream.counts["draws"] == 20
        assert first.consilience == again.consilience
        assert len(first.consilience["votes"]) == 2  # all alike by chance: 2e-6
        moved = dspy.settings.lm.copy(rollout_id=1)
        with dspy.context(lm=moved):
            module(question=f"{upstream.url}?")
        assert upstream.counts["draws"] == 40


def test_a_reply_that_cannot_be_parsed_does_not_vote(lm) -> None:
    left = ["no form at all", FORM.format(answer="42"), FORM.format(answer="42")]
    with ScriptedServer(answers=lambda question, rng: left.pop(0) if left else "nothing") as upstream:
        lm(upstream)
        with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
            module = SelfConsistency("question -> answer", policy="sc:n=3")
            made = module(question="?")
            assert (made.consilience["votes"], made.consilience["failed"]) == ({"42": 2.0}, 1)
            with pytest.raises(dspy.utils.exceptions.AdapterParseError):
                module(question="?")


class Place(BaseModel):
    city: str
    people: int


class Asked(dspy.Signature):
    """Where, and is it far?"""

    question: str = dspy.InputField()
    where: Place = dspy.OutputField()
    far: Literal["yes", "no"] = dspy.OutputField()


def test_a_field_of_another_type_is_compared_by_its_value(lm) -> None:
    def reply(where: str, far: str) -> str:
        return f"[[ ## where ## ]]\n{where}\n\n[[ ## far ## ]]\n{far}\n\n[[ ## completed ## ]]"

    texts = [
        reply('{"city": "Rome", "people": 3}', "no"),
        reply('{"people": 5, "city": "Rome"}', "yes"),
        reply('{ "city":"Rome","people":5}', "yes"),
    ]
    with ScriptedServer(answers=lambda question, rng: texts[min(rng.randrange(6), 2)]) as upstream:
        lm(upstream)
        module = SelfConsistency(Asked, policy="sc:n=24", field="where", predictor=dspy.Predict)
        made = module(question="?")
    assert isinstance(made.where, Place)
    votes = made.consilience["votes"]
    assert set(votes) == {'{"city": "Rome", "people": 3}', '{"city": "Rome", "people": 5}'}
    assert made.where.people == 5  # unless half of the draws are the first text: 2e-4
    assert sum(votes.values()) == 24


def test_the_trace_holds_the_winners_steps_alone(lm) -> None:
    with ScriptedServer(answers={"42": 1.0}, reply=FORM) as upstream:
        lm(upstream)
        module = SelfConsistency("question -> answer", policy="sc:n=4")
        made = module(question="?")
        asyncio.run(module.acall(question="?"))
    steps = dspy.settings.trace
    assert [(step[0], step[1]) for step in steps] == [(module.predict.predict, {"question": "?"})] * 2
    assert steps[0][2].answer == made.answer


def test_it_is_evaluated_saved_and_copied_as_any_module(lm, tmp_path) -> None:
    examples = [dspy.Example(question=f"q{n}?", answer="42").with_inputs("question") for n in range(6)]
    with ScriptedServer(answers={"42": 0.8, "41": 0.2}, reply=FORM) as upstream:
        lm(upstream)
        module = SelfConsistency("question -> answer", policy="sc:n=9")
        module.save(tmp_path / "program.json")
        other = SelfConsistency("question -> answer", policy="sc:n=9")
        other.load(tmp_path / "program.json")
        scored = dspy.Evaluate(
            devset=examples,
            metric=lambda gold, made, trace=None: gold.answer == made.answer,
            num_threads=3,
            display_progress=False,
        )(other.deepcopy())
        assert upstream.counts["draws"] == 54
    answers = Counter(made.answer for _, made, _ in scored.results)
    assert scored.score == pytest.approx(100 * answers["42"] / 6, abs=0.01)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"field": "nothing"}, "no output field"),
        ({"policy": "sc+usc"}, "asks a model"),
        ({"kind": "code"}, "behaviour"),
    ],
)
def test_what_cannot_be_done_is_told_at_once(more: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        SelfConsistency("question -> answer", **more)
