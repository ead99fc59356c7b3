"""The official `openai` client against the command in a process of its own: what a program does by changing one URL."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from consilience.testing import ScriptedServer

pytestmark = pytest.mark.skipif(
    not os.environ.get("CONSILIENCE_REQUIRE_BRIDGES"), reason="tests/serve has it at length; make bridges runs this"
)

ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "6 x 7?"}]}
ANSWERS = {"42": 0.9, "41": 0.1}  # under sc:n=21 the other wins with a chance of 5e-6
TEXT = "Let me think. The answer is 42."
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": TOOL}]


class Place(BaseModel):
    city: str
    people: int


def call(arguments: str, number: str) -> dict[str, Any]:
    made = {"id": number, "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [made]}


def in_turn(*replies: Any):
    left = list(replies)
    return lambda question, rng: left.pop(0)


CALLS = [call('{"city": "Rome"}', "a"), call('{"city": "Oslo"}', "b"), call('{"city":"Oslo"}', "c")]
PLACES = ['{"city": "Rome", "people": 3}', '{"people": 5, "city": "Rome"}', '{ "city":"Rome","people":5}']


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="x", max_retries=0)


def asynchronously(url: str, use: Any) -> Any:
    """What ``use`` gives with an asynchronous client."""

    async def with_client() -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            return await use(client)

    return asyncio.run(with_client())


def test_one_call_and_a_stream(serve: Any) -> None:
    with ScriptedServer(answers=ANSWERS) as upstream, client(serve(upstream, "--policy", "sc:n=21")) as ours:
        reply = ours.chat.completions.create(**ASKED)
        ChatCompletion.model_validate(reply.model_dump(), strict=True)
        assert reply.choices[0].message.content == TEXT
        assert reply.usage.completion_tokens == upstream.counts["completion_tokens"]
        assert reply.consilience["draws"] == sum(reply.consilience["votes"].values()) == 21
        chunks = list(ours.chat.completions.create(**ASKED, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
        assert chunks[-1].consilience["draws"] == 21


def test_asynchronous_calls_at_once_and_a_stream(serve: Any) -> None:
    async def use(ours: openai.AsyncOpenAI) -> list[str]:
        replies = await asyncio.gather(*(ours.chat.completions.create(**ASKED) for _ in range(6)))
        stream = await ours.chat.completions.create(**ASKED, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return [*(reply.choices[0].message.content for reply in replies), text]

    with ScriptedServer(answers=ANSWERS) as upstream:
        assert asynchronously(serve(upstream, "--policy", "sc:n=21"), use) == [TEXT] * 7
        assert upstream.counts["draws"] == 21 * 7


def test_tools(serve: Any) -> None:
    async def use(ours: openai.AsyncOpenAI) -> Any:
        return await ours.chat.completions.create(**ASKED, tools=TOOLS)

    with ScriptedServer(answers=in_turn(*CALLS * 3)) as upstream:
        url = serve(upstream, "--policy", "sc:n=3")
        with client(url) as ours:
            replies = [ours.chat.completions.create(**ASKED, tools=TOOLS), asynchronously(url, use)]
            with ours.chat.completions.stream(**ASKED, tools=TOOLS) as stream:
                replies.append(stream.get_final_completion())
    for reply in replies:
        [made] = reply.choices[0].message.tool_calls
        assert (made.id, json.loads(made.function.arguments)) == ("b", {"city": "Oslo"})
        assert reply.choices[0].finish_reason == "tool_calls"


def test_structured_output(serve: Any) -> None:
    async def use(ours: openai.AsyncOpenAI) -> Any:
        return await ours.chat.completions.parse(**ASKED, response_format=Place)

    with ScriptedServer(answers=in_turn(*PLACES * 3)) as upstream:
        url = serve(upstream, "--policy", "sc:n=3")
        with client(url) as ours:
            replies = [ours.chat.completions.parse(**ASKED, response_format=Place), asynchronously(url, use)]
            with ours.chat.completions.stream(**ASKED, response_format=Place) as stream:
                replies.append(stream.get_final_completion())
    for reply in replies:
        assert reply.choices[0].message.parsed == Place(city="Rome", people=5)
        assert reply.choices[0].message.content == PLACES[1]


def test_errors(serve: Any) -> None:
    async def use(ours: openai.AsyncOpenAI) -> None:
        await ours.chat.completions.create(**ASKED | {"model": "m@sc:n=0"})

    with ScriptedServer(answers=ANSWERS) as upstream:
        url = serve(upstream, "--policy", "sc:n=2", "--budget", "draws=2")
        with client(url) as ours:
            for more in ({"temperature": 9}, {"best_of": 2}, {"consilience": {"policy": "sc:n=0"}}):
                with pytest.raises(openai.BadRequestError) as caught:
                    ours.chat.completions.create(**ASKED, extra_body=more)
                assert caught.value.param
            with pytest.raises(openai.BadRequestError):
                asynchronously(url, use)
            with pytest.raises(openai.NotFoundError):
                ours.embeddings.create(model="m", input="x")
            assert upstream.counts["draws"] == 0
            assert ours.chat.completions.create(**ASKED).consilience["draws"] == 2
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError) as limited:
                    ours.chat.completions.create(**ASKED, stream=stream)
                assert limited.value.code == "insufficient_quota"
