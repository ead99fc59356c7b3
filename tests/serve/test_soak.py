"""The soak of ``benchmarks/serve_soak.py`` in small: the same processes, clients, faults and checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_small_soak_loses_and_crosses_nothing() -> None:
    flags = ["--requests", "400", "--warm", "40", "--settle", "6", "--at-once", "24", "--json"]
    done = subprocess.run(
        [sys.executable, "serve_soak.py", *flags], cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=300
    )
    result = json.loads(done.stdout)
    growth = next(name for name in result["held"] if name.startswith("RSS"))  # means nothing over so few requests
    assert [name for name, good in result["held"].items() if not good and name != growth] == [], done.stderr
    assert sum(result["ends"].values()) == 400
    assert len({name.partition(":")[0] for name in result["ends"]}) > 12
    assert sum(result["upstream"]["faults"].values()) > 0
    assert any("insufficient_quota" in name for name in result["ends"])
