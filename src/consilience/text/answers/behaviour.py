"""Answers that are programs: two are the same if they do the same.

Code is called on the problem's inputs, a query is run on its database, always in the sandbox; what comes back is the
answer that is voted on (MBR-Exec, Shi et al. 2022, arXiv 2204.11454, votes by execution result in the same way). A
program or query that does not work has no answer, as a reply without one.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from consilience.errors import InputError
from consilience.sandbox import CallResult, Limits, run_python, run_sql
from consilience.sandbox.child.values import Encoder

from .classes import NO_ANSWER
from .code import program_of, read_sql
from .inputs import MISSING, derive_inputs, examples_in
from .kinds import BEHAVIOUR_KINDS

if TYPE_CHECKING:
    import asyncio

    from consilience.draws import Problem

LIMITS = Limits(cpu=2.0, call=0.2)
"""What one answer may use by default: two CPU seconds, a fifth of one for each call, and the sandbox's other limits."""

RELATIVE = 1e-9
"""Floats are the same if they differ by no more than this share of the larger one (and 1e-12 around zero)."""


class Behaviour(NamedTuple):
    """What a program did: everything but the floats in ``shape``, the floats in order."""

    shape: str
    floats: tuple[float, ...]

    def agrees(self, other: Behaviour) -> bool:
        """The same shape and close floats; two that are not a number agree."""
        return self.shape == other.shape and all(map(_close, self.floats, other.floats))


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))


class BehaviourClasses:
    """The answer classes of one problem of kind ``code`` or ``sql``, numbered in the order of their first answers.

    The interface of :class:`~consilience.text.answers.classes.AnswerClasses`. A close float joins the first class whose
    first answer it is close to. Nothing runs twice: results are kept by program, also for another object of the same
    problem. Safe to use from several threads.
    """

    def __init__(
        self, problem: Problem, kind: str, *, limits: Limits | None = None, example_outputs: bool = False
    ) -> None:
        """Read what the problem gives to try answers on.

        ``code``: ``entry_point`` (the function; default: the last one that ``prompt`` declares), ``prompt`` (code that
        a completion continues; optional) and ``inputs`` (a list of argument lists; by default derived from the
        examples in the problem's text, else from the function's signature). ``sql``: ``database``, the path of an
        SQLite file. ``example_outputs`` asks programs to give the values that the text's own examples show; one that
        does not has no answer.

        Raises ValueError for another kind, and InputError that names the problem and the field that is missing or bad.
        """
        if kind not in BEHAVIOUR_KINDS:
            raise ValueError(f"only {' and '.join(BEHAVIOUR_KINDS)} are compared by behaviour, got kind {kind!r}")
        self.kind = kind
        self.representatives: list[str] = []
        self.unknown_pairs = 0  # behaviour always decides
        trial = _CodeTrial if kind == "code" else _QueryTrial
        self._trial: _CodeTrial | _QueryTrial = trial(problem, limits or LIMITS, example_outputs)
        self._results = _results_of(self._trial.key())  # by program
        self._class_of: dict[str, int] = {}  # by answer, word for word
        self._behaviours: list[Behaviour] = []
        self._by_shape: dict[str, list[int]] = {}
        self._lock = threading.Lock()
        self._turn: asyncio.Lock | None = None

    def __len__(self) -> int:
        """The number of classes."""
        return len(self.representatives)

    @property
    def inputs(self) -> Sequence[list[Any]]:
        """The argument lists that programs are called on; none for ``sql``."""
        return self._trial.inputs

    def add(self, answer: str | None) -> int:
        """The class of an answer, a new one if none does the same; -1 for None and for an answer that does not work.

        Blocks while the answer runs: inside an event loop use :meth:`add_async`.
        """
        if answer is None:
            return NO_ANSWER
        seen = self._class_of.get(answer)
        if seen is not None:
            return seen
        behaviour = self._behaviour(answer)
        with self._lock:
            return self._class_of.setdefault(answer, NO_ANSWER if behaviour is None else self._place(answer, behaviour))

    async def add_async(self, answer: str | None) -> int:
        """As :meth:`add`, without blocking the event loop; calls made from one loop are served in their order."""
        import asyncio

        if self._turn is None:
            self._turn = asyncio.Lock()
        async with self._turn:
            if answer is not None and self.needs_symbolic(answer):
                return await asyncio.to_thread(self.add, answer)
            return self.add(answer)

    def needs_symbolic(self, answer: str) -> bool:
        """Whether adding this answer would run something."""
        return answer not in self._class_of and self._trial.program(answer) not in self._results

    def run_all(self, answers: Iterable[str | None], workers: int | None = None) -> None:
        """Run the distinct answers at the same time (default: one per core), so that adding them runs nothing."""
        programs = dict.fromkeys(self._trial.program(answer) for answer in answers if answer is not None)
        todo = [program for program in programs if program not in self._results]
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            self._results.update(zip(todo, pool.map(self._trial.run, todo), strict=True))

    def equal_to_gold(self, answer: str | None, gold: str) -> bool | None:
        """Whether an answer does what the gold answer does; None if the gold answer itself does not work."""
        if answer is None:
            return False
        wanted = self._behaviour(gold)
        if wanted is None:
            return None
        given = self._behaviour(answer)
        return given is not None and given.agrees(wanted)

    def _behaviour(self, answer: str) -> Behaviour | None:
        program = self._trial.program(answer)
        if program not in self._results:
            self._results[program] = self._trial.run(program)
        return self._results[program]

    def _place(self, answer: str, behaviour: Behaviour) -> int:
        same_shape = self._by_shape.setdefault(behaviour.shape, [])
        for number in same_shape:
            if self._behaviours[number].agrees(behaviour):
                return number
        same_shape.append(len(self._behaviours))
        self._behaviours.append(behaviour)
        self.representatives.append(answer)
        return same_shape[-1]


@lru_cache(maxsize=256)
def _results_of(trial: str) -> dict[str, Behaviour | None]:
    """The behaviours known so far of one problem's programs; filled by whoever runs one."""
    return {}


class _CodeTrial:
    """Programs on inputs."""

    def __init__(self, problem: Problem, limits: Limits, example_outputs: bool) -> None:
        extra = problem.model_extra or {}
        self.limits = limits
        self.prompt = _text_field(problem, "prompt")
        self.entry_point = entry_point_of(problem)
        if not self.entry_point.isidentifier():
            raise InputError(
                f"problem {problem.id!r}: kind 'code' needs the field 'entry_point', the name of the function to call"
            )
        text = problem.question if self.prompt in problem.question else f"{self.prompt}\n{problem.question}"
        given = extra.get("inputs")
        self.inputs = derive_inputs(text, self.entry_point, self.prompt) if given is None else _checked(problem, given)
        if not self.inputs:
            raise InputError(
                f"problem {problem.id!r}: no inputs for {self.entry_point} can be read from its text; give the field "
                "'inputs', a list of argument lists such as [[1, 2], [3, 4]]"
            )
        examples = examples_in(text, self.entry_point) if example_outputs else []
        self.examples = [example for example in examples if example.expected is not MISSING]

    def key(self) -> str:
        """What a program's behaviour depends on beside the program."""
        return repr((self.entry_point, self.inputs, self.examples, self.limits))

    def program(self, answer: str) -> str:
        return program_of(answer, self.entry_point, self.prompt)

    def run(self, program: str) -> Behaviour | None:
        """What the program does on every input; None if it cannot be run through, or returns on no input."""
        known = [example.args for example in self.examples]
        outcome = run_python(program, entry_point=self.entry_point, inputs=[*self.inputs, *known], limits=self.limits)
        calls, shown = outcome.calls[: len(self.inputs)], outcome.calls[len(self.inputs) :]
        if outcome.status != "finished" or not any(call.status == "returned" for call in calls):
            return None
        if not all(_gives(call, example.expected) for call, example in zip(shown, self.examples, strict=True)):
            return None
        shape = "\n".join(f"{call.status} {call.shape}" for call in calls)
        return Behaviour(shape, tuple(x for call in calls for x in call.floats))


class _QueryTrial:
    """Queries on a database."""

    inputs: Sequence[list[Any]] = ()

    def __init__(self, problem: Problem, limits: Limits, example_outputs: bool) -> None:
        self.limits = limits
        name = _text_field(problem, "database")
        if not name:
            raise InputError(f"problem {problem.id!r}: kind 'sql' needs the field 'database', an SQLite file's path")
        self.database = Path(name)
        if not self.database.is_file():
            raise InputError(f"problem {problem.id!r}: field 'database': there is no file {name}")

    def key(self) -> str:
        """What a query's rows depend on beside the query."""
        state = self.database.stat()
        return repr((str(self.database.resolve()), state.st_mtime_ns, state.st_size, self.limits))

    def program(self, answer: str) -> str:
        return read_sql(answer) or ""

    def run(self, program: str) -> Behaviour | None:
        """The set of rows that the query gives; None if it fails.

        Neither order nor repetition of rows counts, columns by position do, and numbers count by value (1 is 1.0): the
        execution accuracy of BIRD (Li et al. 2023, arXiv 2305.03111) and the vote of CSC-SQL (arXiv 2505.13271) compare
        sets of rows too. Spider's test suite is stricter about order and repetition, and looser about columns.
        """
        found = run_sql(self.database, program, self.limits)
        if found.status != "finished":
            return None
        rows = sorted({_row(row) for row in found.rows})
        return Behaviour("\n".join(shape for shape, _ in rows), tuple(x for _, floats in rows for x in floats))


def entry_point_of(problem: Problem) -> str:
    """The name of the function that answers to a problem define: its ``entry_point``, else the prompt's last one.

    Empty where neither names one; raises InputError for a field that is no text.
    """
    return _text_field(problem, "entry_point") or _last_function(_text_field(problem, "prompt"))


def _row(row: tuple[Any, ...]) -> tuple[str, tuple[float, ...]]:
    """A row's shape and floats; a whole number counts as an integer however it is stored."""
    whole = [int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in row]
    floats = tuple(cell for cell in whole if isinstance(cell, float))
    return json.dumps([_cell(cell) for cell in whole]), floats


def _cell(cell: Any) -> Any:
    if isinstance(cell, float):
        return ["float"]
    return ["bytes", cell.hex()] if isinstance(cell, bytes) else cell


def _text_field(problem: Problem, name: str) -> str:
    value = (problem.model_extra or {}).get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"problem {problem.id!r}: field {name!r} must be text, got {str(value)[:40]!r}")
    return value or ""


def _checked(problem: Problem, inputs: Any) -> list[list[Any]]:
    if isinstance(inputs, list) and inputs and all(isinstance(args, list) for args in inputs):
        return inputs
    raise InputError(
        f"problem {problem.id!r}: field 'inputs' must be a list of argument lists such as [[1, 2], [3, 4]], "
        f"got {str(inputs)[:60]!r}"
    )


def _last_function(prompt: str) -> str:
    names: list[str] = re.findall(r"^def[ \t]+(\w+)", prompt, re.MULTILINE)
    return names[-1] if names else ""


def _gives(call: CallResult, expected: Any) -> bool:
    shape, floats = Encoder(1 << 20).encode(expected)
    return call.status == "returned" and Behaviour(call.shape, call.floats).agrees(Behaviour(shape, tuple(floats)))
