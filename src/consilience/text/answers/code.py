"""Code in replies: find it, and make a whole program of it.

A chat reply holds code in fences, a completion model continues the prompt and often runs on into something else. Both
become one program that defines the function asked for.
"""

from __future__ import annotations

import re
from functools import lru_cache

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = {"", "python", "py", "python3"}
_SQL = {"", "sql", "sqlite", "sqlite3"}
_NEXT_STATEMENT = re.compile(r"^(?:(?:def|class|if|print|import|from)\b|[#@])", re.MULTILINE)
_ANY_DEFINITION = re.compile(r"^(?:async[ \t]+def|def|class)\b", re.MULTILINE)
_QUERY = re.compile(
    r"^[ \t(]*(?:SELECT\b|WITH\s+(?:RECURSIVE\s+)?[\w\"`\[\]]+\s*(?:\([^()]*\)\s*)?AS\b)",
    re.IGNORECASE | re.MULTILINE,
)


@lru_cache(maxsize=256)
def _definition(name: str) -> re.Pattern[str]:
    plain = re.escape(name)
    return re.compile(rf"^(?:(?:async[ \t]+)?def[ \t]+{plain}\b|class[ \t]+{plain}\b|{plain}[ \t]*=)", re.MULTILINE)


def defines(code: str, name: str) -> bool:
    """Whether a line of the code's top level defines ``name``: a function, a class or an assignment."""
    return _definition(name).search(code) is not None


def blocks(reply: str, languages: set[str]) -> list[str]:
    """The contents of the fenced blocks in these languages, in order; a last fence may be left open."""
    return [match[2] for match in _FENCE.finditer(reply) if match[1].lower() in languages and match[2].strip()]


def read_code(reply: str, entry_point: str | None = None) -> str | None:
    """The code of a reply, None if it is empty.

    The last fenced Python block that defines the entry point (without one: a function or class; else the last block),
    or the whole reply, whose leading spaces are kept: a completion starts inside the function.
    """
    fenced = blocks(reply, _PYTHON)
    wanted = _ANY_DEFINITION if entry_point is None else _definition(entry_point)
    defining = [block for block in fenced if wanted.search(block)]
    code = (defining or fenced or [reply])[-1].rstrip()
    return code.lstrip("\n") or None


def read_sql(reply: str) -> str | None:
    """The query of a reply: its last fenced block that selects, else its text from the first SELECT or WITH line on.

    Without either, the whole reply, which will fail as a query; None if it is empty. Final semicolons are dropped.
    """
    fenced = [block for block in blocks(reply, _SQL) if _QUERY.search(block)]
    query = fenced[-1] if fenced else reply
    start = None if fenced else _QUERY.search(reply)
    return (query if start is None else query[start.start() :]).strip().rstrip("; \n\t") or None


def program_of(answer: str, entry_point: str, prompt: str = "") -> str:
    """The whole program of an answer.

    An answer that defines the entry point stands after what the prompt says before that function (imports, helpers).
    Any other answer continues the prompt: it is cut before the first line that starts a new statement of the top level
    (def, class, if, print, import, from, a decorator or a comment).
    """
    code = read_code(answer, entry_point) or ""
    if defines(code, entry_point):
        head = _definition(entry_point).search(prompt)
        return f"{prompt[: head.start()] if head else ''}\n{code}\n"
    if not prompt:
        return code + "\n"
    end = _NEXT_STATEMENT.search(code)
    return prompt + (code if end is None else code[: end.start()]) + "\n"
