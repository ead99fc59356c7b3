"""Retries, the limiter, Retry-After, cancellation and what each attempt is settled at."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from consilience.draws import Usage
from consilience.errors import BudgetSpent, ConsilienceError, EndpointError
from consilience.testing import ScriptedServer
from consilience.text.transport import (
    GaveUp,
    Limiter,
    Refused,
    Retry,
    Transport,
    environment_proxy,
    error_fields,
    retry_after,
)

QUICK = Retry(base=0.001, longest=0.005, patience=5)
PAYLOAD = json.dumps({"messages": [{"role": "user", "content": "q"}]}).encode()


class FakeMeter:
    """Records what becomes of every attempt: a Usage, "released", or "reserved" (nothing was said)."""

    def __init__(self, seconds: float = math.inf, attempts: int = 10**9) -> None:
        self.ends_at = time.monotonic() + seconds
        self.attempts = attempts
        self.outcomes: list[Any] = []
        self.open = 0

    @property
    def seconds_left(self) -> float:
        return self.ends_at - time.monotonic()

    @asynccontextmanager
    async def attempt(self, draws: int) -> AsyncIterator[Any]:
        if self.seconds_left <= 0 or len(self.outcomes) + self.open >= self.attempts:
            raise BudgetSpent("draws", "the cap is reached")
        self.open += 1
        entry = FakeAttempt(self.seconds_left)
        try:
            yield entry
        finally:
            self.open -= 1
            self.outcomes.append(entry.outcome)


class FakeAttempt:
    def __init__(self, seconds_left: float) -> None:
        self.seconds_left = seconds_left
        self.outcome: Any = "reserved"

    def settle(self, usage: Usage) -> None:
        self.outcome = usage

    def release(self) -> None:
        self.outcome = "released"


def read(body: bytes) -> tuple[dict[str, Any], Usage | None]:
    data = json.loads(body)
    usage = data["usage"]
    return data, Usage(prompt_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"])


@asynccontextmanager
async def transport(url: str, **options: Any) -> AsyncIterator[Transport]:
    given = {"concurrency": 4, "timeout": 5.0, "retry": QUICK, "headers": {}} | options
    kept = Transport(url + "/chat/completions", **given)
    try:
        yield kept
    finally:
        await kept.close()


@asynccontextmanager
async def raw_server(*replies: bytes | None) -> AsyncIterator[tuple[str, list[float]]]:
    """Answers each connection with the next of ``replies`` (None: silence; the last repeats) and closes it."""
    times: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(x.split(b":")[1]) for x in head.lower().split(b"\r\n") if b"content-length" in x)
        await reader.readexactly(length)
        times.append(time.monotonic())
        reply = replies[min(len(times), len(replies)) - 1]
        if reply is None:
            await reader.read()
        else:
            writer.write(reply)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", times
    finally:
        server.close()


def http(status: int, body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body) if length is None else length}", *headers]
    return ("\r\n".join([*lines, "connection: close"]) + "\r\n\r\n").encode() + body


GOOD = http(200, b'{"usage": {"prompt_tokens": 1, "completion_tokens": 2}}')


# ------------------------------------------------------------------------------------------- attempts


async def test_a_reply_is_settled_at_its_usage() -> None:
    meter = FakeMeter()
    with ScriptedServer() as server:
        async with transport(server.url) as kept:
            reply = await kept.call(PAYLOAD, 1, meter, read)
    assert reply["usage"]["total_tokens"] == meter.outcomes[0].tokens
    assert kept.limiter.in_flight == 0


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (http(200, b'{"usage": {"prompt', length=500), "truncated body after 3 tries"),
        (http(200, b'{"usage": {"prompt'), "invalid reply after 3 tries"),
        (http(503, b'{"error": {"message": "busy"}}'), "HTTP 503 after 3 tries: busy"),
        (http(500, b"<html><b>Oh</b> no</html>"), "HTTP 500 after 3 tries: Oh no"),
        (http(408, b""), "HTTP 408 after 3 tries"),
        (http(202, b"later"), "HTTP 202 after 3 tries: later"),
        (b"", "connection lost after 3 tries: ServerDisconnectedError"),
        (None, "timeout after 3 tries"),
    ],
)
async def test_passing_trouble_is_retried_and_each_attempt_stays_reserved(reply: bytes | None, reason: str) -> None:
    meter = FakeMeter()
    async with raw_server(reply) as (url, times), transport(url, timeout=0.1) as kept:
        with pytest.raises(GaveUp) as caught:
            await kept.call(PAYLOAD, 1, meter, read, tries=3)
    assert str(caught.value).startswith(reason)
    assert len(times) == 3
    assert meter.outcomes == ["reserved"] * 3
    assert kept.limiter.in_flight == 0


async def test_a_retry_that_succeeds() -> None:
    meter = FakeMeter()
    async with raw_server(http(500, b""), b"", GOOD) as (url, times), transport(url) as kept:
        assert await kept.call(PAYLOAD, 1, meter, read)
    assert len(times) == 3
    assert meter.outcomes == ["reserved", "reserved", Usage(prompt_tokens=1, completion_tokens=2)]


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422])
async def test_refusals_are_not_retried_and_cost_nothing(status: int) -> None:
    meter = FakeMeter()
    body = b'{"error": {"message": "no", "param": "seed", "code": "c"}}'
    async with raw_server(http(status, body)) as (url, times), transport(url) as kept:
        with pytest.raises(Refused, match=f"HTTP {status}: no") as caught:
            await kept.call(PAYLOAD, 1, meter, read)
    assert (caught.value.param, caught.value.code, len(times)) == ("seed", "c", 1)
    assert meter.outcomes == ["released"]


async def test_a_redirect_is_refused_and_does_not_show_its_query() -> None:
    reply = http(307, b"", "location: https://u:p@other/v2?key=sk-1")
    async with raw_server(reply) as (url, _), transport(url) as kept:
        with pytest.raises(Refused, match=r"^HTTP 307: moved to https://other/v2$"):
            await kept.call(PAYLOAD, 1, FakeMeter(), read)


async def test_an_endpoint_never_reached_stops_the_run() -> None:
    meter = FakeMeter()
    with ScriptedServer() as server:
        url = server.url
    async with transport(url) as kept:
        with pytest.raises(EndpointError, match="could not be reached"):
            await kept.call(PAYLOAD, 1, meter, read, tries=2)
    assert meter.outcomes == ["released"] * 2


async def test_an_endpoint_lost_later_fails_the_call_only() -> None:
    with ScriptedServer() as server:
        async with transport(server.url) as kept:
            await kept.call(PAYLOAD, 1, FakeMeter(), read)
            server.stop()
            with pytest.raises(GaveUp, match="no connection after 2 tries"):
                await kept.call(PAYLOAD, 1, FakeMeter(), read, tries=2)


async def test_secrets_are_cut_out_and_messages_shortened() -> None:
    body = json.dumps({"error": {"message": "bad key sk-secret " + "x" * 400}}).encode()
    async with raw_server(http(400, body)) as (url, _), transport(url, secrets=("sk-secret", "")) as kept:
        with pytest.raises(Refused) as caught:
            await kept.call(PAYLOAD, 1, FakeMeter(), read)
    assert "sk-secret" not in str(caught.value)
    assert len(caught.value.message) == 300


async def test_the_budget_is_asked_before_each_attempt() -> None:
    meter = FakeMeter(attempts=2)
    async with raw_server(http(500, b"")) as (url, times), transport(url) as kept:
        with pytest.raises(BudgetSpent):
            await kept.call(PAYLOAD, 1, meter, read)
    assert len(times) == 2
    assert kept.limiter.in_flight == 0


async def test_a_time_cap_cuts_attempts_and_pauses() -> None:
    async with raw_server(None) as (url, _), transport(url, timeout=60) as kept:
        with pytest.raises(BudgetSpent):
            await kept.call(PAYLOAD, 1, FakeMeter(seconds=0.2), read)
    async with raw_server(http(429, b"", "retry-after: 4")) as (url, times), transport(url) as kept:
        with pytest.raises(BudgetSpent):
            await kept.call(PAYLOAD, 1, FakeMeter(seconds=0.3), read)
        assert len(times) == 1


async def test_stopped_sends_nothing() -> None:
    meter = FakeMeter()
    with ScriptedServer() as server:
        async with transport(server.url) as kept:
            kept.stop(EndpointError("no"))
            with pytest.raises(EndpointError):
                await kept.call(PAYLOAD, 1, meter, read)
        assert server.counts["calls"] == 0
    assert meter.outcomes == []


def test_a_second_event_loop_is_refused_until_closed() -> None:
    with ScriptedServer() as server:
        kept = Transport(f"{server.url}/chat/completions", {}, concurrency=1, timeout=5, retry=QUICK)
        first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
        first.run_until_complete(kept.call(PAYLOAD, 1, FakeMeter(), read))
        with pytest.raises(ConsilienceError, match="another event loop"):
            second.run_until_complete(kept.call(PAYLOAD, 1, FakeMeter(), read))
        first.run_until_complete(kept.close())
        second.run_until_complete(kept.call(PAYLOAD, 1, FakeMeter(), read))
        second.run_until_complete(kept.close())
        first.close()
        second.close()


# ------------------------------------------------------------------------------------ 429 and Retry-After


async def test_retry_after_holds_back_every_call() -> None:
    """One 429, then no request before its Retry-After has passed on the server's own clock."""
    meter = FakeMeter()
    with ScriptedServer(calls_per_second=5, retry_after=1.05) as server:
        async with transport(server.url, concurrency=3) as kept:
            await asyncio.gather(*(kept.call(PAYLOAD, 1, meter, read) for _ in range(12)))
        log = server.requests
    burst = max(i for i, entry in enumerate(log[:9]) if entry["status"] == 429)
    first = next(entry["time"] for entry in log if entry["status"] == 429)
    assert burst < 8  # at most the three in flight were refused together
    assert all(entry["time"] >= first + 1.05 for entry in log[burst + 1 :])
    assert sum(entry["status"] == 200 for entry in log) == 12
    assert sum(isinstance(outcome, Usage) for outcome in meter.outcomes) == 12
    assert "reserved" not in meter.outcomes


async def test_429_does_not_count_against_the_tries_but_ends_by_patience() -> None:
    replies = [http(429, b"")] * 9 + [GOOD]
    async with raw_server(*replies) as (url, times), transport(url) as kept:
        await kept.call(PAYLOAD, 1, FakeMeter(), read, tries=1)
        assert len(times) == 10
    async with raw_server(http(429, b"", "retry-after: 86400")) as (url, times), transport(url) as kept:
        with pytest.raises(GaveUp, match="HTTP 429 for 5 s"):
            await kept.call(PAYLOAD, 1, FakeMeter(), read)
        assert len(times) == 1
        assert not kept.limiter.paused


async def test_a_spent_quota_is_a_refusal() -> None:
    body = b'{"error": {"message": "quota", "code": "insufficient_quota"}}'
    async with raw_server(http(429, body)) as (url, _), transport(url) as kept:
        with pytest.raises(Refused):
            await kept.call(PAYLOAD, 1, FakeMeter(), read)


def test_retry_after_forms() -> None:
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after": "9", "retry-after-ms": "40"}) == 0.04
    later = retry_after({"retry-after": formatdate(time.time() + 100, usegmt=True)})
    assert later is not None
    assert 97 < later <= 100
    assert retry_after({"retry-after": formatdate(0, usegmt=True)}) == 0
    assert [retry_after({"retry-after": v}) for v in ("", "soon", "nan", "inf")] == [None] * 4
    assert retry_after({"retry-after": "-3"}) == 0


@given(st.integers(1, 80), st.integers(0, 2**32))
def test_backoff_is_full_jitter_within_its_bounds(attempt: int, seed: int) -> None:
    retry = Retry()
    delay = retry.delay(attempt, random.Random(seed))
    assert 0 <= delay <= min(retry.longest, retry.base * 2.0**attempt)
    assert delay == retry.delay(attempt, random.Random(seed))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": {"message": "m", "param": null, "code": null, "type": "t"}}', ("m", None, "t")),
        (b'{"error": "plain"}', ("plain", None, None)),
        (b'{"object": "error", "message": "m", "param": "n", "code": 400}', ("m", "n", "400")),
        (b'{"detail": "Not Found"}', ("Not Found", None, None)),
        (b'{"detail": [{"loc": ["body", "seed"], "msg": "extra"}]}', ("'seed': extra", None, None)),
        (b'{"message": {"detail": [{"loc": ["body", "n"], "msg": "no"}]}}', ("'n': no", None, None)),
        (b"<p>Bad  <b>gateway</b></p>", ("Bad gateway", None, None)),
        (b"", ("", None, None)),
        (b"[1]", ("[1]", None, None)),
    ],
)
def test_error_bodies_of_many_servers(body: bytes, expected: tuple[Any, ...]) -> None:
    assert error_fields(body) == expected


# ------------------------------------------------------------------------------------------- the limiter


async def test_limiter_never_above_concurrency_and_first_come_first_served() -> None:
    limiter, order, most = Limiter(3), [], 0

    async def work(number: int) -> None:
        nonlocal most
        await limiter.acquire()
        order.append(number)
        most = max(most, limiter.in_flight)
        await asyncio.sleep(0)
        limiter.release()

    await asyncio.gather(*(work(i) for i in range(20)))
    assert (most, limiter.in_flight, order) == (3, 0, list(range(20)))


async def test_limiter_halves_once_per_burst_and_recovers_by_one_a_window() -> None:
    limiter = Limiter(16)
    sent_at = asyncio.get_running_loop().time()
    await asyncio.sleep(0.001)
    for _ in range(10):
        limiter.throttled(sent_at)
    assert limiter.limit == 8
    await asyncio.sleep(0.001)
    limiter.throttled(asyncio.get_running_loop().time())
    assert limiter.limit == 4
    for _ in range(5):
        limiter.succeeded()
    assert limiter.limit == 5
    for _ in range(500):
        limiter.succeeded()
    assert limiter.limit == 16
    for _ in range(9):
        await asyncio.sleep(0.001)
        limiter.throttled(asyncio.get_running_loop().time())
    assert limiter.limit == 1


async def test_limiter_pause_grants_nothing_until_it_ends() -> None:
    limiter = Limiter(2)
    loop = asyncio.get_running_loop()
    limiter.pause(0.05)
    until = loop.time() + 0.05
    waiting = [asyncio.create_task(limiter.acquire()) for _ in range(2)]
    await asyncio.wait(waiting)
    assert loop.time() >= until - 0.001


@given(st.lists(st.sampled_from(["acquire", "release", "cancel", "success", "429"]), max_size=60))
def test_limiter_laws_under_any_order_of_events(events: list[str]) -> None:
    async def run() -> None:
        limiter = Limiter(4)
        waiting: list[asyncio.Task[None]] = []
        for event in events:
            held = [t for t in waiting if t.done() and not t.cancelled()]
            if event == "acquire":
                waiting.append(asyncio.create_task(limiter.acquire()))
            elif event == "release" and held:
                waiting.remove(held[0])
                limiter.release()
            elif event == "cancel" and waiting:
                waiting[-1].cancel()
            elif event == "success":
                limiter.succeeded()
            elif event == "429":
                limiter.throttled(math.inf)
            if event != "cancel":
                await asyncio.sleep(0)
            assert 1 <= limiter.limit <= 4
            assert 0 <= limiter.in_flight <= 4
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        held = [t for t in waiting if t.done() and not t.cancelled()]
        assert limiter.in_flight == len(held)
        while held:  # every waiting call gets its turn
            waiting.remove(held[0])
            limiter.release()
            await asyncio.sleep(0)
            held = [t for t in waiting if t.done() and not t.cancelled()]
        assert limiter.in_flight == 0
        assert all(t.cancelled() for t in waiting)

    asyncio.run(run())


# ----------------------------------------------------------------------------------- cancellation, proxies


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_cancellation_frees_slots_and_leaves_the_reservation() -> None:
    meter = FakeMeter()
    with ScriptedServer(latency=30, latency_shape="fixed") as server:
        async with transport(server.url, concurrency=2) as kept:
            calls = [asyncio.create_task(kept.call(PAYLOAD, 1, meter, read)) for _ in range(5)]
            await until(lambda: server.counts["in_flight"] == 2)
            for call in calls:
                call.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(r, asyncio.CancelledError) for r in results)
            assert (kept.limiter.in_flight, meter.open) == (0, 0)
            server.latency = 0
            assert await kept.call(PAYLOAD, 1, meter, read)
    assert meter.outcomes[:2] == ["reserved"] * 2
    assert len(meter.outcomes) == 3


async def test_connections_are_kept() -> None:
    ports = set()
    with ScriptedServer() as server:
        async with transport(server.url, concurrency=1) as kept:
            for _ in range(5):
                await kept.call(PAYLOAD, 1, FakeMeter(), read)
                ports |= {c.transport.get_extra_info("peername")[1] for c in server._connections}
    assert len(ports) == 1


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_PROXY".upper(), raising=False)
    return monkeypatch


@pytest.mark.filterwarnings("ignore:BasicAuth is deprecated")
def test_environment_proxies(proxies: pytest.MonkeyPatch) -> None:
    assert environment_proxy(URL("https://api.example/v1")) == (None, None)
    proxies.setenv("https_proxy", "http://me:word@proxy.example:3128")
    proxy, login = environment_proxy(URL("https://api.example/v1"))
    assert (str(proxy), login) == ("http://proxy.example:3128", aiohttp.BasicAuth("me", "word"))
    assert environment_proxy(URL("http://api.example/v1")) == (None, None)
    proxies.setenv("no_proxy", "api.example")
    assert environment_proxy(URL("https://api.example/v1")) == (None, None)


async def test_a_call_through_a_proxy_and_an_https_proxy_never_sees_the_key(
    proxies: pytest.MonkeyPatch,
) -> None:
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(GOOD if seen[-1].startswith(b"POST") else b"HTTP/1.1 502 No\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    proxies.setenv("http_proxy", address)
    proxies.setenv("https_proxy", address)
    headers = {"Authorization": "Bearer sk-secret"}
    async with server:
        async with transport("http://api.example/v1", headers=headers) as kept:
            await kept.call(PAYLOAD, 1, FakeMeter(), read)
        assert seen[0].startswith(b"POST http://api.example/v1/chat/completions")
        async with transport("https://api.example/v1", headers=headers) as kept:
            with pytest.raises(EndpointError, match="could not be reached"):
                await kept.call(PAYLOAD, 1, FakeMeter(), read, tries=1)
        assert seen[1].startswith(b"CONNECT api.example:443")
        assert b"sk-secret" not in seen[1]
