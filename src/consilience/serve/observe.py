"""What the server knows of a request once it is over: metrics and the page are told, and keep what they need."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Send

from consilience.draws import Draw
from consilience.serve.errors import ApiError

if TYPE_CHECKING:
    from consilience.serve.core import Answer


@dataclass(frozen=True)
class Served:
    """One request, answered or not.

    ``at`` is seconds since the epoch, ``seconds`` how long it took; ``question`` is the last user message, cut short.
    ``answer``, ``confidence``, ``votes`` and ``stopped_because`` are those of the first choice; ``saved`` counts draws
    that the policy's maximum would have taken beyond ``draws``. ``status`` is the HTTP status, 499 where the client
    went away. ``draws_bought`` and ``failed`` count what was paid for and what failed for good, also where nothing came
    of it; ``upstream_failed`` says that the request failed because the upstream did; tokens and cost are those of the
    draws used. Money is in USD, None where it is not known. ``drawn`` are the draws judged for the first choice.
    """

    id: str
    at: float
    path: str
    client: str
    model: str
    policy: str
    status: int
    seconds: float
    question: str = ""
    answer: str | None = None
    confidence: float | None = None
    votes: dict[str, float] = field(default_factory=dict)
    stopped_because: str = ""
    draws: int = 0
    draws_bought: int = 0
    saved: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    error: str | None = None
    drawn: tuple[Draw, ...] = ()
    failed: int = 0
    upstream_failed: bool = False


Observer = Callable[[Served], None]
"""Told of every request; must return at once."""

GONE = 499
"""The status of a request whose client went away."""
SHOWN = 200
"""Characters of a question that are kept."""
UPSTREAM = {"upstream_failed", "upstream_unavailable", "upstream_key_refused", "rate_limit_exceeded"}
"""The codes of errors that are the upstream's."""


class Outgoing:
    """The way out of one request: passes its messages on, and gathers what becomes known of it until its end.

    ``known`` holds fields of `Served` by name.
    """

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._path = path
        self._at, self._began = time.time(), time.monotonic()
        self.status = 0
        self.known: dict[str, Any] = {}

    @property
    def started(self) -> bool:
        """Whether the status line is out."""
        return self.status != 0

    async def __call__(self, message: Message) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    def knows(self, **more: Any) -> None:
        """Take in what is known by now."""
        self.known.update(more)

    def answered(self, answer: Answer) -> None:
        """Take in what was agreed on."""
        first, used = answer.choices[0], answer.usage
        self.knows(
            policy=answer.policy,
            answer=first.verdict.answer,
            confidence=first.confidence,
            votes=dict(first.verdict.votes),
            stopped_because=first.verdict.stopped_because,
            draws=sum(choice.verdict.draws for choice in answer.choices),
            saved=answer.saved,
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            cost=answer.cost,
            drawn=first.drawn,
        )

    def failed(self, error: Exception) -> None:
        """Take in why there is no answer."""
        if isinstance(error, ApiError):
            self.knows(error=error.message, upstream_failed=error.code in UPSTREAM)
        else:
            self.knows(error="the server or its connection to the upstream failed")

    def served(self) -> Served:
        """The request, now that it is over."""
        known = dict.fromkeys(("client", "model", "policy"), "") | {"status": self.status or GONE} | self.known
        known.setdefault("id", f"req-{secrets.token_hex(12)}")
        if known["policy"] == "none" and known["status"] >= 500:
            known["upstream_failed"] = True
        return Served(at=self._at, path=self._path, seconds=time.monotonic() - self._began, **known)
