"""``@none``: a request goes to the upstream as it is, and its reply comes back byte by byte.

Only who pays is looked after: the server's own key is sent in place of the client's, and the call counts against the
budgets of the client and the server, at its worst case until the reply says what it used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import quote

import aiohttp
from multidict import CIMultiDict
from starlette.types import Send
from yarl import URL

from consilience.errors import BudgetSpent
from consilience.serve.core import Core
from consilience.serve.errors import ApiError, bad
from consilience.serve.http import encoded
from consilience.serve.keys import Client
from consilience.text.budget import CallMeter, Price
from consilience.text.sources.base import Attempt, Request
from consilience.text.sources.openai import chat_urls, stated_usage
from consilience.text.transport import environment_proxy

FORWARDED = ("accept", "accept-encoding", "content-type", "idempotency-key", "openai-beta", "user-agent")
"""The client's headers that go upstream; never his key, nor what names his organization."""
OWN = {"connection", "keep-alive", "transfer-encoding", "set-cookie", "server", "date", "upgrade"}
"""The upstream's headers that do not come back: they are about its own connection."""
TAIL = 64 * 1024
"""Bytes at the end of a stream in which its usage is looked for."""


class Passthrough:
    """A line to the upstream without sampling; ``seconds`` is the longest a connection may be silent."""

    def __init__(self, core: Core, seconds: float = 600.0) -> None:
        config = core.config
        url, variable = core.settings.upstream, "OPENAI_API_KEY"
        if url in config.endpoints:
            url, variable = config.endpoints[url].url, config.endpoints[url].api_key_env
        self._core = core
        self._chat = chat_urls(url)[1]
        self._key = os.environ.get(variable, "").strip()
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=seconds)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def models(self, name: str, headers: Mapping[str, str], send: Send) -> None:
        """The upstream's list of models, or its line on one of them."""
        path = "/models" + (f"/{quote(name, safe='')}" if name else "")
        await self._relay("GET", path, None, headers, send, None)

    async def call(
        self, path: str, raw: bytes, body: dict[str, Any], headers: Mapping[str, str], client: Client, send: Send
    ) -> None:
        """Relay a call; ``body`` is what ``raw`` holds. Raises ApiError before anything was sent."""
        account = client.account
        choices = body.get("n")
        draws = choices if type(choices) is int and choices > 0 else 1
        try:
            async with AsyncExitStack() as stack:
                self._take(account, draws)
                attempt = None
                if account.capped:
                    meter = self._meter(body, client, draws)
                    attempt = await stack.enter_async_context(meter.attempt(draws))
                await self._relay("POST", path, raw, headers, send, attempt)
        except BudgetSpent as spent:
            text = f"the budget that the server has for this key is spent ({spent})"
            quota = "insufficient_quota"
            raise ApiError(429, text, code=quota, kind=quota, headers={"x-should-retry": "false"}) from None

    @staticmethod
    def _take(account: Any, draws: int) -> None:
        granted = account.take_draws(draws)
        if granted < draws:
            account.give_back_draws(granted)
            raise BudgetSpent("draws", f"{granted} draws are left")

    def _meter(self, body: dict[str, Any], client: Client, draws: int) -> CallMeter:
        """What bounds the call's cost; raises ApiError where nothing does."""
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if type(limit) is not int or limit < 1:
            raise bad("a budget is in force: set 'max_tokens'", "max_tokens", "missing_required_parameter")
        prompts = body.get("prompt")
        several = len(prompts) if isinstance(prompts, list) and not all(type(p) is int for p in prompts) else 1
        bounding = Request(
            endpoint="",
            model="",
            messages=({"content": [body.get("messages"), prompts]},),
            params={"max_tokens": limit * several * max(1, _whole(body.get("best_of")) // draws)},
            tools=(body.get("tools"), body.get("functions")),
            response_format=body.get("response_format"),
        )
        price = self._core.price_of(str(body.get("model")), client.account)
        return CallMeter(client.account, bounding, price or Price())

    async def _relay(
        self, method: str, path: str, raw: bytes | None, headers: Mapping[str, str], send: Send, attempt: Attempt | None
    ) -> None:
        url = URL(self._chat.replace("/chat/completions", path, 1), encoded=True)
        sent: CIMultiDict[str] = CIMultiDict((name, headers[name]) for name in FORWARDED if name in headers)
        sent.setdefault("accept-encoding", "identity")
        if attempt is not None:
            sent["accept-encoding"] = "identity"  # the usage has to be read
        if self._key:
            sent["authorization"] = f"Bearer {self._key}"
        started = False
        try:
            async with self._open().request(method, url, data=raw, headers=sent, allow_redirects=False) as response:
                kept = {name: value for name, value in response.headers.items() if name.lower() not in OWN}
                start = {"type": "http.response.start", "status": response.status, "headers": encoded(kept)}
                started = True
                await send(start)
                tail = b""
                async for piece in response.content.iter_any():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    if attempt is not None:
                        tail = tail + piece if response.content_type == "application/json" else (tail + piece)[-TAIL:]
                _settle(attempt, response.status, tail)
            await send({"type": "http.response.body", "body": b""})
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if started:
                raise  # the client sees a reply that is cut, as the upstream cut it
            if attempt is not None and isinstance(error, aiohttp.ClientConnectorError):
                attempt.release()
            text = f"the upstream gave no answer ({type(error).__name__})"
            raise ApiError(502, text, code="upstream_unavailable") from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            proxy, login = environment_proxy(URL(self._chat))
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                proxy=proxy,
                proxy_auth=login,
                timeout=self._timeout,
                skip_auto_headers=("user-agent", "accept"),
            )
        return self._session


def _whole(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


def _settle(attempt: Attempt | None, status: int, body: bytes) -> None:
    """Settle a call by what its reply, or the last chunk of its stream, says was used; a refused one used nothing."""
    if attempt is None:
        return
    if 400 <= status < 500:
        attempt.release()
        return
    lines = [line.removeprefix(b"data:").strip() for line in body.splitlines() if line.startswith(b"data:")]
    for text in reversed(lines or [body]):
        try:
            data = json.loads(text)
        except ValueError:
            continue
        if isinstance(data, dict) and (usage := stated_usage(data)) is not None:
            attempt.settle(usage)
            return
