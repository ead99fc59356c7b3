"""Each benchmark runs at a tiny size, and its table agrees with itself and with the server's counts. No speeds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
NONE = "no-such-python"


def call(name: str, *flags: str, peers: bool = False) -> str:
    """What a benchmark prints; without peers unless asked for."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags]
    if name in ("throughput", "side_by_side"):
        command += ["--peers-python", str(PEERS) if peers else NONE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_json(name: str, *flags: str, peers: bool = False) -> Any:
    return json.loads(call(name, *flags, "--json", peers=peers))


@pytest.fixture
def with_peers() -> None:
    """Skips where the peers are not installed."""
    code = "import its_hub, backoff"
    if not PEERS.exists() or subprocess.run([PEERS, "-c", code], capture_output=True).returncode:
        pytest.skip("its_hub is not installed in .venv-peers: make .venv-peers/.ready")


def cells(markdown: str) -> list[list[str]]:
    """The rows of all Markdown tables."""
    lines = [line for line in markdown.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_throughput_without_the_peer_says_so(tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    printed = call("throughput", "--calls", "64", "--rounds", "2", "--plot", str(picture))
    assert "its_hub was skipped" in printed
    rows = {row[0]: row for row in cells(printed)}
    assert rows["Consilience, sc:n=16, ledger on"][-1] == "64"
    assert rows["aiohttp, bare loop"][3] == "1.00"
    assert picture.stat().st_size < 80_000


@pytest.mark.usefixtures("with_peers")
def test_throughput_counts_the_same_calls_on_every_side() -> None:
    result = as_json("throughput", "--calls", "64", "--rounds", "1", peers=True)
    assert len(result["sides"]) == 5
    assert {row["requests_per_round"] for row in result["sides"].values()} == {64}


def test_side_by_side_without_the_peer() -> None:
    result = as_json("side_by_side", "--questions", "12", "--rounds", "1", "--latency", "0.002")
    assert result["its_hub"] is None
    by_name = {row["side"]: row for row in result["cost"]["12"]}
    assert by_name["sc:n=16, n off"]["requests"] == by_name["sc:n=16, n off"]["draws"] == 192
    on, off = by_name["asc:threshold=0.95,max=16, n on"], by_name["asc:threshold=0.95,max=16, n off"]
    assert on["requests"] < off["requests"] == off["draws"] <= 192
    for rows in [*result["cost"].values(), *result["survival"].values()]:
        assert all(row["lost"] == 0 and row["right"] <= row["questions"] == 12 for row in rows)
    assert 4 < result["sequential"]["draws_per_question"] < 16


@pytest.mark.usefixtures("with_peers")
def test_side_by_side_with_the_peer_prints_every_side(tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    flags = ("--questions", "6", "--rounds", "1", "--latency", "0.002", "--timeout", "10", "--plot", str(picture))
    rows = cells(call("side_by_side", *flags, peers=True))
    plain = next(row for row in rows if row[0] == "its_hub SelfConsistency")
    assert plain[1:5] == ["96", "96", "16.00", plain[4]]
    replaced = [row for row in rows if row[0].endswith("errors replaced")]
    assert len(replaced) == 3
    assert all(row[1] == row[3] == "0 of 6" for row in replaced)
    assert picture.stat().st_size < 80_000


def test_robustness_loses_nothing_and_says_what_it_counted() -> None:
    result = as_json("robustness", "--questions", "10", "--caps", "0", "--kills", "1", "--kill-questions", "20")
    assert len(result["failures"]) == 8
    assert all(row["lost"] == 0 for row in result["failures"])
    assert all(row["calls"] >= 160 for row in result["failures"] if row["policy"] == "sc:n=16, n off")
    assert all((row["stored_bought_again"], row["missing"], row["third"]) == (0, 0, 0) for row in result["kills"])
    assert all(0 <= row["answered_most"] <= row["most"] for row in result["kills"])


def test_robustness_cap_is_never_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import robustness

    one = robustness.capped(robustness.FAULTS["all of these"], n=False, cap=5.0, seed=1)
    assert 0 < one["billed"] <= one["own_count"] <= 5.0
    assert one["stopped"]


def test_startup_lists_every_process_and_no_torch() -> None:
    printed = call("startup", "--rounds", "1")
    assert len(cells(printed)) == 5
    assert re.search(r"torch \(.*?\): `import consilience` no, `consilience --help` no", printed)


def test_the_sequential_optimum_is_that_of_the_rule_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from side_by_side import enough

    from consilience.text.stopping.criteria import votes_needed

    for threshold in (0.85, 0.95):
        needed = votes_needed(threshold, 16)
        for second in range(6):
            first = next(v for v in range(second, 99) if enough(v, second, threshold))
            assert first == needed[second] or needed[second] == 17


def test_a_large_record_is_replayed_without_keeping_its_texts() -> None:
    small, large = (as_json("large_record", "--problems", number, "--repeats", "2") for number in ("20", "1000"))
    assert large["judged"] == pytest.approx(50 * small["judged"], rel=0.3)
    assert large["peak_mb"] - small["peak_mb"] < 40  # the 40,000 draws as objects take more than 100 MB
