"""The grammar of policies: ``"esc:window=5,max=40"`` <-> a `Rule`, no more.

A specification is ``stop:key=value,...[+vote:key=value,...]``; a value holding ``, + @`` is double-quoted (a quote
inside is written ``\\"``). The canonical form names every parameter, defaults filled, in signature order; the
default vote ``plurality`` is left out.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from pathlib import Path
from typing import Any

from consilience import methods
from consilience.errors import InputError
from consilience.rules import Rule

DEFAULT_VOTE = "plurality"

_PART = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^+"])+')
_PAIR = re.compile(r'\s*(\w+)\s*=\s*("(?:[^"\\]|\\.)*"|[^,"]*?)\s*(?:,|$)')


def parse(spec: str) -> Rule:
    """The rule that ``spec`` stands for; ``@FILE`` reads a policy file.

    Raises InputError with the offending part and what would be possible.
    """
    if spec.startswith("@"):
        return parse(read_policy_file(Path(spec[1:])))
    parts = _PART.findall(spec)
    if "+".join(parts) != spec or not 1 <= len(parts) <= 2:
        raise InputError(f"policy {spec!r}: expected stop:key=value,...[+vote:key=value,...]")
    stop = _build(parts[0], "stop", spec)
    vote = _build(parts[1] if len(parts) == 2 else DEFAULT_VOTE, "vote", spec)
    names = [canonical(stop, parts[0])]
    if vote_name := canonical(vote, parts[1] if len(parts) == 2 else DEFAULT_VOTE):
        names += [vote_name] if vote_name != DEFAULT_VOTE else []
    return Rule("+".join(names), stop, vote)


def read_policy_file(path: Path) -> str:
    """The ``policy`` field of a policy file (JSON); raises InputError naming file and field."""
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
    return str(content["policy"])


def canonical(method: Any, part: str) -> str:
    """``name:key=value,...`` of a built method, every parameter in signature order."""
    name = part.partition(":")[0].strip()
    values = [f"{f.name}={_show(getattr(method, f.name))}" for f in dataclasses.fields(method)]
    return f"{name}:{','.join(values)}" if values else name


def _build(part: str, role: str, spec: str) -> Any:
    name, colon, rest = part.partition(":")
    target = methods.find(name.strip(), role).load()
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
