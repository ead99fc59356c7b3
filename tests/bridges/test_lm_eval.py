"""The command of lm-evaluation-harness through the server, on a local task; its figures are counted again here."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from consilience.ledger import Ledger
from consilience.testing import ScriptedServer
from serve.helpers import running
from serve.upstream import Upstream

from .conftest import needed

needed("lm_eval")

ROOT = Path(__file__).parents[2]
TASK = ROOT / "examples" / "lm_eval"
GUIDE = (ROOT / "docs" / "guide" / "bridges.md").read_text(encoding="utf-8")
GOLD = {one["question"]: one["answer"] for one in map(json.loads, (TASK / "sums.jsonl").read_text().splitlines())}
COMMAND = re.search(r"^lm-eval run .*?(?=^```)", GUIDE, re.DOTALL | re.MULTILINE)[0].replace("\\\n", " ")  # type: ignore[index]


def harness(folder: Path, url: str, model: str, *changes: tuple[str, str]) -> float:
    """The accuracy that the guide's command reports for a model at a server."""
    command = COMMAND.replace("http://127.0.0.1:8000/v1", url).replace("my-model@esc:window=4", model)
    for old, new in changes:
        assert old in command
        command = command.replace(old, new)
    name, *arguments = shlex.split(command)
    tool = Path(sys.executable).with_name(name)
    output = folder / "results"
    shutil.rmtree(output, ignore_errors=True)
    arguments[arguments.index("results")] = str(output)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": "x"}
    done = subprocess.run([tool, *arguments], cwd=TASK, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = output.rglob("results_*.json")
    return json.loads(file.read_text())["results"]["sums"]["exact_match,answer"]


def sums(question: str, rng: random.Random) -> str:
    """A model that adds rightly with probability 3/4, and is else off by 1 or 10."""
    right = sum(map(int, re.findall(r"\d+", question)))
    return f"Let me see. The answer is {right if rng.random() < 0.75 else right + rng.choice([-10, -1, 1, 10])}."


def answers(ledger: Path) -> dict[str, list[str]]:
    """What each question's draws answer, in order, read from the ledger by this test's own means."""
    found = {}
    with Ledger(str(ledger)) as opened:
        for asked, _, draws in opened._requests():
            question = re.search(r"What is \d+ \+ \d+\?", asked)[0]  # type: ignore[index]
            found[question] = [re.search(r"is (-?\d+)", draws[n].text)[1] for n in sorted(draws)]  # type: ignore[index]
    return found


def test_a_policy_and_one_draw_of_the_same_draws(serve: Any, tmp_path: Path, capsys: Any) -> None:
    with ScriptedServer(answers=sums, seed=3, supports_seed=False) as upstream:
        url = serve(upstream, "--policy", "one")
        agreed = harness(tmp_path, url, "m@esc:window=4")
        bought = upstream.counts["draws"]
        single = harness(tmp_path, url, "m")
        assert upstream.counts["draws"] == bought
    drawn = answers(tmp_path / "ledger.db")
    assert set(drawn) == set(GOLD)
    assert sum(map(len, drawn.values())) == bought
    for given in drawn.values():
        windows = [given[start : start + 4] for start in range(0, len(given), 4)]
        assert [len(set(window)) == 1 for window in windows[:-1]] == [False] * (len(windows) - 1)
        assert len(set(windows[-1])) == 1 or len(given) == 40
    right = {q: Counter(given).most_common(1)[0][0] == GOLD[q] for q, given in drawn.items()}
    assert agreed == pytest.approx(sum(right.values()) / len(GOLD))
    assert single == pytest.approx(sum(given[0] == GOLD[q] for q, given in drawn.items()) / len(GOLD))
    with capsys.disabled():
        each = bought / len(GOLD)
        print(f"\nlm_eval, 40 sums: one draw {single:.3f}, esc:window=4 {agreed:.3f} with {each:.1f} draws each")
    assert agreed > single  # one draw is right in all 40 with a chance of 1e-5


def test_text_completions(serve: Any, tmp_path: Path) -> None:
    """Each question's three draws are a wrong one and twice the right one: one draw is never right, the vote is."""

    class Three(Upstream):
        async def texts(self, request: Any) -> Any:
            question = (await request.json())["prompt"]
            right = sum(map(int, re.findall(r"\d+", question)))
            self.answers, self.made = ("0", str(right), str(right)), 0
            return await super().texts(request)

    upstream = Three()
    with running(upstream.app) as origin:
        url = serve(type("Served", (), {"url": f"{origin}/v1"}), "--policy", "sc:n=3")
        changes = [
            ("local-chat-completions", "local-completions"),
            ("/chat/completions", "/completions tokenizer_backend=None tokenized_requests=False"),
            ("--apply_chat_template", ""),
            ("num_concurrent=8", "num_concurrent=1"),
        ]
        assert harness(tmp_path, url, "m", *changes) == 1.0
        assert len(upstream.seen) == len(GOLD)
