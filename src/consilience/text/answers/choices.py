"""The letter of a multiple-choice answer: ``(B)``, ``B.``, ``option B``, ``B: Paris`` are all ``B``.

The article "A" and the pronoun "I" are words, not letters: they count only with brackets, punctuation or a lead word.
"""

from __future__ import annotations

import re

from .cleaning import clean, last_match, unwrap_text

_ALONE = re.compile(r"[\[({]?\s*([A-Za-z])\s*[\])}]?[.:]?")
_SEVERAL = re.compile(r"\(?[A-Z]\)?(?:\s*(?:,|;|/|&|\band\b|\bor\b)\s*(?:(?:and|or)\s+)?\(?[A-Z]\)?)+[.]?")
_START = re.compile(
    r"[\[(]\s*([A-Za-z])\s*[\])]|([A-Za-z])\)|([A-Z])(?:\s*[.:,;]|\s+[-–—]|\s*$)|([B-HJ-Z])(?=\s)"
    r"|([AI])(?=\s+(?:because|since|as it|is (?:correct|right|the)))"
)
_LED = re.compile(r"\b(?i:option|choice|answer|letter)\s+[\[(*\"'`]*([A-Z])\b(?!['’])")
_BRACKETED = re.compile(r"[\[(]\s*([A-Z])\s*[\])]")
_BARE = re.compile(r"(?<![\w'’.])(?:([B-HJ-Z])(?![\w'’])|([AI])(?=[\"'*`)\]]{0,4}[.,;:]?[\"'*`)\]]{0,4}$))")


def choice_letter(text: str, *, last: bool = False) -> str | None:
    """The capital letter a short text chooses, None if it chooses none, empty if it lists several (``A, C``).

    A text that is or starts with a letter is that letter; else "option B"; else "(B)"; else a capital standing alone.
    ``last`` takes the last of equal candidates instead of the first, for a line that reasons before it concludes.
    """
    text = clean(unwrap_text(text))
    alone = _ALONE.fullmatch(text)
    if alone:
        return alone.group(1).upper()
    if _SEVERAL.fullmatch(text):
        return ""
    start = _START.match(text)
    if start:
        return _letter(start)
    for form in (_LED, _BRACKETED, _BARE):
        found = last_match(form, text) if last else form.search(text)
        if found is not None:
            return _letter(found)
    return None


def _letter(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group).upper()
