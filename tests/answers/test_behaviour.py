"""Votes on code and queries by what they do; reading them from replies; inputs from a problem's own text."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import os
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.draws import Problem
from consilience.errors import InputError
from consilience.prefix import Prefix
from consilience.text.answers import AnswerClasses, canonical, check_kind, compare, equal_to_gold, extract
from consilience.text.answers.behaviour import Behaviour, BehaviourClasses
from consilience.text.answers.code import program_of, read_code, read_sql
from consilience.text.answers.inputs import MISSING, derive_inputs, enlarge, examples_in, mutations
from consilience.text.answers.signatures import seeds_of_signature
from consilience.text.prompts import ENDINGS, messages
from consilience.text.voting.candidates import answer_in
from consilience.views import label_all

RECORDS = Path(os.environ.get("CONSILIENCE_RECORDS", Path(__file__).parents[3] / "shared" / "records"))
PROMPT = 'import math\n\n\ndef double(x: int) -> int:\n    """Twice x.\n    >>> double(2)\n    4\n    """\n'


def code_problem(**extra: Any) -> Problem:
    return Problem.model_validate(
        {"id": "p1", "question": "Double x.", "kind": "code", "entry_point": "double", **extra}
    )


# ------------------------------------------------------------------------------------------------ classes of code

SAME = ["def double(x): return x * 2", "def double(x):\n    return x + x", "double = lambda x: 2 * x"]
OTHER = [
    "def double(x): return x ** 2",
    "def double(x): return float(2 * x)",
    "def double(x): return 2 if x == 1 else 4",
]
BROKEN = [
    "def double(x): return 1 / 0",
    "def double(x: return",
    "def triple(x): return 3 * x",
    "import os; os._exit(0)",
    "def double(x): __import__('os')._exit(0)",
    "def double(x):\n    while True: pass",
    "def double(x): return [0] * 10**13",
    "def double(x): return 'x' * 10**7",
    "print('no function')",
]


def test_programs_that_do_the_same_are_one_class_and_broken_ones_none() -> None:
    classes = BehaviourClasses(code_problem(inputs=[[1], [2], [3]]), "code")
    assert [classes.add(answer) for answer in [*SAME, None, *OTHER, *BROKEN, SAME[0]]] == [
        *[0] * 3, -1, 1, 2, 3, *[-1] * len(BROKEN), 0
    ]  # fmt: skip
    assert classes.representatives == [SAME[0], *OTHER]
    assert (len(classes), classes.unknown_pairs) == (4, 0)


def test_running_ahead_changes_nothing_but_when() -> None:
    answers = [*SAME, *OTHER, *BROKEN[:5], *SAME]
    plain = BehaviourClasses(code_problem(inputs=[[1], [2]]), "code")
    ahead = BehaviourClasses(code_problem(inputs=[[1], [2]]), "code")
    assert all(ahead.needs_symbolic(answer) for answer in answers)
    ahead.run_all([*answers, None], workers=3)
    assert not any(ahead.needs_symbolic(answer) for answer in answers)
    ahead._trial.run = None  # type: ignore[assignment, method-assign]  # nothing may run from here on
    assert [ahead.add(answer) for answer in answers] == [plain.add(answer) for answer in answers]
    assert ahead.representatives == plain.representatives


async def test_add_async_keeps_the_order_of_the_calls() -> None:
    classes = BehaviourClasses(code_problem(inputs=[[1], [2]]), "code")
    answers = [OTHER[0], SAME[0], None, SAME[1], OTHER[0]]
    ids = await asyncio.gather(*(classes.add_async(answer) for answer in answers))
    assert list(ids) == [0, 1, -1, 1, 0]


def test_an_exception_on_some_inputs_is_behaviour() -> None:
    classes = BehaviourClasses(code_problem(inputs=[[1], [0], ["a"]]), "code")
    bodies = ["return 2 / x", "y = 2 / x; return y", "return 2 / x if x else None", "raise KeyError"]
    assert [classes.add(f"def double(x):\n    {body}") for body in bodies] == [0, 0, 1, -1]


def test_close_floats_are_the_same() -> None:
    classes = BehaviourClasses(code_problem(inputs=[[0.1], [0.7]]), "code")
    bodies = [
        "x * 3",
        "x + x + x",
        "x * 3 + 1e-6",
        "x * 3 * (1 + 1e-11)",
        "float('nan')",
        "float('inf') - float('inf')",
    ]
    assert [classes.add(f"def double(x): return {body}") for body in bodies] == [0, 0, 1, 0, 2, 2]


def test_gold_is_a_program() -> None:
    classes = BehaviourClasses(code_problem(inputs=[[1], [2], [3]]), "code")
    verdicts = [classes.equal_to_gold(answer, SAME[0]) for answer in [SAME[1], OTHER[0], BROKEN[0], None]]
    assert verdicts == [True, False, False, False]
    assert classes.equal_to_gold(SAME[1], BROKEN[0]) is None
    assert len(classes) == 0


def test_examples_as_a_filter() -> None:
    problem = code_problem(prompt=PROMPT)
    square, right = "    return x ** 3 - x ** 2\n", "    return x * 2\n"
    plain, strict = BehaviourClasses(problem, "code"), BehaviourClasses(problem, "code", example_outputs=True)
    assert [plain.add(one) for one in ("    return x + 1\n", right, square)] == [0, 1, 2]
    assert [strict.add(one) for one in ("    return x + 1\n", right, square)] == [-1, 0, 1]  # square gives 4 for 2


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"entry_point": "double"}, "field 'inputs'|'inputs'"),
        ({"entry_point": ""}, "'entry_point'"),
        ({"inputs": []}, "'inputs'"),
        ({"inputs": [1, 2]}, "'inputs'"),
        ({"inputs": {"x": 1}}, "'inputs'"),
        ({"prompt": 3, "inputs": [[1]]}, "'prompt'"),
        ({"entry_point": "not a name", "inputs": [[1]]}, "'entry_point'"),
    ],
)
def test_problems_that_cannot_be_tried(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        BehaviourClasses(code_problem(**extra), "code")
    assert "'p1'" in str(caught.value)


def test_the_entry_point_is_the_prompts_last_function() -> None:
    problem = Problem.model_validate({"question": "q", "prompt": "def helper(a):\n    return a\n\n\n" + PROMPT})
    assert BehaviourClasses(problem, "code").add("    return helper(x) * 2") == 0


# --------------------------------------------------------------------------------------------- classes of queries


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "shop.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE item (id INTEGER, name TEXT, price REAL)")
        connection.executemany("INSERT INTO item VALUES (?, ?, ?)", [(1, "a", 0.1), (2, "b", 0.2), (3, "b", 4.0)])
    connection.close()
    return path


def test_queries_with_the_same_rows_are_one_class(database: Path) -> None:
    classes = BehaviourClasses(Problem.model_validate({"question": "q", "database": str(database)}), "sql")
    queries = [
        "SELECT name FROM item",
        "SELECT DISTINCT name FROM item ORDER BY name DESC;",
        "```sql\nselect item.name from item\n```",
        "SELECT id FROM item",
        "SELECT CAST(id AS REAL) FROM item",
        "SELECT sum(price) FROM item WHERE id < 3",
        "SELECT 0.3",
        "SELECT '0.3'",
        "SELECT name, id FROM item",
        "SELECT id, name FROM item",
        "SELECT 1 WHERE 0",
        "SELECT id FROM item WHERE id > 9",
    ]
    assert [classes.add(query) for query in queries] == [0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 6]
    broken = ["SELECT nothing FROM item", "DELETE FROM item", "sorry", "ATTACH 'x' AS y", "SELECT zeroblob(1e9)"]
    assert {classes.add(query) for query in broken} == {-1}
    assert classes.equal_to_gold("SELECT 3", "SELECT count(*) FROM item") is True
    assert classes.equal_to_gold("SELECT 3", "SELECT nothing") is None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([None, "a", 0.5, 1.0])), min_size=1, max_size=4), st.randoms()
)
def test_order_and_repetition_of_rows_do_not_count(rows: list[tuple[Any, ...]], random: Any) -> None:
    from consilience.text.answers.behaviour import _row

    def behaviour(given_rows: list[tuple[Any, ...]]) -> Behaviour:
        kept = sorted({_row(row) for row in given_rows})
        return Behaviour("\n".join(shape for shape, _ in kept), tuple(x for _, floats in kept for x in floats))

    shuffled = [*rows, random.choice(rows)]
    random.shuffle(shuffled)
    assert behaviour(rows).agrees(behaviour(shuffled))
    assert behaviour(rows).agrees(behaviour([(5, "new"), *rows])) is False


def test_databases_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'s1'.*'database'"):
        BehaviourClasses(Problem.model_validate({"id": "s1", "question": "q"}), "sql")
    with pytest.raises(InputError, match="no file"):
        BehaviourClasses(Problem.model_validate({"question": "q", "database": str(tmp_path / "none.db")}), "sql")


# -------------------------------------------------------------------------------------------- the kinds elsewhere


def test_words_alone_do_not_compare_behaviour() -> None:
    for kind in ("code", "sql"):
        assert check_kind(kind) == kind
        for use in (
            AnswerClasses,
            lambda k: canonical("a", k),
            lambda k: compare("a", "b", k),
            lambda k: equal_to_gold("a", "b", k),
        ):
            with pytest.raises(ValueError, match=r"compared by behaviour.*BehaviourClasses"):
                use(kind)
    for kind in ("text", "auto"):
        with pytest.raises(ValueError, match="by behaviour"):
            BehaviourClasses(code_problem(inputs=[[1]]), kind)


def test_open_answers_are_the_whole_reply() -> None:
    reply = "\n  The answer is 4. \\boxed{5}\n\nAnd more. \n"
    assert extract(reply, "open") == reply.strip()
    assert extract(" \n", "open") is None
    classes = AnswerClasses("open")
    assert [classes.add(answer) for answer in ("It is so.", "it is so", "It is not so.")] == [0, 0, 1]
    assert canonical("It is so.", "open") == canonical("it is so", "text")


def test_prompts_end_as_the_kind_asks() -> None:
    assert messages("q", "open")[0]["content"] == "q"
    assert messages("q", "code")[0]["content"] == "q\n\n" + ENDINGS["code"]
    for kind, language in (("code", "python"), ("sql", "sql")):
        assert f"```{language}" in ENDINGS[kind]


# ---------------------------------------------------------------------------------------------- reading of replies


def test_code_of_chat_replies() -> None:
    reply = "First:\n```python\ndef f(x):\n    return 1\n```\n"
    reply += "Better:\n```py\ndef f(x):\n    return 2\n```\nTry:\n```\nprint(f(1))\n```"
    assert extract(reply, "code") == extract(reply, "code", entry_point="f") == "def f(x):\n    return 2"
    assert read_code(reply, "g") == "print(f(1))"
    assert extract("```bash\nls\n```\n    return 3\n", "code") == "```bash\nls\n```\n    return 3"
    assert extract("    return 3\n", "code") == "    return 3"
    assert extract("```python\ndef f():\n    return 1", "code", finish_reason="length") == "def f():\n    return 1"
    assert extract("\n \n", "code") is None
    assert extract("x <code>f = 1</code>", "code", pattern="<code>(.*?)</code>") == "f = 1"
    assert extract(extract(reply, "code") or "", "code") == extract(reply, "code")


def test_whole_programs() -> None:
    body = "    y = 2\n    return x * y\n\n\ndef other():\n    pass\n"
    assert program_of(body, "double", PROMPT) == PROMPT + "    y = 2\n    return x * y\n\n\n\n"
    for line in ("# note", "class A: pass", "if True: pass", "print(1)", "import os", "from os import path", "@x"):
        assert program_of(f"    return 1\n{line}\n    return 2", "double", PROMPT) == PROMPT + "    return 1\n\n"
    whole = "def double(x):\n    return math.floor(2 * x)"
    assert program_of(whole, "double", PROMPT) == f"import math\n\n\n\n{whole}\n"
    assert program_of(whole, "double") == f"\n{whole}\n"
    assert BehaviourClasses(code_problem(prompt=PROMPT), "code").add(f"Here:\n```python\n{whole}\n```") == 0


@pytest.mark.parametrize(
    ("reply", "query"),
    [
        ("SELECT 1;", "SELECT 1"),
        ("A.\n```sql\nSELECT 1\n```\nor\n```sql\nWITH a AS (SELECT 2) SELECT 3;\n```", "WITH a AS (SELECT 2) SELECT 3"),
        ("```sql\nSELECT 1\n```\n```python\nrun()\n```", "SELECT 1"),
        ("I think\n  select a\nfrom b;", "select a\nfrom b"),
        ("With care.\nWITH a(x, y) AS (SELECT 1, 2)\nSELECT 3", "WITH a(x, y) AS (SELECT 1, 2)\nSELECT 3"),
        ("no query", "no query"),
        ("  ", None),
    ],
)  # fmt: skip
def test_queries_of_replies(reply: str, query: str | None) -> None:
    assert extract(reply, "sql") == read_sql(reply) == query


# -------------------------------------------------------------------------------------------------------- inputs


def test_examples_of_a_text() -> None:
    text = """
        >>> f(1, [2, 3])
        {'a': None}
        f("a)b", (1,)) ➞ "x", because
        f({1: 2}) == 2.5; f(-3) => [-1,
        f(0) ==> true # yes
        For example f(7) returns 'seven'. f(8) should return (1, 2)
        f(x) is left out, so are f(y=1), f(g(1)), f(...), f(), my_f(1) and a.f(2)
        f([1,
           2]) # returns 3
    """
    expected = [
        ([1, [2, 3]], {"a": None}),
        (["a)b", (1,)], "x"),
        ([{1: 2}], 2.5),
        ([-3], MISSING),
        ([0], True),
        ([7], "seven"),
        ([8], (1, 2)),
        ([[1, 2]], 3),
    ]
    assert examples_in(text, "f") == expected


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="f()[]{}'\"1, \n>=:x#\\", max_size=80))
def test_no_text_breaks_the_reading_of_examples(text: str) -> None:
    for args, _ in examples_in("f(1) == " + text + "\nf(" + text, "f"):
        assert isinstance(args, list)


VALUES = st.recursive(
    st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(alphabet="aB ", max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_mutations_keep_the_type_and_are_new(value: Any) -> None:
    changed = list(itertools.islice(mutations(value), 50))
    assert {type(one) for one in changed} <= {type(value)}
    assert len({repr(one) for one in changed} | {repr(value)}) == len(changed) + 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(VALUES, min_size=2, max_size=2), min_size=1, max_size=5), st.integers(1, 30))
def test_enlarging_keeps_the_seeds_and_changes_one_argument_at_a_time(seeds: list[list[Any]], count: int) -> None:
    inputs = enlarge(seeds, count)
    distinct = list({repr(seed): seed for seed in seeds[:count]}.values())
    assert inputs[: len(distinct)] == distinct
    assert len(inputs) <= max(count, len(distinct))
    assert len({repr(args) for args in inputs}) == len(inputs)
    for args in inputs:
        assert any(sum(repr(a) != repr(b) for a, b in zip(args, seed, strict=True)) <= 1 for seed in seeds)
    assert enlarge(seeds, count) == inputs


def test_inputs_come_from_examples_first_and_the_signature_else() -> None:
    assert derive_inputs(PROMPT, "double", PROMPT)[:3] == [[2], [3], [1]]
    bare = "from typing import List\n\ndef f(xs: List[str], n: int, flag=True):\n    pass\n"
    seeds = seeds_of_signature(bare, "f")
    assert len(seeds) == 12
    assert all(isinstance(xs, list) and all(isinstance(x, str) for x in xs) and type(n) is int for xs, n in seeds)
    assert derive_inputs("", "f", "def f(thing, other):\n    pass") == []
    assert derive_inputs("", "g", bare) == []
    unfinished = 'def f(lst):\n    """A list of words in brackets."""\n'
    assert isinstance(seeds_of_signature(unfinished, "f")[0][0][0], str)


# ------------------------------------------------------------------------------------------------ recorded programs


def test_recorded_programs_agree_with_their_flags() -> None:
    """On inputs with many cases, a class holds programs that passed the hidden tests, or programs that failed them."""
    path = RECORDS / "humaneval-codegen16b.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no record {path}; set CONSILIENCE_RECORDS to the folder of records")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        problem = Problem.model_validate(json.loads(next(lines)))  # has_close_elements
    assert problem.model_extra is not None
    lists = [
        [1.0, 2.0, 3.9, 4.0, 5.0, 2.2],
        [1.0, 2.0, 5.9, 4.0, 5.0],
        [1.1, 2.2, 3.1, 4.1, 5.1],
        [3.0, 1.0, 2.8, 1.0],
        [1.0],
    ]
    problem.model_extra["inputs"] = [
        [xs, limit] for xs in lists for limit in (0.05, 0.2, 0.3, 0.5, 0.8, 0.95, 1.0, 2.0)
    ]
    classes = BehaviourClasses(problem, "code")
    draws = problem.draws[:40]
    classes.run_all([extract(draw.text, "code") for draw in draws])
    labels = [classes.add(extract(draw.text, "code")) for draw in draws]
    passed = {
        label: {draw.passed for draw, own in zip(draws, labels, strict=True) if own == label} for label in {*labels}
    }
    assert all(len(flags) == 1 for flags in passed.values())
    winner = Counter(label for label in labels if label >= 0).most_common(1)[0][0]
    assert passed[winner] == {True}
    assert passed.get(-1, {False}) == {False}


# ---------------------------------------------------------------------------------- replies with more than one block

TESTED = (
    "```python\ndef double(x):\n    return 2 * x\n```\nA test of it:\n"
    "```python\ndef test_double():\n    assert double(1) == 2\n```\n"
)


def test_the_block_that_defines_the_function_is_the_answer_not_the_test_after_it() -> None:
    said = [TESTED, "```python\ndef double(x):\n    return x + x\n```", "```python\ndef test_double():\n    pass\n```"]
    problem = code_problem(inputs=[[1], [2]], draws=[{"text": text} for text in said])
    assert label_all(problem, "code")[0] == [0, 0, -1]
    prefix = Prefix(problem, "code")
    for draw in problem.draws:
        prefix.add(draw)
    assert prefix.arms[0].labels == [0, 0, -1]
    assert answer_in(problem.draws[0], problem) == "def double(x):\n    return 2 * x"
    assert answer_in(problem.draws[0], code_problem(entry_point="", prompt=PROMPT)) == answer_in(
        problem.draws[0], problem
    )
