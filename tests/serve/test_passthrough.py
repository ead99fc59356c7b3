"""``@none``: bytes and status come through untouched, and still nobody passes his budget."""

from __future__ import annotations

import asyncio
import json
import socket

import openai
import pytest
from starlette.requests import Request
from starlette.responses import Response

from consilience.cli.serve import _listen
from consilience.errors import InputError

from .helpers import eventually, post, raw, running
from .upstream import Upstream

CHAT = "/v1/chat/completions"


@pytest.fixture
def upstream():
    made = Upstream()
    with running(made.app) as origin:
        made.url = f"{origin}/v1"
        yield made


class Odd(Upstream):
    """Sends a header twice, and does not end a stream after its last line."""

    async def chat(self, request: Request) -> Response:
        reply = await super().chat(request)
        reply.raw_headers.extend([(b"x-twice", b"1"), (b"x-twice", b"2")])
        return reply

    async def stream(self, body):
        async for piece in super().stream(body):
            yield piece
        await asyncio.sleep(60)


def body(model: str = "m", **more) -> bytes:
    """A request with spacing that no encoder would make."""
    asked = {"model": model, "messages": [{"role": "user", "content": "2 + 2?"}]} | more
    return json.dumps(asked, indent=2).encode() + b"\n  "


def direct(upstream: Upstream, request: bytes) -> tuple[int, bytes]:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(request)}\r\n\r\n"
    )
    status, _, got = raw(upstream.url.removesuffix("/v1"), head.encode() + request)
    return status, got


@pytest.mark.parametrize("model", ["m", "teapot"])
def test_bytes_status_and_headers_are_the_upstreams(serve, upstream, model) -> None:
    served = serve(upstream, policy="none")
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mine\r\nContent-Length: {len(body(model))}\r\n\r\n"
    )
    status, headers, got = raw(served.origin, head.encode() + body(model))
    assert upstream.seen[-1][2] == body(model)
    assert (status, got) == direct(upstream, body(model))
    assert headers["x-own"] == "kept"


def test_the_tail_and_the_field_choose_it_and_are_taken_off(serve, upstream) -> None:
    served = serve(upstream, policy="sc:n=3")
    for sent in (body("a/b@none"), body("a/b", consilience={"policy": "none"})):
        status, _, got = post(served.origin, CHAT, sent)
        assert (status, got["id"], "consilience" in got) == (200, "x-1", False)
        assert upstream.bodies[-1] == json.loads(body("a/b"))
        assert len(upstream.seen) == 1
        upstream.seen.clear()


def test_the_upstream_gets_the_servers_key_and_never_the_clients(serve, upstream, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the-servers-own")
    served = serve(upstream, policy="sc:n=2")
    for model in ("m@none", "m"):
        served.client("a-clients-secret", organization="org-1").chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "2 + 2?"}],
            extra_headers={"X-Secret": "a-clients-secret"},
        )
    with served.client("a-clients-secret") as client:
        assert next(iter(client.models.list())).id == "a/b"
        assert client.models.retrieve("a/b@esc:window=5").id == "a/b"
    assert len(upstream.seen) >= 4
    for _, headers, content in upstream.seen:
        assert headers["authorization"] == "Bearer the-servers-own"
        assert "a-clients-secret" not in str(headers) + content.decode()
        assert "openai-organization" not in headers


def test_a_stream_comes_through_byte_by_byte(serve, upstream) -> None:
    served = serve(upstream, policy="none")
    with served.client() as client:
        raw_stream = client.chat.completions.with_streaming_response.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True
        )
        with raw_stream as reply:
            got = b"".join(reply.iter_bytes())
            assert reply.headers["content-type"].startswith("text/event-stream")
    assert got.startswith(b": a comment\n\ndata: {")
    assert got.endswith(b"data: [DONE]\n\n")
    chunks = served.ask(model="m@none", stream=True)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == "The answer is 4."


def test_a_client_that_leaves_a_stream_ends_it_upstream(serve, upstream) -> None:
    served = serve(upstream, policy="none")
    with served.client() as client:
        stream = client.chat.completions.create(
            model="endless", messages=[{"role": "user", "content": "x"}], stream=True
        )
        next(iter(stream))
        stream.close()
    assert eventually(lambda: upstream.cut == 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_binds_it_by_what_the_reply_says_was_used(serve, upstream, stream) -> None:
    """Each call may take its prompt's bound and 50 tokens and then takes 10: the cap lets through exactly so many."""
    served = serve(upstream, policy="none", budget="tokens=500")
    bound = served.core.account.budget.tokens

    def ask_on() -> None:
        for _ in range(1000):
            reply = served.ask(max_tokens=50, stream=stream)
            if stream:
                list(reply)

    with pytest.raises(openai.BadRequestError) as caught:
        served.ask()
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.RateLimitError) as limited:
        ask_on()
    assert limited.value.code == "insufficient_quota"
    assert 10 * len(upstream.seen) == served.core.account.tokens
    worst = bound - served.core.account.tokens
    assert 50 + 64 < worst < 250
    assert len(upstream.seen) > 25


def test_a_cap_on_draws_binds_it(serve, upstream) -> None:
    served = serve(upstream, policy="none", budget="draws=3")
    with pytest.raises(openai.RateLimitError):
        served.ask(n=4)
    for _ in range(3):
        served.ask()
    with pytest.raises(openai.RateLimitError):
        served.ask()
    assert len(upstream.seen) == 3


def test_a_client_that_leaves_after_the_last_line_of_a_stream_pays_what_it_used(serve) -> None:
    odd = Odd()
    with running(odd.app) as origin:
        served = serve(f"{origin}/v1", policy="none", budget="tokens=500")
        for _ in range(3):
            chunks = served.ask(max_tokens=50, stream=True)
            assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [10]
            chunks.close()
        assert eventually(lambda: served.core.account.tokens == 30)
        assert (served.core.account.unknown, served.core.account._reserved_tokens) == (0, 0)


def test_a_header_that_comes_twice_goes_on_twice(serve) -> None:
    odd = Odd()
    with running(odd.app) as origin:
        served = serve(f"{origin}/v1", policy="none")
        with served.client() as client:
            reply = client.chat.completions.with_raw_response.create(
                model="m", messages=[{"role": "user", "content": "x"}]
            )
        assert reply.headers.get_list("x-twice", split_commas=True) == ["1", "2"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_is_written_to_a_client_leaves_at_once(host) -> None:
    """A head and its body are two writes; held back until the first is acknowledged, the second is 40 ms late."""
    try:
        listener = _listen(host, 0)
    except InputError:
        assert host == "::1"
        pytest.skip("no IPv6 here")
    with listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_idempotency_key_goes_upstream_as_its_clients_own(serve, upstream) -> None:
    """The upstream knows one key, the server's: two clients with the same word must not share a reply."""
    served = serve(upstream, policy="none")
    for key in ("alice", "bob", "alice"):
        served.ask(key=key, extra_headers={"Idempotency-Key": "order-66"})
    alice, bob, again = (headers["idempotency-key"] for _, headers, _ in upstream.seen)
    assert alice == again != bob
    assert "order-66" not in (alice, bob)


def test_what_was_refused_before_it_was_sent_takes_no_draw(serve, upstream) -> None:
    served = serve(upstream, policy="none", budget="draws=3,tokens=100000")
    for _ in range(5):
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            served.ask()
        with pytest.raises(openai.RateLimitError):
            served.ask(max_tokens=10**9)
    for _ in range(3):
        served.ask(max_tokens=5)
    with pytest.raises(openai.RateLimitError):
        served.ask(max_tokens=5)
    assert len(upstream.seen) == 3


@pytest.mark.parametrize("policy", ["none", "sc:n=1"])
@pytest.mark.parametrize("name", ["functions", "documents", "prediction", "stop"])
def test_text_beside_the_messages_is_bounded_too(serve, upstream, policy, name) -> None:
    """Some endpoints put it into the prompt: under a cap its bytes are reserved as well."""
    served = serve(upstream, policy=policy, budget="tokens=2000")
    long = "word " * 1000
    value = {"functions": [{"name": "f", "description": long}], "prediction": {"type": "content", "content": long}}
    with pytest.raises(openai.APIStatusError) as caught:
        served.ask(max_tokens=5, extra_body={name: value.get(name, [long])})
    assert caught.value.status_code in (400, 429)
    assert not upstream.seen
    served.ask(max_tokens=5)
