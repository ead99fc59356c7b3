"""Streams: the winner's text as ordinary chunks, heartbeats before them, progress where it is asked for."""

from __future__ import annotations

import asyncio
import json

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from consilience.testing import ScriptedServer

from .helpers import raw

MESSAGES = [{"role": "user", "content": "6 x 7?"}]
LONG = " ".join(f"step {n}" for n in range(60)) + "\n\nThe answer is 42. ❄"


def text_of(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def events(served, **more) -> bytes:
    """The bytes of a stream, as they come."""
    body = json.dumps({"model": "m", "messages": MESSAGES, "stream": True} | more).encode()
    with httpx2.Client() as client:
        reply = client.post(f"{served.url}/chat/completions", content=body)
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        return reply.content


def test_the_chunks_are_the_whole_reply_in_pieces(serve) -> None:
    with ScriptedServer(answers=lambda question, rng: LONG) as upstream:
        served = serve(upstream, policy="sc:n=3")
        chunks = list(served.ask(stream=True, stream_options={"include_usage": True}))
        whole = served.ask()
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert text_of(chunks) == LONG == whole.choices[0].message.content
    assert len(chunks) > 6
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert chunks[-2].consilience == whole.consilience


def test_without_stream_options_there_is_no_usage_and_the_end_is_done(serve) -> None:
    with ScriptedServer(answers={"42": 1.0}) as upstream:
        got = events(serve(upstream, policy="sc:n=2"))
    lines = got.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-2])


def test_heartbeats_come_while_the_votes_do(serve) -> None:
    with ScriptedServer(answers={"42": 1.0}, latency=0.5, latency_shape="fixed") as upstream:
        served = serve(upstream, policy="sc:n=2", heartbeat=0.02)
        got = events(served)
        before, _, after = got.partition(b"data: ")
        assert before.count(b": votes are coming in\n\n") * 23 == len(before) > 0
        assert b": votes" not in after
        assert text_of(list(served.ask(stream=True))).endswith("42.")


def test_progress_says_how_the_votes_stand(serve) -> None:
    with ScriptedServer(answers={"42": 0.6, "41": 0.4}, seed=2) as upstream:
        served = serve(upstream, policy="esc:window=4,max=12")
        asked = {"consilience": {"progress": True}}
        chunks = list(served.ask(stream=True, extra_body=asked))
    told = [chunk.consilience["progress"] for chunk in chunks if hasattr(chunk, "consilience") and not chunk.choices]
    final = chunks[-1].consilience
    assert [one["draws"] for one in told if one["votes"]] == list(range(4, final["draws"] + 1, 4))
    assert [one["votes"]["0"] for one in told if one["votes"]][-1] == final["votes"]
    assert text_of(chunks).startswith("Let me think.")


def test_an_early_error_has_its_status_and_a_late_one_is_an_event(serve) -> None:
    with ScriptedServer(failure_rate=1.0) as upstream, pytest.raises(openai.BadRequestError):
        serve(upstream, policy="sc:n=2").ask(stream=True)
    with ScriptedServer(failure_rate=1.0, latency=0.3, latency_shape="fixed") as upstream:
        stream = serve(upstream, policy="sc:n=2", heartbeat=0.01).ask(stream=True)
        with pytest.raises(openai.APIError, match="The scripted failure"):
            list(stream)


def test_several_choices_come_one_after_the_other(serve) -> None:
    with ScriptedServer(answers={"42": 1.0}) as upstream:
        chunks = list(serve(upstream, policy="sc:n=2").ask(stream=True, n=2))
    for index in (0, 1):
        assert text_of([c for c in chunks if c.choices and c.choices[0].index == index]).endswith("42.")
    assert len(chunks[-1].consilience["choices"]) == 2


def test_log_probabilities_are_in_the_chunk_of_their_text(serve) -> None:
    with ScriptedServer(answers={"42": 1.0}) as upstream:
        chunks = list(serve(upstream, policy="sc:n=2").ask(stream=True, logprobs=True))
    tokens = [
        token.token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
    ]
    assert "".join(tokens) == text_of(chunks)


async def test_the_async_client_and_its_stream_helper(serve) -> None:
    with ScriptedServer(answers={"42": 1.0}) as upstream:
        served = await asyncio.to_thread(serve, upstream, policy="sc:n=3")
        async with openai.AsyncOpenAI(base_url=served.url, api_key="x", max_retries=0) as client:
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(model="m", messages=[{"role": "user", "content": f"q {n}"}])
                    for n in range(8)
                )
            )
            assert {reply.consilience["draws"] for reply in replies} == {3}
            async with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
                final = await stream.get_final_completion()
            assert final.choices[0].message.content.endswith("42.")


def test_a_text_completion_streams_too(serve) -> None:
    served = serve("house", policy="sc:n=2")
    with served.client() as client:
        question = "A coin is heads up. Ann flips the coin. Is the coin still heads up?"
        chunks = list(client.completions.create(model="house", prompt=question, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].consilience["draws"] == 2


def test_an_http_1_0_client_gets_the_stream(serve) -> None:
    body = json.dumps({"model": "house", "messages": MESSAGES, "stream": True}).encode()
    served = serve("house", policy="sc:n=1")
    head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    import socket

    host, port = served.origin.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        got = b""
        while piece := connection.recv(65536):
            got += piece
    assert got.startswith(b"HTTP/1.1 200")
    assert got.rstrip().endswith(b"data: [DONE]")
    assert raw(served.origin, b"GET /healthz HTTP/1.0\r\n\r\n")[0] == 200
