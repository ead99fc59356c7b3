"""Tool calls as answers: two replies agree if they call the same tools with the same arguments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from .replies import NO_FIELD, canonical_json, parse_json

CALLS = "tool_calls:"
"""What the answer of a reply that calls tools starts with; such answers are compared letter by letter."""


def call_answer(calls: Any) -> str | None:
    """The answer that tool calls (OpenAI's ``tool_calls``) are: canonical JSON of their names and arguments.

    Parallel calls have no order; arguments that are not JSON count as the text they are. None for what is no call.
    """
    if not isinstance(calls, Iterable) or isinstance(calls, (str, Mapping)):
        return None
    written = [_written(call) for call in calls]
    if not written or None in written:
        return None
    return CALLS + "[" + ",".join(sorted(filter(None, written))) + "]"


def _written(call: Any) -> str | None:
    """Canonical JSON of one call; a custom tool's ``input`` is a text."""
    if not isinstance(call, Mapping):
        return None
    kind = "custom" if isinstance(call.get("custom"), Mapping) else "function"
    called = call.get(kind)
    if not isinstance(called, Mapping) or not isinstance(called.get("name"), str):
        return None
    given = called.get("input" if kind == "custom" else "arguments", "")
    text = given if isinstance(given, str) else json.dumps(given)
    value = NO_FIELD if kind == "custom" else parse_json(text or "{}")
    arguments = canonical_json(text if value is NO_FIELD else value)
    return "{" + f'"arguments":{arguments},"name":{canonical_json(called["name"])}' + "}"
