"""`langchain-openai` against the command in a process of its own: as it is, and with the vote kept."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from .conftest import needed

needed("langchain_openai")

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import BadRequestError
from pydantic import BaseModel

from consilience.bridges.langchain_openai import ChatConsilience
from consilience.testing import ScriptedServer

ANSWERS = {"42": 0.9, "41": 0.1}  # under sc:n=21 the other wins with a chance of 5e-6
MODELS = [ChatOpenAI, ChatConsilience]


def call(arguments: str, number: str) -> dict[str, Any]:
    made = {"id": number, "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [made]}


def in_turn(*messages: Any):
    left = list(messages)
    return lambda question, rng: left.pop(0)


@tool
def weather(city: str, days: int = 1) -> str:
    """The weather in a place."""
    return "sunny"


@pytest.mark.parametrize("model", MODELS)
def test_invoke_stream_and_batch(serve: Any, model: type[ChatOpenAI]) -> None:
    with ScriptedServer(answers=ANSWERS) as upstream:
        chat = model(base_url=serve(upstream, "--policy", "sc:n=21"), api_key="x", model="m", temperature=0.7)
        reply = chat.invoke("6 x 7?")
        assert upstream.counts["draws"] == 21
        assert reply.content == "Let me think. The answer is 42."
        assert reply.usage_metadata["output_tokens"] == upstream.counts["completion_tokens"]
        chunks = list(chat.stream([("system", "Be short."), ("human", "6 x 7?")]))
        assert "".join(chunk.content for chunk in chunks) == reply.content
        sent = upstream.requests[-1]["body"]
        assert sent["messages"][0] == {"role": "system", "content": "Be short."}
        assert sent["temperature"] == 0.7
        assert {one.content for one in chat.batch(["a?", "b?", "c?"])} == {reply.content}
        assert upstream.counts["draws"] == 21 * 5


@pytest.mark.parametrize("model", MODELS)
def test_asynchronously(serve: Any, model: type[ChatOpenAI]) -> None:
    async def both(chat: ChatOpenAI) -> tuple[str, str]:
        reply = await chat.ainvoke("6 x 7?")
        return reply.content, "".join([chunk.content async for chunk in chat.astream("6 x 7?")])

    with ScriptedServer(answers=ANSWERS) as upstream:
        chat = model(base_url=serve(upstream, "--policy", "sc:n=21"), api_key="x", model="m")
        assert asyncio.run(both(chat)) == ("Let me think. The answer is 42.",) * 2


@pytest.mark.parametrize("model", MODELS)
def test_tools_are_voted_on_and_their_results_go_back(serve: Any, model: type[ChatOpenAI]) -> None:
    calls = [
        call('{"city": "Rome"}', "a"),
        call('{"city": "Oslo", "days": 2}', "b"),
        call('{"days":2,"city":"Oslo"}', "c"),
    ]
    with ScriptedServer(answers=in_turn(*calls, *["The answer is sunny."] * 3)) as upstream:
        chat = model(base_url=serve(upstream, "--policy", "sc:n=3"), api_key="x", model="m").bind_tools([weather])
        asked = [HumanMessage("Weather?")]
        reply = chat.invoke(asked)
        [made] = reply.tool_calls
        assert (made["name"], made["args"], made["id"]) == ("weather", {"city": "Oslo", "days": 2}, "b")
        result = ToolMessage(weather.invoke(made["args"]), tool_call_id=made["id"])
        assert chat.invoke([*asked, reply, result]).content == "The answer is sunny."
        sent = upstream.requests[-1]["body"]
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "tool"]
    assert sent["tools"][0]["function"]["name"] == "weather"


class Place(BaseModel):
    city: str
    people: int


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_agreed_on(serve: Any, model: type[ChatOpenAI], method: str) -> None:
    objects = ['{"city": "Rome", "people": 3}', '{"people": 5, "city": "Rome"}', '{ "city":"Rome","people":5}']
    given = objects if method == "json_schema" else [call(one, "a") for one in objects]
    for one in given if method == "function_calling" else []:
        one["tool_calls"][0]["function"]["name"] = "Place"
    with ScriptedServer(answers=in_turn(*given)) as upstream:
        chat = model(base_url=serve(upstream, "--policy", "sc:n=3"), api_key="x", model="m")
        made = chat.with_structured_output(Place, method=method).invoke("Where?")
        asked = upstream.requests[0]["body"]
    assert made == Place(city="Rome", people=5)
    assert ("response_format" in asked) == (method == "json_schema")


def test_an_error_is_the_official_clients(serve: Any) -> None:
    with ScriptedServer(answers=ANSWERS) as upstream:
        chat = ChatOpenAI(base_url=serve(upstream), api_key="x", model="m@sc:n=0")
        with pytest.raises(BadRequestError, match="n"):
            chat.invoke("6 x 7?")
        assert upstream.counts["calls"] == 0


def test_the_vote_is_in_the_metadata(serve: Any) -> None:
    extra = {"consilience": {"policy": "sc:n=5", "progress": True}}
    with ScriptedServer(answers={"42": 1.0}) as upstream:
        url = serve(upstream)
        chat = ChatConsilience(base_url=url, api_key="x", model="m", extra_body=extra)
        told = [chat.invoke("6 x 7?").response_metadata["consilience"]]
        chunks = list(chat.stream("6 x 7?"))
        total = chunks[0]
        for chunk in chunks[1:]:
            total += chunk
        told.append(total.response_metadata["consilience"])
        assert total.content == "Let me think. The answer is 42."
        structured = chat.with_structured_output(Place, include_raw=True)
        upstream.answers = lambda question, rng: '{"city": "Rome", "people": 3}'
        told.append(structured.invoke("Where?")["raw"].response_metadata["consilience"])
    for one in told[:2]:
        assert (one["votes"], one["draws"], one["policy"]) == ({"42": 5}, 5, "sc:n=5")
        assert one["confidence"] == pytest.approx(6 / 7)
    assert told[2]["draws"] == 5


def test_without_the_server_nothing_is_added() -> None:
    with ScriptedServer(answers={"42": 1.0}) as upstream:
        reply = ChatConsilience(base_url=upstream.url, api_key="x", model="m").invoke("6 x 7?")
    assert "consilience" not in json.dumps(reply.response_metadata)
