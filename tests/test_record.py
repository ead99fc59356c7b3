"""The record: what goes in comes out, and what is wrong is named."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience import record
from consilience.draws import Budget, Draw, Problem
from consilience.errors import InputError

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
unknown = st.dictionaries(st.from_regex(r"x_[a-z]{1,6}", fullmatch=True), json_values, max_size=3)


@given(st.text(min_size=1).filter(str.strip), unknown, unknown, st.booleans())
def test_round_trip_keeps_every_field(question: str, extra: dict, in_draw: dict, packed: bool):
    line = {
        "id": "7",
        "question": question,
        "answer": None,
        "draws": [{"text": "t", "logprob": -1.5} | in_draw],
    } | extra
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.jsonl", Path(folder) / ("b.jsonl.gz" if packed else "b.jsonl")
        source.write_text(json.dumps(line) + "\n\n", encoding="utf-8")
        assert record.write(target, record.read(source)) == 1
        raw = gzip.decompress(target.read_bytes()) if packed else target.read_bytes()
        assert json.loads(raw) == line


def test_ids_default_to_line_numbers_and_numbers_become_text(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('\ufeff{"question": "a", "answer": 18}\n\n{"question": "b", "id": 5}\n', encoding="utf-8")
    first, second = record.read(path)
    assert (first.id, first.answer, first.kind, second.id) == ("1", "18", "auto", "5")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"question": "a"}\n{"question": 3', "line 2"),
        ('{"question": "a"}\n{"questio": "a"}', "line 2: field 'question'"),
        (
            '{"question": "a", "draws": [{"text": "x"}, {"text": 1.5, "logprob": "y"}]}',
            "line 1: field 'draws.1.logprob'",
        ),
        ('{"question": "  "}', "line 1: field 'question'"),
        ("[1]", "line 1"),
        ("\x00", "line 1"),
    ],
)
def test_errors_name_line_and_field(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        list(record.read(path))
    assert says in str(error.value)
    assert "q.jsonl" in str(error.value)


def test_reading_streams(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a"}\nbroken\n')
    reader = record.read(path)
    assert next(reader).question == "a"
    with pytest.raises(InputError, match="line 2"):
        next(reader)


@pytest.mark.parametrize("name", ["missing.jsonl", "folder", "plain.jsonl.gz", "cut.jsonl.gz", "latin.jsonl"])
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain.jsonl.gz").write_text("not gzip")
    whole = gzip.compress(b'{"question": "a"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latin.jsonl").write_bytes('{"question": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        list(record.read(tmp_path / name))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("old")

    def problems():
        yield Problem(question="a", draws=[Draw(text="x")])
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        record.write(path, problems())
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_places_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        record.write(tmp_path, [])
    with pytest.raises(InputError, match="cannot be written"):
        record.write("/proc/nowhere/r.jsonl", [])
    assert record.write("/dev/null", [Problem(question="a")]) == 1
    assert not Path("/dev/null").is_file()


def test_budget_specification() -> None:
    assert Budget.parse("draws=10, usd=0.5") == Budget(draws=10, usd=0.5)
    for spec in ["draws", "draws=x", "draw=1", "usd=-1", "usd=nan", "seconds=inf", "draws=1,draws=2", ""]:
        with pytest.raises(InputError, match="budget"):
            Budget.parse(spec)
