"""Run one Python program: load it, call its function on every input, report each call as soon as it is over."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import marshal
import sys

from .values import Encoder, TooLarge

TYPE_CHECKING = False  # as typing has it; importing typing would cost more than the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Report = Callable[..., None]


class TimeUp(BaseException):
    """The CPU time of one call is used up; not an Exception, so that few programs catch it."""


class Alarm:
    """Raises TimeUp after so many CPU seconds, and again every 20 ms in case the program swallows it."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.armed = seconds, False
        self._set = _signal.setitimer  # kept: the program may replace the module's own
        _signal.signal(_signal.SIGPROF, self._ring)

    def _ring(self, number: int, frame: Any) -> None:
        if self.armed:
            raise TimeUp

    def __enter__(self) -> None:
        """Armed for the length of the block, unless the time is not to be bounded."""
        if self.seconds is not None:
            self.armed = True
            self._set(_signal.ITIMER_PROF, self.seconds, 0.02)

    def __exit__(self, *exc_info: object) -> None:
        """Disarmed."""
        self.off()

    def off(self) -> None:
        """Disarm; a signal already on its way finds the alarm off."""
        self.armed = False
        if self.seconds is not None:
            self._set(_signal.ITIMER_PROF, 0)


def run(task: dict[str, Any], report: Report) -> None:
    """Load ``source``; then, if there is an entry point, call it on every input; report ``raised`` if loading fails."""
    entry = task["entry_point"]
    alarm = Alarm(task["call_seconds"] if entry is not None else None)
    encoder = Encoder(task["result_bytes"])
    module = type(sys)("__main__" if entry is None else "program")
    sys.modules[module.__name__] = module
    try:
        with alarm:
            exec(compile(task["source"], "<program>", "exec"), module.__dict__)
    except TimeUp:
        alarm.off()  # again: it may have rung while it was being switched off
        report("timeout")
        return
    except BaseException as error:
        report("exited" if isinstance(error, SystemExit) else "raised", type(error).__name__, described(error))
        return
    if entry is None:
        return
    function = getattr(module, entry, None)
    if not callable(function):
        report("raised", "NameError", f"the program defines no function {entry}")
        return
    for number, packed in enumerate(task["inputs"]):
        report("call", number, *one_call(function, marshal.loads(packed), alarm, encoder))


def one_call(function: Callable[..., Any], args: list[Any], alarm: Alarm, encoder: Encoder) -> tuple[str, str, str]:
    """How a call ended, the shape of its value (or the exception's type) and the value's floats."""
    try:
        with alarm:
            shape, floats = encoder.encode(function(*args))
        return "returned", shape, ",".join(map(float.hex, floats))
    except TooLarge:
        return "oversized", "", ""
    except TimeUp:
        alarm.off()
        return "timeout", "", ""
    except SystemExit:
        return "exited", "", ""
    except BaseException as error:
        return "raised", type(error).__name__, ""


def described(error: BaseException) -> str:
    """The error's own words; an error whose words fail has none."""
    try:
        return str(error)[:500]
    except BaseException:
        return ""
