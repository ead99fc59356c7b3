"""The samplers' benchmark runs at a tiny size and its rows agree with themselves. Little quality is judged here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_samplers_benchmark_counts_what_each_method_calls(tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    sizes = ["--samples", "80", "--steps", "30", "--width", "16", "--generations", "1", "--seeds", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "samplers.py"), *sizes, "--json", "--plot", str(picture)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    restarts = {row["method"]: row["nfe"] for row in result["restart"] if row["method"].startswith("restart")}
    assert restarts == {f"restart, K = {k}": 35 + 8 * k for k in (1, 2, 4, 8)}
    assert [row["nfe"] for row in result["restart"] if row["method"] == "ODE (Heun)"] == [23, 35, 71, 143] * 3
    assert {row["nfe"] for row in result["teleport"]} == {6, 9, 12, 18}
    assert result["gaussian"] < 1e-6
    uniform, searched = result["s3"]["rows"][0], result["s3"]["rows"][-1]
    assert searched["fit"] <= uniform["fit"]
    for data in ("mixture", "digits"):
        fitness = {row["grid"]: row["fitness"] for row in result["evolved"] if row["data"] == data}
        assert fitness["evolved"] <= fitness["even"]
    assert all(row["path"] < row["other"] for row in result["brownian"])
    assert all(math.isfinite(row[name]) for row in result["ays"] for name in ("AYS", "Karras", "exponential"))
    assert all(math.isfinite(value) for row in result["dc"] for value in row["DC-Solver"])
    assert picture.stat().st_size > 10_000
