"""`solve` and `asolve` from Python."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import consilience
from consilience import policy, record
from consilience.config import read as read_config
from consilience.draws import Draw, Problem
from consilience.errors import InputError
from consilience.replay import judge
from consilience.run import Settings
from consilience.text.prompts import messages
from consilience.text.sources import open_source

QUESTION = "A coin is heads up. Ann flips the coin. Is the coin still heads up?"


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    return {"ledger": str(tmp_path / "l.db"), "policy": "sc:n=5"}


def test_solve_takes_texts_dicts_and_problems(settings: dict) -> None:
    given = [QUESTION, {"question": QUESTION, "id": 9, "answer": "no"}, consilience.Problem(question=QUESTION, id="x")]
    run = consilience.solve(given, **settings)
    assert [problem.id for problem in run] == ["1", "9", "x"]
    assert len({str(problem.verdict.votes) for problem in run}) == 1
    assert run.right[0] is None
    assert run.right[1] is not None
    assert given[2].draws == []  # the caller's object is left alone
    assert run.totals["draws_bought"] == 5


def test_solve_works_inside_a_running_loop(settings: dict) -> None:
    async def notebook() -> consilience.Run:
        return consilience.solve([QUESTION], **settings)

    inside = asyncio.run(notebook())
    awaited = asyncio.run(consilience.asolve([QUESTION], **settings))
    assert inside.problems[0].verdict == awaited.problems[0].verdict

    async def wrong() -> None:
        consilience.solve([QUESTION], **(settings | {"policy": "nothing"}))

    with pytest.raises(InputError, match="nothing"):
        asyncio.run(wrong())


@pytest.mark.parametrize(
    ("problems", "says"),
    [
        ([""], "problem 1"),
        ([QUESTION, {"answer": "x"}], "problem 2"),
        ([{"question": QUESTION, "kind": "essay"}], "auto, number"),
        ("nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_bad_problems_are_refused_before_anything_is_drawn(problems, says: str, settings: dict) -> None:
    with pytest.raises(InputError, match=says):
        consilience.solve(problems, **settings)
    assert not Path(settings["ledger"]).exists()


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        consilience.solve([QUESTION], temprature=1)


def test_a_question_the_model_cannot_read_is_abstained_not_lost(settings: dict) -> None:
    run = consilience.solve([QUESTION, "word " * 5000], **settings)
    assert [problem.verdict.abstained for problem in run] == [False, True]
    assert run.problems[1].verdict.failed == 5
    assert "tokens" in run.problems[1].draws[0].error


def test_the_house_model_gives_the_same_draws_at_every_concurrency(tmp_path: Path) -> None:
    questions = [QUESTION.replace("Ann", name) for name in ("Ann", "Eve", "Tom", "Ida", "Max")]
    texts = []
    for concurrency in (1, 16):
        run = consilience.solve(
            questions,
            policy="sc:n=6",
            concurrency=concurrency,
            ledger=str(tmp_path / f"{concurrency}.db"),
            temperature=1.0,
        )
        texts.append([[draw.text for draw in problem.draws] for problem in run])
    assert texts[0] == texts[1]
    assert len({text for row in texts[0] for text in row}) > 5


def test_an_own_answer_counts_unless_a_pattern_is_given(tmp_path: Path, settings: dict) -> None:
    source = tmp_path / "r.jsonl"
    draws = [Draw(text="The answer is 1. really: 3", answer="2") for _ in range(5)]
    record.write(source, [Problem(question="q", draws=draws)])
    own = consilience.solve(["q"], model=f"record:{source}", **settings)
    assert own.problems[0].verdict.answer == "2"
    read = consilience.solve(["q"], model=f"record:{source}", extract=r"really: (\d)", **settings)
    assert read.problems[0].verdict.answer == "3"


def test_prompts_end_by_kind_and_templates_are_filled(tmp_path: Path, settings: dict) -> None:
    (only,) = messages("What?", "number")
    assert only["content"] == "What?\n\nEnd with: The answer is <number>."
    assert messages("What?", "number", bare=True)[0]["content"] == "What?"
    system, user = messages("{ending}", "math", system="Be brief.", template="Q: {question}\n{ending}")
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == "Q: {ending}\nEnd with the final answer in \\boxed{}."
    bad = tmp_path / "t.txt"
    bad.write_text("no place for it")
    with pytest.raises(InputError, match="must contain"):
        consilience.solve(["q"], template=bad, **settings)


def test_the_configuration_fills_what_no_flag_says(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        '[defaults]\npolicy = "one"\ntemperature = 0.0\n[endpoints.work]\nurl = "http://127.0.0.1:9/v1"\n'
        'api_key_env = "WORK_KEY"\n[prices."m"]\ninput = 1.0\noutput = 2.0\n'
    )
    filled, config = Settings(config=path).resolved()
    assert (filled.policy, filled.temperature, filled.model, filled.max_tokens) == ("one", 0.0, "house", 1024)
    assert Settings(config=path, temperature=0.5).resolved()[0].temperature == 0.5
    source = open_source("openai:m@work", config)
    assert source.name == "openai:m@http://127.0.0.1:9/v1"
    with pytest.raises(InputError, match="there are: work"):
        open_source("openai:m@home", config)
    for text, says in [
        ("[defaults]\nx = 1", "defaults.x"),
        ('[prices.m]\ninput = "a"', "prices.m.input"),
        ("[", "TOML"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=says):
            read_config(path)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("openai:gpt@http://127.0.0.1:9/v1", "openai:gpt@http://127.0.0.1:9/v1"),
        ("openai:org/m@v2@http://127.0.0.1:9", "openai:org/m@v2@http://127.0.0.1:9/v1"),
        ("openai:gpt", "openai:gpt@https://api.openai.com/v1"),
    ],
)
def test_model_specifications(spec: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert open_source(spec, read_config()).name == name


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "gpt",
        "hf:",
        "record:",
        "openai:",
        "openai:@http://x",
        "House",
        "hf:/nowhere/at/all",
        "openai:x@work",
        "openai:x@ftp://h",
    ],
)
def test_model_specifications_that_are_none(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match=r"model|URL|endpoint"):
        open_source(spec, read_config())


@pytest.mark.parametrize(
    "vote", ["logprob-weighted", "soft-sc:aggregate=min", "rpc", "selective-ensembles", "best-of-n:field=logprob"]
)
def test_votes_by_the_models_own_probabilities_run_live_as_they_replay(vote: str, settings: dict) -> None:
    spec = f"sc:n=8+{vote}"
    run = consilience.solve([QUESTION], **(settings | {"policy": spec, "temperature": 1.0}))
    verdict, _ = judge(run.problems[0], policy.parse(spec), "auto")
    live = run.problems[0].verdict
    assert (verdict.answer, verdict.confidence) == (live.answer, live.confidence)
    assert run.policy == policy.parse(spec).name
    assert not any("do not have" in note for note in run.notes)


def test_a_vote_whose_field_the_draws_do_not_have_is_said(settings: dict) -> None:
    run = consilience.solve([QUESTION, QUESTION + " Really?"], **(settings | {"policy": "sc:n=3+best-of-n"}))
    assert [problem.verdict.abstained for problem in run] == [True, True]
    assert sum("reads 'reward'" in note for note in run.notes) == 1
    with pytest.raises(InputError, match="must be a number"):
        consilience.solve([QUESTION], **(settings | {"policy": "sc:n=3+best-of-n:field=text"}))


def test_a_time_cap_stops_the_house_model(settings: dict) -> None:
    questions = [QUESTION.replace("Ann", name) + f" ({n})" for n in range(60) for name in ("Ann", "Eve", "Tom", "Ida")]
    run = consilience.solve(questions, **(settings | {"policy": "sc:n=40", "budget": "seconds=1"}))
    assert run.totals["budget_spent"] == "seconds"
    assert 0 < run.totals["draws_bought"] < 240 * 40
