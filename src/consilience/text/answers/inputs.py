"""Inputs to try a function on, from its problem alone: the examples of its text, its signature, and small changes.

Nothing is evaluated: arguments and values are read as literals (``ast.literal_eval``). The mutations follow EvalPlus
(Liu et al. 2023, arXiv 2305.01210, type-aware mutation) without its randomness: numbers plus and minus one, lists and
strings shortened, doubled, reversed, emptied, elements changed in turn.
"""

from __future__ import annotations

import ast
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

MAX_INPUTS = 30
_CALL_LENGTH, _CALL_TRIES = 4000, 60  # characters and closing brackets looked at for one call
_WORDS = {"true": True, "false": False, "null": None, "none": None}
_RESULT = re.compile(r"\s*#?\s*(?:➞|→|=*>|==|-*>|=|is\b|returns?\b|should (?:return|be)\b)\s*:?\s*(.+)")


class _Missing:
    """The value of an example that gives none."""


MISSING: Any = _Missing()


class Example(NamedTuple):
    """One call in a text, and the value the text gives for it (MISSING if none could be read)."""

    args: list[Any]
    expected: Any


def examples_in(text: str, entry_point: str) -> list[Example]:
    """The calls of a function with literal arguments in a text, in order, each once.

    Values are read after ``==``, ``=>``, ``➞``, ``->``, ``=``, "returns", "should return", and from the line after a
    ``>>>`` prompt.
    """
    found: dict[str, Example] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text's own odd literals
        for match in re.finditer(rf"(?<![\w.]){re.escape(entry_point)}\s*\(", text):
            call = _call_at(text, match.start())
            if call is not None:
                args, end = call
                key = repr(args)
                if key not in found or found[key].expected is MISSING:
                    found[key] = Example(args, _value_after(text, match.start(), end))
    return list(found.values())


def _call_at(text: str, start: int) -> tuple[list[Any], int] | None:
    """The literal arguments of the call that starts here, and where it ends."""
    window = text[start : start + _CALL_LENGTH]
    closings = (match.end() for match in re.finditer(r"\)", window))
    for end in itertools.islice(closings, _CALL_TRIES):
        try:
            node = ast.parse(window[:end], mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
        if not isinstance(node, ast.Call) or node.keywords or not node.args:
            return None
        try:
            args = [ast.literal_eval(arg) for arg in node.args]
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
        return None if any(arg is ... for arg in args) else (args, start + end)
    return None


def _value_after(text: str, start: int, end: int) -> Any:
    """The value that a text gives for the call in it: after a sign on the same line, or on a doctest's next line."""
    rest, _, following = text[end:].partition("\n")
    head = text[text.rfind("\n", 0, start) + 1 : start]
    if head.strip() == ">>>" and not rest.strip():
        return _literal(following.partition("\n")[0])
    match = _RESULT.match(rest)
    return _literal(match[1]) if match else MISSING


def _literal(text: str) -> Any:
    """The literal a text starts with, the longest that ends at a space or at its end."""
    text = text.strip().strip("`")
    ends = [match.start() for match in re.finditer(r"[\s#]|$", text)]
    for end in ends[:-41:-1]:
        part = text[:end].rstrip(".,;:` ").strip()
        if part in _WORDS:
            return _WORDS[part]
        try:
            value = ast.literal_eval(part)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        return MISSING if value is ... else value
    return MISSING


def derive_inputs(text: str, entry_point: str, signature: str = "", *, count: int = MAX_INPUTS) -> list[list[Any]]:
    """Up to ``count`` argument lists for a function: its text's examples, else by its signature, and mutations.

    ``text`` is what the problem says, ``signature`` the code that declares the function. Empty if nothing is known.
    """
    seeds = [example.args for example in examples_in(text, entry_point)]
    if not seeds:
        from .signatures import seeds_of_signature

        seeds = seeds_of_signature(signature or text, entry_point)
    return enlarge(seeds, count)


def enlarge(seeds: Sequence[list[Any]], count: int = MAX_INPUTS) -> list[list[Any]]:
    """The seeds and their mutations, one argument changed at a time, each once, the first ``count`` of them.

    The first changes of all seeds come before the second ones, so that every seed and argument gets its share.
    """
    streams: list[Iterator[list[Any]]] = [iter([seed]) for seed in seeds]
    streams += [_changed(seed, place) for seed in seeds for place in range(len(seed))]
    chosen: dict[str, list[Any]] = {repr(seed): seed for seed in itertools.islice(seeds, count)}
    while streams and len(chosen) < count:
        remaining = []
        for stream in streams:
            args = next(stream, None)
            if args is None:
                continue
            remaining.append(stream)
            if len(chosen) < count:
                chosen.setdefault(repr(args), args)
        streams = remaining
    return list(chosen.values())


def _changed(seed: list[Any], place: int) -> Iterator[list[Any]]:
    for value in mutations(seed[place]):
        yield [*seed[:place], value, *seed[place + 1 :]]


def mutations(value: Any) -> Iterator[Any]:
    """Values of the same type close to this one; each differs from it, and none comes twice."""
    seen = {repr(value)}
    for changed in _variants(value):
        if repr(changed) not in seen:
            seen.add(repr(changed))
            yield changed


def _variants(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (value + 1, value - 1, value * 2, value // 2 if isinstance(value, int) else value / 2, value * 0)
    elif isinstance(value, (str, list, tuple, bytes)):
        yield from _sequences(value)
    elif isinstance(value, dict):
        yield from _dictionaries(value)
    elif isinstance(value, (set, frozenset)):
        yield from (type(value)(items) for items in _sequences(sorted(value, key=repr)))


def _sequences(value: Any) -> Iterator[Any]:
    half = (len(value) + 1) // 2
    yield from (value[:half], value + value, value[::-1], value[1:], value[:-1])
    if isinstance(value, str):
        yield from (value.swapcase(), value.replace(" ", ""), value[:1] + value)
    elif not isinstance(value, bytes):
        kind = type(value)
        for place, item in enumerate(value[:6]):
            for changed in itertools.islice(mutations(item), 2):
                yield value[:place] + kind([changed]) + value[place + 1 :]
        yield value[:1] + value
    yield value[:0]


def _dictionaries(value: dict[Any, Any]) -> Iterator[Any]:
    items = list(value.items())
    yield from (dict(items[:-1]), dict(items[1:]))
    for key, item in items[:4]:
        for changed in itertools.islice(mutations(item), 2):
            yield {**value, key: changed}
    yield {}
