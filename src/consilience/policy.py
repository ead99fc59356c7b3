"""The grammar of policies: ``"esc:window=5,max=40"`` <-> a `Rule`, no more.

A specification is ``stop:key=value,...[+vote:key=value,...]``, where a procedure may stand for the vote; a value
holding ``, + @`` is double-quoted (a quote inside is written ``\\"``). The canonical form names every parameter,
defaults filled, in signature order; the default vote ``plurality`` is left out. A stopping rule may name another
default in its attribute ``vote``.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from consilience import methods
from consilience.errors import InputError
from consilience.rules import Procedure, Rule, View

DEFAULT_VOTE = "plurality"

_PART = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^+"])+')
_PAIR = re.compile(r'\s*(\w+)\s*=\s*("(?:[^"\\]|\\.)*"|[^,"]*?)\s*(?:,|$)')


def parse(spec: str) -> Rule:
    """The rule that ``spec`` stands for; ``@FILE`` reads a policy file.

    Raises InputError with the offending part and what would be possible.
    """
    if spec.startswith("@"):
        path = Path(spec[1:])
        content = read_policy_file(path)
        return dataclasses.replace(parse(content["policy"]), calibration=_calibration(path, content))
    parts = _PART.findall(spec)
    if "+".join(parts) != spec or not 1 <= len(parts) <= 2:
        raise InputError(f"policy {spec!r}: expected stop:key=value,...[+vote:key=value,...]")
    stop = _build(parts[0], "stop", spec)
    default = getattr(stop, "vote", DEFAULT_VOTE)
    last = parts[1] if len(parts) == 2 else default
    vote = _build(last, "vote", spec, "procedure")
    name, vote_name = canonical(stop, parts[0]), canonical(vote, last)
    if vote_name != DEFAULT_VOTE or default != DEFAULT_VOTE:
        name += f"+{vote_name}"
    if isinstance(vote, Procedure):
        rule = Rule(name, stop, _build(DEFAULT_VOTE, "vote", spec), procedure=vote)
        if (arm := getattr(vote, "arm", -1)) >= rule.arms:
            raise InputError(f"policy {rule.name}: there is no arm {arm}: {rule.arms} in all, counted from 0")
        return rule
    rule = Rule(name, stop, vote)
    if vote_name != DEFAULT_VOTE:
        _check_arms(rule)
    return rule


def _check_arms(rule: Rule) -> None:
    """Raises InputError where the vote does not suit the number of arms, before anything is drawn."""
    nothing = np.zeros((1, rule.arms, 0))
    empty = View(nothing.astype(np.int32), np.zeros((1, rule.arms), np.int32), dict.fromkeys(rule.needs, nothing))
    try:
        rule.decide(empty)
    except ValueError as error:
        raise InputError(f"policy {rule.name}: {error}") from error


def read_policy_file(path: Path) -> dict[str, Any]:
    """A policy file (JSON) whose ``policy`` is a specification; raises InputError naming file and field."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"policy file {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"policy file {path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("policy"), str):
        raise InputError(f'policy file {path}: field "policy" must be a policy specification')
    if content["policy"].startswith("@"):
        raise InputError(f'policy file {path}: field "policy" must not point to another file')
    return content


def _calibration(path: Path, content: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The ``calibration`` of a policy file: raw confidences and the shares of right answers they stand for."""
    given = content.get("calibration")
    if not given:
        return None
    try:
        raw, share = (tuple(float(value) for value in given[key]) for key in ("confidence", "accuracy"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f'policy file {path}: field "calibration" must hold "confidence" and "accuracy"') from error
    rising = all(a < b for a, b in pairwise(raw)) and all(a <= b for a, b in pairwise(share))
    if not raw or len(raw) != len(share) or not rising or not all(0 <= value <= 1 for value in (*raw, *share)):
        raise InputError(f'policy file {path}: field "calibration": two rising lists of shares in [0, 1] are needed')
    return raw, share


def canonical(method: Any, part: str) -> str:
    """``name:key=value,...`` of a built method, every parameter in signature order."""
    name = part.partition(":")[0].strip()
    values = [f"{f.name}={_show(getattr(method, f.name))}" for f in dataclasses.fields(method)]
    return f"{name}:{','.join(values)}" if values else name


def _build(part: str, role: str, spec: str, *others: str) -> Any:
    name, colon, rest = part.partition(":")
    target = methods.find(name.strip(), role, *others).load()
    given = _pairs(rest, spec) if colon else {}
    known = inspect.signature(target).parameters
    types = typing.get_type_hints(target)
    if unknown := [key for key in given if key not in known]:
        possible = ", ".join(known) or "none"
        raise InputError(f"policy {spec!r}: {name.strip()} has no parameter {unknown[0]!r} (it has: {possible})")
    try:
        return target(**{key: _value(key, text, types[key]) for key, text in given.items()})
    except (ValueError, TypeError) as error:
        raise InputError(f"policy {spec!r}: {error}") from error


def _pairs(rest: str, spec: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    position = 0
    while position < len(rest):
        match = _PAIR.match(rest, position)
        if match is None or (rest.endswith(",") and match.end() == len(rest)):
            raise InputError(f"policy {spec!r}: expected key=value,... at {rest[position:]!r}")
        if match[1] in pairs:
            raise InputError(f"policy {spec!r}: parameter {match[1]!r} is given twice")
        pairs[match[1]] = match[2]
        position = match.end()
    if not pairs:
        raise InputError(f"policy {spec!r}: expected key=value after ':'")
    return pairs


def _value(key: str, text: str, kind: type) -> Any:
    if text.startswith('"'):
        text = re.sub(r"\\(.)", r"\1", text[1:-1])
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key} must be true or false, got {text!r}")
        return text.lower() == "true"
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise ValueError(f"{key} must be {noun}, got {text!r}") from None
    return text


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    if isinstance(value, str) and re.search(r'[,+@"\\]', text):
        return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    return text
