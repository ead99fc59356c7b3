"""The kinds of answer that can be voted on.

A kind fixes two things: how an answer is read from a reply, and when two answers are the same. A question of another
kind (``code``, ``sql``, ...) has no vote rule here and is an error that names the kinds that have one.
"""

from __future__ import annotations

KINDS: tuple[str, ...] = ("auto", "number", "math", "choice", "text", "json")
"""Every kind with a vote rule."""


def check_kind(kind: str) -> str:
    """Return ``kind`` unchanged, or raise ValueError naming the kinds that have a vote rule."""
    if kind not in KINDS:
        raise ValueError(f"answer kind {kind!r} has no vote rule; the kinds are {', '.join(KINDS)}")
    return kind
