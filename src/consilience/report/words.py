"""Numbers and names as the page prints them; anything that looks like a secret is struck out."""

from __future__ import annotations

import math
import re

DASH = "–"

_USERINFO = re.compile(r"(?<=://)[^\s/@\"']+(?=@)")
_KEYS = r"(?:api[-_]?key|access[-_]?key|auth(?:orization)?|password|passwd|secret|token)"
_NAMED = re.compile(
    rf"(?i)({_KEYS}[\"']?\s*[=:]\s*[\"']?|--[a-z-]*{_KEYS}\s+|\bbearer\s+(?=\S{{8}}))"
    r"(?!\d+(?:[\s,;&]|$))((?:bearer\s+)?[^\s\"'&,;]{4,})"
)
_SHAPED = re.compile(r"\b(?:sk|pk|rk|hf|ghp|gho|xox[abp])[-_][A-Za-z0-9_-]{12,}")
STRUCK = "•••"


def redact(text: str) -> str:
    """``text`` without passwords in URLs, named keys and tokens, and strings shaped like keys."""
    text = _USERINFO.sub(STRUCK, text)
    text = _NAMED.sub(lambda match: match.group(1) + STRUCK, text)
    return _SHAPED.sub(STRUCK, text)


def known(value: float | None) -> bool:
    """True when there is a finite number to print."""
    return value is not None and math.isfinite(value)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}\u202f%"


def interval(pair: tuple[float, float] | None, digits: int = 1) -> str:
    """An interval of shares in per cent, without the sign."""
    if pair is None or not all(math.isfinite(side) for side in pair):
        return ""
    return f"{100 * pair[0]:.{digits}f}{DASH}{100 * pair[1]:.{digits}f}"


def number(value: float | None, digits: int | None = None) -> str:
    """A count or a mean; large numbers with thousands separators."""
    if value is None or not math.isfinite(value):
        return DASH
    if digits is None:
        digits = 0 if float(value).is_integer() or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def money(value: float | None) -> str:
    """US dollars, with enough digits for a small sum."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "$0"
    digits = 2 if abs(value) >= 1 else min(8, 1 - math.floor(math.log10(abs(value))) + 1)
    return f"${value:,.{digits}f}"


def duration(seconds: float | None) -> str:
    """Seconds in the units a reader thinks in."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def letter(index: int) -> str:
    """The key of a policy on charts and in the table: A, B, ... Z, A1, B1, ..."""
    round_, place = divmod(index, 26)
    return chr(ord("A") + place) + (str(round_) if round_ else "")
