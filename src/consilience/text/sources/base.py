"""What a source of draws is, and what it is asked: the seam between the session and a model.

A source turns (request, draw indices) into draws. It never stores, votes or counts a budget: the session does,
through the `Meter` it passes in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from consilience.draws import Draw, Usage

Message = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """Everything that decides how a draw is distributed.

    ``params`` are the sampling parameters by their OpenAI names (temperature, top_p, max_tokens, stop, ...), only
    those in force; ``required`` names the ones the user set himself (an endpoint that refuses one of them is an
    error, a refused default is dropped). ``seed`` is the seed of the run. ``question`` and ``problem_id`` are
    labels for finite sources, ``whole`` asks for draws that hold their choice as it came (field ``choice``), and
    ``most_prompt`` says how many tokens the prompt has at most where its bytes do not; they are not part of the
    identity.
    """

    endpoint: str
    model: str
    messages: tuple[Message, ...]
    params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    tools: tuple[Any, ...] | None = None
    response_format: Any = None
    required: frozenset[str] = frozenset()
    question: str = ""
    problem_id: str = ""
    whole: bool = False
    most_prompt: int | None = None

    def canonical(self) -> str:
        """Canonical JSON of what identifies the request (sorted keys, no spaces, UTF-8)."""
        identity = {
            "endpoint": self.endpoint,
            "model": self.model,
            "messages": self.messages,
            "tools": self.tools,
            "response_format": self.response_format,
            "params": self.params,
            "seed": self.seed,
        }
        return json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of `canonical`, in hexadecimal: the first half of a draw's key in the ledger."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def call_seed(self, index: int) -> int:
        """The seed of the call whose first draw has ``index``: 31 bits of SHA-256(request hash, index)."""
        digest = hashlib.sha256(f"{self.hash}:{index}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    @property
    def max_tokens(self) -> int:
        """The most completion tokens one draw may have."""
        return int(self.params.get("max_tokens", self.params.get("max_completion_tokens", 1024)))

    def prompt_bound(self) -> int:
        """``most_prompt``; else, as no tokenizer makes more tokens than bytes, UTF-8 bytes plus 64 for the template.

        The texts, lists and tables among the parameters are added: some endpoints put them into the prompt.
        """
        more = {name: value for name, value in self.params.items() if isinstance(value, str | list | dict)}
        extra = len(json.dumps(more, ensure_ascii=False).encode()) if more else 0  # functions, suffix, documents, ...
        if self.most_prompt is not None:
            return self.most_prompt + extra
        parts = {"messages": self.messages, "tools": self.tools, "response_format": self.response_format}
        plain = sum(len(m["content"].encode()) for m in self.messages if isinstance(m.get("content"), str))
        if self.tools is None and self.response_format is None and _all_plain(self.messages):
            return plain + 64 + extra
        return len(json.dumps(parts, ensure_ascii=False).encode()) + 64 + extra


def _all_plain(messages: Sequence[Message]) -> bool:
    return all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in messages)


class Attempt(Protocol):
    """One attempt at a call, its worst case reserved. Left without a word it is settled at its reservation."""

    seconds_left: float

    def settle(self, usage: Usage) -> None:
        """The endpoint stated what the attempt used."""

    def release(self) -> None:
        """The attempt certainly used nothing (refused before generation, or never sent)."""


class Meter(Protocol):
    """What a source must pass each attempt through; raises `BudgetSpent` before an attempt that could overrun."""

    @property
    def seconds_left(self) -> float:
        """Seconds until the time cap of the run, infinite without one."""

    def attempt(self, draws: int) -> AbstractAsyncContextManager[Attempt]:
        """Reserve the worst case of one call for ``draws`` draws of the request, for as long as it runs."""


Deliver = Callable[[int, Draw], None]
"""Takes (draw index, draw) as soon as the draw exists, so that it is on disk before the call's siblings end."""


class Source(Protocol):
    """A model one can draw from.

    ``name`` is its canonical specification; ``endpoint`` and ``model`` go into the request's identity, the latter
    names the very weights where they are local. ``priced`` says whether a draw can cost money. ``notes`` collects
    what the user should know of the endpoint (no log-probabilities, `n` not supported, ...), each once.
    """

    name: str
    endpoint: str
    model: str
    priced: bool
    notes: list[str]

    async def draw(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
        """Deliver one draw per index, in any order; a draw that failed for good carries its reason in ``error``.

        Raises EndpointError (the run cannot go on), BudgetSpent, SourceExhausted; what was delivered before stays.
        """

    async def close(self) -> None:
        """Give back connections, threads and memory."""
