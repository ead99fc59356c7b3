"""Reading an answer from a reply: a table of cases, laws, and hostile input."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.text.answers import BEHAVIOUR_KINDS, KINDS, canonical, check_kind, compile_pattern, extract

FENCED = 'Here is my answer:\n```json\n{"reasoning": "2 * 9\n= 18", "answer": "18"}\n```\nDone.'

CASES = [
    # rules in order, last occurrence of each
    ('{"answer": "7"} \\boxed{8}', "auto", "7"),
    ("\\boxed{7} #### 8\nThe answer is 9", "auto", "7"),
    ("\\boxed{6} then \\boxed{7}", "auto", "7"),
    ("#### 8\nThe answer is 9", "auto", "8"),
    ("the answer is 1. THE ANSWER IS 9", "auto", "9"),
    ("some reasoning\n\nParis\n\n", "text", "Paris"),
    ("some reasoning\n\nParis", "auto", None),
    ("3 and 4\nso there are 5 pigs and 6 cows\nbye", "number", "6"),
    ("", "text", None),
    # JSON
    (FENCED, "number", "18"),
    (FENCED, "auto", "18"),
    ('{"Answer": {"b": 1, "a": [1.0, 2]}}', "auto", '{"a":[1,2],"b":1}'),
    ('the set {x} gives {"answer": true}.', "auto", "true"),
    ('{"answer": "x}{", "n": {"m": 1}}', "text", "x}{"),
    ('{"answer": "first"} no: {"answer": "second"}', "text", "second"),
    ('{"answer": "Zoë 東京"}', "text", "Zoë 東京"),
    ('{"reasoning": "\\(x\\)", "answer": "5"}', "number", "5"),
    ('{"answer": "\\frac{1}{2}"}', "math", "\\frac{1}{2}"),
    ('{"answer": "we get \\\\boxed{5}"}', "math", "5"),
    ("{'answer': 'Paris', 'x': 1}", "text", "Paris"),
    ('{"reasoning": "..., "answer": 1,234}', "number", "1234"),
    ('{"answer": "12', "auto", None),
    ('{"answer": 12', "auto", None),
    ('{"answer": null}\nfoo', "text", None),
    ('{"b": 2, "a": 1.0}', "json", '{"a":1,"b":2}'),
    ('{"answer": "Paris"}', "json", '"Paris"'),
    ("Here:\n```json\n[1, 2.50]\n```", "json", "[1,2.5]"),
    ('I found {"x": 1} and {"y": {"z": "}"}}', "json", '{"y":{"z":"}"}}'),
    ("Answer: [1, 2]", "json", "[1,2]"),
    ("no json here", "json", None),
    # boxed
    ("\\boxed{x^{2}+\\frac{1}{2}} and \\boxed{3", "math", "x^{2}+\\frac{1}{2}"),
    ("\\boxed{\\left\\{1, 2\\right\\}}", "math", "\\left\\{1, 2\\right\\}"),
    ("$\\boxed 5$.", "math", "5"),
    ("\\fbox{42}", "math", "42"),
    ("\\boxed{} then \\boxed{ }", "auto", None),
    ("\\boxed{\\text{Evelyn}}", "text", "Evelyn"),
    # marks and wrapping
    ("The answer is: **Paris**.", "text", "Paris"),
    ('The answer is "itna".', "text", "itna"),
    ("**Answer:** `foo`", "text", "foo"),
    ("**The final answer is 18**", "auto", "18"),
    ("Answer:\n```\nhello\n```", "auto", "hello"),
    ("The answer is:\n\\[\n\\frac{1}{2}\n\\]", "math", "\\frac{1}{2}"),
    ("The answer is $x=5$ because it is", "math", "x=5"),
    ("Thus the value is $7$ inches.", "math", "7"),
    ("The answer is 5!", "math", "5!"),
    ("The answer is Paris. It is the capital.", "text", "Paris"),
    ("The answer is St. Louis. It is large.", "text", "St. Louis"),
    ("The answer is +", "text", "+"),
    ("#### Step 3: add them\nThe answer is 18", "auto", "18"),
    ("#### 18\nI hope this helps", "auto", "18"),
    ("foo\n```\n", "text", "foo"),
    # numbers
    ("The answer is $1,234.50.", "number", "1234.5"),
    ("The answer is −5 degrees", "number", "-5"),
    ("The answer is -$5", "number", "-5"),
    ("The answer is 5 + 3 = 8 apples (2 left)", "number", "8"),
    ("The answer is 18 dollars for 3 eggs", "number", "18"),
    ("The answer is unclear. We had 5.", "number", "5"),
    ("\\boxed{\\frac{1}{3}}", "number", "1/3"),
    ("\\boxed{1\\frac12}", "number", "1.5"),
    ("\\boxed{1{,}234}", "number", "1234"),
    ("\\boxed{3\\times10^{8}}", "number", "300000000"),
    ("so 25%", "number", "25"),
    ("about 1.5e3 of H2O", "number", "1500"),
    ("no digits", "number", None),
    # choices
    ("The answer is: **(B)**.", "choice", "B"),
    ("**Answer:** B: Paris", "choice", "B"),
    ("The correct answer is\n\n**B. Mitochondria**", "choice", "B"),
    ("I think it is C because", "choice", "C"),
    ("Answer: (b)", "choice", "B"),
    ("b", "choice", "B"),
    ("\\boxed{\\text{(C)}}", "choice", "C"),
    ("The answer is option D, not A.", "choice", "D"),
    ("So it must be A.", "choice", "A"),
    ("Answer: A. Because", "choice", "A"),
    ("A dog is nice", "choice", None),
    ("The answer is a dog", "choice", None),
    ("I am not sure", "choice", None),
    ("Answer: A and C", "choice", None),
]


@pytest.mark.parametrize(("reply", "kind", "answer"), CASES)
def test_table(reply: str, kind: str, answer: str | None) -> None:
    assert extract(reply, kind) == answer


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("open", *BEHAVIOUR_KINDS)])
def test_cut_reply_uses_explicit_marks_alone(kind: str) -> None:
    assert extract("5 apples\nso 3", kind, finish_reason="length") is None
    assert extract("so\n#### 3\nand", "number", finish_reason="length") == "3"


def test_pattern_decides_alone_and_takes_its_last_match() -> None:
    text = "got 1, got 2; \\boxed{3}"
    assert extract(text, "number", pattern=r"got (\d)") == "2"
    assert extract(text, "text", pattern=r"got \d") == "got 2"
    assert extract(text, "number", pattern=r"lost (\d)") is None
    assert extract(text, "choice", pattern=r"got (\d)") is None
    assert extract(text, "text", pattern=r"q*") is None
    assert extract(text, "number", pattern=compile_pattern(r"got (\d)")) == "2"


def test_bad_pattern_and_bad_kind_are_clear_errors() -> None:
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        compile_pattern("(")
    with pytest.raises(ValueError, match="auto, number, math, choice, text, json, open, code, sql"):
        check_kind("essay")
    with pytest.raises(ValueError, match="the kinds are"):
        extract("x", "essay")


MARKS = st.sampled_from(
    ["\\boxed{", "}", "{", '{"answer": ', '"', "#### ", "The answer is ", "Answer:", "$", "\\(", "**", "```json\n",
     "```", "\n", "[", "]", "1,234", "1/0", "1e9", "(B)", "\\frac{", "\\", "-", "A", ". ", "'", "\\text{", "null",
     "\u2212", "٣"]
)  # fmt: skip
REPLIES = st.lists(st.one_of(MARKS, st.text(max_size=5)), max_size=25).map("".join)


@settings(max_examples=400, deadline=None)
@given(REPLIES, st.sampled_from(KINDS), st.sampled_from([None, "length", "stop"]))
def test_no_reply_crashes_and_answers_are_never_empty(reply: str, kind: str, reason: str | None) -> None:
    answer = extract(reply, kind, finish_reason=reason)
    assert answer is None or answer.strip()
    if answer is not None and kind not in BEHAVIOUR_KINDS:
        canonical(answer, kind)


@settings(max_examples=300, deadline=None)
@given(REPLIES, st.sampled_from(["number", "choice"]))
def test_a_value_boxed_again_is_itself(reply: str, kind: str) -> None:
    answer = extract(reply, kind)
    if answer is not None:
        assert extract(f"\\boxed{{{answer}}}", kind) == answer


@settings(max_examples=200, deadline=None)
@given(st.from_regex(r"[A-Za-z]{4,9}( [A-Za-z]{4,9}){0,2}", fullmatch=True))
def test_words_survive_every_mark(words: str) -> None:
    for reply in (f"The answer is {words}.", f"#### {words}", f"\\boxed{{{words}}}", f'{{"answer": "{words}"}}'):
        assert canonical(extract("We think. " + reply, "text") or "", "text") == canonical(words, "text")


HOSTILE = ["{", "}", "\\", "\\boxed{", '{"a":', "[", "$", "*", '"', "```\n", "#", "#### a:\n", "the answer is ", "1,",
           "1", "1/", "\\frac{", "\\text{", '{"answer":', "\\(", "A''", "a. ", " ", "Answer: {", "é",
           "\u0301"]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_replies_take_linear_time(piece: str) -> None:
    text = "Answer: " + piece * (200_000 // len(piece)) + "x"
    start = time.perf_counter()
    for kind in ("auto", "number", "choice", "math", "json"):
        extract(text, kind)
    assert time.perf_counter() - start < 20  # quadratic work takes minutes


def test_import_is_light() -> None:
    code = (
        "import sys; import consilience.text.answers;"
        "print([m for m in ('sympy', 'math_verify', 'numpy', 'subprocess', 'asyncio') if m in sys.modules])"
    )
    path = {"PYTHONPATH": ":".join(entry for entry in sys.path if entry)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path, check=True)
    assert done.stdout.strip() == "[]"
