"""``/v1/completions``: text completions, drawn from the upstream's own."""

from __future__ import annotations

import json

import openai
import pytest
from openai.types import Completion

from .helpers import post, running
from .upstream import USAGE, Upstream


@pytest.fixture
def upstream():
    made = Upstream(("4", "5", "4", "4"))
    with running(made.app) as origin:
        made.url = f"{origin}/v1"
        yield made


def test_a_prompt_is_completed_by_what_most_draws_say(serve, upstream) -> None:
    served = serve(upstream, policy="sc:n=4")
    with served.client() as client:
        reply = client.completions.create(model="m", prompt="2 + 2", max_tokens=9, suffix="!", temperature=0.5)
    Completion.model_validate(reply.model_dump(), strict=True)
    [(path, _, raw)] = upstream.seen
    sent = json.loads(raw)
    assert path == "/v1/completions"
    assert sent.pop("seed") >= 0
    assert sent == {"model": "m", "prompt": "2 + 2", "max_tokens": 9, "suffix": "!", "temperature": 0.5, "n": 4}
    assert (reply.choices[0].text, reply.choices[0].logprobs) == (" the answer is 4", None)
    assert reply.consilience["votes"] == {"4": 3, "5": 1}
    assert reply.usage.total_tokens == USAGE["total_tokens"]
    assert reply.id.startswith("cmpl-")


def test_several_prompts_and_choices_keep_their_order(serve, upstream) -> None:
    served = serve(upstream, policy="sc:n=2")
    with served.client() as client:
        reply = client.completions.create(model="m", prompt=["a", "b", "c"], n=2)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert sorted(body["prompt"] for body in upstream.bodies) == ["a", "a", "b", "b", "c", "c"]
    assert len({body["seed"] for body in upstream.bodies}) == 6
    assert reply.consilience["draws"] == 12
    for choice, told in zip(reply.choices, reply.consilience["choices"], strict=True):
        assert choice.text.endswith(told["answer"])


def test_tokens_log_probabilities_and_streams(serve, upstream) -> None:
    served = serve(upstream, policy="sc:n=2")
    with served.client() as client:
        reply = client.completions.create(model="m", prompt=[5, 6, 7], logprobs=2)
        assert upstream.bodies[-1]["prompt"] == [5, 6, 7]
        assert reply.choices[0].logprobs.token_logprobs == [-0.5, -0.25]
        chunks = list(client.completions.create(model="m", prompt="x", stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks).startswith(" the answer is ")
        weighted = client.completions.create(model="m@sc:n=3+logprob-weighted", prompt="x")
        assert upstream.bodies[-1]["logprobs"] == 1
        assert weighted.choices[0].logprobs is None


def test_it_passes_through(serve, upstream) -> None:
    served = serve(upstream, policy="none")
    body = b'{"model" : "m", "prompt": ["x", "y"], "echo":true, "max_tokens": 0}'
    status, _, reply = post(served.origin, "/v1/completions", body)
    assert (status, upstream.seen[-1][0], upstream.seen[-1][2]) == (200, "/v1/completions", body)
    assert reply["id"] == "t-1"


@pytest.mark.parametrize("prompt", [[], [[]], [1, "x"], 5, {"a": 1}, [[1], ["x"]]])
def test_a_prompt_of_another_type_is_refused(serve, upstream, prompt) -> None:
    status, _, reply = post(
        serve(upstream).origin, "/v1/completions", json.dumps({"model": "m", "prompt": prompt}).encode()
    )
    assert (status, reply["error"]["param"]) == (400, "prompt")


def test_what_only_chats_have_is_refused(serve, upstream) -> None:
    for name in ("messages", "tools", "response_format"):
        with pytest.raises(openai.BadRequestError) as caught, serve(upstream).client() as client:
            client.completions.create(model="m", prompt="x", extra_body={name: {"type": "x"} if name[0] == "r" else []})
        assert caught.value.param == name
