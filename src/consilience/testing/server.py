"""A scripted OpenAI-compatible server for tests: a real HTTP server on loopback that answers as told.

It samples each reply from a distribution you state, can be slow, refuse, break and throttle as real endpoints do,
and counts everything it was asked::

    with ScriptedServer(answers={"6 x 7": {"42": 0.7, "41": 0.3}}, latency=0.02) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any")
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "6 x 7 = ?"}])
        assert server.counts["completed"] == 1 and server.requests[0]["status"] == 200

As a process of its own: ``python -m consilience.testing.server --answers '{"42": 0.7, "41": 0.3}' --latency 0.02``
prints ``{"url": ...}`` and serves until SIGINT or SIGTERM; every option of `ScriptedServer` is a flag.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import signal
import threading
import time
import traceback
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from http import HTTPStatus
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from consilience.testing.http1 import MAX_BODY, Head, Malformed, parse_body, parse_head

Distribution = Mapping[str, float]
Scripted = Callable[[str, random.Random], "str | dict[str, Any]"]

_TOKEN = re.compile(r"\s*\S+\s*$|\s*\S+")
_ENTRY_POINTS = {
    "/v1/chat/completions": "POST",
    "/v1/models": "GET",
    "/_log": "GET",
    "/_counts": "GET",
    "/_reset": "POST",
}


class _Connection(asyncio.Protocol):
    """One client connection: requests are taken one at a time, so pipelined ones are answered in order."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.lost = False
        self._buffer = bytearray()
        self._known = b""
        self._known_head: Head | None = None
        self._busy = self._looping = self._continued = False
        self._keep_alive = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.server._connections.discard(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._busy:
            self._advance()
        elif len(self._buffer) > MAX_BODY:
            self.transport.pause_reading()

    def _advance(self) -> None:
        """Take complete requests off the buffer until one has to wait for its reply."""
        self._looping = True
        try:
            while self._buffer and not self._busy and not self.transport.is_closing():
                head = self._head()
                if head is None:
                    return
                body = parse_body(self._buffer, head)
                if body is None:
                    self._ask_for_body(head)
                    return
                del self._buffer[: body[1]]
                self._busy, self._continued, self._keep_alive = True, False, head.keep_alive
                self.server._take(head, body[0], self)
        except Malformed as malformed:
            self._keep_alive = False
            self.send(malformed.status, _error(str(malformed)))
        finally:
            self._looping = False

    def _head(self) -> Head | None:
        """The next request's head; a client repeats itself, so the same bytes are parsed once."""
        if self._known and self._buffer.startswith(self._known):
            return self._known_head
        head = parse_head(self._buffer)
        if head is not None:
            self._known, self._known_head = bytes(self._buffer[: head.size]), head
        return head

    def _ask_for_body(self, head: Head) -> None:
        if head.headers.get("expect", "").lower() == "100-continue" and not self._continued:
            self._continued = True
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def send(self, status: int, body: bytes, headers: str = "", cut: int | None = None) -> None:
        """Answer the pending request; ``cut`` sends so many bytes of the body only and closes the connection."""
        closing = cut is not None or not self._keep_alive
        connection = "connection: close\r\n" if closing else ""
        head = f"{_STATUS_LINE[status]}content-length: {len(body)}\r\n{connection}{headers}\r\n"
        self.transport.write(head.encode() + body[:cut])
        self._busy = False
        if closing:
            self.transport.close()
        elif not self._looping:
            self.transport.resume_reading()
            self._advance()


_STATUS_LINE = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\ncontent-type: application/json\r\n" for s in HTTPStatus}


def _error(message: str, param: str | None = None, code: str | None = None) -> bytes:
    """An error body in OpenAI's shape."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return json.dumps({"error": error}).encode()


# ------------------------------------------------------------------------------------------------ script


class _Choices:
    """A distribution made ready for sampling; probabilities are normalised."""

    def __init__(self, distribution: Distribution, template: str) -> None:
        if not distribution or min(distribution.values()) < 0 or sum(distribution.values()) <= 0:
            raise ValueError(f"a distribution needs answers of positive probability, got {dict(distribution)}")
        total = sum(distribution.values())
        self.texts = [template.replace("{answer}", str(answer)) for answer in distribution]
        self.logprobs = [math.log(p / total) if p > 0 else -math.inf for p in distribution.values()]
        self.cumulative = list(accumulate(p / total for p in distribution.values()))

    def sample(self, uniform: float) -> tuple[str, float]:
        """The text and the natural log of its probability at ``uniform`` in [0, 1)."""
        place = min(bisect_right(self.cumulative, uniform), len(self.texts) - 1)
        return self.texts[place], self.logprobs[place]


def _text_of(content: Any) -> str:
    """The text of a message's content, a string or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return " ".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))


def _logprobs(text: str, total: float) -> dict[str, Any]:
    """One token per word; the log-probabilities are equal and sum to ``total``."""
    tokens = _TOKEN.findall(text)
    share = total / len(tokens) if tokens else 0.0
    content = [{"token": t, "logprob": share, "bytes": None, "top_logprobs": []} for t in tokens]
    return {"content": content, "refusal": None}


@dataclass(slots=True)
class _Call:
    """A chat call that was let in: its ``number`` among those on the same question, and its line in the log."""

    body: dict[str, Any]
    question: str
    number: int
    entry: dict[str, Any]


@dataclass(eq=False)
class ScriptedServer:
    """An OpenAI-compatible server that follows a script; use it as a (sync or async) context manager.

    answers: what to reply. A distribution ``{answer: probability}``; or ``{part of the question: distribution}``,
    the first part found counts and ``""`` matches everything; or a callable ``(question, rng)`` that returns the
    whole text, or a whole message as a dict. The question is the text of the last user message. ``reply`` is the
    text around a sampled answer. Tokens are words; a reply longer than ``max_tokens`` is cut.

    latency: mean seconds per call, exponential or fixed. failure_rate: share of calls that fail for good with
    ``failure_status``; error_rate: share that fails in passing with ``error_status``; truncate_rate: share whose
    body is cut in the middle and the connection closed. max_concurrent, calls_per_second: beyond it 429, with
    ``Retry-After: retry_after`` seconds unless that is None. ``unsupported`` parameters get a 400 that names them;
    a ``supports_`` switch that is off ignores the parameter. ``identical``: a caching backend, each question has one
    reply with one id. ``api_key``: anything else gets 401. ``models``: others get 404 (empty: any name is served).

    Determinism: a text depends on (``seed``, question, place among the choices) and on the request's ``seed`` if
    it has one that is honoured, else on how many calls of this question were let in before. Latency and faults
    depend on (``seed``, question, that number), so a retry has a fresh chance. Ids count up.

    ``counts``: calls, completed, failures (any other status, and cut bodies), draws, prompt_tokens and
    completion_tokens generated (also for a reply that was cut or whose client had gone: status 499 in the log),
    in_flight, max_in_flight. ``requests``: per call ``time`` (monotonic seconds), path, body, status (None while
    pending), prompt_tokens, completion_tokens. Over HTTP: GET /_counts, GET /_log, POST /_reset.
    """

    answers: Distribution | Mapping[str, Distribution] | Scripted = field(default_factory=lambda: {"42": 1.0})
    reply: str = "Let me think. The answer is {answer}."
    seed: int = 0
    latency: float = 0.0
    latency_shape: Literal["exponential", "fixed"] = "exponential"
    failure_rate: float = 0.0
    failure_status: int = 400
    error_rate: float = 0.0
    error_status: int = 500
    truncate_rate: float = 0.0
    max_concurrent: int | None = None
    calls_per_second: float | None = None
    retry_after: float | None = 1.0
    supports_n: bool = True
    supports_logprobs: bool = True
    supports_seed: bool = True
    unsupported: Collection[str] = ()
    max_completion_tokens_only: bool = False
    identical: bool = False
    api_key: str | None = field(default=None, repr=False)
    models: Collection[str] = ()
    log_bodies: bool = True
    host: str = "127.0.0.1"
    port: int = 0

    def __post_init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self._counts: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()
        self._ids = 0
        self._recent: deque[float] = deque()
        self._connections: set[_Connection] = set()
        self._scripts: dict[str, _Choices | None] = {}
        self._thread: threading.Thread | None = None
        self._table = self._compile()

    def _compile(self) -> list[tuple[str, _Choices]]:
        if callable(self.answers):
            return []
        flat = {a: p for a, p in self.answers.items() if isinstance(p, int | float)}
        table = {"": flat} if flat else {k: v for k, v in self.answers.items() if isinstance(v, Mapping)}
        if len(flat or table) != len(self.answers) or not self.answers:
            raise ValueError("answers must map answers to probabilities, or parts of questions to such mappings")
        return [(part, _Choices(distribution, self.reply)) for part, distribution in table.items()]

    # ------------------------------------------------------------------------------------------ running

    @property
    def url(self) -> str:
        """The base URL, ending in /v1."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def counts(self) -> dict[str, int]:
        """What the server has done since it started or was last reset."""
        names = ("calls", "completed", "failures", "draws", "prompt_tokens", "completion_tokens")
        return {name: self._counts[name] for name in (*names, "in_flight", "max_in_flight")}

    def reset(self) -> None:
        """Forget all requests and counts, as if just started."""
        pending = self._counts["in_flight"]
        self.requests.clear()
        self._counts.clear()
        self._numbers.clear()
        self._counts["in_flight"] = self._counts["max_in_flight"] = pending

    def start(self) -> ScriptedServer:
        """Serve from a thread of its own until `stop`; raises OSError where the port is taken."""
        if self._thread is not None:
            raise RuntimeError("the server is already running")
        ready, failure = threading.Event(), list[OSError]()

        def run() -> None:
            try:
                asyncio.run(self.serve(ready.set))
            except OSError as error:
                failure.append(error)
            ready.set()

        self._thread = threading.Thread(target=run, name="scripted-server", daemon=True)
        self._thread.start()
        ready.wait()
        if failure:
            self._thread = None
            raise failure[0]
        return self

    def stop(self) -> None:
        """Close every connection and end the thread."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
            self._thread = None

    async def serve(self, ready: Callable[[], None], signals: Collection[int] = ()) -> None:
        """Serve in the running event loop until `stop`, or one of ``signals``; ``ready`` is called once listening."""
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        listener = await self._loop.create_server(lambda: _Connection(self), self.host, self.port, backlog=1024)
        self.port = listener.sockets[0].getsockname()[1]
        for number in signals:
            self._loop.add_signal_handler(number, self._stopping.set)
        ready()
        await self._stopping.wait()
        listener.close()
        for connection in list(self._connections):
            connection.transport.abort()

    def __enter__(self) -> ScriptedServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self.stop()

    async def __aenter__(self) -> ScriptedServer:
        return self.start()

    async def __aexit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        await asyncio.to_thread(self.stop)

    # --------------------------------------------------------------------------------------- dispatching

    def _take(self, head: Head, body: bytes, connection: _Connection) -> None:
        """Answer one HTTP request, now or after its latency."""
        if _ENTRY_POINTS.get(head.path) != head.method:
            status = 405 if head.path in _ENTRY_POINTS else 404
            connection.send(status, _error(f"{head.method} {head.path} is not served here"))
        elif head.path == "/v1/chat/completions":
            self._chat(head, body, connection)
        elif head.path == "/v1/models":
            names = list(self.models) or ["scripted"]
            data = [{"id": m, "object": "model", "created": 0, "owned_by": "consilience"} for m in names]
            connection.send(200, json.dumps({"object": "list", "data": data}).encode())
        else:
            if head.path == "/_reset":
                self.reset()
            shown = self.requests if head.path == "/_log" else self.counts
            connection.send(200, json.dumps(shown).encode())

    def _chat(self, head: Head, raw: bytes, connection: _Connection) -> None:
        counts = self._counts
        entry: dict[str, Any] = {"time": self._loop.time(), "path": head.path, "status": None}
        entry["prompt_tokens"] = entry["completion_tokens"] = 0
        self.requests.append(entry)
        counts["calls"] += 1
        try:
            body = json.loads(raw.decode())
        except ValueError:
            body = None
        if self.log_bodies:
            entry["body"] = body
        refusal = self._refusal(head, body, entry["time"])
        if refusal is not None:
            entry["status"] = refusal[0]
            counts["failures"] += 1
            connection.send(*refusal)
            return
        counts["in_flight"] += 1
        counts["max_in_flight"] = max(counts["max_in_flight"], counts["in_flight"])
        question = next(_text_of(m["content"]) for m in reversed(body["messages"]) if m["role"] == "user")
        number = self._numbers[question]
        self._numbers[question] = number + 1
        call = _Call(body, question, number, entry)
        if self.latency > 0:
            self._loop.call_later(self._delay(call), self._finish, call, connection)
        else:
            self._finish(call, connection)

    def _refusal(self, head: Head, body: Any, now: float) -> tuple[int, bytes] | tuple[int, bytes, str] | None:
        """The (status, body, headers) of a call that is not let in."""
        if self.api_key is not None and head.headers.get("authorization") != f"Bearer {self.api_key}":
            return 401, _error("Incorrect API key provided.", code="invalid_api_key")
        if not isinstance(body, dict) or not _well_formed(body.get("messages")):
            return 400, _error("messages must hold a user message", param="messages")
        if self.models and body.get("model") not in self.models:
            return 404, _error(f"The model {body.get('model')!r} does not exist.", "model", "model_not_found")
        if self._throttled(now):
            after = f"retry-after: {self.retry_after:g}\r\n" if self.retry_after is not None else ""
            return 429, _error("Rate limit reached.", code="rate_limit_exceeded"), after
        if self.max_completion_tokens_only and "max_tokens" in body:
            text = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            return 400, _error(text, "max_tokens", "unsupported_parameter")
        for name in ("n", "seed", "max_tokens", "max_completion_tokens"):
            value = body.get(name)
            if value is not None and (type(value) is not int or (value < 1 and name != "seed")):
                return 400, _error(f"Invalid value for '{name}': {value!r}.", name, "invalid_value")
        for name in self.unsupported:
            if name in body:
                text = f"Unsupported parameter: '{name}' is not supported with this model."
                return 400, _error(text, name, "unsupported_parameter")
        return None

    def _throttled(self, now: float) -> bool:
        if self.max_concurrent is not None and self._counts["in_flight"] >= self.max_concurrent:
            return True
        if self.calls_per_second is None:
            return False
        while self._recent and self._recent[0] <= now - 1:
            self._recent.popleft()
        if len(self._recent) >= self.calls_per_second:
            return True
        self._recent.append(now)
        return False

    # ------------------------------------------------------------------------------------------ replying

    def _finish(self, call: _Call, connection: _Connection) -> None:
        """Answer a call that was let in: fail, or generate and send."""
        counts, entry = self._counts, call.entry
        counts["in_flight"] -= 1
        if self._hit(self.failure_rate, "failure", call):
            self._fail(self.failure_status, "The scripted failure.", entry, connection)
            return
        if self._hit(self.error_rate, "error", call):
            self._fail(self.error_status, "The scripted error.", entry, connection)
            return
        try:
            reply = self._generate(call)
        except Exception as error:  # the user's own script: show it, and answer all the same
            traceback.print_exc()
            self._fail(500, f"The script raised {error!r}.", entry, connection)
            return
        if reply is None:
            self._fail(400, "The script has no answer for this question.", entry, connection)
            return
        entry.update(reply["usage"])
        del entry["total_tokens"]
        counts["prompt_tokens"] += entry["prompt_tokens"]
        counts["completion_tokens"] += entry["completion_tokens"]
        counts["draws"] += len(reply["choices"])
        payload = json.dumps(reply).encode()
        cut = len(payload) // 2 if self._hit(self.truncate_rate, "truncate", call) else None
        entry["status"] = 499 if connection.lost else 200
        counts["failures" if connection.lost or cut is not None else "completed"] += 1
        if not connection.lost:
            connection.send(200, payload, cut=cut)

    def _fail(self, status: int, message: str, entry: dict[str, Any], connection: _Connection) -> None:
        entry["status"] = status
        self._counts["failures"] += 1
        if not connection.lost:
            connection.send(status, _error(message))

    def _generate(self, call: _Call) -> dict[str, Any] | None:
        """The completion object; None where the script says nothing on the question."""
        body = call.body
        n = body.get("n") or 1 if self.supports_n else 1
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        ask_logprobs = bool(body.get("logprobs")) and self.supports_logprobs
        choices, generated = [], 0
        for place in range(n):
            scripted = self._sample(call, place)
            if scripted is None:
                return None
            message, logprob = scripted
            text, finish = _text_of(message.get("content")), "tool_calls" if "tool_calls" in message else "stop"
            words = len(text.split())
            if limit is not None and words > limit:
                text, finish, words = "".join(_TOKEN.findall(text)[:limit]), "length", limit
                message = message | {"content": text}
            generated += words
            logprobs = _logprobs(text, logprob) if ask_logprobs else None
            choices.append({"index": place, "message": message, "logprobs": logprobs, "finish_reason": finish})
        prompt = sum(len(_text_of(m.get("content")).split()) for m in body["messages"])
        usage = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
        return {
            "id": self._id(call),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.get("model") or "scripted",
            "choices": choices,
            "usage": usage,
        }

    def _sample(self, call: _Call, place: int) -> tuple[dict[str, Any], float] | None:
        """The message of choice ``place`` and its log-probability (a callable's text: -0.1 per word)."""
        seed = call.body.get("seed") if self.supports_seed else None
        if self.identical:
            key = b"%d:%b" % (self.seed, call.question.encode())
        elif seed is not None:
            key = b"%d:%d:s%d:%b" % (self.seed, place, seed, call.question.encode())
        else:
            key = b"%d:%d:c%d:%b" % (self.seed, place, call.number, call.question.encode())
        if callable(self.answers):
            message = self.answers(call.question, random.Random(blake2b(key).digest()))
            if isinstance(message, str):
                message = {"role": "assistant", "content": message}
            return message, -0.1 * len(_text_of(message.get("content")).split())
        choices = self._script_for(call.question)
        if choices is None:
            return None
        text, logprob = choices.sample(_uniform(key))
        return {"role": "assistant", "content": text}, logprob

    def _script_for(self, question: str) -> _Choices | None:
        if question not in self._scripts:
            found = (choices for part, choices in self._table if part in question)
            self._scripts[question] = next(found, None)
        return self._scripts[question]

    def _id(self, call: _Call) -> str:
        if self.identical:
            return f"chatcmpl-{blake2b(call.question.encode(), digest_size=8).hexdigest()}"
        self._ids += 1
        return f"chatcmpl-{self._ids}"

    def _hit(self, rate: float, what: str, call: _Call) -> bool:
        return rate > 0 and self._chance(what, call) < rate

    def _delay(self, call: _Call) -> float:
        if self.latency_shape == "fixed":
            return self.latency
        return -self.latency * math.log1p(-self._chance("latency", call))

    def _chance(self, what: str, call: _Call) -> float:
        """A number in [0, 1) for ``what`` of this call."""
        return _uniform(f"{self.seed}:{what}:{call.number}:{call.question}".encode())


def _uniform(key: bytes) -> float:
    """A number in [0, 1), the same for the same key."""
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 11) / 2**53


def _well_formed(messages: Any) -> bool:
    """True for a list of messages with a user's among them."""
    if not isinstance(messages, list):
        return False
    asked = False
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            return False
        asked = asked or (message["role"] == "user" and "content" in message)
    return asked


# ----------------------------------------------------------------------------------------- command line


def _value(text: str) -> Any:
    """A flag's value: ``@FILE`` holds JSON, else JSON, else the text itself."""
    if text.startswith("@"):
        return json.loads(Path(text[1:]).read_text(encoding="utf-8"))
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(arguments: list[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; prints ``{"url": ...}`` as one line once listening."""
    parser = argparse.ArgumentParser(
        prog="python -m consilience.testing.server",
        description="A scripted OpenAI-compatible server; values are JSON, or @FILE with JSON.",
    )
    for option in fields(ScriptedServer):
        plain = option.name in ("reply", "host", "api_key", "latency_shape")
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=str if plain else _value)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    server = ScriptedServer(**given)
    ready: Callable[[], None] = lambda: print(json.dumps({"url": server.url}), flush=True)  # noqa: E731
    asyncio.run(server.serve(ready, (signal.SIGINT, signal.SIGTERM)))


if __name__ == "__main__":
    main()
