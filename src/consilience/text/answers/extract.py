"""From a reply to its answer: the first rule that finds one wins, and each rule takes its last occurrence.

The rules, in order: the user's pattern; the ``answer`` field of a JSON reply; ``\\boxed{}``; ``####``; "the answer is"
or "Answer:"; the final line; for kind ``number`` the last number of the text. The last two are guesses: kind ``auto``
and a reply cut by its token limit do without them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from .choices import choice_letter
from .cleaning import clean, lines_from_end, unwrap_text
from .code import read_code, read_sql
from .kinds import check_kind
from .markers import last_answer_is, last_boxed, last_hashes
from .numeric import number_key, result_key, whole_number_key
from .replies import NO_FIELD, answer_field, as_text, canonical_json, parse_json, reply_value

_SPAN = re.compile(
    r"\$\$([^$]+)\$\$|\$([^$\n]+)\$|\\\(((?:[^\\\n]|\\(?![()]))+)\\\)|\\\[((?:[^\\\n]|\\(?![\[\]]))+)\\\]"
)


class Candidate(NamedTuple):
    """A piece of a reply that may hold the answer, and where it was found."""

    text: str
    place: str  # "pattern", "field", "mark" (boxed), "tail" (after #### or "the answer is") or "line"


@lru_cache(maxsize=256)
def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the answer pattern {pattern!r} is not a regular expression: {error}") from error


def compile_pattern(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    """The compiled pattern; ValueError that quotes it and says what is wrong if it is not a regular expression."""
    return _compile(pattern) if isinstance(pattern, str) else pattern


def extract(
    text: str,
    kind: str = "auto",
    *,
    pattern: str | re.Pattern[str] | None = None,
    finish_reason: str | None = None,
    entry_point: str | None = None,
) -> str | None:
    """The answer a reply gives, as a string of its kind, or None if it gives none.

    ``number`` gives the exact value (``1234.5``, ``1/3``), ``choice`` a capital letter, ``json`` canonical JSON; the
    others the reply's own words without their wrapping. ``pattern`` alone decides where it is given: its last match
    that is not empty, group 1 if it has a group; no match, or a match that is no answer of the kind, is None. A JSON
    ``answer`` field decides alone too (null and empty are None). A mark without a number (or letter) leaves it to the
    next rule; one that lists several letters is no answer.

    ``code`` gives the last fenced Python block that defines ``entry_point`` (not given: any function or class), else
    the whole reply; ``sql`` the last fenced query, else the text from its first SELECT or WITH; ``open`` the whole
    reply.

    Raises ValueError for a kind without a vote rule and for a pattern that is not a regular expression.
    """
    check_kind(kind)
    if kind in _WHOLE:
        return _read_whole(text, kind, pattern, entry_point)
    read = _READERS[kind]
    if pattern is not None:
        found = _last_match(compile_pattern(pattern), text)
        return read(Candidate(found, "pattern")) if found else None
    value = answer_field(text)
    if value is not NO_FIELD:
        return canonical_json(value) if kind == "json" else _read_field(read, as_text(value))
    explicit_only = kind == "auto" or finish_reason == "length"
    if kind == "json" and not explicit_only:
        value = reply_value(text)
        if value is not NO_FIELD:
            return canonical_json(value)
    for candidate in _candidates(text, explicit_only):
        answer = read(candidate)
        if answer is not None:
            return answer or None
    return number_key(text) if kind == "number" and not explicit_only else None


def _read_whole(text: str, kind: str, pattern: str | re.Pattern[str] | None, entry_point: str | None) -> str | None:
    if pattern is not None:
        return _last_match(compile_pattern(pattern), text)
    return read_code(text, entry_point) if kind == "code" else _WHOLE[kind](text)


def _read_field(read: Callable[[Candidate], str | None], value: str | None) -> str | None:
    if not value:
        return None
    boxed = last_boxed(value)
    return read(Candidate(value, "field") if boxed is None else Candidate(boxed, "mark"))


def _last_match(pattern: re.Pattern[str], text: str) -> str | None:
    found = None
    for match in pattern.finditer(text):
        content = match.group(1 if pattern.groups else 0)
        if content and content.strip():
            found = content
    return found


def _candidates(text: str, explicit_only: bool) -> Iterator[Candidate]:
    boxed = last_boxed(text)
    if boxed is not None:
        yield Candidate(boxed, "mark")
    for rule in (last_hashes, last_answer_is):
        tail = rule(text)
        if tail is not None:
            inner = last_boxed(tail)
            yield Candidate(tail if inner is None else inner, "tail")
    if not explicit_only:
        yield from (Candidate(line, "line") for line in lines_from_end(text)[:1])


def _read_words(candidate: Candidate) -> str | None:
    return clean(unwrap_text(clean(candidate.text))) or None


def _read_auto(candidate: Candidate) -> str | None:
    return clean(candidate.text) or None


def _read_number(candidate: Candidate) -> str | None:
    """One number as a whole; in a tail what its statement arrives at, in a longer text the last number."""
    whole = whole_number_key(clean(candidate.text))
    if whole is not None:
        return whole
    return result_key(candidate.text) if candidate.place == "tail" else number_key(candidate.text)


def _read_choice(candidate: Candidate) -> str | None:
    return choice_letter(candidate.text, last=candidate.place == "line")


def _read_math(candidate: Candidate) -> str | None:
    """LaTeX as it stands; in prose the formula: the first one of a tail that starts with it, the last one of a line."""
    text = candidate.text
    if candidate.place in ("tail", "line"):
        spans = list(_SPAN.finditer(text))
        if spans and candidate.place == "line":
            text = spans[-1].group()
        elif spans and not text[: spans[0].start()].strip(" *_:"):
            text = spans[0].group()
    return clean(text) or None


def _read_json(candidate: Candidate) -> str | None:
    value = parse_json(clean(candidate.text))
    return None if value is NO_FIELD else canonical_json(value)


_WHOLE: dict[str, Callable[[str], str | None]] = {
    "code": read_code,
    "sql": read_sql,
    "open": lambda text: text.strip() or None,
}
_READERS: dict[str, Callable[[Candidate], str | None]] = {
    "auto": _read_auto,
    "number": _read_number,
    "math": _read_math,
    "choice": _read_choice,
    "text": _read_words,
    "json": _read_json,
}
