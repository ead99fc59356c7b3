"""Calls per second of four clients against one scripted server, in one run: the ratios are the result.

The server (its own process, no latency, `n` and log-probabilities off) is first loaded by bare sockets that send
prepared bytes: its capacity must be at least three times that of any client, else the server is what is measured.
Then the same calls go through the official `openai` client, a bare aiohttp loop, and `OpenAISource.draw` with a
meter that does nothing. Rounds are interleaved and ratios taken within a round, since other work may
share the cores; processor time per call is shown beside the rates for the same reason.

    python benchmarks/http_client.py [--calls 4000] [--connections 32] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from statistics import median
from typing import Any
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import aiohttp

from consilience.draws import Draw, Usage
from consilience.text.sources.base import Request
from consilience.text.sources.openai import OpenAISource

QUESTION = "A farmer has 17 sheep and buys 25 more. How many sheep are there? End with: The answer is ..."
BODY: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0.7,
    "max_tokens": 1024,
}


class FreeMeter:
    """A meter without caps, and each of its attempts."""

    seconds_left = math.inf

    def attempt(self, draws: int) -> FreeMeter:
        """Let every attempt through."""
        return self

    async def __aenter__(self) -> FreeMeter:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to book."""

    def settle(self, usage: Usage) -> None:
        """Nothing to book."""

    def release(self) -> None:
        """Nothing to give back."""


class Blast(asyncio.Protocol):
    """One connection that sends the same prepared request again as soon as the reply is there."""

    def __init__(self, request: bytes, calls: int, done: asyncio.Future[None]) -> None:
        self.request, self.left, self.done = request, calls, done
        self.received = self.expected = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if not self.expected:  # the replies differ by a digit of an id at most, so each is measured by its head
            head, _, _ = data.partition(b"\r\n\r\n")
            self.expected = len(head) + 4 + int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        self.received += len(data)
        if self.received >= self.expected:
            self.received = self.expected = 0
            self.left -= 1
            if self.left:
                self.transport.write(self.request)
            elif not self.done.done():
                self.done.set_result(None)


async def blast(port: int, calls: int, connections: int) -> float:
    """Calls per second of bare sockets."""
    body = json.dumps(BODY).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    request, loop = head.encode() + body, asyncio.get_running_loop()
    done: list[asyncio.Future[None]] = [loop.create_future() for _ in range(connections)]
    start = time.perf_counter()
    for future in done:
        await loop.create_connection(partial(Blast, request, calls // connections, future), "127.0.0.1", port)
    await asyncio.gather(*done)
    return calls // connections * connections / (time.perf_counter() - start)


async def capacity(url: str, calls: int, connections: int) -> float:
    """Calls per second that the server answers."""
    return await blast(int(url.split(":")[2].split("/")[0]), calls, connections)


async def workers(call: Callable[[int], Awaitable[object]], calls: int, connections: int) -> float:
    """Calls per second of ``call`` run by so many workers at once."""
    numbers = iter(range(calls))

    async def work() -> None:
        for number in numbers:
            await call(number)

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(connections)))
    return calls / (time.perf_counter() - start)


async def official(url: str, calls: int, connections: int) -> float:
    """The official client."""
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
        return await workers(lambda i: client.chat.completions.create(**BODY, seed=i), calls, connections)


async def bare(url: str, calls: int, connections: int, trust_env: bool = False) -> float:
    """aiohttp alone: post, read, parse."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections), trust_env=trust_env) as session:

        async def call(number: int) -> str:
            async with session.post(f"{url}/chat/completions", json=BODY | {"seed": number}) as response:
                text: str = (await response.json())["choices"][0]["message"]["content"]
                return text

        return await workers(call, calls, connections)


async def bare_trust_env(url: str, calls: int, connections: int) -> float:
    """aiohttp alone with its own ``trust_env``, which looks up proxies and netrc in threads for every call."""
    return await bare(url, calls, connections, trust_env=True)


def request() -> Request:
    """The request of every call."""
    return Request("e", "m", ({"role": "user", "content": QUESTION},), {"temperature": 0.7, "max_tokens": 1024})


async def source_single(url: str, calls: int, connections: int) -> float:
    """`OpenAISource.draw`, one index per call of it."""
    source, asked, draws = OpenAISource("m", url, api_key="any", concurrency=connections), request(), list[Draw]()
    meter = FreeMeter()
    try:
        return await workers(lambda i: source.draw(asked, [i], meter, lambda _, d: draws.append(d)), calls, connections)
    finally:
        await source.close()
        assert len(draws) == calls
        assert not any(d.failed for d in draws)


async def source_wave(url: str, calls: int, connections: int) -> float:
    """`OpenAISource.draw` over 100 problems, all indices of a problem at once (`n` ignored: single calls)."""
    source, asked, draws = OpenAISource("m", url, api_key="any", concurrency=connections), request(), list[Draw]()
    meter, each = FreeMeter(), calls // 100
    start = time.perf_counter()
    try:
        await asyncio.gather(
            *(source.draw(asked, range(each), meter, lambda _, d: draws.append(d)) for _ in range(100))
        )
        return len(draws) / (time.perf_counter() - start)
    finally:
        await source.close()
        assert len(draws) == each * 100
        assert not any(d.failed for d in draws)


CLIENTS = {
    "server capacity (bare sockets)": capacity,
    "aiohttp, bare loop": bare,
    "aiohttp, bare loop, trust_env": bare_trust_env,
    "openai, official async client": official,
    "OpenAISource.draw, single draws": source_single,
    "OpenAISource.draw, waves": source_wave,
}


Measured = tuple[float, float]
"""Calls per second, and microseconds of the client's own processor time per call."""


def measure(url: str, calls: int, connections: int, rounds: int) -> dict[str, list[Measured]]:
    """What each client did, one entry per round."""
    measured: dict[str, list[Measured]] = {name: [] for name in CLIENTS}
    for _ in range(rounds):
        for name, client in CLIENTS.items():
            some = calls // 4 if name.startswith("openai") else calls
            gc.collect()
            before = time.process_time()
            rate = asyncio.run(client(url, some, connections))
            measured[name].append((round(rate), round((time.process_time() - before) / some * 1e6)))
            with urlopen(HttpRequest(url.replace("/v1", "/_reset"), method="POST")):
                pass
    return measured


def summary(measured: dict[str, list[Measured]]) -> dict[str, Any]:
    """Per client the best rate, and the median over the rounds of its ratio to the bare loop of the same round."""
    bare_loop = measured["aiohttp, bare loop"]
    rows: dict[str, dict[str, Any]] = {}
    for name, rounds in measured.items():
        rows[name] = {
            "calls_per_second": [rate for rate, _ in rounds],
            "best": max(rate for rate, _ in rounds),
            "cpu_us_per_call": min(cpu for _, cpu in rounds),
            "times_bare_loop": round(median(r / b for (r, _), (b, _) in zip(rounds, bare_loop, strict=True)), 3),
            "times_bare_loop_cpu": round(median(b / c for (_, c), (_, b) in zip(rounds, bare_loop, strict=True)), 3),
        }
    clients = [row["best"] for name, row in rows.items() if not name.startswith("server")]
    capacity_best = rows["server capacity (bare sockets)"]["best"]
    return {"clients": rows, "server_over_fastest_client": round(capacity_best / max(clients), 2)}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    for flag, default in (("--calls", 4000), ("--connections", 32), ("--rounds", 5)):
        parser.add_argument(flag, type=int, default=default)
    options = parser.parse_args()
    command = [sys.executable, "-m", "consilience.testing.server", "--log-bodies", "false", "--supports-n", "false"]
    command += ["--supports-logprobs", "false", "--answers", '{"42": 0.7, "41": 0.3}']
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        measured = measure(url, options.calls, options.connections, options.rounds)
    finally:
        server.terminate()
        server.wait()
    print(json.dumps(summary(measured), indent=1))


if __name__ == "__main__":
    main()
