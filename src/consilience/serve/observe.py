"""What the server knows of a request once it is over: metrics and the page are told, and keep what they need."""

from __future__ import annotations

import json
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Send

from consilience.draws import Draw
from consilience.serve.errors import ApiError

if TYPE_CHECKING:
    from consilience.serve.core import Answer, Choice


@dataclass(frozen=True, slots=True)
class Voted:
    """One choice of several: its verdict, and the draws judged for it."""

    answer: str | None
    confidence: float | None
    votes: dict[str, float]
    stopped_because: str
    draws: int
    drawn: tuple[Draw, ...] = ()


@dataclass(frozen=True)
class Served:
    """One request, answered or not.

    ``at`` is seconds since the epoch, ``seconds`` how long it took; ``question`` is the last user message, cut short.
    ``answer``, ``confidence``, ``votes`` and ``stopped_because`` are those of the first choice; ``saved`` counts draws
    that the policy's maximum would have taken beyond ``draws``. ``status`` is the HTTP status, 499 where the client
    went away. ``draws_bought`` and ``failed`` count what was paid for and what failed for good, also where nothing came
    of it; ``upstream_failed`` says that the request failed because the upstream did; tokens and cost are those of the
    draws used, for a request that was passed through those that its reply states. Money is in USD, None where it is not
    known. ``drawn`` are the draws judged for the first choice; ``others`` are the choices after it.
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
    others: tuple[Voted, ...] = ()


Observer = Callable[[Served], None]
"""Told of every request; must return at once."""

GONE = 499
"""The status of a request whose client went away."""
SHOWN = 200
"""Characters of a question that are kept."""
TAIL = 64 * 1024
"""Bytes at the end of a reply that was passed through in which its usage is looked for."""
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
        self._last: deque[bytes] = deque()
        self._size = 0

    @property
    def started(self) -> bool:
        """Whether the status line is out."""
        return self.status != 0

    async def __call__(self, message: Message) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif self.known.get("policy") == "none":
            self._keep(message.get("body", b""))
        await self._send(message)

    def _keep(self, piece: bytes) -> None:
        """Hold on to the end of a reply: as few pieces as have `TAIL` bytes."""
        self._last.append(piece)
        self._size += len(piece)
        while self._size - len(self._last[0]) >= TAIL:
            self._size -= len(self._last.popleft())

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
            others=tuple(_voted(choice) for choice in answer.choices[1:]),
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
        if self._last and known["status"] == 200:
            known |= stated_tokens(b"".join(self._last)[-TAIL:])
        return Served(at=self._at, path=self._path, seconds=time.monotonic() - self._began, **known)


def _voted(choice: Choice) -> Voted:
    verdict = choice.verdict
    return Voted(
        verdict.answer, choice.confidence, dict(verdict.votes), verdict.stopped_because, verdict.draws, choice.drawn
    )


def stated_tokens(tail: bytes) -> dict[str, int]:
    """The tokens that the end of a reply states, of JSON or of a stream; nothing where it states none, or is packed.

    In a text of the reply the quotation marks would be escaped, so what is found is a name of the reply itself.
    """
    place = tail.rfind(b'"usage"')
    _, _, rest = tail[place + 7 :].partition(b":") if place >= 0 else (b"", b"", b"")
    try:
        usage, _ = json.JSONDecoder().raw_decode(rest.decode("utf-8", "replace").lstrip())
    except (ValueError, RecursionError):
        return {}
    names = ("prompt_tokens", "completion_tokens")
    counts = {name: usage.get(name, 0) for name in names} if isinstance(usage, dict) else {}
    return counts if all(type(count) is int and 0 <= count < 2**53 for count in counts.values()) else {}
