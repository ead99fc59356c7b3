"""Group a question's answers into classes, one draw at a time; a class, once given, never changes.

Votes are counted over these classes. An answer whose equality with a class cannot be decided gets a class of its own,
and the undecided pair is counted, so that an unknown never becomes a vote for the wrong answer silently.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

from .equality import Equality, canonical, compare, compare_cheaply, compare_keys
from .kinds import BEHAVIOUR_KINDS, check_words_kind

if TYPE_CHECKING:
    import asyncio

    from consilience.draws import Problem

    from .symbolic import SymbolicPool

NO_ANSWER = -1
"""The class of a draw without an answer."""


class Classes(Protocol):
    """The answer classes of one problem, numbered in the order of their first answers; see `AnswerClasses`."""

    representatives: list[str]
    unknown_pairs: int

    def add(self, answer: str | None) -> int:
        """The class of an answer, a new one if it equals no earlier one; -1 for none. May block."""

    async def add_async(self, answer: str | None) -> int:
        """As `add`, without blocking the event loop."""

    def needs_symbolic(self, answer: str) -> bool:
        """Whether adding this answer may take long: symbolic work, or running it."""


class AnswerClasses:
    """The answer classes of one question, numbered 0, 1, ... in the order of their first answers.

    ``representatives[i]`` is the first answer seen of class i; ``unknown_pairs`` counts the comparisons that could not
    be decided and left an answer on its own. Safe to use from several threads; ids follow the order of the calls.
    """

    def __init__(self, kind: str, *, pool: SymbolicPool | None = None) -> None:
        """Start without classes; ``pool`` is used for ``math`` alone.

        Raises ValueError for a kind without a vote rule, and for ``code`` and ``sql``, compared by behaviour.
        """
        self.kind = check_words_kind(kind)
        self.representatives: list[str] = []
        self.unknown_pairs = 0
        self._pool = pool
        self._seen: dict[str, int] = {}  # every answer met so far, word for word
        self._class_of: dict[str, int] = {}  # every key met so far
        self._keys: list[str] = []  # the key of each representative
        self._lock = threading.Lock()
        self._turn: asyncio.Lock | None = None

    def __len__(self) -> int:
        """The number of classes."""
        return len(self.representatives)

    def add(self, answer: str | None) -> int:
        """The class of an answer, a new one if it equals no earlier representative; -1 for None.

        May block for symbolic work (kind ``math``): inside an event loop use :meth:`add_async`.
        """
        if answer is None:
            return NO_ANSWER
        seen = self._seen.get(answer)
        if seen is not None:
            return seen
        key = canonical(answer, self.kind)
        with self._lock:
            known = self._class_of.get(key)
            if known is None:
                known = self._class_of[key] = self._place(answer, key)
            self._seen[answer] = known
            return known

    async def add_async(self, answer: str | None) -> int:
        """As :meth:`add`, without blocking the event loop; calls made from one loop are served in their order."""
        import asyncio  # here, because it would be most of this package's import time

        if self._turn is None:
            self._turn = asyncio.Lock()
        async with self._turn:
            if answer is not None and self.needs_symbolic(answer):
                return await asyncio.to_thread(self.add, answer)
            return self.add(answer)

    def needs_symbolic(self, answer: str) -> bool:
        """Whether adding this answer would call the computer algebra system."""
        if self.kind != "math":
            return False
        key = canonical(answer, "math")
        return key not in self._class_of and any(compare_cheaply(key, other) is None for other in self._keys)

    def _place(self, answer: str, key: str) -> int:
        """The class of a key not met before; compares with each representative, in order, for ``math``."""
        unknown = 0
        for number, other in enumerate(self._keys if self.kind == "math" else ()):
            outcome = compare_keys(other, key, pool=self._pool)
            if outcome is Equality.EQUAL:
                return number
            unknown += outcome is Equality.UNKNOWN
        self.unknown_pairs += unknown
        self.representatives.append(answer)
        self._keys.append(key)
        return len(self._keys) - 1


def classes_of(problem: Problem, kind: str) -> Classes:
    """The empty classes of a problem: code and SQL are compared by what they do, all else by what it says."""
    if kind in BEHAVIOUR_KINDS:
        from .behaviour import BehaviourClasses

        return BehaviourClasses(problem, kind)
    return AnswerClasses(kind)


def equal_to_gold(answer: str | None, gold: str, kind: str, *, pool: SymbolicPool | None = None) -> bool | None:
    """Whether an answer is right: False without an answer, None where equality could not be decided.

    Raises ValueError for a kind without a vote rule or compared by behaviour.
    """
    check_words_kind(kind)
    if answer is None:
        return False
    outcome = compare(answer, gold, kind, pool=pool)
    return None if outcome is Equality.UNKNOWN else outcome is Equality.EQUAL
