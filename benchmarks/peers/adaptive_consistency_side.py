"""The package AdaptiveConsistency, run by the Python that has it: reads one JSON object, prints one.

Input: ``sequences``, answers in the order of drawing; ``counts``, vote counts to be judged by every criterion. Output:
after how many draws `AC.should_stop` (Beta) stops each sequence, the steps and the seconds of its calls alone, and the
decision of each criterion on every count vector with the probability or share it gives.

Dirichlet is judged with ``use_markov=False``, by its quadrature: the Monte Carlo integral that is its default fails
with the NumPy of today, whatever the counts (an array of unequal rows), and then never stops. Vectors of more than
three answers, on which the quadrature takes up to seconds, are left out for it (null).
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

from adaptive_consistency import AC, DirichletStoppingCriteria, stop_criteria_dict

CRITERIA = ("beta", "dirichlet", "entropy", "majority")


def main() -> None:
    """Judge what standard input holds."""
    given = json.load(sys.stdin)
    rule = AC(max_gens=40)
    index, steps, seconds = [], 0, 0.0
    for answers in given["sequences"]:
        drawn, stop = 0, False
        while drawn < len(answers) and not stop:
            drawn += 1
            prefix = answers[:drawn]
            start = time.process_time()
            stop = rule.should_stop(prefix)
            seconds += time.process_time() - start
        index.append(drawn)
        steps += drawn
    decisions: dict[str, list[list[float] | None]] = {}
    for name in CRITERIA:
        criterion = DirichletStoppingCriteria(use_markov=False) if name == "dirichlet" else stop_criteria_dict[name]()
        decisions[name] = []
        for counts in given["counts"]:
            judged = name != "dirichlet" or len(counts) <= 3
            found = (
                criterion.should_stop([label for label, n in enumerate(counts) for _ in range(n)]) if judged else None
            )
            decisions[name].append(found and [bool(found["stop"]), float(found["prob"])])
    result = {"index": index, "steps": steps, "seconds": seconds, "decisions": decisions}
    print(json.dumps({**result, "release": version("AdaptiveConsistency")}))


if __name__ == "__main__":
    main()
