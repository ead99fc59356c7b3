"""``@none``: a request goes to the upstream as it is, and its reply comes back byte by byte.

Only who pays is looked after: the server's own key is sent in place of the client's, and the call counts against the
budgets of the client and the server, at its worst case until the reply says what it used.
"""

from __future__ import annotations

import asyncio
import hashlib
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
from consilience.serve.errors import ApiError, bad, of_spent
from consilience.serve.keys import Client
from consilience.serve.schema import all_text
from consilience.text.budget import LOOK, Account, CallMeter, Price
from consilience.text.sources.base import Attempt, Request
from consilience.text.sources.openai import chat_urls, stated_usage
from consilience.text.transport import environment_proxy

FORWARDED = ("accept", "accept-encoding", "content-type", "openai-beta", "user-agent")
"""The client's headers that go upstream; never his key, nor what names his organization."""
OWN = {b"connection", b"keep-alive", b"transfer-encoding", b"set-cookie", b"server", b"date", b"upgrade"}
"""The upstream's headers that do not come back: they are about its own connection."""
TAIL = 64 * 1024
"""Bytes at the end of a stream in which its usage is looked for."""
DONE = b"data: [DONE]"
"""The last line of a stream: many clients leave once they have read it."""


class Passthrough:
    """A line to the upstream without sampling; ``seconds`` is the longest a connection may be silent."""

    def __init__(self, core: Core, seconds: float = 600.0) -> None:
        config = core.config
        url, variable = core.settings.upstream, "OPENAI_API_KEY"
        if url in config.endpoints:
            url, variable = config.endpoints[url].url, config.endpoints[url].api_key_env
        self._core = core
        self._chat = chat_urls(url)[1]
        self._urls: dict[str, URL] = {}
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
        await self._relay("GET", self._url(path), None, self._sent(headers), send, None)

    async def call(
        self, path: str, raw: bytes, body: dict[str, Any], headers: Mapping[str, str], client: Client, send: Send
    ) -> None:
        """Relay a call; ``body`` is what ``raw`` holds. Raises ApiError before anything was sent."""
        account = client.account
        draws = _draws(body, account)
        if (url := self._urls.get(path)) is None:
            url = self._urls[path] = self._url(path)
        meter = self._meter(body, client, draws) if account.capped else None
        sent = self._sent(headers)
        if (key := headers.get("idempotency-key")) is not None:  # the upstream knows one key, the server's: not whose
            sent["idempotency-key"] = hashlib.sha256(json.dumps([client.name, key]).encode()).hexdigest()
        try:
            await _take(account, draws)
            if meter is None:
                await self._relay("POST", url, raw, sent, send, None)
                return
            sent["accept-encoding"] = "identity"  # the usage has to be read
            async with AsyncExitStack() as reserved:
                try:
                    attempt = await reserved.enter_async_context(meter.attempt(draws))
                except BaseException:
                    account.give_back_draws(draws)  # nothing was sent
                    raise
                await self._relay("POST", url, raw, sent, send, attempt)
        except BudgetSpent as spent:
            raise of_spent(account.refused_by, spent) from None

    def _meter(self, body: dict[str, Any], client: Client, draws: int) -> CallMeter:
        """What bounds the call's cost; raises ApiError where nothing does."""
        limits = [body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
        if not limits or any(type(limit) is not int or limit < 1 for limit in limits):
            raise bad("a budget is in force: set 'max_tokens'", "max_tokens", "missing_required_parameter")
        prompts, best = body.get("prompt"), -(-_whole(body.get("best_of")) // (_whole(body.get("n")) or 1))
        bounded = self._core.bounds_prompt(_plain(body.get("messages")), client.account)
        bounding = Request(
            endpoint="",
            model="",
            messages=({"content": [body.get("messages"), prompts]},),
            params=_others(body) | {"max_tokens": max(limits) * max(1, best)},
            tools=body.get("tools"),
            response_format=body.get("response_format"),
            most_prompt=None if bounded else self._core.settings.max_prompt_tokens,
        )
        price = self._core.price_of(str(body.get("model")), client.account)
        return CallMeter(client.account, bounding, price or Price())

    def _url(self, path: str) -> URL:
        return URL(self._chat.replace("/chat/completions", path, 1), encoded=True)

    def _sent(self, headers: Mapping[str, str]) -> CIMultiDict[str]:
        """The headers that go upstream."""
        sent: CIMultiDict[str] = CIMultiDict((name, headers[name]) for name in FORWARDED if name in headers)
        sent.setdefault("accept-encoding", "identity")
        if self._key:
            sent["authorization"] = f"Bearer {self._key}"
        return sent

    async def _relay(
        self, method: str, url: URL, raw: bytes | None, sent: CIMultiDict[str], send: Send, attempt: Attempt | None
    ) -> None:
        started = False
        try:
            async with self._open().request(method, url, data=raw, headers=sent, allow_redirects=False) as response:
                kept = [(name, value) for name, value in response.raw_headers if name.lower() not in OWN]
                started = True
                await send({"type": "http.response.start", "status": response.status, "headers": kept})
                await _stream(response, send, attempt)
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


TRIES = 20
"""How often draws are asked for that other processes may give back."""


async def _take(account: Account, draws: int) -> None:
    """Take so many draws or none; raises BudgetSpent."""
    for left in reversed(range(TRIES if account.shared else 1)):
        granted = await account.take(draws) if account.shared else account.take_draws(draws)
        if granted == draws:
            return
        account.give_back_draws(granted)
        if not left:
            raise BudgetSpent("draws", f"{granted} draws are left")
        await asyncio.sleep(LOOK)


def _others(body: dict[str, Any]) -> dict[str, Any]:
    """What a body holds beside what its prompt is counted by, where it may be text of the prompt."""
    counted = {"messages", "prompt", "tools", "response_format", "model"}
    return {name: value for name, value in body.items() if name not in counted and isinstance(value, str | list | dict)}


def _draws(body: dict[str, Any], account: Account) -> int:
    """How many replies a body asks for; raises ApiError where a cap is in force and that cannot be read."""
    choices, prompts = body.get("n"), body.get("prompt")
    several = isinstance(prompts, list) and not all(type(token) is int for token in prompts)
    if type(choices) is int and choices > 0:
        draws = choices
    elif choices is not None and account.limited:
        raise bad("a budget is in force: expected a whole number, 1 or more", "n")
    else:
        draws = 1
    return draws * max(1, len(prompts)) if several and isinstance(prompts, list) else draws


def _plain(messages: Any) -> bool:
    """Whether all that is in messages is text."""
    return all_text([one for one in messages if isinstance(one, dict)]) if isinstance(messages, list) else True


def _whole(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


async def _stream(response: aiohttp.ClientResponse, send: Send, attempt: Attempt | None) -> None:
    """Pass each piece of a reply on as it comes; the attempt is settled before its client can know that it ends."""
    content, tail, ended = response.content, b"", False
    while not ended:
        piece = await content.readany()
        ended = content.at_eof()
        if attempt is not None:
            tail = tail + piece if response.content_type == "application/json" else (tail + piece)[-TAIL:]
            if ended or tail.rstrip().endswith(DONE):
                _settle(attempt, response.status, tail)
        await send({"type": "http.response.body", "body": piece, "more_body": not ended})


def _settle(attempt: Attempt, status: int, body: bytes) -> None:
    """Settle a call by what its reply, or the last chunk of its stream, says was used; a refused one used nothing."""
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
