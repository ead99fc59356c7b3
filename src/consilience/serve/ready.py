"""Whether the server can do its work now: keep draws, and reach the upstream."""

from __future__ import annotations

import asyncio
import time

from starlette.types import Message

from consilience.errors import ConsilienceError
from consilience.serve.core import Core
from consilience.serve.errors import ApiError
from consilience.serve.gate import Gate
from consilience.serve.observe import Served
from consilience.serve.passthrough import Passthrough

FRESH = 60.0
"""Seconds for which an answer of the upstream stands for its health."""
PATIENCE = 2.0
"""Seconds that the ledger, and then the upstream, have for an answer."""


class Readiness:
    """Looks after the ledger and the upstream; an observer too, as an answered request shows that both work."""

    def __init__(self, core: Core, passthrough: Passthrough | None, gate: Gate) -> None:
        self._core, self._passthrough, self._gate = core, passthrough, gate
        self._heard: float | None = None
        self._looks: dict[str, asyncio.Task[str | None]] = {}

    def observe(self, served: Served) -> None:
        """Note a request whose answer came from the upstream just now."""
        if served.status == 200 and (served.draws_bought > served.failed or served.policy == "none"):
            self._heard = time.monotonic()

    async def reason(self) -> str | None:
        """Why the server is not ready; None where it is."""
        if self._gate.draining:
            return "shutting down"
        if (reason := await self._one_look("ledger")) is not None:
            return reason
        if self._passthrough is None or (self._heard is not None and time.monotonic() - self._heard < FRESH):
            return None
        return await self._one_look("upstream")

    async def _one_look(self, what: str) -> str | None:
        """Look now, or share the look that is on: however many ask, there is one."""
        look = self._looks.get(what)
        if look is None or look.done():
            work = self._ledger() if what == "ledger" else self._upstream()
            look = self._looks[what] = asyncio.ensure_future(work)
        done, _ = await asyncio.wait({look}, timeout=PATIENCE)
        return look.result() if done else f"{what}: no answer within {PATIENCE:g} s"

    async def _ledger(self) -> str | None:
        try:
            await asyncio.to_thread(self._core.ledger.check)
        except ConsilienceError:
            return "ledger: cannot be written"  # the details, with paths, are for the log of the requests that fail
        return None

    async def _upstream(self) -> str | None:
        status = 0

        async def note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        assert self._passthrough is not None
        try:
            async with asyncio.timeout(PATIENCE):
                await self._passthrough.models("", {}, note)
        except TimeoutError:
            return f"upstream: no answer within {PATIENCE:g} s"
        except ApiError as error:
            return f"upstream: {error.message}"
        except Exception as error:
            return f"upstream: {type(error).__name__}"
        if status in (401, 403):
            return "upstream: it does not accept the server's own key"
        if status >= 500:
            return f"upstream: HTTP {status}"
        self._heard = time.monotonic()
        return None
