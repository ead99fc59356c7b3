"""Errors in OpenAI's shape, and what the library's own errors become on their way to a client."""

from __future__ import annotations

import json
import logging
from typing import Any

from aiohttp import ClientError

from consilience.draws import Draw
from consilience.errors import ConsilienceError, EndpointError
from consilience.text.budget import Account
from consilience.text.transport import Refused

log = logging.getLogger("consilience.serve")

TYPES = {429: "rate_limit_error", 500: "server_error", 502: "upstream_error", 503: "server_error"}
"""The ``type`` of an error by its status; every other is an ``invalid_request_error``."""


class ApiError(Exception):
    """An answer other than 200: ``status``, and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = kind or TYPES.get(status, "invalid_request_error")
        self.headers = headers or {}

    @property
    def content(self) -> dict[str, Any]:
        """The body as an object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        """The body as JSON."""
        return json.dumps(self.content).encode()


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400: the request cannot be taken as it is."""
    return ApiError(400, message, param=param, code=code)


def of_spent(refused_by: Account | None, reason: object) -> ApiError:
    """A cap of the server's is met: ``refused_by`` says whose, the server's own or the key's."""
    whose = "the server's budget" if refused_by is None or refused_by.parent is None else "the budget of this key"
    headers = {"x-should-retry": "false"}
    quota = "insufficient_quota"
    return ApiError(429, f"{whose} is spent ({reason})", code=quota, kind=quota, headers=headers)


def of_mishap(error: Exception) -> ApiError:
    """What an error means that is no fault of the client's; it is logged, and its words stay here."""
    log.error("a request failed", exc_info=error)
    if isinstance(error, ConsilienceError):
        return ApiError(503, "the server cannot keep draws now, so it makes none", code="unavailable")
    return ApiError(500, "the server had an error while processing the request")


def of_cut(error: Exception) -> None:
    """Log why a reply that had begun was cut: in one line where a connection is the reason, else in full."""
    if isinstance(error, ApiError | ClientError | OSError | TimeoutError):
        log.warning("a reply was cut: %s: %s", type(error).__name__, str(error)[:200])
    else:
        log.error("a reply was cut", exc_info=error)


def of_refusal(status: int, message: str, param: str | None, code: str | None) -> ApiError:
    """What the upstream's refusal means to the client: its own mistake is handed on, the server's is a 502."""
    if status in (401, 403):
        return ApiError(502, "the upstream did not accept the server's own key", code="upstream_key_refused")
    if status == 429 and code == "insufficient_quota":
        text = f"the upstream has no credit left: {message}"
        return ApiError(429, text, code=code, kind=code, headers={"x-should-retry": "false"})
    if status == 429:
        return ApiError(429, message, param=param, code=code, headers={"retry-after": "5"})
    if status == 404 or code == "model_not_found":
        return ApiError(404, message or "the upstream does not know this", param=param, code=code)
    if 400 <= status < 500:
        return bad(message or f"the upstream refused the request with status {status}", param, code or "refused")
    return ApiError(502, f"the upstream failed: HTTP {status} {message}".rstrip(), code="upstream_failed")


def of_endpoint(error: EndpointError) -> ApiError:
    """What an error that ended the sampling means to the client."""
    refused = error.refused
    if isinstance(refused, Refused):
        return of_refusal(refused.status, refused.message, refused.param, refused.code)
    return ApiError(502, f"the upstream cannot be used: {error}", code="upstream_unavailable")


def of_failed(draw: Draw) -> ApiError:
    """What it means that no draw came, of which ``draw`` was the first."""
    reason = draw.error or ""
    refused = (draw.model_extra or {}).get("refused")
    if isinstance(refused, dict):
        message = reason.partition(": ")[2]
        return of_refusal(refused["status"], message, refused["param"], refused["code"])
    if reason.startswith("house model:"):
        return bad(reason, code="context_length_exceeded")
    if reason.startswith("HTTP 429"):
        text = f"the upstream takes no more calls now ({reason})"
        return ApiError(429, text, code="rate_limit_exceeded", headers={"retry-after": "5"})
    return ApiError(502, f"the upstream failed: {reason}", code="upstream_failed")
