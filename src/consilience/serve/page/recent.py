"""The latest requests, kept in memory for the page: each client's apart, bounded in number and in text."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from consilience.draws import Draw
from consilience.serve.observe import Served, Voted

KEPT = 100
"""Requests kept for each client of the configuration, or in all where there are none."""
TEXT = 16_384
"""Characters kept of one draw."""
ANSWER = 1024
"""Characters kept of an answer, or of an error."""
ANSWERS = 64
"""Answers whose votes are kept of one request: those with the most; where it has several choices, fewer of each."""
TEXTS = 8_000_000
"""Characters kept of one client's draws together; the oldest requests lose theirs first."""


@dataclass
class Totals:
    """Sums over all requests since the server started, also those that are no longer kept; money in USD.

    ``unpriced`` counts the answered requests whose cost is not known.
    """

    requests: int = 0
    errors: int = 0
    draws: int = 0
    saved: int = 0
    tokens: int = 0
    cost: float = 0.0
    unpriced: int = 0

    def add(self, served: Served) -> None:
        """Count one more request."""
        self.requests += 1
        self.errors += served.status >= 400
        self.draws += served.draws
        self.saved += served.saved
        self.tokens += served.prompt_tokens + served.completion_tokens
        self.cost += served.cost or 0.0
        self.unpriced += served.status < 400 and served.cost is None


@dataclass
class _Kept:
    """What is kept of one client."""

    totals: Totals = field(default_factory=Totals)
    latest: OrderedDict[str, Served] = field(default_factory=OrderedDict)
    texts: int = 0


class Recent:
    """Told of every request as an observer of the core.

    ``apart``: each client's requests are kept, counted and shown apart; otherwise all together, under the name "".
    """

    def __init__(self, apart: bool, most: int = KEPT, texts: int = TEXTS) -> None:
        self._apart, self._most, self._texts = apart, most, texts
        self._of: dict[str, _Kept] = {}

    def note(self, served: Served) -> None:
        """Keep a completion, answered or not; the oldest is let go where there are too many."""
        if not served.path.endswith("completions"):
            return
        kept = self._of.setdefault(served.client if self._apart else "", _Kept())
        kept.totals.add(served)
        served = _shortened(served)
        if (old := kept.latest.pop(served.id, None)) is not None:
            kept.texts -= _size(old)
        kept.latest[served.id] = served
        kept.texts += _size(served)
        while len(kept.latest) > self._most:
            kept.texts -= _size(kept.latest.popitem(last=False)[1])
        for name, old in kept.latest.items():
            if kept.texts <= self._texts:
                break
            kept.texts -= _size(old)
            kept.latest[name] = _without_texts(old)

    def shown(self, owner: str) -> dict[str, Any]:
        """The latest requests of a client, newest first and without the texts of their draws, and his totals."""
        kept = self._of.get(owner, _Kept())
        return {"requests": [_row(one) for one in reversed(kept.latest.values())], "totals": asdict(kept.totals)}

    def one(self, owner: str, name: str) -> dict[str, Any] | None:
        """A kept request of a client with its draws, None where there is none of that id."""
        served = self._of.get(owner, _Kept()).latest.get(name)
        if served is None:
            return None
        others = [asdict(other) | {"drawn": _texts(other.drawn)} for other in served.others]
        return _row(served) | {"drawn": _texts(served.drawn), "others": others}


_SHOWN = (
    "id",
    "at",
    "model",
    "policy",
    "status",
    "seconds",
    "question",
    "answer",
    "confidence",
    "votes",
    "stopped_because",
    "draws",
    "saved",
    "prompt_tokens",
    "completion_tokens",
    "cost",
    "error",
)


def _row(served: Served) -> dict[str, Any]:
    return {name: getattr(served, name) for name in _SHOWN} | {"choices": 1 + len(served.others)}


def _texts(drawn: tuple[Draw, ...]) -> list[dict[str, str | None]]:
    return [{"text": draw.text, "answer": draw.answer, "error": draw.error} for draw in drawn]


def _without_texts(served: Served) -> Served:
    return replace(served, drawn=(), others=tuple(replace(other, drawn=()) for other in served.others))


def _size(served: Served) -> int:
    drawn = [served.drawn, *(other.drawn for other in served.others)]
    return sum(len(draw.text) for one in drawn for draw in one)


def _cut(text: str | None, most: int) -> str | None:
    return text if text is None or len(text) <= most else text[:most] + " …"


def _shortened(served: Served) -> Served:
    """The request with long texts cut, and without the rest of the upstream's replies."""
    most = max(1, ANSWERS // (1 + len(served.others)))
    others = tuple(replace(other, **_verdict(other, most)) for other in served.others)
    return replace(served, error=_cut(served.error, ANSWER), others=others, **_verdict(served, most))


def _verdict(one: Served | Voted, most: int) -> dict[str, Any]:
    """The texts of a verdict, cut, with the votes of so many answers."""
    votes: dict[str, float] = {}
    for answer, count in sorted(one.votes.items(), key=lambda vote: -vote[1])[:most]:
        name = _cut(answer, ANSWER) or ""
        votes[name] = votes.get(name, 0) + count
    drawn = tuple(
        Draw(text=_cut(draw.text, TEXT) or "", answer=_cut(draw.answer, ANSWER), error=_cut(draw.error, ANSWER))
        for draw in one.drawn
    )
    return {"answer": _cut(one.answer, ANSWER), "votes": votes, "drawn": drawn}
