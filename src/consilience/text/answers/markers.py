"""The explicit marks of an answer in a reply: ``\\boxed{}``, ``####``, "the answer is" / "Answer:".

Each function returns what the last such mark holds, or None; each takes linear time on any text.
"""

from __future__ import annotations

import re

from .cleaning import clean, first_sentence, last_match

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_TOKEN = re.compile(r"[^\s${}]+")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_HEADING = re.compile(
    r"(?:\d+[.)]\s|\**(?:step|part|case|solution|explanation|conclusion|summary|approach|note|example|given)\b"
    r"|\**(?:the\s+)?(?:final\s+)?answer\**\s*$)|[^\n]*:\**\s*$",
    re.IGNORECASE,
)
_ANSWER_IS = re.compile(
    r"\bthe\s+(?:(?:final|correct|right|best)\s+){0,2}answer\s+is\b[\s:*_]*|\banswer\b[ \t*_]*:[\s*_]*", re.IGNORECASE
)


def last_boxed(text: str) -> str | None:
    """What the last closed, non-empty ``\\boxed{...}`` or ``\\fbox{...}`` holds (``\\boxed 5`` too)."""
    boxes = list(_BOX.finditer(text)) if "\\" in text else []
    if not boxes:
        return None
    closing = _closing_braces(text, {box.end() for box in boxes})
    for box in reversed(boxes):
        if text.startswith("{", box.end()):
            end = closing.get(box.end())
            content = text[box.end() + 1 : end] if end is not None else ""
        else:
            token = _TOKEN.match(text, box.end())
            content = token.group() if token else ""
        if content.strip():
            return content.strip()
    return None


def _closing_braces(text: str, wanted: set[int]) -> dict[int, int]:
    """For each wanted opening brace, where it closes; one pass, escaped braces do not count."""
    open_braces: list[int] = []
    closing: dict[int, int] = {}
    for match in _BRACES.finditer(text, min(wanted)):
        if match.group() == "{":
            open_braces.append(match.start())
        elif match.group() == "}" and open_braces:
            start = open_braces.pop()
            if start in wanted:
                closing[start] = match.start()
    return closing


def last_hashes(text: str) -> str | None:
    """The rest of the last ``####`` line; a line that is a Markdown heading over more text is not an answer."""
    if "####" not in text:
        return None
    end = len(text.rstrip())
    for match in reversed(list(_HASHES.finditer(text))):
        tail = match.group(1).strip()
        heading = match.end() < end and _HEADING.match(tail)
        if tail.strip("*_`") and not heading:
            inner = last_answer_is(tail)
            return inner if inner is not None else tail
    return None


def last_answer_is(text: str) -> str | None:
    """The first sentence after the last "the answer is" or "Answer:" (any case, "final" and "correct" may be added).

    Where nothing follows on the line, the next line that says something; None where nothing follows at all.
    """
    match = last_match(_ANSWER_IS, text)
    if match is None:
        return None
    for line in text[match.end() :].splitlines():
        if clean(line) and not line.lstrip().startswith("```"):
            return first_sentence(line.strip())
    return None
