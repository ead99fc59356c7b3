"""``/openapi.json``: what this server takes and gives, as an OpenAPI 3.1 document.

It states what the server itself checks; parameters that are not named travel to the upstream, which may refuse them.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from consilience.serve.schema import EXTENSION, INTERNAL, MOST_CHOICES, MOST_NAME
from consilience.text.answers import KINDS
from consilience.text.answers.kinds import BEHAVIOUR_KINDS

Schema = dict[str, Any]

ERRORS = {
    400: "the request, or a parameter that the upstream refused",
    401: "the key",
    403: "the name by which the server was addressed",
    404: "the path or the model",
    408: "the body did not come",
    413: "the body is too large",
    429: "a budget is spent, or the server or the upstream takes no more now",
    500: "an error of the server",
    502: "the upstream failed",
    503: "draws cannot be kept now, or the server is shutting down",
}


def _or_null(**schema: Any) -> Schema:
    """A field that may be null, which says the same as leaving it out."""
    return {"anyOf": [schema, {"type": "null"}]}


def _whole(low: int, high: int) -> Schema:
    return _or_null(type="integer", minimum=low, maximum=high)


def _object(required: tuple[str, ...] = (), closed: bool = False, **properties: Any) -> Schema:
    shown: Schema = {"type": "object", "properties": properties}
    if required:
        shown["required"] = list(required)
    return shown | ({"additionalProperties": False} if closed else {})


TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": MOST_NAME, "pattern": r"\S"}
CHOICES: Schema = {"type": "array", "minItems": 1, "items": {"type": "object"}}
PARTS: Schema = {"type": "array", "items": {"type": "object"}}
TOKENS: Schema = {"type": "array", "minItems": 1, "items": {"type": "integer"}}

ERROR = _object(
    ("error",),
    True,
    error=_object(
        ("message", "type", "param", "code"),
        message=TEXT,
        type=TEXT,
        param=_or_null(type="string"),
        code=_or_null(type="string"),
    ),
)

ASK = _or_null(
    **_object(
        closed=True,
        policy=_or_null(type="string", minLength=1, maxLength=MOST_NAME),
        kind=_or_null(enum=[kind for kind in KINDS if kind not in BEHAVIOUR_KINDS]),
        budget={
            "anyOf": [{"type": "string", "minLength": 1, "maxLength": MOST_NAME}, {"type": "object"}, {"type": "null"}]
        },
        progress=_or_null(type="boolean"),
    )
)

SAID: Any = {
    "type": "object",
    "required": ["policy", "kind", "draws", "failed", "draws_bought", "cost", "answer", "confidence", "votes"],
}

COMMON: dict[str, Any] = {
    "model": NAME,
    "n": _whole(1, MOST_CHOICES),
    "seed": _whole(-(2**63), 2**63 - 1),
    "stream": _or_null(type="boolean"),
    "stream_options": _or_null(
        **_object(closed=True, include_usage={"type": "boolean"}, include_obfuscation={"const": False})
    ),
    "max_tokens": _whole(1, 2**31),
    "max_completion_tokens": _whole(1, 2**31),
    "temperature": _or_null(type="number", minimum=0, maximum=2),
    "top_p": _or_null(type="number", minimum=0, maximum=1),
    "best_of": _or_null(const=1),
    EXTENSION: ASK,
    **{name: {"type": "null"} for name in INTERNAL},
}

MESSAGE = _object(("role",), role=TEXT, content={"anyOf": [TEXT, PARTS, {"type": "null"}]})

CHAT = _object(
    ("model", "messages"),
    **COMMON,
    messages={"type": "array", "minItems": 1, "items": MESSAGE},
    tools=_or_null(type="array", items={"type": "object"}),
    response_format=_or_null(**_object(("type",), type=TEXT)),
)

COMPLETION = _object(
    ("model", "prompt"),
    **COMMON,
    prompt={
        "anyOf": [
            TEXT,
            TOKENS,
            {"type": "array", "minItems": 1, "maxItems": MOST_CHOICES, "items": {"anyOf": [TEXT, TOKENS]}},
        ]
    },
)


def _reply(name: str) -> Schema:
    fields = ("id", "object", "created", "model", "choices", "usage")
    return _object(
        fields,
        id=TEXT,
        object={"const": name},
        created={"type": "integer"},
        model=TEXT,
        choices=CHOICES,
        usage={"type": "object"},
        **{EXTENSION: SAID},
    )


def _content(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _answers(good: Schema, *statuses: int) -> Schema:
    errors = {
        str(status): {"description": ERRORS[status], "content": _content({"$ref": "#/components/schemas/Error"})}
        for status in statuses
    }
    return {"200": {"description": "the reply", "content": good}} | errors


def _post(summary: str, body: str, reply: str) -> Schema:
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    }
    good = _content({"$ref": f"#/components/schemas/{reply}"}) | {"text/event-stream": {}}
    return {
        "summary": summary,
        "parameters": [key],
        "requestBody": {"required": True, "content": _content({"$ref": f"#/components/schemas/{body}"})},
        "responses": _answers(good, *ERRORS),
    }


def document() -> Schema:
    """The whole document."""
    listed = _content(_object(("data",), data={"type": "array", "items": {"type": "object"}}))
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    reads = (401, 403, 404, 500, 502)
    return {
        "openapi": "3.1.0",
        "info": {"title": "consilience serve", "version": version("consilience")},
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Chat": CHAT,
                "Completion": COMPLETION,
                "ChatReply": _reply("chat.completion"),
                "CompletionReply": _reply("text_completion"),
                "Error": ERROR,
            },
        },
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/chat/completions": {"post": _post("An agreed chat completion", "Chat", "ChatReply")},
            "/v1/completions": {"post": _post("An agreed text completion", "Completion", "CompletionReply")},
            "/v1/models": {"get": {"summary": "The upstream's models", "responses": _answers(listed, *reads)}},
            "/v1/models/{name}": {
                "get": {
                    "summary": "One of them",
                    "parameters": [name],
                    "responses": _answers(_content({"type": "object"}), *reads),
                }
            },
        },
    }
