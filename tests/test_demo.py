"""The demo, whole: what it promises is in the files it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


def demo(folder: Path) -> str:
    done = subprocess.run([sys.executable, str(DEMO)], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_keeps_its_promises_and_a_second_run_draws_nothing(tmp_path: Path) -> None:
    printed = demo(tmp_path)
    assert str(tmp_path / "demo" / "report.html") in printed.replace("\n", "")
    summary = {row["policy"]: row for row in json.loads((tmp_path / "demo" / "summary.json").read_text())}
    fixed, adaptive = summary["sc:n=40"], summary["asc:threshold=0.95,max=40"]
    assert fixed["mean_draws"] == 40
    assert adaptive["accuracy"] >= fixed["accuracy"] - 0.01
    assert adaptive["mean_draws"] <= 0.6 * 40
    assert fixed["accuracy"] - summary["one"]["accuracy"] >= 0.12
    assert summary["esc:window=5,max=40"]["mean_draws"] < 40
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert all(policy.split(":")[0] in page for policy in summary)
    assert {row["origin"] for row in summary.values()} == {"live", "replay"}
    again = demo(tmp_path)
    assert again.count(" 0 drawn now") == 3
    assert {row["policy"]: row for row in json.loads((tmp_path / "demo" / "summary.json").read_text())} == summary
