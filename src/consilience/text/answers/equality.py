"""When two answers are the same: equal, different, or unknown.

All kinds but ``math`` have an exact key (:func:`canonical`), so equality is an equivalence relation and costs one
look-up. ``math`` goes through tiers, cheapest first, and only the last needs a computer algebra system.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from .calls import CALLS
from .choices import choice_letter
from .cleaning import clean, text_key
from .kinds import check_words_kind
from .latex import is_words, normal_form
from .numeric import number_key, whole_number_key
from .replies import json_key

if TYPE_CHECKING:
    from .symbolic import SymbolicPool

MAX_SYMBOLIC = 2000
"""Characters; a longer answer never reaches the computer algebra system."""


class Equality(enum.Enum):
    """The outcome of a comparison. UNKNOWN is never counted as equal."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNKNOWN = "unknown"


def canonical(answer: str, kind: str) -> str:
    """The key of an answer: for every kind but ``math``, two answers are equal if and only if their keys are.

    ``number``: the exact value, of the last number if there are several; ``choice``: the letter; ``json``: canonical
    JSON; ``text`` and ``open``: folded letters and digits; ``auto``: the value if the whole answer is one number (a
    currency or percent sign may be there), else as ``text``. An answer that is not of its kind has the key of its text,
    marked ``text:`` so that it meets no number or letter. ``math``: the normal form; equal keys are equal answers,
    unequal keys decide nothing. Raises ValueError for a kind without a vote rule, and for ``code`` and ``sql``, which
    are compared by behaviour. Tool calls are their own key in every kind.
    """
    check_words_kind(kind)
    if answer.startswith(CALLS):
        return answer
    if kind in ("text", "open"):
        return text_key(answer)
    if kind == "json":
        return json_key(answer)
    if kind == "math":
        return _math_key(answer)
    return _valued_key(answer, kind) or "text:" + text_key(answer)


def _valued_key(answer: str, kind: str) -> str | None:
    if kind == "choice":
        return choice_letter(answer)
    whole = whole_number_key(clean(answer))
    return number_key(answer) if whole is None and kind == "number" else whole


def _math_key(answer: str) -> str:
    """The exact value, folded words, or the normal form; a mark keeps the three apart."""
    form = normal_form(answer)
    number = whole_number_key(form)
    if number is not None:
        return "number:" + number
    return "words:" + text_key(form) if is_words(form) else "latex:" + form


def compare(a: str, b: str, kind: str, *, pool: SymbolicPool | None = None) -> Equality:
    """Whether two answers of a kind are the same; UNKNOWN is possible for ``math`` alone.

    ``math``: equal normal forms are EQUAL; two numbers are compared exactly (0.333 is not 1/3); words differ from
    other words and from numbers; the rest is decided by math-verify in ``pool`` (default: one shared pool), EQUAL if
    it holds in either direction. Too long, not parsed, timed out or crashed is UNKNOWN. Raises ValueError for a kind
    without a vote rule, and for ``code`` and ``sql``.
    """
    check_words_kind(kind)
    first, second = canonical(a, kind), canonical(b, kind)
    if kind == "math":
        return compare_keys(first, second, pool=pool)
    return Equality.EQUAL if first == second else Equality.DIFFERENT


def compare_keys(a: str, b: str, *, pool: SymbolicPool | None = None) -> Equality:
    """As :func:`compare` for kind ``math``, given the two keys."""
    cheap = compare_cheaply(a, b)
    if cheap is not None:
        return cheap
    if pool is None:
        from .symbolic import shared_pool

        pool = shared_pool()
    return pool.compare(a.partition(":")[2], b.partition(":")[2])


def compare_cheaply(a: str, b: str) -> Equality | None:
    """What the keys of two ``math`` answers decide without symbolic work; None if they do not."""
    if a == b:
        return Equality.EQUAL
    tags = {a.partition(":")[0], b.partition(":")[0]}
    if "latex" not in tags or CALLS[:-1] in tags:
        return Equality.DIFFERENT
    if max(len(a), len(b)) > MAX_SYMBOLIC:
        return Equality.UNKNOWN
    return None
