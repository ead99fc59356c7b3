"""The scripted server: its script, its counts, its HTTP, and that OpenAI's own client is content with it."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import socket
import subprocess
import sys
from collections import Counter
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest
from openai.types.chat import ChatCompletion

from consilience.testing import ScriptedServer, http1

COINS = {"heads": 0.7, "tails": 0.3}


def ask(server: ScriptedServer, question: str = "q", key: str = "any", **params: Any) -> dict[str, Any]:
    """One chat call; returns the reply's JSON, raises HTTPError otherwise."""
    body = {"model": "m", "messages": [{"role": "user", "content": question}], **params}
    headers = {"authorization": f"Bearer {key}"}
    sent = Request(server.url + "/chat/completions", json.dumps(body).encode(), headers)
    with urlopen(sent) as reply:
        return json.loads(reply.read())


def refusal(server: ScriptedServer, **params: Any) -> tuple[int, dict[str, Any], Any]:
    with pytest.raises(HTTPError) as caught:
        ask(server, **params)
    return caught.value.code, json.loads(caught.value.read())["error"], caught.value.headers


def text(reply: dict[str, Any], place: int = 0) -> str:
    return reply["choices"][place]["message"]["content"]


def exchange(server: ScriptedServer, *pieces: bytes) -> bytes:
    """What the server sends back on one connection until it closes it or falls silent."""
    with socket.create_connection((server.host, server.port)) as connection:
        connection.settimeout(1.0)
        received = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            while chunk := connection.recv(65536):
                received += chunk
        except (TimeoutError, ConnectionError):  # silent, or closed while some of what we sent was still unread
            pass
        return received


def raw(body: bytes, *headers: str, framing: bool = True) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", *headers]
    if framing:
        lines.append(f"content-length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


BODY = json.dumps({"messages": [{"role": "user", "content": "q"}]}).encode()


def test_official_sync_client_accepts_replies_and_models() -> None:
    with ScriptedServer(answers=COINS, models=["m"]) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
        messages: Any = [{"role": "user", "content": "Toss the coin."}]
        reply = client.chat.completions.create(model="m", messages=messages, n=3, logprobs=True, seed=1)
        assert len(reply.choices) == 3
        assert all(c.logprobs and c.logprobs.content for c in reply.choices)
        assert [m.id for m in client.models.list()] == ["m"]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=messages)
        client.close()


async def test_official_async_client_and_async_with() -> None:
    async with ScriptedServer() as server, openai.AsyncOpenAI(base_url=server.url, api_key="k") as client:
        replies = await asyncio.gather(
            *(
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": f"q{i}"}])
                for i in range(8)
            )
        )
        assert {r.choices[0].message.content for r in replies} == {"Let me think. The answer is 42."}
        assert server.counts["completed"] == 8


def test_replies_validate_strictly_as_official_types() -> None:
    with ScriptedServer(answers=COINS) as server:
        ChatCompletion.model_validate(ask(server, n=2, logprobs=True, max_tokens=3), strict=True)


def test_answers_follow_the_distribution_of_the_matching_question() -> None:
    script = {"coin": COINS, "": {"nothing": 1.0}}
    with ScriptedServer(answers=script, reply="A: {answer}") as server:
        reply = ask(server, "a coin?", n=2000, seed=7)
        drawn = Counter(c["message"]["content"] for c in reply["choices"])
        # 2,000 draws, standard deviation 20.5: off by 5 of them once in a million seeds
        assert abs(drawn["A: heads"] - 1400) < 103
        assert text(ask(server, "else")) == "A: nothing"


def test_same_seed_same_text_and_order_does_not_matter_with_request_seeds() -> None:
    first, second = ScriptedServer(answers=COINS, seed=3), ScriptedServer(answers=COINS, seed=3)
    with first, second:
        seeds = range(30)
        forward = [text(ask(first, seed=s)) for s in seeds]
        backward = [text(ask(second, seed=s)) for s in reversed(seeds)]
        assert forward == backward[::-1]
        assert len(set(forward)) == 2
        first.reset()
        without = [text(ask(first)) for _ in seeds]
        first.reset()
        assert [text(ask(first)) for _ in seeds] == without
        assert len(set(without)) == 2


def test_request_seed_is_ignored_where_not_supported() -> None:
    with ScriptedServer(answers=COINS, supports_seed=False) as server:
        assert len({text(ask(server, seed=1)) for _ in range(30)}) == 2


def test_callable_answers_text_or_message() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    def answers(question: str, rng: Any) -> Any:
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        return message if question == "tool" else f"{question} {rng.random():.3f}"

    with ScriptedServer(answers=answers) as server:
        assert text(ask(server, "x", seed=1)) == text(ask(server, "x", seed=1))
        reply = ask(server, "tool")
        assert reply["choices"][0]["finish_reason"] == "tool_calls"
        ChatCompletion.model_validate(reply, strict=True)


def test_a_script_that_raises_is_a_500(capsys: pytest.CaptureFixture[str]) -> None:
    def answers(question: str, rng: Any) -> str:
        raise ZeroDivisionError("mine")

    with ScriptedServer(answers=answers) as server:
        assert "ZeroDivisionError" in refusal(server)[1]["message"]
    assert "mine" in capsys.readouterr().err


def test_n_ignored_refused_and_logprobs_off() -> None:
    with ScriptedServer(supports_n=False, supports_logprobs=False) as server:
        reply = ask(server, n=4, logprobs=True)
        assert len(reply["choices"]) == 1
        assert reply["choices"][0]["logprobs"] is None
    with ScriptedServer(unsupported={"n"}) as server:
        status, error, _ = refusal(server, n=2)
        assert (status, error["param"], error["code"]) == (400, "n", "unsupported_parameter")


def test_max_tokens_cuts_and_can_be_refused() -> None:
    with ScriptedServer(reply="one two three {answer}") as server:
        reply = ask(server, max_tokens=2)
        assert text(reply) == "one two"
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] == 2
    with ScriptedServer(max_completion_tokens_only=True) as server:
        status, error, _ = refusal(server, max_tokens=2)
        assert status == 400
        assert "max_completion_tokens" in error["message"]
        assert ask(server, max_completion_tokens=2)["usage"]["completion_tokens"] == 2


def test_logprobs_sum_to_the_answers_probability() -> None:
    with ScriptedServer(answers={"x": 0.25, "y": 0.75}) as server:
        reply = ask(server, logprobs=True, n=20, seed=1)
        for choice in reply["choices"]:
            total = sum(t["logprob"] for t in choice["logprobs"]["content"])
            p = 0.25 if "x." in choice["message"]["content"] else 0.75
            assert total == pytest.approx(math.log(p))
            assert "".join(t["token"] for t in choice["logprobs"]["content"]) == choice["message"]["content"]


def test_usage_and_counts() -> None:
    with ScriptedServer(reply="a b {answer}") as server:
        ask(server, "one two three", n=4)
        entry = server.requests[0]
        assert (entry["prompt_tokens"], entry["completion_tokens"], entry["status"]) == (3, 12, 200)
        assert entry["body"]["n"] == 4
        counts = {"calls": 1, "completed": 1, "failures": 0, "draws": 4, "prompt_tokens": 3}
        assert server.counts == counts | {"completion_tokens": 12, "in_flight": 0, "max_in_flight": 1}


def test_failures_errors_and_cuts_come_at_their_rate_and_repeat_by_seed() -> None:
    def statuses() -> list[int]:
        with ScriptedServer(failure_rate=0.2, error_rate=0.2, error_status=503, seed=5) as server:
            for _ in range(60):
                try:
                    ask(server)
                except HTTPError as error:
                    error.close()
            return [entry["status"] for entry in server.requests]

    first = statuses()
    assert first == statuses()
    seen = Counter(first)
    assert set(seen) == {200, 400, 503}
    assert seen[200] > 20


def test_truncated_body_closes_the_connection() -> None:
    with ScriptedServer(truncate_rate=1.0) as server:
        received = exchange(server, raw(BODY))
        head, _, body = received.partition(b"\r\n\r\n")
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        assert 0 < len(body) < length
        assert server.counts["failures"] == 1
        assert server.counts["draws"] == 1  # generated, so billed


def test_rate_limits_answer_429_with_retry_after() -> None:
    with ScriptedServer(calls_per_second=2, retry_after=3) as server:
        ask(server)
        ask(server)
        status, _, headers = refusal(server)
        assert (status, headers["retry-after"]) == (429, "3")
    with ScriptedServer(max_concurrent=0, retry_after=None) as server:
        status, _, headers = refusal(server)
        assert (status, headers["retry-after"]) == (429, None)


async def test_max_in_flight_and_max_concurrent() -> None:
    with ScriptedServer(latency=0.3, latency_shape="fixed", max_concurrent=3) as server:
        tasks = [asyncio.to_thread(ask, server, f"q{i}") for i in range(5)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(r, HTTPError) for r in results) == 2
        assert server.counts["max_in_flight"] == 3


def test_identical_is_a_caching_backend() -> None:
    with ScriptedServer(answers={str(i): 1 for i in range(50)}, identical=True) as server:
        replies = [ask(server, seed=i) for i in range(5)]
        assert len({(r["id"], text(r)) for r in replies}) == 1
    with ScriptedServer() as server:
        assert len({ask(server)["id"] for _ in range(5)}) == 5


def test_api_key_is_checked_and_not_shown() -> None:
    with ScriptedServer(api_key="sk-secret") as server:
        assert refusal(server, key="wrong")[0] == 401
        assert text(ask(server, key="sk-secret"))
        assert "sk-secret" not in repr(server)


def test_a_client_that_hangs_up_is_counted_as_served_tokens_and_status_499() -> None:
    with ScriptedServer(latency=0.2, latency_shape="fixed") as server:
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(raw(BODY))
            while not server.counts["in_flight"]:
                pass
        while server.requests[0]["status"] is None:
            pass
        assert server.requests[0]["status"] == 499
        assert server.counts["draws"] == 1


def test_bad_scripts_and_bodies_are_refused() -> None:
    for answers in ({}, {"a": -1.0}, {"a": 1.0, "b": {"c": 1.0}}):
        with pytest.raises(ValueError, match=r"answers|distribution"):
            ScriptedServer(answers=answers)
    with ScriptedServer(answers={"known": COINS}) as server:
        assert "no answer" in refusal(server)[1]["message"]
        assert b" 400 " in exchange(server, raw(b"{"))
        assert b" 400 " in exchange(server, raw(b'{"messages": []}'))
        for name, value in {"n": 0, "seed": "x", "max_tokens": 1.5, "max_completion_tokens": True}.items():
            status, error, _ = refusal(server, question="known", **{name: value})
            assert (status, error["param"]) == (400, name)
        with pytest.raises(RuntimeError):
            server.start()
        with pytest.raises(OSError, match="address"):
            ScriptedServer(port=server.port).start()


# ------------------------------------------------------------------------------------------------ HTTP/1.1


def test_pipelined_and_split_requests_are_answered_in_order() -> None:
    with ScriptedServer(answers=lambda q, _: q, latency=0.01) as server:
        bodies = [json.dumps({"messages": [{"role": "user", "content": f"q{i}"}]}).encode() for i in range(5)]
        stream = b"".join(raw(b) for b in bodies)
        received = exchange(server, stream[:90], stream[90:300], stream[300:])
        places = [received.find(f'"q{i}"'.encode()) for i in range(5)]
        assert -1 not in places
        assert places == sorted(places)


def test_chunked_body_extensions_and_trailers() -> None:
    with ScriptedServer() as server:
        half = len(BODY) // 2
        chunks = b"%x;ext=1\r\n%b\r\n%X\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n"
        body = chunks % (half, BODY[:half], len(BODY) - half, BODY[half:])
        request = raw(b"", "transfer-encoding: chunked", framing=False) + body
        assert exchange(server, request[:150], request[150:], raw(BODY)).count(b"HTTP/1.1 200") == 2


def test_100_continue() -> None:
    with ScriptedServer() as server:
        request = raw(BODY, "expect: 100-continue")
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(request[: -len(BODY)])
            assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(BODY)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
        assert b"100 Continue" not in exchange(server, request)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (raw(b"", "no colon here"), 400),
        (raw(BODY, "transfer-encoding: chunked"), 400),
        (raw(b"", "transfer-encoding: gzip", framing=False), 400),
        (raw(b"", "transfer-encoding: chunked", framing=False) + b"xyz\r\n", 400),
        (raw(b"", "transfer-encoding: chunked", framing=False) + b"3\r\nabcdef\r\n", 400),
        (raw(BODY, "content-length: 5"), 400),
        (raw(b"", "content-length: -5", framing=False), 400),
        (raw(b"", "content-length: 99999999999", framing=False), 413),
        (raw(b"", "x: " + "y" * (http1.MAX_HEAD + 1)), 431),
        (b"GET /v1/chat/completions HTTP/1.1\r\n\r\n", 405),
        (b"GET /nowhere HTTP/1.1\r\n\r\n", 404),
    ],
)
def test_malformed_requests_are_refused(sent: bytes, status: int) -> None:
    with ScriptedServer() as server:
        assert exchange(server, sent).startswith(b"HTTP/1.1 %d " % status)
        assert server.counts["calls"] == 0


def test_connection_close_and_http_1_0() -> None:
    with ScriptedServer() as server:
        assert b"connection: close" in exchange(server, raw(BODY, "connection: close"), raw(BODY))
        old = raw(BODY).replace(b"HTTP/1.1", b"HTTP/1.0")
        assert exchange(server, old + old).count(b"HTTP/1.1 200") == 1


# ------------------------------------------------------------------------------------------- as a process


def test_as_a_process_with_log_counts_and_reset() -> None:
    command = [sys.executable, "-m", "consilience.testing.server", "--answers", json.dumps(COINS)]
    command += ["--reply", "{answer}", "--log-bodies", "false", "--api-key", "123"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        client = openai.OpenAI(base_url=url, api_key="123", max_retries=0)
        messages: Any = [{"role": "user", "content": "q"}]
        reply = client.chat.completions.create(model="m", messages=messages)
        assert reply.choices[0].message.content in COINS
        client.close()
        root = url.removesuffix("/v1")
        with urlopen(root + "/_log") as log, urlopen(root + "/_counts") as counts:
            (entry,) = json.loads(log.read())
            assert entry["status"] == 200
            assert "body" not in entry
            assert json.loads(counts.read())["completed"] == 1
        with urlopen(Request(root + "/_reset", method="POST")) as counts:
            assert json.loads(counts.read())["calls"] == 0
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_importing_the_package_is_light() -> None:
    probe = "import sys, consilience.testing; print('consilience.testing.server' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", probe], text=True).strip() == "False"
