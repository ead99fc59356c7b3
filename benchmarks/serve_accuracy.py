"""Right answers and their price through `consilience serve` and through optillm: same upstream, same questions.

Two upstreams, both the scripted server on loopback with real replies of a model behind it, which counts requests
and completions itself:

- the house model: 40 draws a question at the temperature that is asked for, made at the start;
- with ``--record``: recorded draws of a model, in their recorded order, whatever temperature is asked for.

Its k-th completion of a question is the same for every side. Every side is asked each question once, over the OpenAI
API, by 8 clients at a time. The reply's text is read in one way for all sides, apart from the library: what
follows the last "the answer is", letters and digits only.

    python benchmarks/serve_accuracy.py [--questions 240] [--record esc-last-letters-a.jsonl.gz] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from _common import COLOURS, ROOT, emit, environment, parser, picture, table
from _servers import NO_OPTILLM, consilience, optillm, optillm_release
from replay_check import answer, key

from consilience.testing import ScriptedServer
from consilience.text.sources.house import HouseModel

DRAWS = 40
CLIENTS = 8
COOL, WARM = 0.6, 1.0


@dataclass(frozen=True)
class Side:
    """One way to ask: the model's name, what else the request holds, and the temperature the upstream must be asked."""

    name: str
    ours: bool
    model: str
    more: dict[str, Any] = field(default_factory=dict)
    temperature: float = WARM


OURS = tuple(
    Side(spec, True, f"m@{spec}", {"temperature": WARM})
    for spec in ("one", "esc:window=5,max=40", "asc:threshold=0.95,max=40", "sc:n=8", "sc:n=40")
)
THEIRS = (
    Side("optillm none", False, "none-m", {"temperature": WARM}),
    Side("optillm self_consistency", False, "self_consistency-m", {"temperature": WARM}),
    Side("optillm majority_voting", False, "majority_voting-m", {"temperature": WARM}),
    Side("optillm majority_voting, k=40", False, "majority_voting-m", {"temperature": WARM, "k": DRAWS}),
)
COOLER = Side("optillm majority_voting, its own temperature", False, "majority_voting-m", temperature=COOL)
"""What it does where the client states no temperature: 0.6."""


@dataclass
class Upstream:
    """Replies with a side's draws in their order; ``draws[temperature][question]`` are texts, ``numbers`` the next."""

    draws: dict[float, dict[str, list[str]]]
    temperature: float = WARM
    numbers: Counter[str] = field(default_factory=Counter)

    def start(self, temperature: float) -> None:
        """Begin again, at this temperature."""
        self.temperature = temperature
        self.numbers.clear()

    def __call__(self, question: str, _: random.Random) -> str:
        """The next draw; optillm puts "User: " before a question, which is taken off."""
        asked = question.removeprefix("User: ")
        number = self.numbers[asked]
        self.numbers[asked] += 1
        return self.draws[self.temperature][asked][number]


# ------------------------------------------------------------------------------------------------ the questions


def house_draws(problems: Sequence[dict[str, Any]], temperature: float) -> dict[str, list[str]]:
    """Draws of the house model, by question; the seeds are fixed."""
    model, drawn = HouseModel.load(), {}
    for number, problem in enumerate(problems):
        question = problem["question"]
        seeds = [number * DRAWS + k for k in range(DRAWS)]
        made = model.generate([question] * DRAWS, seeds, temperature=temperature, top_p=1.0, max_tokens=256)
        drawn[question] = [one.text for one in made]
    return drawn


def house_problems(count: int) -> list[dict[str, Any]]:
    """The first of the house model's test questions, which hold the four kinds in turn."""
    lines = (ROOT / "examples" / "house-test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def recorded(path: Path) -> list[dict[str, Any]]:
    """A record's problems with their draws; raises ValueError where one has fewer than the most that is asked for."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        problems = [json.loads(line) for line in stream]
    if any(len(problem["draws"]) < DRAWS for problem in problems):
        raise ValueError(f"{path}: every problem needs {DRAWS} draws")
    return problems


# --------------------------------------------------------------------------------------------------- one side


def ask(origin: str, side: Side, question: str) -> str | None:
    """The reply's text; None where there is an error instead."""
    body = {"model": side.model, "messages": [{"role": "user", "content": question}], **side.more}
    headers = {"content-type": "application/json", "authorization": "Bearer any"}
    request = Request(f"{origin}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=600) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])
    except HTTPError:
        return None


def answered(origin: str, side: Side, problems: Sequence[dict[str, Any]], server: ScriptedServer) -> dict[str, Any]:
    """A side's row; raises AssertionError where the upstream was asked at another temperature than stated."""
    server.reset()
    server.answers.start(side.temperature)  # type: ignore[union-attr]
    with ThreadPoolExecutor(CLIENTS) as pool:
        texts = list(pool.map(lambda problem: ask(origin, side, problem["question"]), problems))
    asked = {entry["body"].get("temperature") for entry in server.requests}
    assert asked == {side.temperature}, (side.name, asked)
    right = [text is not None and answer(text) == key(p["answer"]) for text, p in zip(texts, problems, strict=True)]
    counts = server.counts
    return {
        "side": side.name,
        "ours": side.ours,
        "right": 100 * sum(right) / len(right),
        "which": right,
        "errors": sum(text is None for text in texts),
        "requests": counts["calls"] / len(problems),
        "completions": counts["draws"] / len(problems),
        "prompt_tokens": counts["prompt_tokens"] / len(problems),
    }


def compare(
    problems: Sequence[dict[str, Any]], draws: dict[float, dict[str, list[str]]], theirs: Sequence[Side]
) -> list[dict[str, Any]]:
    """All sides on one upstream."""
    upstream = Upstream(draws)
    with ExitStack() as stack:
        server = stack.enter_context(ScriptedServer(answers=upstream))
        url = server.url
        ours = stack.enter_context(consilience(url, "asc")).origin
        rows = [answered(ours, side, problems, server) for side in OURS]
        if theirs:
            peer = stack.enter_context(optillm(url)).origin
            rows += [answered(peer, side, problems, server) for side in theirs]
    return rows


def margin(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Half the width of the 95 % interval of a difference in percent right on the same questions."""
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    mean = sum(gaps) / len(gaps)
    return 196 * math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))


# ------------------------------------------------------------------------------------------------------ output


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one JSON-ready object."""
    release = optillm_release()
    theirs = THEIRS if release else ()
    problems = house_problems(options.questions)
    draws = {heat: house_draws(problems, heat) for heat in (WARM, COOL)}
    found = {"house model": compare(problems, draws, (*theirs, COOLER) if release else ())}
    counts = {"house model": len(problems)}
    if options.record:
        lines = recorded(options.record)
        texts = {line["question"]: [draw["text"] for draw in line["draws"]] for line in lines}
        assert len(texts) == len(lines), "two problems of the record have the same question"
        found["recorded draws"] = compare(lines, {WARM: texts}, theirs)
        counts["recorded draws"] = len(lines)
    for rows in found.values():
        base = next(row for row in rows if row["side"].startswith("esc"))["which"]
        for row in rows:
            row["behind_esc"] = (100 * sum(base) - 100 * sum(row["which"])) / len(base)
            row["margin"] = margin(base, row["which"])
        for row in rows:
            del row["which"]
    return {"upstreams": found, "questions": counts, "optillm": release, "environment": environment()}


def markdown(result: dict[str, Any]) -> str:
    """A table for each upstream."""
    head = ["side", "right", "behind esc, points", "requests", "completions", "prompt tokens", "errors"]
    parts = []
    for name, rows in result["upstreams"].items():
        lines = [
            [
                row["side"],
                f"{row['right']:.1f} %",
                f"{row['behind_esc']:+.1f} ± {row['margin']:.1f}",
                f"{row['requests']:.2f}",
                f"{row['completions']:.2f}",
                f"{row['prompt_tokens']:.0f}",
                row["errors"],
            ]
            for row in rows
        ]
        parts.append(f"Upstream: {name}, {result['questions'][name]} questions.\n\n{table(head, lines)}")
    notes = [
        f"Requests, completions and prompt tokens (words) are per question, counted by the upstream. {CLIENTS} "
        "clients. `±` is the 95 % interval of the difference to `esc` on the same questions. "
        "Errors: questions without a reply.",
        result["environment"],
        f"optillm {result['optillm']}." if result["optillm"] else NO_OPTILLM,
    ]
    return "\n\n".join([*parts, "\n".join(notes)])


def plot(result: dict[str, Any], path: str) -> None:
    """For each upstream, percent right as dots and completions per question as bars, a line for each side."""
    upstreams = result["upstreams"]
    names = [row["side"] for row in upstreams["house model"]]
    with picture(path, width=9.5, height=0.9 + 0.24 * len(names)) as figure:
        panels = figure.subplots(1, 2 * len(upstreams), sharey=True)
        for place, (upstream, rows) in enumerate(upstreams.items()):
            dots, bars = panels[2 * place], panels[2 * place + 1]
            for row in rows:
                line, colour = names.index(row["side"]), COLOURS[0 if row["ours"] else 1]
                dots.plot(row["right"], line, "o", color=colour, markersize=5)
                bars.barh(line, row["completions"], color=colour)
            dots.grid(axis="x", alpha=0.3)
            dots.set_title(upstream, fontsize=9)
            dots.set_xlabel("% right")
            bars.set_xlabel("completions per question")
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()


def main() -> None:
    """Measure and print."""
    shown = parser(__doc__, questions=240)
    shown.add_argument("--record", type=Path, help="a record with at least 40 draws a problem")
    shown.add_argument("--plot", metavar="FILE.png", help="also draw accuracy against completions")
    options = shown.parse_args()
    result = run(options)
    emit(options, result, markdown(result))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
