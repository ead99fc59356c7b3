"""The benchmark of few-step students of the digits runs at a tiny size and takes its students up again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_at_a_tiny_size(tmp_path):
    pytest.importorskip("sklearn", reason="needs scikit-learn (extra diffusion) for its digits")
    script = ROOT / "benchmarks" / "few_steps_digits.py"
    flags = [
        "--count",
        "16",
        "--seeds",
        "2",
        "--objectives",
        "ect:2,lsd:1",
        "--cache",
        str(tmp_path / "kept"),
        "--json",
    ]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    flags += ["--plot", str(pictures / "plot.png"), "--pictures", str(pictures)]
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert [(row["model"], row["seed"], row["nfe"]) for row in found[0]["students"]] == [
        *(("ect", seed, n) for seed in (0, 1) for n in (1, 2, 4)),
        *(("lsd", 0, n) for n in (1, 2, 4)),
    ]
    assert len(list(pictures.iterdir())) == 6
