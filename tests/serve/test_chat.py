"""Chat completions under a policy, by the official client against a real server and a scripted upstream."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from openai.types.chat import ChatCompletion

from consilience import policy
from consilience.rules import View
from consilience.testing import ScriptedServer

ANSWERS = {"42": 0.7, "41": 0.3}


def confidence(votes: dict[str, float], spec: str) -> float:
    """What a policy's vote says of these counts, by the library's rule alone."""
    labels = [label for label, count in enumerate(votes.values()) for _ in range(int(count))]
    return float(policy.parse(spec).decide(View.single(np.array([labels])))[1][0])


def test_a_reply_is_the_winner_of_all_draws_and_a_completion_by_the_official_types(serve) -> None:
    with ScriptedServer(answers={"42": 0.9, "41": 0.1}) as upstream:  # the other wins with a chance of 1e-7
        served = serve(upstream, policy="sc:n=25")
        reply = served.ask()
        told = reply.consilience
        assert isinstance(reply, ChatCompletion)
        ChatCompletion.model_validate(reply.model_dump(), strict=True)
        drawn = list(upstream.requests)
        assert upstream.counts["draws"] == told["draws"] == told["draws_bought"] == 25
        assert sum(told["votes"].values()) == 25
        winner = max(told["votes"], key=told["votes"].get)
        assert told["answer"] == winner == "42"
        assert told["confidence"] == pytest.approx(confidence(told["votes"], "sc:n=25"))
        assert reply.choices[0].message.content == "Let me think. The answer is 42."
        assert (reply.choices[0].finish_reason, reply.model, reply.id[:9]) == ("stop", "m", "chatcmpl-")
        assert reply.usage.prompt_tokens == sum(entry["prompt_tokens"] for entry in drawn)
        assert reply.usage.completion_tokens == sum(entry["completion_tokens"] for entry in drawn)
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
        assert (told["policy"], told["kind"], told["stopped_because"], told["cost"]) == ("sc:n=25", "auto", "max", None)


def test_the_text_is_the_first_supporting_draw_word_for_word(serve) -> None:
    texts = ["No idea.", "I say: the answer is 7.", "The answer is 8.", "So the answer is 7.", "The answer is 7.0"]
    count = Counter()

    def script(question: str, rng) -> str:
        count["calls"] += 1
        return texts[count["calls"] - 1]

    with ScriptedServer(answers=script) as upstream:
        reply = serve(upstream, policy="sc:n=5").ask()
        assert reply.choices[0].message.content == texts[1]
        assert sorted(reply.consilience["votes"].values()) == [1, 3]
        assert reply.consilience["confidence"] == pytest.approx(confidence({"7": 3, "8": 1}, "sc:n=5"))


def test_an_adaptive_policy_stops_early(serve) -> None:
    with ScriptedServer(answers={"42": 1.0}) as upstream:
        served = serve(upstream, policy="esc:window=3,max=30")
        reply = served.ask()
        assert (reply.consilience["draws"], upstream.counts["draws"]) == (3, 3)
        assert reply.consilience["stopped_because"] == "rule"
        assert reply.consilience["confidence"] == pytest.approx(confidence({"42": 3}, "esc:window=3,max=30"))


@pytest.mark.parametrize(
    ("model", "extension", "draws", "sent"),
    [
        ("m", None, 4, "m"),
        ("m@sc:n=3", None, 3, "m"),
        ("org/m@2024@sc:n=2", None, 2, "org/m@2024"),
        ("m@latest", None, 4, "m@latest"),
        ("m", {"policy": "sc:n=6"}, 6, "m"),
        ("m@sc:n=3", {"policy": "sc:n=5"}, 5, "m"),
        ("m@sc", {}, 40, "m"),
    ],
)
def test_the_policy_comes_from_the_server_the_model_name_or_the_request(serve, model, extension, draws, sent) -> None:
    with ScriptedServer(answers={"42": 1.0}) as upstream:
        served = serve(upstream, policy="sc:n=4")
        more = {} if extension is None else {"extra_body": {"consilience": extension}}
        reply = served.ask(model=model, **more)
        assert reply.consilience["draws"] == draws == upstream.counts["draws"]
        assert {entry["body"]["model"] for entry in upstream.requests} == {sent}
        assert all("consilience" not in entry["body"] for entry in upstream.requests)


def test_a_poem_costs_one_wave_and_comes_back_as_it_is(serve) -> None:
    with ScriptedServer(answers=lambda question, rng: f"Roses are red {rng.random()}") as upstream:
        served = serve(upstream, policy="esc:window=5,max=40")
        reply = served.ask("a poem please")
        told = reply.consilience
        assert told["confidence"] is None
        assert (told["draws"], upstream.counts["draws"], told["stopped_because"]) == (5, 5, "no answer")
        held = served.core.ledger._requests()
        [(_, _, draws)] = list(held)
        assert reply.choices[0].message.content == draws[0].text


def test_an_answer_in_the_first_wave_goes_on_sampling(serve) -> None:
    """The limit of the law above: one answer among the first five is enough to go on."""
    count = Counter()

    def script(question: str, rng) -> str:
        count["calls"] += 1
        return "The answer is 5." if count["calls"] == 5 else "Hm."

    with ScriptedServer(answers=script) as upstream:
        reply = serve(upstream, policy="sc:n=12", concurrency=1).ask()
        assert (reply.consilience["draws"], reply.consilience["votes"]) == (12, {"5": 1})
        assert reply.choices[0].message.content == "The answer is 5."


def test_messages_and_parameters_travel_unchanged(serve) -> None:
    messages = [
        {"role": "system", "content": "Be brief. ❄"},
        {"role": "user", "content": "before"},
        {"role": "assistant", "content": "after", "name": "bot"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
            ],
        },
    ]
    params = {
        "temperature": 0.3,
        "top_p": 0.9,
        "stop": ["\n\n", "END"],
        "presence_penalty": 0.1,
        "logit_bias": {"50256": -100},
        "max_completion_tokens": 77,
        "reasoning_effort": "low",
        "extra_body": {"top_k": 5, "chat_template_kwargs": {"thinking": False}},
    }
    with ScriptedServer(answers={"42": 1.0}, supports_n=False) as upstream:
        served = serve(upstream, policy="sc:n=2")
        with served.client() as client:
            client.chat.completions.create(model="m", messages=messages, **params)
        flat = {name: value for name, value in params.items() if name != "extra_body"} | params["extra_body"]
        for entry in upstream.requests:
            sent = {name: value for name, value in entry["body"].items() if name not in ("seed", "n")}
            assert sent == {"model": "m", "messages": messages} | flat
        assert len({entry["body"]["seed"] for entry in upstream.requests}) == len(upstream.requests)
        identity = json.loads(next(served.core.ledger._requests())[0])
        assert identity["messages"] == messages
        assert flat.items() <= identity["params"].items()


def test_every_choice_of_n_is_agreed_on_by_itself(serve) -> None:
    with ScriptedServer(answers=ANSWERS) as upstream:
        reply = serve(upstream, policy="sc:n=5").ask(n=3)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        assert upstream.counts["draws"] == reply.consilience["draws"] == 15
        assert reply.consilience["confidence"] is None
        each = reply.consilience["choices"]
        assert [sum(one["votes"].values()) for one in each] == [5, 5, 5]
        assert [one["answer"] in choice.message.content for one, choice in zip(each, reply.choices, strict=True)] == [
            True
        ] * 3
        assert reply.usage.completion_tokens == upstream.counts["completion_tokens"]


def test_log_probabilities_come_with_the_winner_where_they_were_asked_for(serve) -> None:
    with ScriptedServer(answers={"42": 1.0}) as upstream:
        served = serve(upstream, policy="sc:n=3")
        asked = served.ask(logprobs=True, top_logprobs=2)
        text = "".join(token.token for token in asked.choices[0].logprobs.content)
        assert text == asked.choices[0].message.content
        assert upstream.requests[-1]["body"]["top_logprobs"] == 2
        plain = served.ask()
        assert plain.choices[0].logprobs is None
        assert "logprobs" not in upstream.requests[-1]["body"]


def test_a_vote_that_reads_log_probabilities_asks_for_them(serve) -> None:
    with ScriptedServer(answers=ANSWERS) as upstream:
        reply = serve(upstream).ask(model="m@sc:n=5+logprob-weighted")
        assert upstream.requests[-1]["body"]["logprobs"] is True
        assert reply.choices[0].logprobs is None
        assert reply.consilience["answer"] in ANSWERS


def test_the_kind_of_the_server_and_of_the_request(serve) -> None:
    with ScriptedServer(answers=lambda question, rng: "It may be 17 or 18") as upstream:
        assert serve(upstream, policy="sc:n=2").ask().consilience["answer"] is None
        served = serve(upstream, policy="sc:n=2", kind="number")
        assert served.ask().consilience["votes"] == {"18": 2}
        asked = served.ask(extra_body={"consilience": {"kind": "open"}}).consilience
        assert (asked["kind"], list(asked["votes"])) == ("open", ["It may be 17 or 18"])


def test_a_procedure_asks_and_is_counted(serve) -> None:
    def script(question: str, rng) -> str:
        return "Response 2" if "Response 1" in question or "[1]" in question else f"Poem {rng.random()}"

    with ScriptedServer(answers=script, supports_n=False) as upstream:
        served = serve(upstream)
        asked = {"consilience": {"policy": "sc:n=3+usc", "kind": "open"}}
        reply = served.ask("a poem", extra_body=asked, max_tokens=50)
        assert upstream.counts["calls"] == reply.consilience["draws_bought"] == 4
        assert reply.usage.completion_tokens == upstream.counts["completion_tokens"]
        assert {entry["body"]["model"] for entry in upstream.requests} == {"m"}
        assert reply.choices[0].message.content.startswith("Poem")


def test_the_house_model_answers(serve) -> None:
    served = serve("house", policy="sc:n=5")
    question = "A coin is heads up. Ann flips the coin. Is the coin still heads up?"
    reply = served.ask(question, model="house")
    assert reply.consilience["draws"] == 5
    assert reply.model.startswith("house")
    assert reply.usage.completion_tokens > 0
    assert served.ask(question, model="house@none").consilience["draws"] == 1
    with served.client() as client:
        assert [model.id for model in client.models.list()] == ["house"]
        assert client.models.retrieve("house").id == "house"
        text = client.completions.create(model="house", prompt=question)
        assert text.choices[0].text
        assert text.consilience["draws"] == 5
