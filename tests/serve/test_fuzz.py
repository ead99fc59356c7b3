"""The server against its own OpenAPI document: schemathesis makes requests that fit it, and requests that do not.

No request is a 500, every reply is as the document says, errors have OpenAI's shape, and what does not fit is refused.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from consilience.serve.app import create_app
from consilience.serve.core import Settings
from consilience.serve.openapi import document

from .helpers import running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
SPEED = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


class Willing:
    """An upstream that takes whatever it is sent and answers it; tells what it was asked."""

    def __init__(self) -> None:
        self.rng = random.Random(1)
        self.asked: Counter[str] = Counter()
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
                Route("/v1/completions", self.answer, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.models),
            ]
        )

    async def models(self, request: Request) -> Any:
        one = {"id": request.path_params.get("name", "m"), "object": "model", "created": 5, "owned_by": "me"}
        return JSONResponse(one if "name" in request.path_params else {"object": "list", "data": [one]})

    async def answer(self, request: Request) -> Any:
        body = await request.json()
        self.asked[request.url.path] += 1
        choices = []
        for index in range(min(body["n"], 200) if isinstance(body.get("n"), int) else 1):
            text = f"The answer is {self.rng.randint(1, 3)}."
            said = {"message": {"role": "assistant", "content": text}} if "chat" in request.url.path else {"text": text}
            choices.append({"index": index, "logprobs": None, "finish_reason": "stop"} | said)
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        kind = "chat.completion" if "chat" in request.url.path else "text_completion"
        reply = {"id": "up", "object": kind, "created": 1, "model": "m", "choices": choices, "usage": usage}
        reply["consilience"] = dict.fromkeys(document()["components"]["schemas"][  # a reply passed through fits as well
            "ChatReply" if "chat" in request.url.path else "CompletionReply"
        ]["properties"]["consilience"]["required"])  # fmt: skip
        if body.get("stream"):
            return StreamingResponse(iter([b"data: [DONE]\n\n"]), media_type="text/event-stream")
        return JSONResponse(reply)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    """The origin of a server before a willing upstream."""
    folder = tmp_path_factory.mktemp("fuzz")
    upstream = Willing()
    with running(upstream.app) as origin:
        app = create_app(Settings(upstream=f"{origin}/v1", policy="sc:n=1", ledger=str(folder / "l.db")))
        with running(app) as own:
            yield own, upstream


def fuzz(origin: str, path: str, method: str, examples: int, mode: schemathesis.GenerationMode) -> Counter[int]:
    """Send requests of one kind to an operation; how often each status came."""
    operation = schemathesis.openapi.from_dict(document())[path][method]
    seen: Counter[int] = Counter()

    @seed(1)
    @settings(max_examples=examples, phases=(Phase.generate,), **SPEED)
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        reply = case.call_and_validate(origin, checks=CHECKS, timeout=60)
        seen[reply.status_code] += 1

    send()
    return seen


OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
]
GOOD, BAD = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


def checked(served: Any, path: str, method: str, examples: int) -> None:
    origin, upstream = served
    upstream.asked.clear()
    good = fuzz(origin, path, method, examples, GOOD)
    assert good.total() > (0 if method == "GET" else examples // 2)
    if method == "POST":
        assert good[200] > 0.05 * examples  # else nothing but refusals was tried
        asked = upstream.asked.total()
        bad = fuzz(origin, path, method, examples, BAD)
        assert set(bad) <= {400, 404, 405}
        assert upstream.asked.total() == asked > 0


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_requests_that_fit_the_document_and_that_do_not(served, path, method) -> None:
    checked(served, path, method, 40)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), OPERATIONS[:2])
def test_many_more_of_them(served, path, method) -> None:
    checked(served, path, method, 4000)


def test_the_document_is_served_and_valid(served) -> None:
    import httpx2

    reply = httpx2.get(f"{served[0]}/openapi.json")
    assert reply.json() == json.loads(json.dumps(document()))
    schemathesis.openapi.from_dict(reply.json()).validate()


HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=300)
NAMES = ("authorization", "idempotency-key", "content-type", "accept", "accept-encoding", "user-agent", "openai-beta",
         "content-encoding", "x-request-id", "cookie", "expect", "range", "origin", "x-forwarded-for")  # fmt: skip


@settings(max_examples=100, **SPEED)
@given(
    headers=st.lists(st.tuples(st.sampled_from(NAMES), HEADER), max_size=4),
    model=st.sampled_from(["m", "m@none"]),
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/models"]),
)
def test_no_header_is_a_500(served, headers, model, path) -> None:
    import socket

    host, port = served[0].removeprefix("http://").split(":")
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "x"}]}).encode()
    if path == "/v1/completions":
        body = json.dumps({"model": model, "prompt": "x"}).encode()
    method = "GET" if path == "/v1/models" else "POST"
    lines = [(b"Host", b"x"), (b"Connection", b"close"), (b"Content-Length", b"%d" % len(body))]
    lines += [(name.encode(), value.encode("latin-1")) for name, value in headers]
    head = f"{method} {path} HTTP/1.1\r\n".encode() + b"".join(k + b": " + v + b"\r\n" for k, v in lines) + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head + body)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    status = int(received.split(b" ", 2)[1])
    assert status in (200, 400), (headers, received)
