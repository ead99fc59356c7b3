"""The kinds of answer that can be voted on.

A kind fixes two things: how an answer is read from a reply, and when two answers are the same. Answers of most kinds
are compared by what they say; ``code`` and ``sql`` by what they do, which takes a problem to try them on. A question
of another kind has no vote rule here and is an error that names the kinds that have one.
"""

from __future__ import annotations

BEHAVIOUR_KINDS: tuple[str, ...] = ("code", "sql")
"""The kinds whose answers are run, and are the same if they do the same."""

KINDS: tuple[str, ...] = ("auto", "number", "math", "choice", "text", "json", "open", *BEHAVIOUR_KINDS)
"""Every kind with a vote rule."""


def check_kind(kind: str) -> str:
    """Return ``kind`` unchanged, or raise ValueError naming the kinds that have a vote rule."""
    if kind not in KINDS:
        raise ValueError(f"answer kind {kind!r} has no vote rule; the kinds are {', '.join(KINDS)}")
    return kind


def check_words_kind(kind: str) -> str:
    """As :func:`check_kind`, and ValueError for a kind that two answers alone cannot be compared in."""
    if kind in BEHAVIOUR_KINDS:
        raise ValueError(
            f"answers of kind {kind!r} are compared by behaviour, which needs their problem: "
            "use consilience.text.answers.behaviour.BehaviourClasses(problem, kind)"
        )
    return check_kind(kind)
