"""The benchmark beside a public package runs at a tiny size, and its page holds the tables it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEANFLOWS = ["meanflow", "meanflow, the peer's settings"]


@pytest.mark.slow
def test_the_benchmark_trains_every_row_for_its_time_and_trains_none_twice(tmp_path):
    pytest.importorskip("sklearn", reason="needs scikit-learn (extra diffusion) for its digits")
    pytest.importorskip("diffusers", reason="needs diffusers (extra diffusion) for its networks")
    command = [sys.executable, str(ROOT / "benchmarks" / "few_steps_peer.py"), "--json", "--seeds", "1"]
    command += ["--plane-seconds", "0.1", "--digits-seconds", "0.1", "--plot", str(tmp_path / "plot.png")]
    command += ["--cache", str(tmp_path / "cache.json")]
    first, again = (subprocess.run(command, capture_output=True, text=True, timeout=500) for _ in range(2))
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert json.loads(again.stdout) == result
    assert "is done" in first.stderr
    assert "is done" not in again.stderr
    for row in result["rows"]:
        assert row["seconds"] >= 0.1
        assert row["steps"] >= 1
        assert len({at["distance"] for at in row["at"].values()}) == len(row["at"]) >= 2
    ours = [row["method"] for row in result["rows"] if row["side"] == "here" and row["task"] == "plane"]
    assert ours == [*MEANFLOWS, "meanflow, tuned", "consistency-fm, 1 segment", "ect", "sct"]
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_page_has_every_row_of_both_tables():
    page = (ROOT / "docs" / "results" / "few-steps-peer.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z0-9-]+(?:, [a-z0-9 ']+)?) \| (rectified-flow-pytorch|here) \| (\d+) \|", page, re.M)
    found = {(name, side) for name, side, _ in rows}
    assert {
        (name, "rectified-flow-pytorch") for name in ("meanflow", "meanflow, tuned", "consistency-fm", "soflow")
    } <= found
    ours = (*MEANFLOWS, "meanflow, tuned", "meanflow, by differences", "consistency-fm, 1 segment", "ect", "sct")
    assert {(name, "here") for name in ours} <= found
    assert all(int(steps) > 0 for *_, steps in rows)
