"""Recorded replies of real models: accuracy of one draw and of the plurality vote, by our extraction and equality."""

from __future__ import annotations

import collections
import gzip
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from consilience.text.answers import AnswerClasses, equal_to_gold, extract

RECORDS = Path(os.environ.get("CONSILIENCE_RECORDS", Path(__file__).parents[3] / "shared" / "records"))


class Score(NamedTuple):
    single: float
    vote: float
    unanswered: float
    unknown: int
    disagreements: list[tuple[str, str | None]]


def load(name: str) -> list[dict[str, Any]]:
    path = RECORDS / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no record {path}; set CONSILIENCE_RECORDS to the folder of records")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def score(name: str, kind: str, finish_reason: str | None = None) -> Score:
    problems = load(name)
    single = vote = unanswered = 0.0
    unknown, disagreements = 0, []
    for problem in problems:
        classes = AnswerClasses(kind)
        answers = [extract(draw["text"], kind, finish_reason=finish_reason) for draw in problem["draws"]]
        ids = [classes.add(answer) for answer in answers]
        right = [equal_to_gold(answer, problem["answer"], kind) for answer in answers]
        counts = collections.Counter(number for number in ids if number >= 0)
        if counts:
            leader = max(counts, key=lambda number: (counts[number], -ids.index(number)))
            vote += bool(right[ids.index(leader)])
        single += sum(map(bool, right)) / len(right)
        unanswered += ids.count(-1) / len(ids)
        unknown += classes.unknown_pairs + right.count(None)
        for draw, answer, is_right in zip(problem["draws"], answers, right, strict=True):
            if draw.get("passed", is_right) != is_right:
                disagreements.append((problem["id"], answer))
    share = 100 / len(problems)
    return Score(single * share, vote * share, unanswered * share, unknown, disagreements)


def test_last_letters() -> None:
    marked = score("esc-last-letters-a", "text", finish_reason="length")
    assert (round(marked.single, 1), round(marked.vote, 1), round(marked.unanswered, 2)) == (79.8, 82.0, 0.56)
    full = score("esc-last-letters-a", "text")
    assert (round(full.single, 1), round(full.vote, 1)) == (79.8, 82.0)


def test_qwen_math() -> None:
    result = score("qwen-math-reward", "math")
    assert result.vote == pytest.approx(93.0)
    assert result.unknown == 0
    assert result.disagreements == [("qwen-math-72", "10000")]  # gold 10{,}000: the source's grader was wrong


def test_zeroeval() -> None:
    result = score("zeroeval-gsm8k-models", "number")
    assert result.single == pytest.approx(87.4, abs=0.05)
    assert result.vote == pytest.approx(96.7, abs=0.05)
