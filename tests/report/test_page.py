"""What is written, what is escaped, and what happens where there is little to show."""

from __future__ import annotations

import dataclasses
import html as html_module
import json
import os
import re
from pathlib import Path

import pytest

from consilience.errors import InputError
from consilience.report import Curve, Page, PolicyRow, QuestionRow, ReplyRow, embed, write
from consilience.report.page import render
from consilience.report.words import money, number, redact

from .demo import demo

EMPTY = Page(title="Nothing", model="house", command="consilience solve", created="today")


def data(html: str) -> list[dict]:
    """The rows embedded in the page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found.group(1))


def text(html: str) -> str:
    """The page's own text: no style, no script, no markup."""
    bare = re.sub(r"<(style|script)\b.*?</\1>", " ", html, flags=re.S)
    return re.sub(r"[ \n]+", " ", html_module.unescape(re.sub(r"<[^>]+>", " ", bare)))


def test_writes_a_page_and_three_pictures(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "run.html"
    written = write(demo(30), path)
    names = ["run.html", "run-accuracy.png", "run-draws.png", "run-reliability.png"]
    assert [place.name for place in written] == names
    assert sorted(os.listdir(path.parent)) == sorted(names)
    for image in written[1:]:
        assert image.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert image.name in path.read_text("utf-8")


def test_names_no_other_host(tmp_path: Path) -> None:
    html = render(demo(30))
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#)[^"')\s>]+""", html) == []
    assert re.findall(r"https?://", html) == []


def test_every_number_of_a_policy_is_on_the_page() -> None:
    row = PolicyRow("asc", "live", 0.8125, (0.7512, 0.8634), 7.25, 443.0, 0.00125, 0.9, 0.025, [7.25], [0.9], [1.0])
    shown = text(render(dataclasses.replace(EMPTY, policies=[row], fixed_draws=29)))
    for part in ("81.2\u202f%", "75.1–86.3", "7.25", "75\u202f%", "443", "$0.00125", "90.0\u202f%", "2.5\u202f%"):
        assert part in shown, part


def test_totals_notes_and_provenance_are_shown() -> None:
    shown = text(render(demo(30)))
    for part in (
        "consilience solve questions.jsonl",
        "house",
        "sqlite .consilience/ledger.db",
        "41.2\u202f%",
        "2 min 28 s",
    ):
        assert part in shown, part
    assert "offers no logprobs" in shown


def test_a_policy_name_is_never_markup() -> None:
    name = "</style><script>alert(1)</script><b onclick=x>\"'"
    row = PolicyRow(name, "live", 0.5, (0.4, 0.6), 3.0, draws_used=[3], confidence=[0.5], right=[1.0])
    html = render(dataclasses.replace(EMPTY, title=name, policies=[row], notes=[name], model=name))
    assert "<b onclick" not in html
    assert html.count("<script") == 2
    assert html.count("</style>") == 1


def test_pictures_take_any_policy_name(tmp_path: Path) -> None:
    names = ["$\\frac{", "a\nb\x00\ud800", "答" * 200, "_^{}$$", ""]
    rows = [
        PolicyRow(name, "replay", 0.5, (0.4, 0.6), 3.0, draws_used=[3.0], confidence=[0.5], right=[1.0])
        for name in names
    ]
    written = write(dataclasses.replace(EMPTY, policies=rows), tmp_path / "r.html")
    assert all(place.stat().st_size > 1000 for place in written)


def test_embedded_rows_keep_every_text_and_hold_no_markup() -> None:
    vicious = "</script><!--<script>&\u2028\u2029\x00\"'\\ é \U0001f600"
    row = QuestionRow(
        vicious, vicious, vicious, vicious, True, 0.5, 1, {vicious: 1}, vicious, [ReplyRow(vicious, vicious)]
    )
    html = render(dataclasses.replace(EMPTY, questions=[row]))
    raw = re.search(r'id="data">(.*?)</script>', html, re.S).group(1)  # type: ignore[union-attr]
    assert not set("<>&\u2028\u2029\x00") & set(raw)
    (back,) = data(html)
    assert {back["id"], back["question"], back["gold"], back["answer"], back["why"], back["votes"][0][0]} == {vicious}
    assert back["replies"] == [[vicious, vicious, None, 1]]


def test_numbers_that_are_none_are_no_json_error() -> None:
    row = QuestionRow("1", "q", confidence=float("nan"), votes={"a": float("inf")})
    assert data(render(dataclasses.replace(EMPTY, questions=[row])))[0]["confidence"] == 0


def test_without_gold_answers_a_sentence_stands_for_the_plots(tmp_path: Path) -> None:
    full = demo(20)
    rows = [dataclasses.replace(row, accuracy=None, accuracy_ci=None, right=[None] * 20) for row in full.policies]
    questions = [dataclasses.replace(row, gold=None, right=None) for row in full.questions]
    page = dataclasses.replace(full, policies=rows, questions=questions, curve=None)
    html = render(page)
    assert text(html).count("No question has a gold answer") == 2
    assert "chart wide" not in html
    assert text(html).count("draws used") > 0
    assert len(write(page, tmp_path / "r.html")) == 4


def test_no_question_at_all(tmp_path: Path) -> None:
    html = write(EMPTY, tmp_path / "r.html")[0].read_text("utf-8")
    assert text(html).count("No question was asked.") == 4
    assert data(html) == []


def test_questions_that_got_no_draw_are_said_not_drawn() -> None:
    row = PolicyRow("asc", "live", None, None, 1.0, draws_used=[0, 0, 3], confidence=[0] * 3, right=[None] * 3)
    html = render(dataclasses.replace(EMPTY, policies=[row]))
    assert "2 without a draw" in text(html)
    assert "3 draws\n1 question, 33.3\u202f%" in html
    unasked = dataclasses.replace(row, draws_used=[0, 0, 0], mean_draws=0.0)
    assert "3 without a draw" in text(render(dataclasses.replace(EMPTY, policies=[unasked])))


def test_one_question_and_one_draw(tmp_path: Path) -> None:
    page = demo(1)
    assert len(write(page, tmp_path / "r.html")) == 4
    short = dataclasses.replace(page, curve=Curve([1], [1.0], [0.2], [1.0]))
    assert "Plurality vote of 1 draw" in render(short)


def test_every_draw_failed(tmp_path: Path) -> None:
    replies = [ReplyRow("", None, "HTTP 500 <oops>")] * 4
    rows = [QuestionRow(str(place), "q", "1", None, False, 0.0, 4, {}, "limit", replies, False) for place in range(5)]
    policy = PolicyRow("sc:n=4", "live", 0.0, (0.0, 0.43), 4.0, None, None, 0.0, 1.0, [4.0] * 5, [0.0] * 5, [0.0] * 5)
    totals = {"questions": 5, "answered": 0, "abstained": 5, "draws": 20, "failed": 20}
    page = dataclasses.replace(EMPTY, questions=rows, policies=[policy], totals=totals)
    html = write(page, tmp_path / "r.html")[0].read_text("utf-8")
    assert "100.0\u202f% of the draws" in text(html)
    assert data(html)[0]["replies"][0] == ["", None, "HTTP 500 <oops>", 1]


def test_a_draw_cut_off_from_its_table_is_an_input_error() -> None:
    row = PolicyRow("sc", "live", None, None, 3.0, draws_used=[3.0], confidence=[], right=[None])
    with pytest.raises(InputError, match="sc: draws_used, confidence and right"):
        render(dataclasses.replace(EMPTY, policies=[row]))
    with pytest.raises(InputError, match="curve"):
        render(dataclasses.replace(EMPTY, curve=Curve([1, 2], [0.5], [0.4], [0.6])))


def test_a_path_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write the report"):
        write(EMPTY, tmp_path / "file" / "r.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="cannot write the report"):
        write(EMPTY, tmp_path / "folder.html")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.html"]


def test_a_failure_leaves_the_old_page_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    write(EMPTY, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("consilience.report.plots.save", full)
    with pytest.raises(InputError, match="No space left"):
        write(demo(5), path)
    assert path.read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_a_big_run_is_cut_and_says_so() -> None:
    replies = [ReplyRow("reasoning " * 400 + "The answer is 42.", "42")] * 3
    rows = [QuestionRow(str(place), "q", "42", "42", True, 0.9, 3, {"42": 3}, "", replies) for place in range(2_100)]
    html = render(dataclasses.replace(EMPTY, questions=rows))
    assert len(html) < 10_000_000
    back = data(html)
    assert len(back) == 2_000
    assert back[0]["replies"][0][0].endswith("The answer is 42.")
    assert "characters left out" in back[0]["replies"][0][0]
    shown = text(html)
    assert "first 2,000 of 2,100" in shown
    assert "The record holds all of it." in shown


def test_wide_characters_and_many_draws_stay_in_bounds() -> None:
    replies = [ReplyRow("答" * 300, str(place)) for place in range(500)]
    rows = [
        QuestionRow(str(place), "q", replies=replies, votes={str(n): 1 for n in range(500)}) for place in range(300)
    ]
    result = embed.embed(rows)
    assert len(result.json.encode()) < 16_000_000
    back = json.loads(result.json)
    assert len(back[0]["replies"]) + back[0]["hidden"] == 500
    assert len(back[0]["votes"]) + back[0]["rest"][0] == 500
    assert sum(vote[1] for vote in back[0]["votes"]) + back[0]["rest"][1] == 500
    assert any("draws of a question" in sentence for sentence in result.left_out)


def test_a_small_run_is_whole() -> None:
    assert embed.embed(demo(20).questions).left_out == []


@pytest.mark.parametrize(
    ("secret", "written"),
    [
        ("hunter2pass", "postgresql://ann:{}@db.local/ledger"),
        ("hunter2pass", "OPENAI_API_KEY={} consilience solve q.jsonl"),
        ("hunter2pass", '{{"api_key": "{}"}}'),
        ("abcdef123456", "consilience solve --header 'Authorization: Bearer {}'"),
        ("sk-proj-Abcdefghij0123456789", "consilience solve --model openai:m@http://h {}"),
        ("hunter2pass", "http://h/v1?token={}&x=1"),
        ("hunter2pass", "consilience serve --upstream-api-key {} --port 1"),
    ],
)
def test_secrets_are_struck_out(secret: str, written: str) -> None:
    line = written.format(secret)
    assert secret not in redact(line)
    html = render(dataclasses.replace(EMPTY, command=line, ledger=line, model=line, notes=[line]))
    assert secret not in html


@pytest.mark.parametrize(
    "harmless",
    [
        "consilience solve q.jsonl --max-tokens 1024 --budget tokens=20000,usd=1",
        "openai:Qwen/Qwen3-8B@http://localhost:8000/v1",
        "585600 tokens, 61 per draw",
        "the token budget is spent; a secret question about a password; max_token=1024, the bearer of it",
    ],
)
def test_what_is_no_secret_stays(harmless: str) -> None:
    assert redact(harmless) == harmless


def test_numbers_read_well() -> None:
    assert [number(value) for value in (None, 3.0, 7.254, 21.17, 939.2, 1234567)] == [
        "–",
        "3",
        "7.25",
        "21.2",
        "939",
        "1,234,567",
    ]
    assert [money(value) for value in (None, 0, 12.5, 0.0589, 0.0000048)] == [
        "–",
        "$0",
        "$12.50",
        "$0.0589",
        "$0.00000480",
    ]
