"""its_hub's side of a comparison, run by the Python that has it; prints one JSON object.

All questions are asked at once through one algorithm object, as its documentation shows for one question, and one
`OpenAICompatibleLanguageModel`; votes are on the number behind "The answer is", by its own
`create_regex_projection_function`. Algorithm thresholds are its defaults (0.75 adaptive, 0.95 Beta).

``--limit own`` bounds the calls in flight by its own orchestrator (``max_concurrency``); ``--limit questions`` turns
that limit off and asks concurrency / budget questions at a time instead. ``--replace`` sets its option
``replace_error_with_message``, by which a failed call votes as that text instead of failing its question.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import sys
import time
from importlib.metadata import version
from typing import Any

from its_hub import AdaptiveSelfConsistency, BetaSelfConsistency, SelfConsistency
from its_hub.core.algorithms.self_consistency import create_regex_projection_function
from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel
from its_hub.core.orchestrator import LMOrchestrator

ALGORITHMS = {"sc": SelfConsistency, "adaptive": AdaptiveSelfConsistency, "beta": BetaSelfConsistency}
PATTERN = r"The answer is (\d+)"


def text_of(number: int) -> str:
    """The same words as this project's side asks."""
    return f"Question number {number}: what is the answer?\n\nEnd with: The answer is <number>."


async def ask(options: argparse.Namespace, own: bool) -> tuple[list[Any], float, float]:
    """The reply or exception of every question, wall seconds, processor seconds."""
    orchestrator = LMOrchestrator(max_concurrency=options.concurrency if own else -1)
    algorithm = ALGORITHMS[options.algorithm](
        consistency_space_projection_func=create_regex_projection_function(PATTERN), orchestrator=orchestrator
    )
    room = asyncio.Semaphore(options.questions if own else max(1, options.concurrency // options.budget))
    replies: list[Any] = [TimeoutError("no reply in time")] * options.questions
    async with OpenAICompatibleLanguageModel(
        endpoint=options.url,
        api_key="any",
        model_name="m",
        temperature=0.7,
        max_completion_tokens=1024,
        replace_error_with_message=options.replace,
    ) as model:

        async def one(number: int) -> None:
            async with room:
                try:
                    replies[number] = await algorithm.ainfer(model, text_of(number), budget=options.budget)
                except Exception as error:
                    replies[number] = error

        wall, cpu = time.perf_counter(), time.process_time()
        tasks = [asyncio.create_task(one(number)) for number in range(options.questions)]
        await asyncio.wait(tasks, timeout=options.timeout)
        return replies, time.perf_counter() - wall, time.process_time() - cpu


def report(options: argparse.Namespace, replies: list[Any], wall: float, cpu: float) -> dict[str, Any]:
    """What came of the questions: lost ones raised, hung ones never came back."""
    found = [None if isinstance(r, Exception) else re.search(PATTERN, r["content"] or "") for r in replies]
    return {
        "version": version("its_hub"),
        "questions": options.questions,
        "right": sum(1 for match in found if match and match[1] == "42"),
        "lost": sum(1 for match in found if match is None),
        "hung": sum(1 for reply in replies if isinstance(reply, TimeoutError)),
        "errors": sorted({str(r)[:160] for r in replies if isinstance(r, Exception)})[:3],
        "seconds": wall,
        "cpu_seconds": cpu,
    }


def main() -> None:
    """Ask, print, and leave without waiting for threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), default="sc")
    parser.add_argument("--limit", choices=["own", "questions"], default="own")
    parser.add_argument("--replace")
    for flag, default in (("--questions", 40), ("--budget", 16), ("--concurrency", 32), ("--timeout", 120)):
        parser.add_argument(flag, type=int, default=default)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    replies, wall, cpu = asyncio.new_event_loop().run_until_complete(ask(options, options.limit == "own"))
    print(json.dumps(report(options, replies, wall, cpu)))
    sys.stdout.flush()
    os._exit(0)  # threads of its limiter may still wait for a slot


if __name__ == "__main__":
    main()
