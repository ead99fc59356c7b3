"""The worker process of :mod:`consilience.text.answers.symbolic`: compares pairs of LaTeX answers with math-verify.

Run by path, it imports nothing of this project. It reads and writes messages of four bytes of length and a JSON
object; the first message holds its limits. math-verify's own timeouts use signals and are off: the parent kills.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from typing import Any, BinaryIO

FLOAT_PLACES = 12  # decimals that must agree where one side is a decimal and the other irrational


def main() -> None:
    """Serve until the parent closes the pipe."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # a library that prints must not break the protocol
    settings = receive(requests)
    if settings is None:
        return
    try:
        limit_memory(settings["memory_bytes"])
        importlib.import_module("math_verify")
    except Exception as error:
        send(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    send(replies, {"ready": True})
    while (message := receive(requests)) is not None:
        limit_cpu(settings["cpu_seconds"])
        send(replies, {"outcome": outcome(message["a"], message["b"])})


def outcome(a: str, b: str) -> str:
    """``equal``, ``different`` or ``unknown`` for one pair; never raises."""
    try:
        return compare(a, b)
    except (Exception, RecursionError, MemoryError):
        return "unknown"


def compare(a: str, b: str) -> str:
    """Equal if math-verify accepts either order; different if both parse and it accepts neither cleanly."""
    verify = importlib.import_module("math_verify").verify
    first, second = parse(a), parse(b)
    if not first or not second:
        return "unknown"
    failed = False
    for gold, target in ((first, second), (second, first)):
        try:
            if verify(
                gold, target, float_rounding=FLOAT_PLACES, strict=True, timeout_seconds=None, raise_on_error=True
            ):
                return "equal"
        except Exception:
            failed = True
    return "unknown" if failed else "different"


def parse(latex: str) -> list[Any]:
    """What math-verify reads in the answer, an empty list if nothing."""
    parse_latex = importlib.import_module("math_verify").parse
    parsed: list[Any] = parse_latex(
        f"${latex}$", fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True
    )
    return parsed


def limit_memory(size: int) -> None:
    """Cap the address space where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, AttributeError, ValueError, OSError):
        pass


def limit_cpu(seconds: int) -> None:
    """End this process by itself after so much more CPU time, should the parent be gone and the work never end."""
    try:
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used) + seconds, hard))
    except (ImportError, AttributeError, ValueError, OSError):
        pass


def receive(pipe: BinaryIO) -> dict[str, Any] | None:
    """The next message, None at the end of the stream."""
    head = pipe.read(4)
    if len(head) < 4:
        return None
    message: dict[str, Any] = json.loads(pipe.read(int.from_bytes(head, "big")))
    return message


def send(pipe: BinaryIO, message: dict[str, Any]) -> None:
    """Write one message; a parent that is gone ends the process."""
    body = json.dumps(message).encode()
    try:
        pipe.write(len(body).to_bytes(4, "big") + body)
        pipe.flush()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
