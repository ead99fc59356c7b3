"""The benchmark of the digits model runs at a tiny size, and its page holds the tables it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_at_a_tiny_size(tmp_path):
    pytest.importorskip("sklearn", reason="needs scikit-learn (extra diffusion) for its digits")
    script = ROOT / "benchmarks" / "digits.py"
    flags = ["--count", "16", "--guided", "40", "--guided-evaluations", "4", "--json"]
    flags += ["--plot", str(tmp_path / "plot.png"), "--pictures", str(tmp_path)]
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    errors = {(row["method"], row["evaluations"]): row["map_median"] for row in result["rows"]}
    for method in {row["method"] for row in result["rows"]}:
        assert errors[method, 4] > errors[method, 32]
    guided = [row["guidance"] for row in result["guided"]]
    assert len(guided) == 8
    assert (guided[0], guided[-1]) == ("no guidance", "data")
    assert {file.name for file in tmp_path.iterdir()} == {
        "plot.png",
        *(f"digits-guidance-{name}.png" for name in ("none", "plain", "apg")),
    }


def test_every_method_on_the_page_is_in_the_package():
    from consilience.diffusion import METHODS

    page = (ROOT / "docs" / "results" / "digits.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (\d+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert {name for name, _, _ in rows} <= {"auto", *METHODS}
    assert len(rows) >= 30
