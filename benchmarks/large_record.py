"""Memory and time of `consilience replay` on a large record, which is made up for it and deleted afterwards.

Every reply is a few sentences with an answer that is right with the question's own probability. The command runs as a
process of its own, so that its peak memory is its own.

    python benchmarks/large_record.py --problems 25000 --draws 40
"""

from __future__ import annotations

import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import emit, environment, parser, table

POLICIES = ("asc", "esc:window=5,max=40", "sc:n=40")
SENTENCES = "First I write down what is given. Then I combine the quantities step by step and check each of them. "


def write(path: Path, problems: int, draws: int, seed: int) -> None:
    """A record of made-up draws."""
    lots = random.Random(seed)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as stream:
        for number in range(problems):
            share = lots.random()
            replies = [7 if lots.random() < share else lots.randrange(100) for _ in range(draws)]
            drawn = [
                {"text": f"{SENTENCES * 3}The answer is {reply}.", "completion_tokens": 60 + reply, "model": "made up"}
                for reply in replies
            ]
            problem = {"id": str(number), "question": f"Question {number}?", "answer": "7", "kind": "number"}
            stream.write(json.dumps({**problem, "draws": drawn}) + "\n")


def replay(path: Path, repeats: int) -> dict[str, Any]:
    """One run of the command: seconds, peak memory in MB and the figures it prints."""
    command = [sys.executable, "-m", "consilience", "replay", str(path), "--repeats", str(repeats), "--json"]
    for spec in POLICIES:
        command += ["--policy", spec]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mb": peak, "policies": json.loads(done.stdout)["policies"]}


def main() -> None:
    """Print the table."""
    shown = parser(__doc__, seed=0)
    shown.add_argument("--problems", type=int, default=25_000, help="default 25000")
    shown.add_argument("--draws", type=int, default=40, help="per problem, default 40")
    shown.add_argument("--repeats", type=int, default=20, help="orders, default 20")
    options = shown.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.jsonl.gz"
        write(path, options.problems, options.draws, options.seed)
        size = path.stat().st_size / 1e6
        found = replay(path, options.repeats)
    judged = sum(row["mean_draws"] for row in found["policies"]) * options.problems * options.repeats
    cells = [
        ["draws in the record", f"{options.problems * options.draws:,}"],
        ["file, MB (gzip)", f"{size:.0f}"],
        ["policies x orders", f"{len(POLICIES)} x {options.repeats}"],
        ["draws judged in replay", f"{judged:,.0f}"],
        ["peak memory of the command, MB", f"{found['peak_mb']:.0f}"],
        ["seconds, reading and replaying", f"{found['seconds']:.0f}"],
    ]
    emit(options, {**found, "file_mb": size, "judged": judged}, table(["", ""], cells) + "\n\n" + environment())


if __name__ == "__main__":
    main()
