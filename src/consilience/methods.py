"""The register of methods, read from ``methods.toml``; listing it imports no method."""

from __future__ import annotations

import importlib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from consilience.errors import InputError


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the register: ``id`` as in the catalogue, ``target`` as "module:name", what it ``needs``."""

    id: str
    target: str
    family: str
    role: str
    paper: str
    arxiv: str
    summary: str
    needs: tuple[str, ...]
    catalogue: bool = True

    def load(self) -> Any:
        """The class or function that implements the method."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


@cache
def register() -> dict[str, Method]:
    """Every registered method by its id, in the order of the file."""
    table = tomllib.loads(files("consilience").joinpath("methods.toml").read_text(encoding="utf-8"))
    return {key: Method(id=key, **{**entry, "needs": tuple(entry["needs"])}) for key, entry in table.items()}


def find(name: str, *roles: str) -> Method:
    """The method ``name`` for one of ``roles``; raises InputError naming the close and the possible ones."""
    method = register().get(name)
    if method is not None and method.role in roles:
        return method
    from difflib import get_close_matches

    names = [m.id for m in register().values() if m.role in roles]
    close = get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"unknown {roles[0]} rule {name!r}{hint} (there are: {', '.join(names)})")
