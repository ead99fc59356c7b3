"""A normal form for short LaTeX answers: spelling that does not change the value is removed.

Spacing, sizes, ``\\left``/``\\right``, degree and percent signs, units after a value, ``x =`` before it, and the short
spellings ``\\frac12`` and ``\\sqrt2``. Equal normal forms mean equal answers; unequal ones decide nothing.
"""

from __future__ import annotations

import re

from .cleaning import clean, unwrap_text

_UNIT = re.compile(r"(?<=[\w)}\]°%$])(?:\\[ ,;:!]|[~\s])*\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?$")
_DROP = re.compile(
    r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|textstyle|limits|nolimits|quad|qquad)(?![A-Za-z])\s*"
    r"|\\[,!;: ]|~|\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])|°|\\?%|\\?\$"
)
_FRAC_NAME = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_SHORT_FRAC = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))")
_SHORT_SQRT = re.compile(r"\\sqrt\s*([0-9A-Za-z])")
_NAMED = re.compile(r"^[A-Za-z]\s*(?:=|\\in(?![A-Za-z]))\s*([^=]+)$")
_COMMAND_GAP = re.compile(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])")
_SPACE = re.compile(r"\s+")
_PLAIN_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s,.'’-]+[^\W\d_]+)*|[^\W\d_]+(?:[\s,.'’-]+[^\W\d_]+)*\s+[^\W\d_]{3,}")


def normal_form(answer: str) -> str:
    """The answer with its spelling made one: see the module's docstring. Idempotent on what models write."""
    text = clean(answer)
    bare = _UNIT.sub("", text).strip()
    text = unwrap_text(bare or text)
    words = _DROP.sub("", text).strip()
    if is_words(words):
        return _SPACE.sub(" ", words)
    text = _FRAC_NAME.sub(r"\\frac", words)
    text = _SHORT_FRAC.sub(_full_fraction, text)
    text = _SHORT_SQRT.sub(r"\\sqrt{\1}", text)
    named = _NAMED.match(text)
    text = named.group(1) if named else text
    text = _COMMAND_GAP.sub(lambda match: match.group(1) + "\0", text)
    return clean(_SPACE.sub("", text).replace("\0", " "))


def _full_fraction(match: re.Match[str]) -> str:
    top, short_top, bottom, short_bottom = match.groups()
    return f"\\frac{{{short_top if top is None else top}}}{{{short_bottom if bottom is None else bottom}}}"


def is_words(text: str) -> bool:
    """Whether the text is plain words ("no solution"), to be compared as text and not as a product of letters."""
    return len(text) <= 2000 and bool(_PLAIN_WORDS.fullmatch(text))
