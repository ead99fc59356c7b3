"""Recorded draws as a source: what was drawn once is drawn again, in its order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from consilience import record
from consilience.draws import Draw, Usage
from consilience.errors import InputError, SourceExhausted
from consilience.text.sources.base import Deliver, Meter, Request


class RecordSource:
    """Draw i of a question is the record's i-th draw of the problem with the same id and question.

    Raises InputError when the file cannot be read or holds no draws, SourceExhausted past a problem's draws.
    """

    priced = False

    def __init__(self, path: str | Path) -> None:
        self.name = f"record:{path}"
        self.endpoint = "record"
        self.notes: list[str] = []
        self._by_id: dict[tuple[str, str], list[Draw]] = {}
        self._by_question: dict[str, list[Draw]] = {}
        digest = hashlib.sha256()
        for problem in record.read(path):
            digest.update(problem.model_dump_json().encode())
            self._by_id[problem.id, problem.question] = problem.draws
            self._by_question.setdefault(problem.question, problem.draws)
        if not any(self._by_question.values()):
            raise InputError(f"{path}: holds no draws")
        self.model = f"{Path(path).name}@{digest.hexdigest()[:12]}"

    async def draw(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
        """Deliver the recorded draws at ``indices``."""
        key = (request.problem_id, request.question)
        recorded = self._by_id.get(key, self._by_question.get(request.question, []))
        for index in indices:
            if index >= len(recorded):
                raise SourceExhausted(f"{self.name}: problem {request.problem_id!r} has only {len(recorded)} draws")
            async with meter.attempt(1) as attempt:
                draw = recorded[index].model_copy()
                attempt.settle(
                    Usage(prompt_tokens=draw.prompt_tokens or 0, completion_tokens=draw.completion_tokens or 0)
                )
            deliver(index, draw)

    async def close(self) -> None:
        """Nothing to give back."""
