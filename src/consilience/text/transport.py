"""The kept HTTP client of one endpoint: each call waits for a slot, reserves, is sent, and is sent again as needed.

How many calls run at once follows the endpoint (`Limiter`); how often and how late a call is sent again is `Retry`.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeVar
from urllib.request import getproxies, proxy_bypass

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from consilience.draws import Usage
from consilience.errors import BudgetSpent, ConsilienceError, EndpointError
from consilience.text.crew import Crew
from consilience.text.sources.base import Attempt, Meter

T = TypeVar("T")
Read = Callable[[bytes], tuple[T, Usage | None]]
"""Turns the body of a 200 into (value, the usage it states); raises ValueError where the body is not whole."""

CONNECT_SECONDS = 30.0
MESSAGE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Retry:
    """How patient a call is.

    A call is sent at most ``tries`` times; before try t + 1 it waits a uniform time in [0, min(``longest``,
    ``base`` * 2^t)] seconds (full jitter). A 429 is no try: it is repeated for ``patience`` seconds.
    """

    tries: int = 5
    base: float = 0.5
    longest: float = 30.0
    patience: float = 600.0

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Seconds to wait after the ``attempt``-th failure (counted from 1)."""
        return rng.uniform(0, min(self.longest, self.base * 2.0 ** min(attempt, 60)))


class Refused(Exception):
    """The endpoint refused the call (HTTP 3xx or 4xx); sending the same again would not help.

    ``param`` and ``code`` are the error's own fields where it has them, ``message`` its text without secrets.
    """

    def __init__(self, status: int, message: str, param: str | None, code: str | None) -> None:
        super().__init__(f"HTTP {status}: {message}" if message else f"HTTP {status}")
        self.status, self.message, self.param, self.code = status, message, param, code


class GaveUp(Exception):
    """The call brought nothing in all its tries; the text says why."""


class _Again(Exception):
    """One attempt brought nothing, another may: ``reason`` and ``detail`` are for the message.

    ``deadline`` is when the time cap ends (event loop time), ``wait`` the endpoint's Retry-After in seconds.
    """

    def __init__(self, reason: str, detail: str, deadline: float, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.deadline, self.wait = reason, detail, deadline, wait


class _Throttled(_Again):
    """A 429: the attempt does not count."""


class _Paused(_Throttled):
    """A pause of the endpoint began before the attempt was sent: it waits for its slot again, no more."""


class _Unreachable(_Again):
    """No connection came about: nothing was sent."""


class Limiter:
    """Slots for calls in flight: halved by a 429, one more after each window of successes, at most ``maximum``.

    Additive increase, multiplicative decrease. Calls that were sent before the last decrease do not decrease
    again, so a burst of 429s within one round trip counts once. `pause` grants no slot for some seconds.
    """

    def __init__(self, maximum: int) -> None:
        if maximum < 1:
            raise ValueError(f"concurrency must be at least 1, got {maximum}")
        self.maximum = maximum
        self.in_flight = 0
        self._limit = float(maximum)
        self._decreased_at = self._open_at = -math.inf
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def limit(self) -> int:
        """How many calls may be in flight now."""
        return int(self._limit)

    @property
    def paused(self) -> bool:
        """True while no slot is granted."""
        return self._open_at > -math.inf and asyncio.get_running_loop().time() < self._open_at

    def take(self) -> bool:
        """Take a slot if one is free and nobody waits for it."""
        free = not self._waiting and self.in_flight < self.limit and not self.paused
        self.in_flight += free
        return free

    async def acquire(self) -> None:
        """Wait for a slot, first come first served."""
        if self.take():
            return
        await self._queue()
        while self.paused:  # it began between the grant and now
            self.release()
            await self._queue()

    async def _queue(self) -> None:
        slot = asyncio.get_running_loop().create_future()
        self._waiting.append(slot)
        self._grant()
        try:
            await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():
                self.release()  # it was granted at the same moment: the next one may have it
            raise

    def release(self) -> None:
        """Give a slot back."""
        self.in_flight -= 1
        if self._waiting:
            self._grant()

    def succeeded(self) -> None:
        """A call was answered."""
        if self._limit < self.maximum:
            self._limit = min(float(self.maximum), self._limit + 1 / self._limit)

    def throttled(self, sent_at: float) -> None:
        """A call sent at ``sent_at`` (event loop time) was answered with 429."""
        if sent_at >= self._decreased_at:
            self._limit = max(1.0, self._limit / 2)
            self._decreased_at = asyncio.get_running_loop().time()

    def pause(self, seconds: float) -> None:
        """Grant no slot for ``seconds`` from now on."""
        self._open_at = max(self._open_at, asyncio.get_running_loop().time() + seconds)

    def _grant(self) -> None:
        if self.paused:
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_at(self._open_at, self._reopen)
            return
        while self._waiting and self.in_flight < self.limit:
            slot = self._waiting.popleft()
            if not slot.done():
                self.in_flight += 1
                slot.set_result(None)

    def _reopen(self) -> None:
        self._timer = None
        self._grant()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by ``Retry-After`` (seconds or an HTTP date), or by the finer ``retry-after-ms``."""
    try:
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    except (KeyError, ValueError):
        pass
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def error_fields(body: bytes) -> tuple[str, str | None, str | None]:
    """(message, param, code) of an error body: OpenAI's shape, FastAPI's ``detail``, or plain text."""
    try:
        data = json.loads(body)
    except ValueError:
        text = body[:2000].decode("utf-8", "replace")
        return " ".join(re.sub(r"<[^>]*>", " ", text).split()), None, None
    error = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(error, dict):
        return str(error), None, None
    message = error.get("message", error.get("detail"))
    param, code = error.get("param"), error.get("code") or error.get("type")
    found = message.get("detail", message) if isinstance(message, dict) else message
    if isinstance(found, list):  # one entry per field: {"loc": ["body", "seed"], "msg": ...}
        entries = [e for e in found if isinstance(e, dict)]
        places = [[str(p) for p in e.get("loc", ()) if p != "body"] for e in entries]
        found = "; ".join(f"'{'.'.join(p)}': {e.get('msg', '')}" for p, e in zip(places, entries, strict=True))
    text = found if isinstance(found, str) else json.dumps(error, ensure_ascii=False)
    return text, param if isinstance(param, str) else None, str(code) if code is not None else None


class _Watch:
    """Cancels attempts that run past their time, with one timer for all: one each costs a tenth of the rate."""

    def __init__(self) -> None:
        self._ends: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._wakes = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def start(self, until: float) -> asyncio.Task[Any]:
        """Watch the running task until `stop`; ``until`` is event loop time."""
        task = asyncio.current_task()
        assert task is not None
        self._ends[task] = until
        if until < self._wakes:
            self._arm(until)
        return task

    def stop(self, task: asyncio.Task[Any]) -> None:
        """The attempt has ended."""
        del self._ends[task]
        self._late.discard(task)

    def was_late(self, task: asyncio.Task[Any]) -> bool:
        """Whether the CancelledError in hand came from here, and from nowhere else."""
        return task in self._late and task.uncancel() == 0

    def close(self) -> None:
        """Forget the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, when: float) -> None:
        self.close()
        self._wakes = when
        self._timer = asyncio.get_running_loop().call_at(when, self._wake)

    def _wake(self) -> None:
        now, self._wakes = asyncio.get_running_loop().time() + 0.001, math.inf
        for task, until in self._ends.items():
            if until <= now and task not in self._late:
                self._late.add(task)
                task.cancel()
        if rest := [until for task, until in self._ends.items() if task not in self._late]:
            self._arm(min(rest))


class Transport:
    """POSTs JSON to one URL over kept connections.

    ``timeout`` is in seconds per attempt; ``secrets`` never appear in a message. ``failed`` counts attempts that failed
    in passing, by their reason. It belongs to the event loop of its first call; after `close` it may be used again, in
    any loop.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        concurrency: int,
        timeout: float,
        retry: Retry,
        seed: int = 0,
        secrets: tuple[str, ...] = (),
    ) -> None:
        self.limiter = Limiter(concurrency)
        self.crew = Crew(concurrency)
        self.retry = retry
        self.stopped: EndpointError | None = None
        self.failed: Counter[str] = Counter()
        self._url = URL(url)
        self._headers = CIMultiDict(headers)
        self._each_headers: CIMultiDict[str] | None = None
        self._seconds = timeout
        self._watch = _Watch()
        self._secrets = tuple(s for s in secrets if s)
        self._rng = random.Random(seed)
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reached = False

    async def call(self, payload: bytes, draws: int, meter: Meter, read: Read[T], tries: int | None = None) -> T:
        """Send ``payload`` until ``read`` accepts a reply.

        Each attempt is reserved with ``meter`` for ``draws`` draws. Raises Refused, GaveUp, BudgetSpent, and
        EndpointError where the endpoint was never reached or `stopped` is set.
        """
        tries = tries or self.retry.tries
        failures = refusals = 0
        refused_since, deadline = math.inf, asyncio.get_running_loop().time() + meter.seconds_left
        while True:
            try:
                return await self._attempt(payload, draws, meter, read, deadline)
            except _Again as again:
                failed = again
                self.failed[failed.reason] += not isinstance(failed, _Paused)
            now, deadline = asyncio.get_running_loop().time(), min(deadline, failed.deadline)
            throttled = isinstance(failed, _Throttled)
            if throttled:
                refusals += 1
                refused_since = min(refused_since, now)
                if now + (failed.wait or 0) - refused_since > self.retry.patience:
                    raise GaveUp(self._story(failed, f"for {self.retry.patience:g} s"))
            else:
                failures += 1
                if failures >= tries:
                    self._give_up(failed, tries)
            if not failed.wait and not isinstance(failed, _Paused):
                delay = self.retry.delay(refusals if throttled else failures, self._rng)
                await self.crew.rest(max(0.0, min(delay, deadline - now)))

    def stop(self, error: EndpointError) -> None:
        """Let no further attempt start; ``error`` is raised instead."""
        self.stopped = error

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            self._watch.close()
            await self._session.close()
            self._session = self._loop = None
            self.crew = Crew(self.crew.size)

    # ------------------------------------------------------------------------------------- one attempt

    async def _attempt(self, payload: bytes, draws: int, meter: Meter, read: Read[T], deadline: float) -> T:
        if not self.limiter.take():
            await self._slot(deadline)
        try:
            if self.stopped is not None:
                raise EndpointError(str(self.stopped))
            async with meter.attempt(draws) as attempt:
                if self.limiter.paused:  # the reservation had to wait, and a pause began meanwhile
                    attempt.release()
                    raise _Paused("HTTP 429", "", deadline)
                return await self._send(payload, attempt, read)
        finally:
            self.limiter.release()

    async def _slot(self, deadline: float) -> None:
        if deadline == math.inf:
            await self.limiter.acquire()
            return
        try:
            async with asyncio.timeout_at(deadline):
                await self.limiter.acquire()
        except TimeoutError:
            raise BudgetSpent("seconds", "the time cap came before the endpoint took the call") from None

    async def _send(self, payload: bytes, attempt: Attempt, read: Read[T]) -> T:
        session = self._open()
        sent_at = asyncio.get_running_loop().time()
        left = attempt.seconds_left
        deadline = sent_at + left
        task = self._watch.start(sent_at + min(self._seconds, left))
        try:
            async with session.post(
                self._url, data=payload, headers=self._each_headers, allow_redirects=False
            ) as response:
                body = await response.read()
        except asyncio.CancelledError:
            if self._watch.was_late(task):
                raise _Again("timeout", "", deadline) from None
            raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._mishap(error, attempt, deadline) from None
        finally:
            self._watch.stop(task)
        self._reached = True
        if response.status != 200:
            self._judge(response, body, attempt, sent_at, deadline)
        try:
            value, usage = read(body)
        except ValueError as error:
            raise _Again("invalid reply", self._clean(str(error)), deadline) from None
        if usage is not None:
            attempt.settle(usage)
        self.limiter.succeeded()
        return value

    def _judge(
        self, response: aiohttp.ClientResponse, body: bytes, attempt: Attempt, sent_at: float, deadline: float
    ) -> NoReturn:
        """Raise what a status other than 200 means."""
        status, wait = response.status, retry_after(response.headers)
        message, param, code = error_fields(body)
        message = self._clean(message)
        if status == 429 and code != "insufficient_quota":
            attempt.release()
            self.limiter.throttled(sent_at)
            self._pause(wait)
            raise _Throttled("HTTP 429", message, deadline, wait)
        if status >= 500 or status == 408 or status < 300:
            self._pause(wait)
            raise _Again(f"HTTP {status}", message, deadline)
        attempt.release()
        if status < 400:
            target = URL(response.headers.get("location", ""))
            message = f"moved to {target.origin()}{target.path}" if target.absolute else "moved"
        raise Refused(status, message, param, code)

    def _pause(self, wait: float | None) -> None:
        if wait is not None and wait <= self.retry.patience:
            self.limiter.pause(wait)

    def _mishap(self, error: Exception, attempt: Attempt, deadline: float) -> _Again:
        """What an attempt without a whole reply means."""
        unsent = aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientHttpProxyError
        if isinstance(error, unsent):
            attempt.release()
            detail = self._clean(str(getattr(error, "os_error", type(error).__name__)))
            return _Unreachable("no connection", detail, deadline)
        if isinstance(error, aiohttp.ClientPayloadError):
            return _Again("truncated body", "", deadline)
        return _Again("connection lost", type(error).__name__, deadline)

    # ------------------------------------------------------------------------------------------ helpers

    def _give_up(self, failed: _Again, tries: int) -> NoReturn:
        story = self._story(failed, f"after {tries} tries" if tries > 1 else "after 1 try")
        if isinstance(failed, _Unreachable) and not self._reached:
            raise EndpointError(
                f"{self._url.origin()} could not be reached ({story}); check the URL and that the server runs"
            )
        raise GaveUp(story)

    def _story(self, failed: _Again, extent: str) -> str:
        return f"{failed.reason} {extent}" + (f": {failed.detail}" if failed.detail else "")

    def _clean(self, message: str) -> str:
        """``message`` without secrets, cut to a readable length."""
        for secret in self._secrets:
            message = message.replace(secret, "***")
        return message if len(message) <= MESSAGE_CHARACTERS else message[: MESSAGE_CHARACTERS - 3] + "..."

    def _open(self) -> aiohttp.ClientSession:
        """The session, opened by the first call of the running loop."""
        loop = asyncio.get_running_loop()
        if self._session is None:
            self._loop, self._watch = loop, _Watch()
            proxy, login = environment_proxy(self._url)
            # aiohttp sends the session's headers, key and all, to a proxy too; then each call brings its own
            self._each_headers = self._headers if proxy else None
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # the limiter counts
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=None if proxy else self._headers,
                proxy=proxy,
                proxy_auth=login,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            )
        elif self._loop is not loop:
            raise ConsilienceError("the source is in use by another event loop; await its close() there first")
        return self._session


def environment_proxy(url: URL) -> tuple[URL | None, aiohttp.BasicAuth | None]:
    """The proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY set for ``url``, and its login.

    aiohttp's own ``trust_env`` asks two threads for every call, which halves the rate, and lets ~/.netrc overrule
    the key; so it is looked up once.
    """
    proxies = {} if proxy_bypass(url.host or "") else getproxies()
    found = proxies.get(url.scheme) or proxies.get("all")
    if not found:
        return None, None
    proxy = URL(found)
    return proxy.with_user(None), aiohttp.BasicAuth.from_url(proxy)
