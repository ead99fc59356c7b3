"""`litellm` against the command in a process of its own: its functions as they are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .conftest import needed

litellm = needed("litellm")

from consilience.testing import ScriptedServer

MESSAGES = [{"role": "user", "content": "6 x 7?"}]
ANSWERS = {"42": 0.9, "41": 0.1}  # under sc:n=21 the other wins with a chance of 5e-6
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def asked(url: str, model: str = "m", **more: Any) -> dict[str, Any]:
    return {"model": f"openai/{model}", "api_base": url, "api_key": "x", "messages": MESSAGES, "max_retries": 0} | more


def test_completion_and_stream(serve: Any) -> None:
    with ScriptedServer(answers=ANSWERS) as upstream:
        url = serve(upstream, "--policy", "sc:n=21")
        reply = litellm.completion(**asked(url, temperature=0.7, max_tokens=99))
        assert reply.choices[0].message.content == "Let me think. The answer is 42."
        assert reply.usage.completion_tokens == upstream.counts["completion_tokens"]
        assert reply.consilience["draws"] == sum(reply.consilience["votes"].values()) == 21
        sent = upstream.requests[-1]["body"]
        assert (sent["temperature"], sent["max_tokens"], sent["model"]) == (0.7, 99, "m")
        chunks = list(litellm.completion(**asked(url, stream=True)))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == reply.choices[0].message.content
        [told] = [chunk.consilience for chunk in chunks if hasattr(chunk, "consilience")]
        assert told["draws"] == 21


def test_asynchronously(serve: Any) -> None:
    async def both(url: str) -> tuple[str, str]:
        reply = await litellm.acompletion(**asked(url))
        stream = await litellm.acompletion(**asked(url, stream=True))
        return reply.choices[0].message.content, "".join(
            [chunk.choices[0].delta.content or "" async for chunk in stream]
        )

    with ScriptedServer(answers=ANSWERS) as upstream:
        assert asyncio.run(both(serve(upstream, "--policy", "sc:n=21"))) == ("Let me think. The answer is 42.",) * 2


def test_the_policy_of_the_model_name_and_of_the_request(serve: Any) -> None:
    with ScriptedServer(answers={"42": 1.0}) as upstream:
        url = serve(upstream, "--policy", "one")
        assert litellm.completion(**asked(url, "m@sc:n=4")).consilience["draws"] == 4
        extra = {"consilience": {"policy": "esc:window=3,max=9"}}
        assert litellm.completion(**asked(url, extra_body=extra)).consilience["draws"] == 3
        assert upstream.counts["draws"] == 7


def test_tools_and_structured_output(serve: Any) -> None:
    made = [
        {"id": n, "type": "function", "function": {"name": "weather", "arguments": a}} for n, a in ("a1", "b2", "c2")
    ]
    left: list[Any] = [{"role": "assistant", "content": None, "tool_calls": [one]} for one in made]
    left += ['{"city": "Rome"}', '{"city": "Oslo"}', '{ "city":"Oslo"}']
    with ScriptedServer(answers=lambda question, rng: left.pop(0)) as upstream:
        url = serve(upstream, "--policy", "sc:n=3")
        [call] = litellm.completion(**asked(url, tools=TOOLS)).choices[0].message.tool_calls
        assert (call.id, call.function.name, call.function.arguments) == ("b", "weather", "2")
        reply = litellm.completion(**asked(url, response_format={"type": "json_object"}))
        assert reply.choices[0].message.content == '{"city": "Oslo"}'


def test_errors_have_litellms_types(serve: Any) -> None:
    with ScriptedServer(answers=ANSWERS) as upstream:
        url = serve(upstream, "--budget", "draws=2", "--policy", "sc:n=2")
        with pytest.raises(litellm.BadRequestError):
            litellm.completion(**asked(url, "m@sc:n=0"))
        assert litellm.completion(**asked(url)).consilience["draws"] == 2
        with pytest.raises(litellm.RateLimitError):
            litellm.completion(**asked(url))
        assert upstream.counts["draws"] == 2
