"""Small string work shared by all kinds: strip the wrapping around an answer, cut a line at its first sentence.

Everything here is linear in the length of the text, whatever the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque

_PAIRS = (
    ("**", "**"),
    ("__", "__"),
    ("```", "```"),
    ("`", "`"),
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ('"', '"'),
    ("'", "'"),
    ("“", "”"),
    ("‘", "’"),
    ("«", "»"),
    ("*", "*"),
)
_OPENINGS = frozenset(left[0] for left, _ in _PAIRS)
_MARKS = ("**", "```", "\\[", "\\]", "\\(", "\\)", "$$")
_MARK_ENDS = frozenset("*`\\[]()$")
_TAIL = ".,;"  # not "!": 5! is a factorial; not "?": an answer may be "?"
_SPACE_OR_TAIL = _TAIL + " \t\r\n\f\v\u00a0\u202f"
_TEXT_MACRO = re.compile(r"\\(?:text|mathrm|mbox|operatorname|math|text)(?:bf|it|rm|sf|tt|normal)?\s*\{([^{}]*)\}")
_SENTENCE_END = re.compile(r"[.!?][\"'”’*_)\]]{0,8}\s{1,8}(?=[\"'“*(]{0,4}[A-Z])")
_LAST_WORD = re.compile(r"[\w'’]+$")
_ABBREVIATIONS = frozenset({"vs", "eg", "ie", "cf", "no", "approx", "etc"})


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match of a pattern in a text, None if there is none."""
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None


def clean(text: str) -> str:
    """The answer without what wraps it: white space, a final ``.``, ``$...$``, ``\\(...\\)``, bold, quotes, backticks.

    Only a pair that closes once is removed (``$5$ and $6$`` stays), and a lone ``**`` left over by a cut is dropped.
    """
    while True:
        stripped = _unpair(text.strip().rstrip(_SPACE_OR_TAIL))
        if stripped == text:
            return text
        text = stripped


def _unpair(text: str) -> str:
    """One layer of wrapping removed, if there is one."""
    if not text or (text[0] not in _OPENINGS and text[-1] not in _MARK_ENDS and text[0] not in _MARK_ENDS):
        return text
    for left, right in _PAIRS:
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
            inner = text[len(left) : len(text) - len(right)]
            if inner.strip() and left not in inner and right not in inner:
                return inner
    return _unpaired(text)


def _unpaired(text: str) -> str:
    """A bold mark, a fence or a delimiter whose partner was left outside is removed; a lone ``*`` can be an answer."""
    for mark in _MARKS:
        if text.count(mark) == 1:
            if text.startswith(mark):
                return text[len(mark) :]
            if text.endswith(mark):
                return text[: -len(mark)]
    return text


def unwrap_text(text: str) -> str:
    """``\\text{Paris}`` and its relatives (``\\mathrm``, ``\\textbf``, ...) replaced by what they hold."""
    for _ in range(3):
        if "\\" not in text:
            break
        text = _TEXT_MACRO.sub(r"\1", text)
    return text


def first_sentence(line: str) -> str:
    """The line up to its first sentence end: a ``.``, ``!`` or ``?`` before a space and a capital.

    A full stop after a short capitalised word (St. Louis, U.S. Army) or a usual abbreviation ends nothing.
    """
    for match in _SENTENCE_END.finditer(line):
        word = _LAST_WORD.findall(line[max(0, match.start() - 20) : match.start()])[-1:]
        short_name = bool(word) and word[0][0].isupper() and len(word[0]) <= 3 and word[0] not in ("Yes", "No")
        if not short_name and (not word or word[0].casefold() not in _ABBREVIATIONS or word[0] == "No"):
            return line[: match.end()]
    return line


def lines_from_end(text: str) -> list[str]:
    """The lines of the text that say something, last first; fence lines and lines of pure wrapping are left out."""
    lines = (line.strip() for line in reversed(text.splitlines()))
    return [line for line in lines if line and not line.startswith("```") and line.strip("*_`$\\[]() .")]


def text_key(text: str) -> str:
    """Case-folded, with everything but letters and digits removed; two texts with one key are the same answer.

    Unicode is compatibility-normalised first, and combining marks stay with their letter, so that words that differ
    in a vowel sign stay apart. A text without any letter or digit (``+``, ``?!``) is its own key, stripped.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", unwrap_text(text)).casefold())
    if folded.isascii():
        key = "".join(filter(str.isalnum, folded))
    else:
        key = "".join(char for char in folded if _counts(char))
    return key or text.strip()


def _counts(char: str) -> bool:
    return char.isalnum() or (unicodedata.category(char) in ("Mn", "Mc") and not "\ufe00" <= char <= "\ufe0f")
