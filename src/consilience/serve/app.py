"""The ASGI application: paths, keys, limits, and one way out for every error."""

from __future__ import annotations

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from consilience.serve import page
from consilience.serve.core import Answer, Core, OnProgress, Settings
from consilience.serve.errors import ApiError, bad, of_cut, of_mishap
from consilience.serve.gate import Gate, Uploads, ending, send_parting
from consilience.serve.hosts import OwnNames, loopback
from consilience.serve.http import ClientGone, send_error, send_json, while_connected
from consilience.serve.keys import Client, run_seed
from consilience.serve.metrics import Metrics
from consilience.serve.observe import GONE, SHOWN, Outgoing
from consilience.serve.openapi import document
from consilience.serve.page.recent import Recent
from consilience.serve.passthrough import Passthrough
from consilience.serve.policies import NONE, split_model
from consilience.serve.ready import Readiness
from consilience.serve.replies import Replies
from consilience.serve.schema import EXTENSION, Ask, read_ask, read_extension, read_model, read_object
from consilience.serve.stream import EventStream
from consilience.text.session import Session

log = logging.getLogger("consilience.serve")

CHAT, TEXT = "/chat/completions", "/completions"
UPSTREAM = 502
"""The status that says that the upstream failed: whoever runs the server should see it in the log."""

log = logging.getLogger("consilience.serve")


def create_app(settings: Settings | None = None, host: str | None = None) -> Starlette:
    """The server as an ASGI application; raises InputError for bad settings.

    ``host`` is the address it listens on. Where that is a loopback address and no keys are configured, requests by
    another name are refused.
    """
    core = Core(settings or Settings())
    passthrough = None if core.house else Passthrough(core)
    gate, uploads = Gate(core.settings.queue), Uploads(core.config.serve.max_body_bytes)
    metrics, ready = Metrics(core, gate), Readiness(core, passthrough, gate)
    recent = Recent(apart=len(core.keyring) > 0)
    core.observers += [metrics.observe, ready.observe, recent.note]

    async def readyz(_: Request) -> Response:
        reason = await ready.reason()
        shown = {"status": "ready"} if reason is None else {"status": "not ready", "reason": reason}
        return JSONResponse(shown, 200 if reason is None else 503)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        core.start()
        metrics.start()
        yield
        await gate.end()
        if passthrough is not None:
            await passthrough.close()
        await core.close()

    models = _Models(core, passthrough)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _Completions(core, passthrough, gate, uploads, CHAT), methods=["POST"]),
            Route("/v1/completions", _Completions(core, passthrough, gate, uploads, TEXT), methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", models, methods=["GET"]),
            Route("/openapi.json", _openapi, methods=["GET"]),
            Route("/healthz", _healthy, methods=["GET"]),
            Route("/readyz", readyz, methods=["GET"]),
            Route("/metrics", metrics.__call__, methods=["GET"]),
            *page.routes(core, recent),
        ],
        middleware=[Middleware(OwnNames, host=host)] if host and loopback(host) and not len(core.keyring) else [],
        exception_handlers={HTTPException: _no_route},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.core, app.state.gate, app.state.uploads = core, gate, uploads
    return app


async def _healthy(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _openapi(_: Request) -> Response:
    return JSONResponse(document())


async def _no_route(request: Request, error: Exception) -> Response:
    """What starlette itself refuses: a path or a method that is not served."""
    assert isinstance(error, HTTPException)
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    text = f"{request.method[:20]} {request.url.path[:200]} is not served here"
    found = ApiError(error.status_code, text, code=codes.get(error.status_code))
    headers = dict(error.headers or {})
    return Response(found.body, error.status_code, headers, "application/json")


class _Endpoint(ABC):
    """An endpoint whose errors, whatever they are, leave in OpenAI's shape."""

    def __init__(self, core: Core, passthrough: Passthrough | None) -> None:
        self.core = core
        self.passthrough = passthrough

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        out = Outgoing(send, scope["path"])
        try:
            headers = Headers(scope=scope)
            client = self.core.keyring.identify(headers.get("authorization", ""))
            out.knows(client=client.shown)
            await self.handle(scope, receive, out, headers, client)
        except ClientGone:
            out.knows(status=GONE)
        except Exception as error:
            if out.started:  # it cannot be mended: the connection is closed, which the client can tell from an end
                out.failed(error)
                of_cut(error)
                return
            meant = error if isinstance(error, ApiError) else of_mishap(error)
            out.failed(meant)
            if meant.status == UPSTREAM:
                log.warning("answered %d: %s", meant.status, meant.message[:300])
            if meant.headers.get("connection") == "close":
                await send_parting(receive, out, meant)
            else:
                await send_error(out, meant)
        finally:
            self.over(out)

    @abstractmethod
    async def handle(self, scope: Scope, receive: Receive, out: Outgoing, headers: Headers, client: Client) -> None:
        """Answer a request of a known client; may raise ApiError while nothing was sent."""

    @abstractmethod
    def over(self, out: Outgoing) -> None:
        """The request has ended."""


class _Models(_Endpoint):
    """``/v1/models``: the upstream's own list, or the house model."""

    def over(self, out: Outgoing) -> None:
        """Nobody keeps account of these."""

    async def handle(self, scope: Scope, receive: Receive, out: Outgoing, headers: Headers, client: Client) -> None:
        name = split_model(scope["path_params"].get("name", ""))[0]
        if self.passthrough is not None:
            await while_connected(receive, self.passthrough.models(name, headers, out))
            return
        house = {"id": "house", "object": "model", "created": 0, "owned_by": "consilience"}
        if name in ("", "house"):
            await send_json(out, 200, house if name else {"object": "list", "data": [house]})
            return
        raise ApiError(404, f"The model {name!r} does not exist.", param="model", code="model_not_found")


class _Completions(_Endpoint):
    """``/v1/chat/completions`` and ``/v1/completions``."""

    def __init__(self, core: Core, passthrough: Passthrough | None, gate: Gate, uploads: Uploads, path: str) -> None:
        super().__init__(core, passthrough)
        self.gate, self.uploads = gate, uploads
        self.path = path

    def over(self, out: Outgoing) -> None:
        """Tell those who watch."""
        served = out.served()
        for observer in self.core.observers:
            try:
                observer(served)
            except Exception:  # no fault of the request, and no reason to leave the others untold
                log.exception("an observer failed")

    async def handle(self, scope: Scope, receive: Receive, out: Outgoing, headers: Headers, client: Client) -> None:
        try:
            self.gate.look()
            raw = await self.uploads.body(scope, receive)
            with self.gate.admitted():
                await self._work(raw, receive, out, headers, client)
        except asyncio.CancelledError:
            if not self.gate.ended:
                raise
            raise ending() from None

    async def _work(self, raw: bytes, receive: Receive, out: Outgoing, headers: Headers, client: Client) -> None:
        body = read_object(raw)
        model, tail = split_model(read_model(body))
        spec = self.core.spec_of(read_extension(body).get("policy", tail), client)
        out.knows(model=model, policy=spec)
        if spec == NONE and self.passthrough is not None:
            for name in read_extension(body).keys() - {"policy"}:
                raise bad(f"{name!r} means nothing where nothing is sampled: leave it out", f"{EXTENSION}.{name}")
            if tail is not None or EXTENSION in body:
                body = {name: value for name, value in body.items() if name != EXTENSION} | {"model": model}
                raw = json.dumps(body).encode()
            work = self.passthrough.call(self.path, raw, body, headers, client, out)
        else:
            ask = read_ask(body, chat=self.path == CHAT)
            work = self._answer(ask, client, _idempotency(headers), out)
        await while_connected(receive, work)

    async def _answer(self, ask: Ask, client: Client, idempotency: str | None, out: Outgoing) -> None:
        seed = run_seed(client, idempotency, ask.seed)
        repeatable = idempotency is not None or ask.seed is not None
        replies = Replies(ask)
        out.knows(id=replies.id, question=ask.question(0)[:SHOWN])

        def ended(session: Session) -> None:
            out.knows(draws_bought=session.bought + session.asked, failed=session.failed)

        async def agreed(told: OnProgress | None = None) -> Answer:
            try:
                answer = await self.core.answer(ask, client, seed, told, ended, repeatable=repeatable)
            except Exception as error:  # a stream that has begun makes an event of it
                out.failed(error)
                raise
            out.answered(answer)
            return answer

        if ask.stream:
            await EventStream(out, replies, self.core.settings.heartbeat).run(agreed)
            return
        await send_json(out, 200, replies.whole(await agreed()), {"x-request-id": replies.id})


def _idempotency(headers: Any) -> str | None:
    key: str | None = headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise bad("the Idempotency-Key must have 1 to 255 characters", code="invalid_idempotency_key")
    return key
