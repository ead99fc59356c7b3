"""The guidance benchmark runs at a tiny size and its rows agree with themselves. No quality is judged here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_guidance_benchmark_counts_what_each_method_calls(tmp_path: Path) -> None:
    sizes = ["--steps", "12", "--width", "16", "--samples", "8", "--evaluations", "6", "--classifier-steps", "5"]
    picture = tmp_path / "plot.png"
    command = [sys.executable, str(ROOT / "benchmarks" / "guidance.py"), *sizes, "--task-steps", "2", "--seeds", "1"]
    done = subprocess.run(
        [*command, "--json", "--plot", str(picture)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for row in result["guided"][1:]:
        two = not row["method"].startswith(("no guidance", "interval"))
        assert 6 <= row["nfe"] <= 12
        assert (row["nfe"] == 12) == two
    assert result["guided"][0]["outside"] < 0.2
    assert result["continual"][0]["gain"] == 0
    assert len(result["continual"]) == 10
    assert [row["nfe"] for row in result["density"][1:]] == [40] * 4
    assert all(math.isfinite(row["distance"]) for part in result["losses"].values() for row in part)
    assert picture.stat().st_size < 80_000
