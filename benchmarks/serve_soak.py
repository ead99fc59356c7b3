"""A soak of `consilience serve`: faults upstream, clients that leave or are slow, and no reply to another's question.

Three kinds of process, all real: this one is the clients, the server is the command, the upstream is scripted. What the
upstream answers depends on the question alone, so a reply that went to another client is seen; it counts what it
made for each client, faults included, so a budget that was passed is seen too. RSS is sampled over the whole run.

What must hold was stated before the run: every request ends in its own reply or in a proper error; the median RSS of
the last quarter of the requests is at most 5 % above that of the second quarter; no client's tokens, money or draws
pass its cap; afterwards nothing is in flight, and no file descriptors are open that were not before, except for the
ledger's pool of connections.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import aiohttp
from _common import COLOURS, emit, environment, parser, picture, table
from aiohttp import web

GROWTH = 1.05
"""The median RSS of the last quarter over that of the second, at most."""
POOL = 15
"""Connections that a process may keep open to its ledger, by SQLAlchemy's defaults."""
FAULTS = 0.02
MOST_BODY = 65_536
LONG = 200_000
PRICE = {"input": 1.0, "output": 4.0}  # USD per million tokens
POLICIES = (None, "sc:n=3", "esc:window=3,max=9", "asc:max=8")
KINDS = {
    "chat": 30, "stream": 18, "text": 8, "text-stream": 2, "tools": 8, "json": 7, "several": 5, "none": 6,
    "none-stream": 4, "twice": 4, "leave": 3, "leave-stream": 2, "slow-upload": 1, "slow-reader": 1, "oversized": 1,
    "wrong": 2,
}  # fmt: skip
CLIENTS = ("ann", "ann", "ann", "ann", "ann", "ann", "ann", "tok", "usd", "few")
"""Who asks: ann has no cap, the others are capped in tokens, in USD, in draws, at about half of what they ask for."""
MARK = re.compile(r"\[q (\d+) of (\w+)\]")


def right(number: int) -> int:
    """The answer to a question, most of the time."""
    return number * 7919 % 100_003


# --------------------------------------------------------------------------------------------------- the upstream


@dataclass
class Made:
    """What the upstream generated for one client, whether it arrived or not; ``whole`` draws were sent to the end."""

    calls: int = 0
    draws: int = 0
    whole: int = 0
    tokens: int = 0
    micro_usd: float = 0.0


class Upstream:
    """Answers by the mark in the question; one call in fifty fails: HTTP 500, a cut body, a reset."""

    def __init__(self, seed: int, latency: float) -> None:
        self.rng, self.latency = random.Random(seed), latency
        self.made: dict[str, Made] = {}
        self.faults: Counter[str] = Counter()
        self.app = web.Application()
        self.app.router.add_post("/v1/chat/completions", self.answer)
        self.app.router.add_post("/v1/completions", self.answer)
        self.app.router.add_get("/v1/models", self.models)
        self.app.router.add_get("/_counts", self.counts)

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model", "created": 1}]})

    async def counts(self, _: web.Request) -> web.Response:
        return web.json_response({"made": {k: vars(v) for k, v in self.made.items()}, "faults": self.faults})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        chat = request.path.endswith("chat/completions")
        asked = body["messages"][-1]["content"] if chat else body["prompt"]
        found = MARK.search(asked)
        assert found, asked
        number, client = int(found[1]), found[2]
        await asyncio.sleep(self.rng.expovariate(1 / self.latency))
        made = self.made.setdefault(client, Made())
        made.calls += 1
        fault = self.rng.choice(("500", "cut", "reset")) if self.rng.random() < FAULTS else None
        if fault is not None:
            self.faults[fault] += 1
        if fault == "500":
            return web.json_response({"error": {"message": "a fault", "type": "server_error"}}, status=500)
        choices = [self.choice(number, client, index, body, chat, asked) for index in range(body.get("n") or 1)]
        usage = self.count(made, asked, choices)
        if fault == "reset":
            _cut(request)
            return web.Response()
        send = self.stream if body.get("stream") else self.whole
        try:
            sent = await send(request, choices, usage, chat, cut=fault == "cut")
        except ConnectionResetError:  # who asked has gone
            return web.Response()
        made.whole += len(choices) if fault is None else 0
        return sent

    def choice(self, number: int, client: str, index: int, body: dict[str, Any], chat: bool, asked: str) -> Any:
        value = right(number) if self.rng.random() < 0.8 else right(number) + self.rng.randint(1, 3)
        mark = f"[q {number} of {client}]"
        if not chat:
            return {"index": index, "text": f" {mark} The answer is {value}.", "finish_reason": "stop"}
        message: dict[str, Any] = {"role": "assistant", "content": f"{mark} Let me see. The answer is {value}."}
        if body.get("tools"):
            arguments = json.dumps({"mark": mark, "value": value})
            call = {"id": f"call-{number}", "type": "function", "function": {"name": "look", "arguments": arguments}}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        elif body.get("response_format"):
            message["content"] = json.dumps({"mark": mark, "answer": value})
        elif "at length" in asked:
            message["content"] = f"{mark} " + "step by step " * (LONG // 13) + f"The answer is {value}."
        return {"index": index, "message": message, "logprobs": None, "finish_reason": "stop"}

    def count(self, made: Made, asked: str, choices: list[Any]) -> dict[str, int]:
        """The usage, counted for the client; a token is a word, a draw has at most 64."""
        prompt = len(asked.split()) + 8
        words = [len(json.dumps(one.get("message", one)).split()) for one in choices]
        completion = sum(min(64, one) for one in words)
        made.draws += len(choices)
        made.tokens += prompt + completion
        made.micro_usd += prompt * PRICE["input"] + completion * PRICE["output"]
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def whole(self, request: web.Request, choices: list[Any], usage: Any, chat: bool, cut: bool) -> Any:
        kind = "chat.completion" if chat else "text_completion"
        reply = {"id": "up-1", "object": kind, "created": 1, "model": "m", "choices": choices, "usage": usage}
        data = json.dumps(reply).encode()
        if not cut:
            return web.Response(body=data, content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "application/json", "content-length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        _cut(request)
        return response

    async def stream(self, request: web.Request, choices: list[Any], usage: Any, chat: bool, cut: bool) -> Any:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        text = choices[0]["message"]["content"] if chat else choices[0]["text"]
        half = len(text) // 2
        for place, piece in enumerate((text[:half], text[half:])):
            if cut and place:
                _cut(request)
                return response
            delta = {"delta": {"content": piece}} if chat else {"text": piece}
            chunk = {"id": "up-2", "object": "chat.completion.chunk", "created": 1, "model": "m"}
            chunk["choices"] = [{"index": 0, "finish_reason": None} | delta]
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        last = {"id": "up-2", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
        await response.write(b"data: " + json.dumps(last | {"usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        return response


def _cut(request: web.Request) -> None:
    if request.transport is not None:  # else the server has gone already
        request.transport.abort()


async def _upstream(seed: int, latency: float) -> None:
    runner = web.AppRunner(Upstream(seed, latency).app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    print(json.dumps({"url": f"http://127.0.0.1:{port}/v1"}), flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await runner.cleanup()


# ---------------------------------------------------------------------------------------------------- the processes


@contextmanager
def upstream(seed: int, latency: float) -> Iterator[str]:
    """The upstream in a process of its own; gives its URL."""
    command = [sys.executable, __file__, "--as-upstream", "--seed", str(seed), "--latency", str(latency)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait()


@dataclass
class Server:
    """The running command: its URL, what it wrote to stderr since, how it ended."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    end: int | None = None

    @property
    def origin(self) -> str:
        return self.url.removesuffix("/v1")

    def pids(self) -> list[int]:
        """The command and all its children."""
        found = [self.process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
        return found

    def rss(self) -> float:
        """Resident memory of all its processes, MiB."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids())
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def descriptors(self) -> int:
        """Open file descriptors of all its processes."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())

    def threads(self) -> int:
        """Threads of all its processes."""
        return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self.pids())


def caps(requests: int) -> dict[str, str]:
    """The caps of the clients that have one: each asks for about twice as much."""
    return {"tok": f"tokens={8 * requests}", "usd": f"usd={20e-6 * requests:.6f}", "few": f"draws={requests // 4}"}


def _config(requests: int) -> str:
    text = (
        f'[serve]\nmax_body_bytes = {MOST_BODY}\n[prices."m"]\ninput = {PRICE["input"]}\noutput = {PRICE["output"]}\n'
    )
    for name in sorted(set(CLIENTS)):
        text += f'[serve.keys.{name}]\nkey_env = "SOAK_{name.upper()}"\n'
        if name in caps(requests):
            text += f'budget = "{caps(requests)[name]}"\n'
    return text


@contextmanager
def server(folder: Path, url: str, requests: int, workers: int, ledger: str) -> Iterator[Server]:
    """`consilience serve` in a process of its own (with ``workers`` above 1: and theirs)."""
    (folder / "soak.toml").write_text(_config(requests))
    keys = {f"SOAK_{name.upper()}": f"key-of-{name}" for name in set(CLIENTS)}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CONSILIENCE_")}
    command = [sys.executable, "-m", "consilience", "serve", "--upstream", url, "--port", "0", "--policy", "asc:max=8"]
    command += ["--config", str(folder / "soak.toml"), "--ledger", ledger]
    command += ["--queue", str(512 * workers)]  # connections are not spread evenly over the workers
    command += ["--workers", str(workers)] if workers > 1 else []
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=clean | keys, stderr=log, text=True)
    running: Server | None = None
    try:
        for _ in range(600):
            said = re.search(r"serving (http://\S+/v1)", (folder / "serve.log").read_text())
            if said or process.poll() is not None:
                break
            time.sleep(0.1)
        if not said:
            raise RuntimeError(f"the server did not start: {(folder / 'serve.log').read_text()}")
        running = Server(process, said[1], folder / "serve.log")
        yield running
    finally:
        process.terminate()
        try:
            end = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            end = process.wait()
        if running is not None:
            running.end = end


@contextmanager
def database(url: str) -> Iterator[str]:
    """A PostgreSQL database of its own on the server of ``url``, dropped at the end."""
    import psycopg

    name = f"soak_{os.getpid()}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield urlsplit(url)._replace(path=f"/{name}").geturl()
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


# ------------------------------------------------------------------------------------------------------ the clients


@dataclass
class Tally:
    """How the requests ended, and what was wrong with those that ended in no way that they may."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    retried: int = 0
    draws: int = 0
    saved_twice: int = 0

    def note(self, kind: str, end: str) -> None:
        self.ends[kind, end] += 1


class Crossed(Exception):
    """A reply that is not its question's, or no reply at all."""


class Clients:
    """All clients; each request's kind, client and question come from its number and the seed."""

    def __init__(self, origin: str, seed: int, session: aiohttp.ClientSession) -> None:
        self.origin, self.seed, self.session = origin, seed, session
        self.tally = Tally()
        address = urlsplit(origin)
        self.address = address.hostname or "", address.port or 0

    async def one(self, number: int) -> None:
        """One request from its start to its end."""
        rng = random.Random(f"{self.seed}:{number}")
        kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        client = rng.choice(CLIENTS)
        try:
            end = await getattr(self, "_" + kind.replace("-", "_"))(number, client, rng)
        except Crossed as crossed:
            self.tally.wrong.append(f"{kind} {number} of {client}: {crossed}")
            end = "LOST OR CROSSED"
        except Exception as error:
            self.tally.wrong.append(f"{kind} {number} of {client}: {error!r}")
            end = "LOST OR CROSSED"
        self.tally.note(kind, end)

    # --- what is sent

    def body(self, number: int, client: str, rng: random.Random, **more: Any) -> dict[str, Any]:
        policy = rng.choice(POLICIES)
        question = f"[q {number} of {client}] What is it{more.pop('how', '')}? " + "please " * rng.randint(0, 20)
        model = more.pop("model", "m" if policy is None else f"m@{policy}")
        asked = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 64}
        if more.pop("text", False):
            asked["prompt"] = asked.pop("messages")[0]["content"]
        return asked | more

    def headers(self, client: str, **more: str) -> dict[str, str]:
        return {"authorization": f"Bearer key-of-{client}", "content-type": "application/json"} | more

    async def post(self, path: str, client: str, body: Any, **headers: str) -> tuple[int, bytes]:
        data = json.dumps(body).encode()
        async with self.session.post(
            f"{self.origin}/v1/{path}", data=data, headers=self.headers(client, **headers)
        ) as reply:
            return reply.status, await reply.read()

    # --- what may come back

    def error(self, status: int, raw: bytes, client: str, also: tuple[int, ...] = ()) -> str:
        """The name of an error that is allowed and has OpenAI's shape."""
        try:
            error = json.loads(raw)["error"]
            assert set(error) == {"message", "type", "param", "code"}
        except Exception:
            raise Crossed(f"HTTP {status} in no proper shape: {raw[:200]!r}") from None
        spent = status == 429 and error["code"] == "insufficient_quota" and client != "ann"
        if spent or status in also or (status == 502 and error["code"] == "upstream_failed"):
            return f"{status} {error['code']}"
        raise Crossed(f"HTTP {status}: {error}")

    def own(self, text: str, number: int, client: str) -> None:
        found = MARK.findall(text)
        if not found or set(found) != {(str(number), client)}:
            raise Crossed(f"another's reply: {text[:200]!r}")

    def verdict(self, said: dict[str, Any], number: int) -> None:
        for one in said.get("choices") or [said]:
            answer = one["answer"]
            plain = isinstance(answer, str) and answer.isdigit()
            if plain and not right(number) <= int(answer) <= right(number) + 3:
                raise Crossed(f"the verdict is another's: {one}")
            if sum((one["votes"] or {}).values()) > one["draws"] + 1e-9 or one["draws"] < 1:
                raise Crossed(f"votes that do not add up: {one}")
        self.tally.draws += said["draws"]

    def whole(self, status: int, raw: bytes, number: int, client: str, choices: int = 1) -> str:
        if status != 200:
            return self.error(status, raw, client)
        reply = json.loads(raw)
        if len(reply["choices"]) != choices:
            raise Crossed(f"{len(reply['choices'])} choices")
        for choice in reply["choices"]:
            self.own(json.dumps(choice), number, client)
        self.verdict(reply["consilience"], number)
        return "200"

    def streamed(self, raw: bytes, number: int, client: str) -> str:
        events = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
        if not events or events[-1] != "[DONE]":
            raise Crossed(f"a stream without an end: {raw[-200:]!r}")
        chunks = [json.loads(event) for event in events[:-1]]
        late = [chunk for chunk in chunks if "error" in chunk]
        if late:
            return "event " + self.error(502, json.dumps(late[0]).encode(), client)
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        self.own(
            "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices), number, client
        )
        said = [chunk["consilience"] for chunk in chunks if "consilience" in chunk and chunk["choices"]]
        if len(said) != 1 or choices[-1]["finish_reason"] != "stop":
            raise Crossed(f"a stream without its last chunk: {raw[-300:]!r}")
        self.verdict(said[0], number)
        return "200"

    # --- the kinds

    async def _chat(self, number: int, client: str, rng: random.Random) -> str:
        return self.whole(*await self.post("chat/completions", client, self.body(number, client, rng)), number, client)

    async def _text(self, number: int, client: str, rng: random.Random) -> str:
        body = self.body(number, client, rng, text=True)
        return self.whole(*await self.post("completions", client, body), number, client)

    async def _stream(self, number: int, client: str, rng: random.Random, text: bool = False) -> str:
        more = {"consilience": {"progress": True}} if rng.random() < 0.3 else {}
        body = self.body(number, client, rng, stream=True, text=text, **more)
        status, raw = await self.post("completions" if text else "chat/completions", client, body)
        return self.streamed(raw, number, client) if status == 200 else self.error(status, raw, client)

    async def _text_stream(self, number: int, client: str, rng: random.Random) -> str:
        return await self._stream(number, client, rng, text=True)

    async def _tools(self, number: int, client: str, rng: random.Random) -> str:
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
        body = self.body(number, client, rng, tools=[tool])
        return self.whole(*await self.post("chat/completions", client, body), number, client)

    async def _json(self, number: int, client: str, rng: random.Random) -> str:
        body = self.body(number, client, rng, response_format={"type": "json_object"})
        return self.whole(*await self.post("chat/completions", client, body), number, client)

    async def _several(self, number: int, client: str, rng: random.Random) -> str:
        n = rng.randint(2, 4)
        body = self.body(number, client, rng, n=n)
        return self.whole(*await self.post("chat/completions", client, body), number, client, n)

    async def _none(self, number: int, client: str, rng: random.Random) -> str:
        body = self.body(number, client, rng, model="m@none")
        try:
            status, raw = await self.post("chat/completions", client, body)
        except aiohttp.ClientPayloadError:
            return "cut as by the upstream"
        if status == 500 and b"a fault" in raw:
            return "500 as by the upstream"
        if status != 200:
            return self.error(status, raw, client, also=(502,))
        self.own(json.dumps(json.loads(raw)["choices"]), number, client)
        return "200"

    async def _none_stream(self, number: int, client: str, rng: random.Random) -> str:
        body = self.body(number, client, rng, model="m@none", stream=True)
        try:
            status, raw = await self.post("chat/completions", client, body)
        except aiohttp.ClientPayloadError:
            return "cut as by the upstream"
        if status == 500 and b"a fault" in raw:
            return "500 as by the upstream"
        if status != 200:
            return self.error(status, raw, client, also=(502,))
        pieces = [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]
        text = "".join(c["delta"].get("content") or "" for one in pieces for c in one["choices"])
        self.own(text, number, client)
        return "200" if raw.endswith(b"data: [DONE]\n\n") else "cut as by the upstream"

    async def _twice(self, number: int, client: str, rng: random.Random) -> str:
        """A request and its retry with the same ``Idempotency-Key``: the second buys nothing."""
        body = self.body(number, client, rng)
        key = {"idempotency-key": f"order-{self.seed}-{number}"}
        first = await self.post("chat/completions", client, body, **key)
        end = self.whole(*first, number, client)
        if end != "200":
            return end
        status, raw = await self.post("chat/completions", client, body, **key)
        end = self.whole(status, raw, number, client)
        if end != "200":
            return end
        then, now = json.loads(first[1])["consilience"], json.loads(raw)["consilience"]
        if then["failed"] == 0 and (now["draws_bought"] != 0 or now["votes"] != then["votes"]):
            raise Crossed(f"a retry bought again: {then} {now}")
        self.tally.saved_twice += now["draws"]
        return "200"

    async def _oversized(self, number: int, client: str, rng: random.Random) -> str:
        body = self.body(number, client, rng)
        body["messages"].append({"role": "user", "content": "x" * rng.randint(MOST_BODY, 8 * MOST_BODY)})
        data = json.dumps(body).encode()

        async def pieces() -> Any:  # without a length: the server finds out on the way
            for start in range(0, len(data), 16_384):
                yield data[start : start + 16_384]

        sent: Any = pieces() if rng.random() < 0.5 else data
        async with self.session.post(
            f"{self.origin}/v1/chat/completions", data=sent, headers=self.headers(client)
        ) as reply:
            return self.error(reply.status, await reply.read(), client, also=(413,))

    async def _wrong(self, number: int, client: str, rng: random.Random) -> str:
        body: Any = self.body(number, client, rng)
        spoil = rng.choice(("key", "model", "messages", "n", "policy", "json", "path"))
        if spoil == "key":
            client_sent, expected = "nobody", 401
        else:
            client_sent, expected = client, 404 if spoil == "path" else 400
            spoilt = {"model": None, "messages": "hi", "n": 0, "consilience": {"policy": "nothing"}}
            body = body | {k: v for k, v in spoilt.items() if k == spoil or (k, spoil) == ("consilience", "policy")}
        path = "embeddings" if spoil == "path" else "chat/completions"
        status, raw = await self.post(path, client_sent, [] if spoil == "json" else body)
        return self.error(status, raw, client, also=(expected,))

    # --- clients with sockets of their own

    def request(self, client: str, body: Any) -> bytes:
        data = json.dumps(body).encode()
        lines = self.headers(client, host="127.0.0.1", connection="close") | {"content-length": str(len(data))}
        head = "POST /v1/chat/completions HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        return head.encode() + b"\r\n" + data

    async def _leave(self, number: int, client: str, rng: random.Random, **more: Any) -> str:
        _, writer = await asyncio.open_connection(*self.address)
        sent = self.request(client, self.body(number, client, rng, **more))
        writer.write(sent if rng.random() < 0.8 else sent[: rng.randint(1, len(sent))])  # some leave before the end
        await asyncio.sleep(rng.expovariate(1 / 0.03))
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
        return "left"

    async def _leave_stream(self, number: int, client: str, rng: random.Random) -> str:
        return await self._leave(number, client, rng, stream=True, consilience={"progress": True})

    async def _slow_upload(self, number: int, client: str, rng: random.Random) -> str:
        reader, writer = await asyncio.open_connection(*self.address)
        sent = self.request(client, self.body(number, client, rng))
        step = len(sent) // 12 + 1
        for start in range(0, len(sent), step):
            writer.write(sent[start : start + step])
            await writer.drain()
            await asyncio.sleep(0.1)
        return self.whole(*_reply(await reader.read(), writer), number, client)

    async def _slow_reader(self, number: int, client: str, rng: random.Random) -> str:
        """Reads a long stream piece by piece, over a connection that holds little."""
        reader, writer = await asyncio.open_connection(*self.address, limit=2048)
        body = self.body(number, client, rng, how=" at length", stream=True, model="m@sc:n=2")
        writer.write(self.request(client, body))
        received = b""
        while piece := await reader.read(4096):
            received += piece
            await asyncio.sleep(0.02)
        status, raw = _reply(received, writer)
        return self.streamed(raw, number, client) if status == 200 else self.error(status, raw, client)


def _reply(received: bytes, writer: asyncio.StreamWriter) -> tuple[int, bytes]:
    """Status and body of a whole reply on a connection that was closed after it."""
    writer.close()
    head, _, rest = received.partition(b"\r\n\r\n")
    if not head:
        raise Crossed("no reply")
    if b"transfer-encoding: chunked" in head.lower():
        parts = []
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            parts.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        rest = b"".join(parts)
    return int(head.split()[1]), rest


# ---------------------------------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """What was seen of one run."""

    tally: Tally
    rss: list[tuple[int, float]]
    seconds: float
    idle: tuple[int, int]
    after: tuple[int, int]
    in_flight: float


async def _load(running: Server, requests: int, at_once: int, seed: int, warm: int, settle: int) -> Run:
    timeout = aiohttp.ClientTimeout(total=180)
    headers = {"authorization": "Bearer key-of-ann"}

    def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    async with session() as warming:
        before = Clients(running.origin, seed, warming)
        await asyncio.gather(*(before.one(requests + n) for n in range(warm)))
    idle = await _idle(running, settle)
    async with session() as steady:
        clients = Clients(running.origin, seed, steady)
        rss: list[tuple[int, float]] = []
        numbers = iter(range(requests))
        done = 0

        async def work() -> None:
            nonlocal done
            for number in numbers:
                await clients.one(number)
                done += 1
                if done % max(1, requests // 200) == 0:
                    rss.append((done, running.rss()))
                if done % max(1, requests // 10) == 0:
                    print(f"{done} of {requests}, {rss[-1][1]:.0f} MiB", file=sys.stderr, flush=True)

        began = time.monotonic()
        await asyncio.gather(*(work() for _ in range(at_once)))
        seconds = time.monotonic() - began
        in_flight = await _in_flight(steady, running.origin, headers)
    clients.tally.wrong += before.tally.wrong
    return Run(clients.tally, rss, seconds, idle, await _idle(running, settle, idle[0]), in_flight)


async def _in_flight(session: aiohttp.ClientSession, origin: str, headers: dict[str, str]) -> float:
    """Requests and draws in flight by the server's own count, once clients that left were noticed."""
    for _ in range(100):
        async with session.get(f"{origin}/metrics", headers=headers) as reply:
            text = await reply.text()
        names = "consilience_(?:requests|draws)_in_flight"
        total = sum(float(value) for value in re.findall(rf"^{names}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))
        if total == 0:
            break
        await asyncio.sleep(0.1)
    return total


async def _idle(running: Server, settle: int, least: int = 0) -> tuple[int, int]:
    """Descriptors and threads once idle connections were closed: after a while, or once they are as few as before."""
    for _ in range(2 * settle):
        await asyncio.sleep(0.5)
        if running.descriptors() <= least:
            break
    return running.descriptors(), running.threads()


def _judge(run: Run, counts: dict[str, Any], requests: int, log: str) -> dict[str, Any]:
    """What must hold, and whether it does."""
    quarter = len(run.rss) // 4
    second = statistics.median(mib for _, mib in run.rss[quarter : 2 * quarter])
    last = statistics.median(mib for _, mib in run.rss[3 * quarter :])
    half = run.rss[len(run.rss) // 2 :]
    slope = statistics.linear_regression(*zip(*half, strict=True)).slope
    budget = {}
    for name, cap in caps(requests).items():
        what, limit = cap.split("=")
        made = counts["made"].get(name, vars(Made()))
        used = {"tokens": made["tokens"], "usd": made["micro_usd"] / 1e6, "draws": made["whole"]}[what]
        budget[name] = {"cap": cap, "used": used, "kept": used <= float(limit) + 1e-9, "share": used / float(limit)}
    return {
        "requests": requests,
        "lost_or_crossed": len(run.tally.wrong),
        "rss_second_quarter_mib": second,
        "rss_last_quarter_mib": last,
        "rss_growth": last / second,
        "rss_mib_per_1000_requests_second_half": slope * 1000,
        "budgets": budget,
        "in_flight_after": run.in_flight,
        "descriptors": [run.idle[0], run.after[0]],
        "threads": [run.idle[1], run.after[1]],
        "tracebacks": log.count("Traceback"),
        "seconds": run.seconds,
        "draws_judged": run.tally.draws,
        "upstream": counts,
        "ends": {f"{kind}: {end}": count for (kind, end), count in sorted(run.tally.ends.items())},
        "wrong": run.tally.wrong[:20],
    }


def held(result: dict[str, Any]) -> dict[str, bool]:
    """Each thing that must hold."""
    return {
        "every request ended in its own reply or a proper error": result["lost_or_crossed"] == 0,
        f"RSS, last quarter over second: at most {GROWTH}": result["rss_growth"] <= GROWTH,
        "no budget passed, by the upstream's own count": all(one["kept"] for one in result["budgets"].values()),
        "nothing in flight at the end": result["in_flight_after"] == 0,
        f"descriptors when idle: at most {POOL} per process more": (
            result["descriptors"][1] - result["descriptors"][0] <= POOL * result["workers"]
        ),
        "no traceback in the server's log": result["tracebacks"] == 0,
        "the server ended by itself at SIGTERM": result["end"] in (0, -signal.SIGTERM),
    }


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """One run by the flags; gives what was seen and what held."""
    with tempfile.TemporaryDirectory() as name, upstream(options.seed, options.latency) as url:
        folder = Path(name)
        if options.postgres:
            with database(options.postgres) as own:
                result = _soak(folder, url, own, options)
        else:
            result = _soak(folder, url, str(folder / "l.db"), options)
    result["held"] = held(result)
    return result


def _soak(folder: Path, url: str, ledger: str, options: argparse.Namespace) -> dict[str, Any]:
    with server(folder, url, options.requests, options.workers, ledger) as running:
        run = asyncio.run(_load(running, options.requests, options.at_once, options.seed, options.warm, options.settle))
        with urlopen(url.replace("/v1", "/_counts"), timeout=60) as reply:
            counts = json.load(reply)
    log = running.log.read_text()
    result = _judge(run, counts, options.requests, log) | {"end": running.end, "rss": run.rss}
    result |= {"workers": options.workers, "ledger": "PostgreSQL" if options.postgres else "SQLite"}
    for found in list(re.finditer("Traceback", log))[:5]:
        print(log[max(0, found.start() - 300) : found.start() + 3000], file=sys.stderr)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The tables of the results page."""
    made, faults = result["upstream"]["made"], result["upstream"]["faults"]
    calls = sum(one["calls"] for one in made.values())
    faulty = ", ".join(f"{faults[name]} x {name}" for name in sorted(faults))
    rows = [(what, "yes" if good else "NO") for what, good in result["held"].items()]
    ends: dict[str, list[str]] = {}
    for name, count in result["ends"].items():
        kind, _, end = name.partition(": ")
        ends.setdefault(kind, []).append(f"{count} x {end}")
    budgets = [
        (name, one["cap"], f"{one['used']:.6g}", f"{one['share']:.3f}") for name, one in result["budgets"].items()
    ]
    return "\n\n".join(
        (
            f"{result['requests']} requests in {result['seconds']:.0f} s, {result['workers']} worker(s), ledger on "
            f"{result['ledger']}; {calls} calls upstream, "
            f"of which failed: {faulty}; {result['draws_judged']} draws judged.",
            table(("what must hold", "held"), rows),
            f"RSS {result['rss_second_quarter_mib']:.1f} MiB in the second quarter, "
            f"{result['rss_last_quarter_mib']:.1f} in the last ({result['rss_growth']:.3f} times), slope over the "
            f"second half {result['rss_mib_per_1000_requests_second_half']:+.3f} MiB per 1000 requests. Descriptors "
            f"when idle {result['descriptors'][0]} before, {result['descriptors'][1]} after; "
            f"threads {result['threads'][0]}, {result['threads'][1]}.",
            table(("client", "cap", "used, by the upstream", "share"), budgets),
            table(("requests", "how they ended"), [(kind, "; ".join(lines)) for kind, lines in ends.items()]),
            environment(),
        )
    )


def plot(path: str, results: list[dict[str, Any]]) -> None:
    """RSS over requests."""
    with picture(path) as figure:
        axes = figure.subplots()
        for result, colour in zip(results, COLOURS, strict=False):
            label = f"{result['workers']} worker{'s' * (result['workers'] > 1)}, {result['ledger']}"
            axes.plot(*zip(*result["rss"], strict=True), color=colour, label=label)
        axes.set_xlabel("requests answered")
        axes.set_ylabel("RSS of the server, MiB")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)


def main() -> None:
    """Parse the flags, run, print."""
    flags = parser(__doc__, requests=20_000, at_once=48, seed=1, latency=0.005, workers=1, warm=300, settle=30)
    flags.add_argument("--postgres", default="", help="URL of a PostgreSQL where a database may be made: the ledger")
    flags.add_argument("--plot", help="write a picture here")
    flags.add_argument("--also", help="JSON of another run, for the picture")
    flags.add_argument("--as-upstream", action="store_true", help=argparse.SUPPRESS)
    options = flags.parse_args()
    if options.as_upstream:
        asyncio.run(_upstream(options.seed, options.latency))
        return
    result = soak(options)
    if options.plot:
        others = [json.loads(Path(options.also).read_text())] if options.also else []
        plot(options.plot, [result, *others])
    emit(options, result, markdown(result))
    if not all(result["held"].values()):
        for line in result["wrong"]:
            print(line, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
