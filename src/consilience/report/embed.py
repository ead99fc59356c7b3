"""The questions as JSON inside the page: bounded in size, and inert whatever the model wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from consilience.report.rows import QuestionRow

MAX_QUESTIONS = 2_000
MAX_TEXT_BYTES = 8_000_000
MAX_REPLIES = 80_000
_LEAST_TEXT = 32
MAX_VOTES = 24
_UNSAFE = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026", 0x2028: "\\u2028", 0x2029: "\\u2029"}


@dataclass(frozen=True, slots=True)
class Embedded:
    """``json`` is safe inside a script element; ``left_out`` says in sentences what the page does not hold."""

    json: str
    left_out: list[str]


def safe_json(value: Any) -> str:
    """JSON without any ``<``, ``>`` or ``&``: no text can end the element that holds it. UTF-8 can write it all:
    half of a surrogate pair becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_UNSAFE)
    return text.encode("utf-8", "replace").decode("utf-8")


def clip(text: str, limit: int) -> str:
    """``text`` with its middle left out where it is longer than ``limit``; the end, where answers are, stays."""
    if len(text) <= limit:
        return text
    head = limit // 3
    tail = limit - head
    return f"{text[:head]} [… {len(text) - limit:,} characters left out …] {text[len(text) - tail :]}"


def embed(questions: Sequence[QuestionRow]) -> Embedded:
    """The table's rows as JSON, at most `MAX_QUESTIONS` questions and about `MAX_TEXT_BYTES` of texts."""
    shown = questions[:MAX_QUESTIONS]
    replies = max(1, MAX_REPLIES // max(1, len(shown)))
    limit = _text_limit(list(_texts(shown, replies)))
    left_out = []
    if len(shown) < len(questions):
        left_out.append(f"The first {len(shown):,} of {len(questions):,} questions are listed here.")
    if any(len(row.replies) > replies for row in shown):
        left_out.append(f"At most {replies:,} draws of a question are shown.")
    if limit is not None:
        left_out.append(f"Texts longer than {limit:,} characters are shown without their middle.")
    if left_out:
        left_out.append("The record holds all of it.")
    rows = [_row(row, replies, _as_number(limit)) for row in shown]
    return Embedded(safe_json(rows), left_out)


def _as_number(limit: int | None) -> int:
    """No limit as a number larger than any text."""
    return 1 << 60 if limit is None else limit


def _texts(questions: Sequence[QuestionRow], replies: int) -> Iterator[str]:
    for row in questions:
        yield from (row.id, row.question, row.gold or "", row.answer or "", row.stopped_because)
        yield from sorted(row.votes, key=lambda name: -row.votes[name])[:MAX_VOTES]
        for reply in row.replies[:replies]:
            yield from (reply.text, reply.answer or "", reply.error or "")


def _text_limit(texts: list[str]) -> int | None:
    """The largest length to cut every text to so that all fit; None where nothing has to be cut."""
    written = len(safe_json(texts).encode()) - 3 * len(texts)  # without quotes and commas
    if written <= MAX_TEXT_BYTES:
        return None
    lengths = sorted(len(text) for text in texts)
    room, left = int(MAX_TEXT_BYTES * sum(lengths) / written), len(lengths)  # in characters
    for length in lengths:
        if length * left > room:
            return max(_LEAST_TEXT, room // left)
        room, left = room - length, left - 1
    return None


def _row(row: QuestionRow, replies: int, limit: int) -> dict[str, Any]:
    votes = sorted(row.votes.items(), key=lambda pair: -pair[1])
    return {
        "id": clip(row.id, limit),
        "question": clip(row.question, limit),
        "gold": None if row.gold is None else clip(row.gold, limit),
        "answer": None if row.answer is None else clip(row.answer, limit),
        "right": row.right,
        "decided": row.decided,
        "confidence": _finite(row.confidence),
        "draws": row.draws,
        "why": clip(row.stopped_because, limit),
        "votes": [[clip(name, limit), _finite(weight)] for name, weight in votes[:MAX_VOTES]],
        "rest": [len(votes) - MAX_VOTES, sum(_finite(weight) for _, weight in votes[MAX_VOTES:])]
        if len(votes) > MAX_VOTES
        else None,
        "replies": [
            [
                clip(reply.text, limit),
                None if reply.answer is None else clip(reply.answer, limit),
                None if reply.error is None else clip(reply.error, limit),
                int(reply.judged),
            ]
            for reply in row.replies[:replies]
        ],
        "hidden": max(0, len(row.replies) - replies),
    }


def _finite(value: float) -> float:
    return round(float(value), 6) if math.isfinite(value) else 0.0
