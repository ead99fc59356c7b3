"""A module for DSPy: a predictor is sampled until its answers agree."""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from consilience.bridges.agreement import agree, rule_of
from consilience.draws import Draw
from consilience.errors import InputError
from consilience.serve.schema import EXTENSION

Made = tuple[Any, list[Any]]
"""A prediction, or the error in its place, and its steps for DSPy's trace."""
ROLLOUTS = 1_000_000
"""Rollout ids kept for the draws of one call: more than any policy draws."""


class SelfConsistency(dspy.Module):
    """Sample a predictor until one of its output fields agrees, and return the first prediction that supports it.

    ``predictor`` is made of ``signature`` (``dspy.ChainOfThought`` by default), ``field`` is voted on (the last
    output field by default; values that are not strings are compared as JSON), ``temperature`` is that of the draws.
    The prediction has one more field, ``consilience``: answer, confidence, votes, draws and why it stopped. Draw i
    has the rollout id i, so that DSPy's cache keeps draws apart and a repeated call finds them again; a reply that
    cannot be parsed keeps its place and does not vote.

    Raises InputError for a policy that needs more than the draws or a field that the signature does not have, and
    what the predictor raised where no draw could be parsed. After Wang et al., self-consistency, arXiv:2203.11171,
    section 2.
    """

    def __init__(
        self,
        signature: Any,
        policy: str = "asc",
        *,
        field: str | None = None,
        kind: str = "auto",
        predictor: Callable[[Any], Any] = dspy.ChainOfThought,
        temperature: float = 0.7,
    ) -> None:
        super().__init__()
        rule_of(policy, kind)
        outputs = list(dspy.ensure_signature(signature).output_fields)
        if field is not None and field not in outputs:
            raise InputError(f"the signature has no output field {field!r} (there are: {', '.join(outputs)})")
        self.policy, self.kind, self.temperature = policy, kind, temperature
        self.field = field or outputs[-1]
        self.predict = predictor(signature)

    def forward(self, **inputs: Any) -> Any:
        """The agreed prediction; draws of a wave run side by side in threads."""

        async def draw(index: int) -> Made:
            return await asyncio.to_thread(self._draw, inputs, index)

        return _run(self._agree(inputs, draw))

    async def aforward(self, **inputs: Any) -> Any:
        """As `forward`, for asynchronous callers."""

        async def draw(index: int) -> Made:
            with dspy.context(trace=[]):
                try:
                    made = await self.predict.acall(**inputs, config=self._config(index))
                except AdapterParseError as error:
                    made = error
                return made, list(dspy.settings.trace)

        return await self._agree(inputs, draw)

    def _draw(self, inputs: dict[str, Any], index: int) -> Made:
        with dspy.context(trace=[]):
            try:
                made = self.predict(**inputs, config=self._config(index))
            except AdapterParseError as error:
                made = error
            return made, list(dspy.settings.trace)

    def _config(self, index: int) -> dict[str, Any]:
        """What the predictor is called with; a rollout id of the language model's own moves those of all draws."""
        own = getattr(self.get_lm() or dspy.settings.lm, "kwargs", {}).get("rollout_id") or 0
        return {"rollout_id": own * ROLLOUTS + index, "temperature": self.temperature}

    async def _agree(self, inputs: dict[str, Any], draw: Callable[[int], Awaitable[Made]]) -> Any:
        async def wave(indices: range) -> Sequence[tuple[Draw, Made]]:
            made = await asyncio.gather(*(draw(index) for index in indices))
            return [(self._read(one), (one, steps)) for one, steps in made]

        question = json.dumps(inputs, default=str, ensure_ascii=False)
        agreed = await agree(rule_of(self.policy, self.kind), question, self.kind, wave)
        prediction, steps = agreed.chosen
        if isinstance(prediction, Exception):
            raise prediction
        if dspy.settings.trace is not None:
            dspy.settings.trace.extend(steps)
        prediction[EXTENSION] = agreed.verdict
        return prediction

    def _read(self, made: Any) -> Draw:
        if isinstance(made, Exception):
            return Draw(text="", error=f"cannot be parsed: {type(made).__name__}")
        value = made[self.field]
        if value is None or isinstance(value, str):
            return Draw(text=value or "", answer=value or None)
        plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else to_jsonable_python(value)
        written = json.dumps(plain, sort_keys=True, ensure_ascii=False)
        return Draw(text=written, answer=written)


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run it to its end; beside a running event loop in a thread of its own, under the same settings of DSPy."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, asyncio.run, work).result()
