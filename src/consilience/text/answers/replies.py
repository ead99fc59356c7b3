"""JSON in replies: the ``answer`` field of an object anywhere in the text, and the canonical form of a JSON value.

Replies hold JSON as the whole text, in a fence, inside prose, with raw line breaks or bad escapes in its strings, or
cut short; the last object that has the field counts, and nothing here raises or takes more than linear time.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .cleaning import last_match
from .numeric import whole_number_key

NO_FIELD: Any = object()
"""What :func:`answer_field` returns for a reply without an ``answer`` field (None is a field that says null)."""

_KEY = re.compile(r"""["']\s*answer\s*["']\s*:\s*""", re.IGNORECASE)
_OPEN_OBJECT = re.compile(r'\{\s*"')
_OPEN_ANY = re.compile(r'\{\s*["}]|\[')
_ATTEMPTS = 200  # parses tried per reply; a bound that keeps hostile replies linear
_FENCE = re.compile(r"```[ \t]*(?:json5?|JSON)?[ \t]*\n(.*?)```", re.DOTALL)
_LOOSE_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(?=\s*(?:[,}\n]|```|$))', re.DOTALL)
_SINGLE_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'(?=\s*[,}\n])")
_BARE_VALUE = re.compile(r"""([^\s"'{\[][^"{}\n]{0,200}?)\s{0,20}(?:,\s{0,20}["'}\n]|[}\n])""")
_AFTER_VALUE = re.compile(r"[}\r\n]|,(?![0-9])")
_LONE_BACKSLASH = re.compile(r'\\(?:(?=["\\/bfnrt]|u[0-9a-fA-F]{4})(.)|)', re.DOTALL)
_LOST_ESCAPES = (
    (re.compile(r"\x08(?=[a-z])"), r"\\b"),
    (re.compile(r"\x0c(?=[a-z])"), r"\\f"),
    (re.compile(r"\t(?=ext|imes|heta|an\b|frac|au\b|riangle)"), r"\\t"),
    (re.compile(r"\r(?=ight|angle|ho\b)"), r"\\r"),
    (re.compile(r"\n(?=eq\b|e\b|abla|u\b)"), r"\\n"),
)


class JsonNumber(str):
    """A JSON number as it was written, so that no digit is lost to a float."""


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_float=JsonNumber, parse_int=JsonNumber, parse_constant=_no_constant)


def _decode(text: str, start: int) -> tuple[Any, int] | None:
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def answer_field(text: str) -> Any:
    """The value of the ``answer`` field (key in any case) of the last JSON object that has one, else ``NO_FIELD``.

    Where no object parses, the last ``"answer":`` after a brace is read loosely; its value must be complete.
    """
    if not _KEY.search(text):
        return NO_FIELD
    found = NO_FIELD
    for value in _values(text, _OPEN_OBJECT):
        if isinstance(value, dict):
            for key in value:
                if key.strip().casefold() == "answer":
                    found = value[key]
    return _loose_field(text) if found is NO_FIELD else found


def _values(text: str, opening: re.Pattern[str]) -> list[Any]:
    """Every JSON value that starts at an opening mark, in order; the inside of one that has an answer is skipped."""
    starts = [match.start() for match in opening.finditer(text)][-_ATTEMPTS:]
    values, done = [], 0
    for start in starts:
        if start < done:
            continue
        decoded = _decode(text, start)
        if decoded is not None:
            values.append(decoded[0])
            keys = decoded[0] if isinstance(decoded[0], dict) else ()
            if opening is _OPEN_ANY or any(key.strip().casefold() == "answer" for key in keys):
                done = decoded[1]
    return values


def _loose_field(text: str) -> Any:
    match = last_match(_KEY, text)
    if match is None or "{" not in text[: match.start()]:
        return NO_FIELD
    decoded = _decode(text, match.end())
    after = text[decoded[1] :].lstrip(" \t") if decoded else ""
    whole_at_end = not after and not isinstance(decoded and decoded[0], JsonNumber)  # a number there may be cut
    closed = whole_at_end or _AFTER_VALUE.match(after)
    if decoded and closed:
        return decoded[0]
    return _loose_value(text, match.end())


def _loose_value(text: str, start: int) -> Any:
    """A value that is not JSON: bad escapes in a string, single quotes, or bare words up to the comma or brace."""
    string = _LOOSE_STRING.match(text, start) or _SINGLE_STRING.match(text, start)
    if string:
        content = _LONE_BACKSLASH.sub(_kept_backslash, string.group(1)).replace('\\"', '"').replace('"', '\\"')
        decoded = _decode(f'"{content}"', 0)
        return decoded[0] if decoded else string.group(1)
    bare = _BARE_VALUE.match(text, start)
    return bare.group(1).strip() if bare else NO_FIELD


def _kept_backslash(match: re.Match[str]) -> str:
    return "\\" + match.group(1) if match.group(1) else "\\\\"


def as_text(value: Any) -> str | None:
    """A field's value as an answer: a string as it stands, None for null, canonical JSON for the rest.

    A control character that can only be a lost LaTeX backslash (``"\\frac"`` decoded as a form feed) is put back.
    """
    if value is None:
        return None
    if type(value) is not str:
        return canonical_json(value)
    text: str = value
    for pattern, repair in _LOST_ESCAPES:
        text = pattern.sub(repair, text)
    return text.encode("utf-8", "replace").decode("utf-8")


def reply_value(text: str) -> Any:
    """The JSON value of a reply: the whole text, else the last fenced block, else the last object or list in it.

    ``NO_FIELD`` if none of them parses.
    """
    for candidate in (text, *reversed(_FENCE.findall(text)[-_ATTEMPTS:])):
        value = parse_json(candidate)
        if value is not NO_FIELD:
            return value
    values = _values(text, _OPEN_ANY)
    return values[-1] if values else NO_FIELD


def parse_json(text: str) -> Any:
    """The value of a text that is one JSON value and nothing else, else ``NO_FIELD``."""
    text = text.strip()
    decoded = _decode(text, 0)
    return decoded[0] if decoded is not None and decoded[1] == len(text) else NO_FIELD


def canonical_json(value: Any) -> str | None:
    """The one spelling of a JSON value: sorted keys, no white space, numbers exact (``1.0`` is ``1``).

    None for a value nested too deeply to write.
    """
    try:
        return _write(value)
    except RecursionError:
        return None


def _write(value: Any) -> str:
    if isinstance(value, JsonNumber):
        return whole_number_key(value) or str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_quote(key)}:{_write(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_write, value)) + "]"
    return _quote(value)


def _quote(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode("utf-8")


def json_key(answer: str) -> str:
    """The canonical form of an answer of kind ``json``; an answer that is not JSON is taken as a string."""
    value = parse_json(answer)
    canonical = _quote(answer.strip()) if value is NO_FIELD else canonical_json(value)
    return answer if canonical is None else canonical
