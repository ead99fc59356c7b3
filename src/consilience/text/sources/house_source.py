"""The house model as a source: waiting draws of all questions are generated together, in batches."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from consilience.draws import Draw, Usage
from consilience.errors import BudgetSpent
from consilience.text.sources.base import Deliver, Meter, Request
from consilience.text.sources.house import Generation, HouseModel
from consilience.text.sources.house.llama import WEIGHTS

ROWS = 48
"""The most draws in one batch: more gain little speed and make the first answers wait."""


@dataclass(slots=True)
class _Job:
    prompt: str
    seed: int
    sampling: tuple[float, float, int]
    deadline: float  # time.monotonic() at which the time cap of the run ends
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Generation]


class HouseSource:
    """Draws from the model that ships with the package; ``path`` names another folder of the same layout.

    Draw i of a request depends on the request and i alone, whatever else is in its batch. ``workers`` threads
    generate at a time (NumPy lets go of the interpreter lock in its matrix products).
    """

    priced = False

    def __init__(self, path: str | None = None, *, workers: int | None = None) -> None:
        self.name = "house"
        self.endpoint = "house"
        self.notes: list[str] = []
        folder = WEIGHTS if path is None else Path(path)
        self._model = HouseModel.load(folder)
        weights = (folder / "model.safetensors").read_bytes()
        self.model = f"house@{hashlib.sha256(weights).hexdigest()[:12]}"
        self._jobs: deque[_Job] = deque()
        self._ready = threading.Condition()
        self._stop = threading.Event()
        count = workers or min(2, os.cpu_count() or 1)
        self._threads = [threading.Thread(target=self._work, name="house", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    async def draw(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
        """Deliver one generation per index. A question that does not fit the model fails each of its draws."""
        prompt = "\n".join(str(message["content"]) for message in request.messages)
        loop = asyncio.get_running_loop()
        params = request.params
        sampling = (float(params["temperature"]), float(params.get("top_p", 1.0)), request.max_tokens)
        async with meter.attempt(len(indices)) as attempt:
            end = time.monotonic() + attempt.seconds_left
            jobs = [
                _Job(prompt, request.call_seed(index), sampling, end, loop, loop.create_future()) for index in indices
            ]
            with self._ready:
                self._jobs.extend(jobs)
                self._ready.notify_all()
            try:
                outcomes = await asyncio.gather(*(job.done for job in jobs), return_exceptions=True)
            finally:
                for job in jobs:
                    job.done.cancel()
            made = {index: done for index, done in zip(indices, outcomes, strict=True) if isinstance(done, Generation)}
            used = sum(generation.completion_tokens for generation in made.values())
            prompt_tokens = next(iter(made.values())).prompt_tokens if made else 0
            attempt.settle(Usage(prompt_tokens=prompt_tokens, completion_tokens=used, requests=1))
        for position, (index, generation) in enumerate(made.items()):
            deliver(index, self._draw(generation, first=position == 0))
        for index, error in zip(indices, outcomes, strict=True):
            if isinstance(error, ValueError):  # the question is too long or empty
                deliver(index, Draw(text="", error=f"house model: {error}"))
            elif isinstance(error, BaseException):
                raise error

    def _draw(self, made: Generation, first: bool) -> Draw:
        return Draw(
            text=made.text,
            model=self.model,
            prompt_tokens=made.prompt_tokens if first else 0,
            completion_tokens=made.completion_tokens,
            logprob=made.logprob,
            finish_reason=made.finish_reason,
            token_logprobs=[round(value, 6) for value in made.token_logprobs],  # type: ignore[call-arg]
        )

    async def close(self) -> None:
        """End the worker threads after the token they are at."""
        self._stop.set()
        with self._ready:
            self._ready.notify_all()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            if time.monotonic() > batch[0].deadline or batch[0].done.done():
                _answer(batch[0], BudgetSpent("seconds", "the time cap came before the model got to it"))
                continue
            temperature, top_p, max_tokens = batch[0].sampling
            try:
                made: Sequence[Generation | Exception] = self._model.generate(
                    [job.prompt for job in batch],
                    [job.seed for job in batch],
                    temperature=temperature,
                    top_p=top_p,
                    max_tokens=max_tokens,
                    stop=self._stop,
                )
            except Exception as error:
                made = [error] * len(batch)
            if self._stop.is_set():
                return
            for job, result in zip(batch, made, strict=True):
                _answer(job, result)

    def _take(self) -> list[_Job] | None:
        """The next batch: jobs of the same sampling parameters, and of one prompt if another could fail it."""
        with self._ready:
            while not self._jobs and not self._stop.is_set():
                self._ready.wait()
            if self._stop.is_set():
                return None
            if self._jobs[0].done.done() or time.monotonic() > self._jobs[0].deadline:
                return [self._jobs.popleft()]
            batch = [self._jobs.popleft()]
            while self._jobs and len(batch) < ROWS and self._jobs[0].sampling == batch[0].sampling:
                if self._jobs[0].prompt != batch[0].prompt and not self._fits(self._jobs[0].prompt, batch[0].prompt):
                    break
                batch.append(self._jobs.popleft())
            return batch

    def _fits(self, *prompts: str) -> bool:
        return all(p.strip() and len(self._model.tokenizer.prompt(p)) < self._model.context for p in prompts)


def _answer(job: _Job, result: Generation | Exception) -> None:
    def resolve() -> None:
        if job.done.done():
            return
        if isinstance(result, Exception):
            job.done.set_exception(result)
        else:
            job.done.set_result(result)

    try:
        job.loop.call_soon_threadsafe(resolve)
    except RuntimeError:  # the run is over and its loop closed
        return
