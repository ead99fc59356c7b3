"""Reading a request: a JSON body becomes an `Ask`, or an error that names the field.

What the server itself acts on is checked here; every other parameter travels to the upstream as it is, which is the
one to refuse it. None is dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from consilience.draws import Budget
from consilience.errors import InputError
from consilience.serve.errors import bad
from consilience.serve.policies import split_model
from consilience.text.answers import KINDS
from consilience.text.answers.kinds import BEHAVIOUR_KINDS
from consilience.text.sources.base import Message
from consilience.text.sources.openai import message_text

EXTENSION = "consilience"
"""The field of a request that holds what OpenAI's API has no word for, and of a reply that holds the verdict."""
OURS = {"model", "messages", "prompt", "n", "seed", "stream", "stream_options", "tools", "response_format", EXTENSION}
INTERNAL = ("completion", "embedding")
"""Names by which the library tells its sources what to ask for; no parameters of OpenAI's API."""
MOST_CHOICES = 128
MOST_DEPTH = 100
"""How deep lists and objects of a body may be nested."""
MOST_NAME = 1000
"""Characters of a model's name, with its policy, or of a policy."""


@dataclass(frozen=True)
class Ask:
    """A request as the server understands it.

    ``prompts`` are the chats to answer: one, or for text completions as many as there are prompts, each a message
    whose content is the prompt. ``params`` are the sampling parameters that go upstream. ``policy`` is what the request
    names (with the field it came from), ``kind`` and ``budget`` likewise.
    """

    model: str
    chat: bool
    prompts: tuple[tuple[Message, ...], ...]
    params: dict[str, Any]
    tools: tuple[Any, ...] | None
    response_format: Any
    n: int
    seed: int | None
    stream: bool
    include_usage: bool
    policy: str | None
    policy_field: str
    kind: str | None
    budget: Budget | None
    progress: bool

    @property
    def logprobs(self) -> bool:
        """Whether the client asked for log-probabilities."""
        value = self.params.get("logprobs")
        return bool(value) if self.chat else value is not None

    @property
    def plain(self) -> bool:
        """Whether bytes bound its tokens: all is text, with no image, sound or file."""
        return all(all_text(messages) for messages in self.prompts)

    def question(self, prompt: int) -> str:
        """The words of a prompt's last message of a user, for people and procedures to read."""
        messages = self.prompts[prompt]
        asked = [message for message in messages if message.get("role") == "user"] or list(messages)
        return message_text(asked[-1].get("content")).replace("\0", "\ufffd")  # PostgreSQL keeps no NUL


def all_text(messages: Iterable[Message]) -> bool:
    """Whether messages hold nothing but text: no image, sound or file, and no reference to one."""
    for message in messages:
        content = message.get("content")
        parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        if message.get("audio") is not None or any(part.get("type") not in ("text", "refusal") for part in parts):
            return False
    return True


# ----------------------------------------------------------------------------------------------- reading JSON


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two values under one name the upstream might read the other one than is counted here."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:100]!r} is there twice")
    return found


def _within(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested no deeper than that."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return True
    return False


def read_object(raw: bytes) -> dict[str, Any]:
    """The object of a body; raises ApiError where it is none, or holds what no text can."""
    try:
        text = raw.decode("utf-8")
        body = json.loads(text, parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_once)
        if b"\\u" in raw:
            json.dumps(body, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair cannot be written
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad("the body must be a JSON object", code="invalid_json")
    if raw.count(b"{") + raw.count(b"[") > MOST_DEPTH and not _within(body, MOST_DEPTH):
        raise bad(f"the body is nested deeper than {MOST_DEPTH} levels", code="invalid_json")
    return body


def read_model(body: dict[str, Any]) -> str:
    """The ``model`` field as it was sent."""
    model = body.get("model")
    if not isinstance(model, str) or not model.strip():
        raise bad("you must provide a model", "model", "missing_required_parameter")
    if len(model) > MOST_NAME:
        raise bad(f"at most {MOST_NAME} characters", "model")
    return model


def read_extension(body: dict[str, Any]) -> dict[str, Any]:
    """The ``consilience`` field, checked by name and type; an empty one where there is none."""
    given = body.get(EXTENSION)
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise bad("must be an object", EXTENSION, "invalid_type")
    types: dict[str, tuple[type, ...]] = {"policy": (str,), "kind": (str,), "budget": (str, dict), "progress": (bool,)}
    for name, value in given.items():
        if name not in types:
            raise bad(f"unknown field {name!r} (there are: {', '.join(types)})", EXTENSION, "unknown_parameter")
        if value is not None and not isinstance(value, types[name]):
            raise bad(f"{name!r} is of the wrong type", f"{EXTENSION}.{name}", "invalid_type")
        if isinstance(value, str) and not 1 <= len(value) <= MOST_NAME:
            raise bad(f"expected 1 to {MOST_NAME} characters", f"{EXTENSION}.{name}")
    return {name: value for name, value in given.items() if value is not None}


# ------------------------------------------------------------------------------------------------ the fields


def _whole(value: Any, low: int, high: float = math.inf) -> bool:
    return type(value) is int and low <= value <= high


def _number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (lambda v: _whole(v, 1, MOST_CHOICES), f"a whole number from 1 to {MOST_CHOICES}"),
    "seed": (lambda v: _whole(v, -(2**63), 2**63 - 1), "a whole number of 64 bits"),
    "stream": (lambda v: type(v) is bool, "true or false"),
    "stream_options": (lambda v: isinstance(v, dict), "an object"),
    "max_tokens": (lambda v: _whole(v, 1, 2**31), "a whole number, 1 or more"),
    "max_completion_tokens": (lambda v: _whole(v, 1, 2**31), "a whole number, 1 or more"),
    "temperature": (lambda v: _number(v, 0, 2), "a number from 0 to 2"),
    "top_p": (lambda v: _number(v, 0, 1), "a number from 0 to 1"),
    "tools": (lambda v: isinstance(v, list) and all(isinstance(t, dict) for t in v), "a list of objects"),
    "response_format": (lambda v: isinstance(v, dict) and isinstance(v.get("type"), str), "an object with a type"),
}


def _check(body: dict[str, Any]) -> None:
    for name, (holds, wanted) in _CHECKS.items():
        if body.get(name) is not None and not holds(body[name]):
            raise bad(f"Invalid value for '{name}': expected {wanted}.", name)
    if "max_tokens" in body and "max_completion_tokens" in body:
        raise bad("set one of 'max_tokens' and 'max_completion_tokens'", "max_tokens")
    if "stream_options" in body and not body.get("stream"):
        raise bad("'stream_options' is for streams: set 'stream'", "stream_options")
    options = body.get("stream_options", {})
    for name, value in options.items():
        if type(value) is not bool or name not in ("include_usage", "include_obfuscation"):
            raise bad(f"cannot be honoured: {name!r}", f"stream_options.{name}", "unsupported_parameter")
    if options.get("include_obfuscation"):
        raise bad("chunks are not padded here", "stream_options.include_obfuscation", "unsupported_parameter")


def _messages(body: dict[str, Any]) -> tuple[Message, ...]:
    messages = body.get("messages")
    if messages is None:
        raise bad("you must provide messages", "messages", "missing_required_parameter")
    if not isinstance(messages, list) or not messages:
        raise bad("must be a list of at least one message", "messages", "invalid_type")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad("must be an object with a role", f"messages[{place}]", "invalid_type")
        content = message.get("content")
        parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not (content is None or isinstance(content, str) or parts):
            raise bad("must be a text or a list of parts", f"messages[{place}].content", "invalid_type")
    return tuple(messages)


def _prompts(body: dict[str, Any]) -> tuple[tuple[Message, ...], ...]:
    prompt = body.get("prompt")
    if prompt is None:
        raise bad("you must provide a prompt", "prompt", "missing_required_parameter")
    several = isinstance(prompt, list) and not (prompt and all(type(token) is int for token in prompt))
    prompts = prompt if several else [prompt]
    for one in prompts:
        tokens = isinstance(one, list) and one and all(type(token) is int for token in one)
        if not isinstance(one, str) and not tokens:
            raise bad("must be a text, a list of texts, tokens, or a list of token lists", "prompt", "invalid_type")
    if not prompts:
        raise bad("must hold at least one prompt", "prompt")
    return tuple(({"role": "user", "content": one},) for one in prompts)


def _kind(extension: dict[str, Any]) -> str | None:
    kind: str | None = extension.get("kind")
    if kind is None or (kind in KINDS and kind not in BEHAVIOUR_KINDS):
        return kind
    known = ", ".join(name for name in KINDS if name not in BEHAVIOUR_KINDS)
    raise bad(f"unknown answer kind {kind!r} (there are: {known})", f"{EXTENSION}.kind")


def _budget(extension: dict[str, Any]) -> Budget | None:
    given = extension.get("budget")
    if given is None:
        return None
    try:
        if isinstance(given, dict) and any(isinstance(v, (list, dict)) for v in given.values()):
            raise InputError("budget: expected numbers")
        spec = ",".join(f"{name}={value}" for name, value in given.items()) if isinstance(given, dict) else given
        return Budget.parse(spec)
    except InputError as error:
        raise bad(str(error), f"{EXTENSION}.budget") from None


def read_ask(body: dict[str, Any], chat: bool) -> Ask:
    """The request that a body is; raises ApiError naming the field that is wrong."""
    body = {name: value for name, value in body.items() if value is not None}
    extension = read_extension(body)
    model, tail = split_model(read_model(body))
    _check(body)
    prompts = (_messages(body),) if chat else _prompts(body)
    n = body.get("n", 1)
    if n * len(prompts) > MOST_CHOICES:
        raise bad(f"at most {MOST_CHOICES} choices in one request", "n")
    foreign = ("prompt",) if chat else ("messages", "tools", "response_format")
    for name in (*foreign, *INTERNAL):
        if name in body:
            raise bad(f"Unrecognized request argument supplied: {name}", name, "unknown_parameter")
    best = body.get("best_of", 1)
    if isinstance(best, bool) or best != 1:
        raise bad("choosing the best of several is what the policy does: leave 'best_of' out", "best_of")
    tools = body.get("tools")
    return Ask(
        model=model,
        chat=chat,
        prompts=prompts,
        params={name: value for name, value in body.items() if name not in OURS},
        tools=tuple(tools) if tools else None,
        response_format=body.get("response_format"),
        n=n,
        seed=body.get("seed"),
        stream=body.get("stream", False),
        include_usage=bool(body.get("stream_options", {}).get("include_usage")),
        policy=extension.get("policy", tail),
        policy_field=f"{EXTENSION}.policy" if "policy" in extension else "model",
        kind=_kind(extension),
        budget=_budget(extension),
        progress=extension.get("progress", False),
    )
