"""What the bridges share: a policy over draws that somebody else makes. Needs none of the frameworks."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

import consilience
from consilience.bridges.agreement import agree, rule_of
from consilience.draws import Draw
from consilience.errors import InputError
from consilience.text.voting.token_statistics import FIELDS

SPECS = ["asc", "esc:window=3,max=12", "sc:n=7", "certified", "sc:n=8+logprob-weighted", "sc:n=6+mbr", "one"]


def replies(texts: list[str | None]):
    """A framework that makes these draws in order (None: one that failed), and the waves it was asked for."""
    waves: list[int] = []

    async def wave(indices: range) -> list[tuple[Draw, int]]:
        waves.append(len(indices))
        return [
            (Draw(text="", error="x") if texts[i] is None else Draw(text=texts[i], token_logprobs=[-1.0 - i / 99]), i)
            for i in indices
        ]

    return wave, waves


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_the_verdict_of_solve_on_the_same_draws(tmp_path: Path, spec: str) -> None:
    rng = np.random.default_rng(4)
    for number in range(5):
        answers = rng.choice(["3", "4", "5"], p=[0.6, 0.3, 0.1], size=1000)
        texts: list[str | None] = [f"The answer is {answer}." for answer in answers]
        texts[1:4] = ["Well.", None, texts[3]]
        draws = [
            {"text": text or "", "error": None if text else "x", "token_logprobs": [-1.0 - i / 99]}
            for i, text in enumerate(texts)
        ]
        record = tmp_path / f"{spec.replace(':', '')}{number}.jsonl"
        record.write_text(json.dumps({"id": "1", "question": "q", "draws": draws}) + "\n")
        run = consilience.solve(record, model=f"record:{record}", policy=spec, ledger=str(tmp_path / f"{number}.db"))
        expected = run.problems[0].verdict
        wave, waves = replies(texts)
        agreed = asyncio.run(agree(rule_of(spec, "auto", FIELDS), "q", "auto", wave))
        told = agreed.verdict
        assert told["votes"] == expected.votes
        assert (told["answer"], told["draws"], told["failed"]) == (expected.answer, expected.draws, expected.failed)
        assert told["confidence"] == pytest.approx(expected.confidence)
        assert told["stopped_because"] == expected.stopped_because
        assert sum(waves) == expected.draws
        assert texts[agreed.chosen] == f"The answer is {expected.answer}."
        assert agreed.chosen == texts.index(f"The answer is {expected.answer}.")


def test_without_an_answer_one_wave_and_the_first_that_did_not_fail() -> None:
    wave, waves = replies([None, "A poem.", "Another."] * 10)
    agreed = asyncio.run(agree(rule_of("esc:window=5,max=20", "auto"), "q", "auto", wave))
    assert (agreed.chosen, waves) == (1, [5])
    assert (agreed.verdict["answer"], agreed.verdict["confidence"]) == (None, None)
    assert (agreed.verdict["stopped_because"], agreed.verdict["failed"]) == ("no answer", 2)


def test_where_all_failed_the_first_is_given() -> None:
    wave, _ = replies([None] * 4)
    assert asyncio.run(agree(rule_of("sc:n=4", "auto"), "q", "auto", wave)).chosen == 0


def test_what_a_wave_raises_ends_it() -> None:
    async def wave(indices: range) -> list[tuple[Draw, int]]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(agree(rule_of("asc", "auto"), "q", "auto", wave))


@pytest.mark.parametrize(
    ("spec", "kind", "says"),
    [
        ("nothing", "auto", "nothing"),
        ("sc+usc", "auto", "asks a model"),
        ("sc+reward-weighted", "auto", "'reward'"),
        ("modelswitch", "auto", "models"),
        ("asc", "sql", "behaviour"),
        ("asc", "prose", "kinds are"),
    ],
)
def test_what_a_bridge_cannot_do_is_refused_at_once(spec: str, kind: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        rule_of(spec, kind)
