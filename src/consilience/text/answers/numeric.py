"""Numbers in text, exactly: find them, and give each value one canonical string.

``1,234.50``, ``$1234.5`` and ``2469/2`` are one value and have one key, ``1234.5``; ``0.333`` and ``1/3`` are two.
A key is a plain decimal, a reduced ``p/q``, or ``<digits>e<exponent>`` where the decimal would be too long.
No value is ever held as a float, and no hostile exponent is ever expanded.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from fractions import Fraction

_NUM = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_CURRENCY = r"[$€£¥₹₽₩]"
_POWER = r"(?:[eE](?P<exp>[-+]?[0-9]+)(?![0-9A-Za-z.])|\s*[×x*]\s*10\s*\^\s*\{?\s*(?P<pow>[-+]?[0-9]+)\s*\}?)?"
_VALUE = (
    rf"(?:(?P<whole>[0-9]+)\s+(?P<top>[0-9]+)/(?P<bottom>[0-9]+)(?![0-9.,/])"
    rf"|10\s*\^\s*(?:\{{\s*(?P<tens>[-+]?[0-9]+)\s*\}}|(?P<tens2>[-+]?[0-9]+))"
    rf"|(?P<num>{_NUM}){_POWER}(?:\s*/\s*(?P<den>{_NUM}))?)"
)
_SCAN = re.compile(
    rf"(?P<s1>(?<![\w)\]}}])[-+](?=[-+0-9.$€£¥₹₽₩]))?(?:{_CURRENCY}\s?)?(?P<s2>(?<![\w)\]}}])[-+])?(?<![A-Za-z0-9_]){_VALUE}"
)
_WHOLE = re.compile(rf"(?P<s1>[-+])?\s*(?:{_CURRENCY}\s*)?(?P<s2>[-+])?\s*{_VALUE}\s*(?:%|{_CURRENCY})?")

_SIMPLE = r"(?:\{\s*([-+]?[0-9.,]+)\s*\}|([0-9]))"
_FRAC = re.compile(rf"\\[dtc]?frac\s*{_SIMPLE}\s*{_SIMPLE}")
_GROUP = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!;:]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_MINUS = {ord(char): "-" for char in "\u2212\ufe63\uff0d"}
_MAX_DIGITS, _MAX_EXPONENT = 300, 300  # beyond these a value keeps its e-form, and a fraction is not read as a number


def number_key(text: str, *, last: bool = True) -> str | None:
    """The key of the last (or first) number in the text, None if it holds none.

    Currency signs, units and percent signs are dropped: ``25%`` is 25. A number is not read out of a word (``H2O``).
    """
    text = _plain(text)
    keys = (key for key in map(_key, _SCAN.finditer(text)) if key is not None)
    if not last:
        return next(keys, None)
    found = deque(keys, maxlen=1)
    return found[0] if found else None


def result_key(text: str) -> str | None:
    """The number a statement arrives at: the first one after its last ``=``, else the first one in it."""
    _, equals, tail = text.rpartition("=")
    after = number_key(tail, last=False) if equals else None
    return after if after is not None else number_key(text, last=False)


def whole_number_key(text: str) -> str | None:
    """The key of a text that is one number and nothing else but a currency or percent sign, else None."""
    if not any(char.isdecimal() for char in text[:1000]):
        return None
    match = _WHOLE.fullmatch(_plain(text).strip().rstrip("."))
    return _key(match) if match else None


def _plain(text: str) -> str:
    """ASCII digits and signs, LaTeX fractions as ``a/b``, thousands separators as commas."""
    if not text.isascii():
        text = "".join(_ascii_digit(char) for char in text.translate(_MINUS))
    if "\\" in text:
        text = text.replace("\\$", "$").replace("\\%", "%").replace("\\!", "")
        text = text.replace("\\times", "×").replace("\\cdot", "×")
        text = _FRAC.sub(_inline_fraction, text)
    text = text.replace("·", "×")
    return _GROUP.sub(",", text)


def _ascii_digit(char: str) -> str:
    return str(unicodedata.decimal(char)) if char > "\x7f" and char.isdecimal() else char


def _inline_fraction(match: re.Match[str]) -> str:
    top, bottom = match.group(1) or match.group(2), match.group(3) or match.group(4)
    after_digit = match.start() > 0 and match.string[match.start() - 1].isdigit()
    return f"{' ' if after_digit else ''}{top}/{bottom}"


def _key(match: re.Match[str]) -> str | None:
    """The key of one matched number, None if it is beyond the limits or divides by zero."""
    part = match.groupdict()
    sign = "-" if (part["s1"] == "-") != (part["s2"] == "-") else ""
    if part["whole"] is not None:
        whole, fraction = _fraction(part["whole"], 0), _quotient(part["top"], 0, part["bottom"])
        return None if whole is None or fraction is None else _format_fraction(sign, whole + fraction)
    if part["num"] is None:
        power = _exponent(part["tens"] or part["tens2"])
        return None if power is None else _format_decimal(sign, "1", power)
    power = _exponent(part["exp"] or part["pow"] or "0")
    if power is None:
        return None
    if part["den"] is None:
        return _format_decimal(sign, *_digits(part["num"], power))
    value = _quotient(part["num"], power, part["den"])
    return None if value is None else _format_fraction(sign, value)


def _exponent(text: str) -> int | None:
    return int(text) if len(text) <= 12 else None


def _digits(token: str, power: int) -> tuple[str, int]:
    """Digits without leading or trailing zeros, and the power of ten that goes with them."""
    integer, _, decimals = token.replace(",", "").partition(".")
    digits = (integer + decimals).lstrip("0")
    short = digits.rstrip("0")
    return (short, power - len(decimals) + len(digits) - len(short)) if short else ("0", 0)


def _fraction(token: str, power: int) -> Fraction | None:
    digits, exponent = _digits(token, power)
    if len(digits) > _MAX_DIGITS or abs(exponent) > _MAX_EXPONENT:
        return None
    return Fraction(int(digits)) * Fraction(10) ** exponent


def _quotient(top: str, power: int, bottom: str) -> Fraction | None:
    above, below = _fraction(top, power), _fraction(bottom, 0)
    return above / below if above is not None and below else None


def _format_fraction(sign: str, value: Fraction) -> str:
    """The decimal where the value has a finite one, else ``p/q`` in lowest terms."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{sign}{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    return _format_decimal(sign, *_digits(str(int(value * 10**places)), -places))


def _format_decimal(sign: str, digits: str, exponent: int) -> str:
    if digits == "0":
        return "0"
    if abs(exponent) > _MAX_EXPONENT:
        return f"{sign}{digits}e{exponent}"
    if exponent >= 0:
        return f"{sign}{digits}{'0' * exponent}"
    digits = digits.rjust(1 - exponent, "0")
    return f"{sign}{digits[:exponent]}.{digits[exponent:]}"
