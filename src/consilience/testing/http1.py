"""The part of HTTP/1.1 that a test server needs: requests read from a buffer, bodies by length or in chunks."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HEAD = 64 * 1024
MAX_BODY = 64 * 1024 * 1024


class Malformed(Exception):
    """The bytes are no request that this server takes."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Head:
    """Request line and headers; ``size`` is their length in bytes, the blank line included."""

    method: str
    path: str
    headers: dict[str, str]
    keep_alive: bool
    size: int


def parse_head(buffer: bytearray) -> Head | None:
    """The head of the request at the start of ``buffer``; None while it is incomplete."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0 or end > MAX_HEAD:
        if len(buffer) > MAX_HEAD:
            raise Malformed(431, f"the request head is longer than {MAX_HEAD} bytes")
        return None
    first, *lines = buffer[:end].decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise Malformed(400, "the first line is not an HTTP/1.1 request line")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise Malformed(400, "a header line is malformed")
        name, value = name.lower(), value.strip()
        if headers.setdefault(name, value) != value and name in ("content-length", "transfer-encoding"):
            raise Malformed(400, f"two different {name} headers")
    connection = headers.get("connection", "").lower()
    keep = "close" not in connection if parts[2] == "HTTP/1.1" else "keep-alive" in connection
    return Head(parts[0], parts[1].partition("?")[0], headers, keep, end + 4)


def parse_body(buffer: bytearray, head: Head) -> tuple[bytes, int] | None:
    """The body that follows ``head`` and where the next request starts; None while it is incomplete."""
    length = head.headers.get("content-length")
    if (coding := head.headers.get("transfer-encoding")) is not None:
        if coding.lower() != "chunked" or length is not None:
            raise Malformed(400, "transfer-encoding must be chunked, without a content-length")
        return _parse_chunks(buffer, head.size)
    if length is None:
        return b"", head.size
    if not (length.isascii() and length.isdigit()):
        raise Malformed(400, "content-length is not a number")
    if int(length) > MAX_BODY:
        raise Malformed(413, f"the body is longer than {MAX_BODY} bytes")
    end = head.size + int(length)
    return (bytes(buffer[head.size : end]), end) if len(buffer) >= end else None


def _parse_chunks(buffer: bytearray, start: int) -> tuple[bytes, int] | None:
    """A chunked body from ``start`` on, trailers skipped."""
    body = bytearray()
    while (line_end := buffer.find(b"\r\n", start)) >= 0:
        digits = bytes(buffer[start:line_end]).partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", digits):
            raise Malformed(400, "a chunk size is not a hexadecimal number")
        size, data = int(digits, 16), line_end + 2
        if len(body) + size > MAX_BODY:
            raise Malformed(413, f"the body is longer than {MAX_BODY} bytes")
        if size == 0:
            if buffer[data : data + 2] == b"\r\n":
                return bytes(body), data + 2
            end = buffer.find(b"\r\n\r\n", data)
            return (bytes(body), end + 4) if end >= 0 else None
        if len(buffer) < data + size + 2:
            return None
        if buffer[data + size : data + size + 2] != b"\r\n":
            raise Malformed(400, "a chunk is longer than its size")
        body += buffer[data : data + size]
        start = data + size + 2
    if len(buffer) - start > MAX_HEAD:
        raise Malformed(400, "a chunk size is too long")
    return None
