"""A second real OpenAI-compatible server, which is not ours: `transformers serve` with the house model."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

import consilience

WEIGHTS = Path(consilience.__file__).parent / "text" / "sources" / "house" / "weights"
QUESTIONS = Path(__file__).parents[1] / "examples" / "house-questions.jsonl"
BARE = "{question}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    for module in ("torch", "transformers", "fastapi", "uvicorn"):
        pytest.importorskip(module, reason="transformers serve needs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(WEIGHTS), "--device", "cpu"]
    with log.open("w") as stream:
        process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=stream, stderr=stream)
    try:
        for _ in range(480):
            assert process.poll() is None, log.read_text()
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, ConnectionError, TimeoutError):
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
def test_the_main_job_on_a_server_that_is_not_ours(server: str, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    problems = [line for line in lines if line["kind"] == "text"][:6]
    template = tmp_path / "template.txt"
    template.write_text(BARE)
    settings = {
        "model": f"openai:{WEIGHTS}@{server}",
        "policy": "sc:n=5",
        "temperature": 1.0,
        "max_tokens": 80,
        "concurrency": 2,
        "template": template,
        "ledger": str(tmp_path / "l.db"),
    }
    run = consilience.solve(problems, **settings)
    assert run.totals["answered"] == 6
    assert run.totals["failed"] == 0
    assert run.totals["draws_bought"] == 30
    assert run.totals["usage"]["completion_tokens"] > 30 * 5
    assert run.totals["spent"]["attempts_of_unknown_usage"] == 0
    assert len({draw.text for problem in run for draw in problem.draws}) > 10  # a seed of its own for every draw
    assert any("`n`" in note for note in run.notes)
    assert any("log-probabilities" in note for note in run.notes)
    again = consilience.solve(problems, **settings)
    assert again.totals["draws_bought"] == 0
    assert [p.verdict.answer for p in again] == [p.verdict.answer for p in run]
