"""The canonical form of a returned value: a string that says its types and contents, and its floats apart.

Equal strings and close floats are the same value. Sets and dictionaries are put in order, so that only the contents
count. Nothing here may run away: depth and length are bounded.
"""

from __future__ import annotations

from _collections import deque  # type: ignore[import-not-found]

TYPE_CHECKING = False  # as typing has it; importing typing would cost more than the rest
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

MAX_DEPTH = 60
Form = tuple[str, list[float]]  # the shape and the floats in it


class TooLarge(Exception):
    """The value does not fit the room left for results."""


class Encoder:
    """Turns values into canonical forms; ``room`` is the length (characters, floats as 24) left for all of them."""

    def __init__(self, room: int) -> None:
        self.room = room

    def encode(self, value: Any, depth: int = 0) -> Form:
        """The form of a value; raises TooLarge, and whatever the value's own code raises."""
        if depth > MAX_DEPTH:
            raise TooLarge
        for kind, write in _WRITERS:
            if isinstance(value, kind):
                form: Form = write(self, value, depth + 1)
                return form
        if hasattr(value, "__next__"):
            return self._together(f"{type(value).__name__}<", value, ">", depth + 1)
        return self._object(value, depth + 1)

    def spend(self, length: int) -> None:
        """Take so much of the room."""
        self.room -= length + 2
        if self.room < 0:
            raise TooLarge

    def _plain(self, value: Any, depth: int) -> Form:
        self.spend(8)
        return repr(value), []

    def _int(self, value: int, depth: int) -> Form:
        self.spend(value.bit_length() // 4)
        return hex(value), []

    def _float(self, value: float, depth: int) -> Form:
        self.spend(24)
        return "F", [float(value)]

    def _complex(self, value: complex, depth: int) -> Form:
        self.spend(48)
        return "C", [value.real, value.imag]

    def _text(self, value: str | bytes | bytearray, depth: int) -> Form:
        self.spend(len(value))
        plain: str | bytes = str.__str__(value) if isinstance(value, str) else bytes(value)
        return ascii(plain), []

    def _range(self, value: range, depth: int) -> Form:
        self.spend(60)
        return repr(value), []

    def _list(self, value: Iterable[Any], depth: int) -> Form:
        return self._together("[", value, "]", depth)

    def _tuple(self, value: Iterable[Any], depth: int) -> Form:
        return self._together("(", value, ")", depth)

    def _deque(self, value: Iterable[Any], depth: int) -> Form:
        return self._together("deque[", value, "]", depth)

    def _set(self, value: Iterable[Any], depth: int) -> Form:
        return self._join("{", sorted(self.encode(item, depth) for item in value), "}")

    def _dict(self, value: dict[Any, Any], depth: int) -> Form:
        pairs = sorted((self.encode(key, depth), self.encode(item, depth)) for key, item in value.items())
        return self._join("{:", [(f"{key[0]}:{item[0]}", key[1] + item[1]) for key, item in pairs], "}")

    def _object(self, value: Any, depth: int) -> Form:
        """Any other object: the name of its type, and its attributes or its words."""
        if hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
            shape, floats = self._dict(vars(value), depth)
            return f"{type(value).__name__}{shape}", floats
        words = str(value)
        self.spend(len(words))
        return f"{type(value).__name__}<{'' if ' at 0x' in words else ascii(words)}>", []

    def _together(self, opening: str, items: Iterable[Any], closing: str, depth: int) -> Form:
        return self._join(opening, [self.encode(item, depth) for item in items], closing)

    def _join(self, opening: str, forms: list[Form], closing: str) -> Form:
        self.spend(len(opening))
        return opening + ",".join(shape for shape, _ in forms) + closing, [x for _, floats in forms for x in floats]


_WRITERS: tuple[tuple[Any, Any], ...] = (
    ((bool, type(None), type(...)), Encoder._plain),
    (int, Encoder._int),
    (float, Encoder._float),
    (complex, Encoder._complex),
    ((str, bytes, bytearray), Encoder._text),
    (list, Encoder._list),
    (tuple, Encoder._tuple),
    ((set, frozenset), Encoder._set),
    (dict, Encoder._dict),
    (deque, Encoder._deque),
    (range, Encoder._range),
)
