"""When answers are equal: keys, exact numbers, JSON, and the tiers of ``math``."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.text.answers import Equality, canonical, compare, equal_to_gold, extract

EXACT = ["auto", "number", "choice", "text", "json"]
ANSWERS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["18", "18.0", "$18", "1,8", "3/4", "0.75", "A", "(A)", "a", "+", "-", "?!", '{"a":1}', "[1, 2]", "é"]
    ),
)


@settings(max_examples=300, deadline=None)
@given(ANSWERS, ANSWERS, st.sampled_from(EXACT))
def test_comparison_is_reflexive_symmetric_and_the_equality_of_keys(a: str, b: str, kind: str) -> None:
    assert compare(a, a, kind) is Equality.EQUAL
    assert compare(a, b, kind) is compare(b, a, kind)
    assert (compare(a, b, kind) is Equality.EQUAL) == (canonical(a, kind) == canonical(b, kind))


@settings(max_examples=300, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(0, 6), st.integers(1, 5000), st.booleans())
def test_numbers_agree_with_fractions(top: int, places: int, bottom: int, commas: bool) -> None:
    decimal = f"{'-' if top < 0 else ''}{abs(top) // 10**places:{',' if commas else ''}}"
    decimal += f".{abs(top) % 10**places:0{places}d}" if places else ""
    assert Fraction(canonical(decimal, "number")) == Fraction(top, 10**places)
    assert Fraction(canonical(f"{top}/{bottom}", "number")) == Fraction(top, bottom)
    same = Fraction(top, bottom) == Fraction(top, 10**places)
    assert (compare(f"{top}/{bottom}", decimal, "number") is Equality.EQUAL) == same
    assert canonical(f"{top}e{places}", "number") == canonical(str(top * 10**places), "number")


@pytest.mark.parametrize(
    ("a", "b", "kind", "same"),
    [
        ("1,234.50", "1234.5", "number", True),
        ("0.333", "1/3", "number", False),
        ("0.5", "\\frac{1}{2}", "number", True),
        ("18 dollars", "$18", "number", True),
        ("1e500", "1" + "0" * 500, "number", True),
        ("1e999999999999", "1e999999999998", "number", False),
        ("unknown", "18", "number", False),
        ("(B) Paris", "b", "choice", True),
        ("Paris!", "  pARIS", "text", True),
        ("+", "?!", "text", False),
        ("Straße", "STRASSE", "text", True),
        ("e\u0301", "é", "text", True),
        ("कि", "की", "text", False),
        ("18.0", "18", "auto", True),
        ("1 8", "18", "auto", False),
        ("-5", "5", "auto", False),
        ("\\text{Paris}", "paris", "auto", True),
        ("Paris", '"Paris"', "json", True),
        ("[1, 2.0]", "[1,2]", "json", True),
        ("[1, 2]", "[2, 1]", "json", False),
    ],
)
def test_table(a: str, b: str, kind: str, same: bool) -> None:
    assert compare(a, b, kind) is (Equality.EQUAL if same else Equality.DIFFERENT)
    assert equal_to_gold(a, b, kind) is same


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def shuffled(value: object) -> object:
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_json_key_ignores_order_and_space_and_keeps_the_value(value: object) -> None:
    key = canonical(json.dumps(value), "json")
    assert key == canonical(json.dumps(shuffled(value), indent=3), "json")
    assert key == canonical(key, "json")
    assert json.loads(key) == value or max(key, default="") >= "\ud800"
    assert extract(json.dumps({"answer": value}), "json") == key


@pytest.mark.parametrize(
    ("a", "b", "outcome"),
    [
        ("\\dfrac12", "\\frac{1}{2}", Equality.EQUAL),
        ("0.5", "\\frac{1}{2}", Equality.EQUAL),
        ("0.333333", "\\frac{1}{3}", Equality.DIFFERENT),
        ("10{,}000", "10000", Equality.EQUAL),
        ("25\\%", "25", Equality.EQUAL),
        ("x = 5", "5", Equality.EQUAL),
        ("45^\\circ", "45", Equality.EQUAL),
        ("15\\text{ cm}", "15", Equality.EQUAL),
        ("\\left( 1, 2 \\right)", "(1,2)", Equality.EQUAL),
        ("\\text{Evelyn}", "evelyn", Equality.EQUAL),
        ("yes", "sey", Equality.DIFFERENT),
        ("no solution", "5", Equality.DIFFERENT),
        ("x^2+2x+1", "(x+1)^2", Equality.EQUAL),
        ("2\\sqrt3", "\\sqrt{12}", Equality.EQUAL),
        ("\\sqrt{2}", "1.41421", Equality.DIFFERENT),
        ("x+1", "x+2", Equality.DIFFERENT),
        ("x" * 3000, "y+" * 1500, Equality.UNKNOWN),
    ],
)
def test_math_tiers(a: str, b: str, outcome: Equality) -> None:
    assert compare(a, b, "math") is outcome
    assert compare(b, a, "math") is outcome
    assert equal_to_gold(a, b, "math") is {"equal": True, "different": False, "unknown": None}[outcome.value]


def test_no_answer_is_wrong_and_unknown_kinds_are_named() -> None:
    assert equal_to_gold(None, "5", "number") is False
    with pytest.raises(ValueError, match="auto, number"):
        compare("a", "b", "essay")
    with pytest.raises(ValueError, match="auto, number"):
        canonical("a", "essay")
