"""First inputs for a function whose text shows no call of it: by its annotations, else by its parameters' names.

The names are those that programming tasks use; the docstring settles whether a list holds numbers, words or lists. A
parameter that neither tells anything about leaves the function without inputs.
"""

from __future__ import annotations

import ast
import itertools
import re
from typing import Any

_INTS = [3, 5, 1, 2, 10, 7, 12, 4, 24, 100, 6, 13]
_FLOATS = [1.5, 2.0, 0.5, 3.25, 10.0, 0.1, 7.75, 4.0]
_WORDS = ["abc", "Hello World", "racecar", "aabbc", "The quick brown Fox", "a", "x1y22 z", "Banana, apple; Cherry"]
_BRACKETS = ["(()())", "((()))()", "(()", "( ) (( )) (( )( ))", "())(", "()"]
_INT_LISTS = [[1, 2, 3], [4, 1, 2, 2, 3], [10, -2, 7, 0, 4], [5], [3, 3, 3], [-1, -5, 2, 8], [2, 4, 6, 8, 9], []]
_FLOAT_LISTS = [[1.0, 2.0, 3.5], [4.5, 1.25, 2.0, 2.0], [10.0, -2.5, 0.5], [5.0], [1.1, 1.2, 3.0, 2.2], []]
_WORD_LISTS = [["abc", "b", "aa"], ["Hello", "world", "hi"], ["x"], ["aaa", "bb", "c", "bb"], ["level", "Ab", ""], []]
_GRIDS = [[[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 2], [3, 4]], [[0, 1], [1, 0]], [[2, 3], [1, 4]]]
_MAPS = [{"a": 1, "b": 2}, {"x": 3}, {"apple": 5, "Pear": 2, "fig": 0}, {}]
_POOLS: dict[str, list[Any]] = {
    "int": _INTS,
    "float": _FLOATS,
    "bool": [True, False],
    "str": _WORDS,
    "brackets": _BRACKETS,
    "list[int]": _INT_LISTS,
    "list[float]": _FLOAT_LISTS,
    "list[str]": _WORD_LISTS,
    "list[list]": _GRIDS,
    "tuple": [(1, 2), (2, 4), (3, 10), (-3, 5), (5, 5)],
    "dict": _MAPS,
    "list[any]": [[1, "a", 2.5], [3, "3", None], [1, 2, 3], ["x"], [{}, [], 5], []],
}
_NAMES = (
    (r"(?:lst|arr|array|nums|numbers|list|l|xs|values|operand|game|guess|elements|integers|q|w|plane)\d?", "list[int]"),
    (r"(?:s|str|text|string|word|sentence|message|txt|test_str|substring|name|date|key|letters?|alphabet)\d?", "str"),
    (r"(?:words|strings|names|operator|planets|bits)\d?", "list[str]"),
    (
        r"(?:[nmkxyzabcdpih]|num|number|shift|base|decimal|capacity|need|remaining|side|size|value)\d?",
        "int",
    ),
    (r"(?:grid|matrix|board)", "list[list]"),
    (r"(?:dict|mapping)", "dict"),
    (r"(?:interval|point|pair)\d?", "tuple"),
)


def seeds_of_signature(code: str, entry_point: str, count: int = 12) -> list[list[Any]]:
    """Up to ``count`` argument lists for the function that the code declares; empty if a type is unknown."""
    function = _function(code, entry_point)
    if function is None or function.args.kwonlyargs:
        return []
    needed = function.args.args[: len(function.args.args) - len(function.args.defaults)]
    doc = (ast.get_docstring(function) or "").lower()
    kinds = [_annotated(arg.annotation, doc) or _named(arg.arg, doc) for arg in needed]
    if not kinds or None in kinds:
        return []
    pools = [_POOLS[kind][place % 3 :] + _POOLS[kind][: place % 3] for place, kind in enumerate(filter(None, kinds))]
    return [list(args) for args in itertools.islice(zip(*map(itertools.cycle, pools), strict=False), count)]


def _function(code: str, entry_point: str) -> ast.FunctionDef | None:
    """The declaration of the function in code that may end inside it."""
    for ending in ("", "\n    pass\n", '\n    """\n    pass\n'):
        try:
            tree = ast.parse(code + ending)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry_point]
        return found[-1] if found else None
    return None


def _annotated(annotation: ast.expr | None, doc: str) -> str | None:
    """The pool of an annotation such as ``List[int]`` or ``str``."""
    if annotation is None:
        return None
    words = ast.unparse(annotation).lower().replace("typing.", "")
    if words == "str":
        return "brackets" if re.search(r"parenthes|bracket", doc) else "str"
    if words in _POOLS:
        return words
    if words.startswith("list"):
        inner = words.partition("[")[2]
        ordered = (("list", "list[list]"), ("str", "list[str]"), ("float", "list[float]"), ("int", "list[int]"))
        return next((pool for word, pool in ordered if inner.startswith(word)), "list[any]" if inner else None)
    return next((pool for pool in ("tuple", "dict") if words.startswith(pool)), None)


def _named(name: str, doc: str) -> str | None:
    """The pool of a parameter's name, where the docstring may say more."""
    kind = next((kind for pattern, kind in _NAMES if re.fullmatch(pattern, name.lower())), None)
    if kind == "list[int]":
        if re.search(r"(?:list|array)s? of (?:strings|words|names)", doc):
            return "list[str]"
        if re.search(r"(?:list|array)s? of lists|nested list|matrix|rows", doc):
            return "list[list]"
    if kind in ("str", "int") and re.search(r"(?:string|expression)[^.]*(?:bracket|parenthes)", doc):
        return "brackets"
    if re.fullmatch(r"brackets|parens|paren_string", name.lower()):
        return "brackets"
    return kind
