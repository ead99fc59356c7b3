"""The certificate's error and its price: 29 distributions of answers, exact ties, and `asc` on the same draws.

One run of 2,000 simulated questions per distribution, up to 2,000 draws each. Every rule sees the same draws:

- `certified` at errors 0.05, 0.1, 0.2 and 0.5 (the rule of the library, `consilience.montecarlo.betting`);
- `asc:threshold=0.95`, the Beta criterion;
- LB, log(1 / (2.4 error)) / KL(second answer): a bound below the mean draws of any valid rule (Kaufmann et al. 2016);
- oracle: two most frequent answers only, the true odds between first and second known, threshold 1/error;
- P0: `certified`'s table on the two largest vote counts, a shortcut whose error is not proved.

With `--record` the rules are also replayed on recorded draws.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from _common import COLOURS, emit, parser, picture, table
from numpy.typing import NDArray

from consilience.montecarlo.betting import Bets, blocks, certified, log_mixture, place_bets, wins_needed
from consilience.text.stopping.criteria import votes_needed

ERRORS = (0.05, 0.1, 0.2, 0.5)
SHOWN = ERRORS[:2]
STAGES = (48, 160, 512)
Int = NDArray[np.int32]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Case:
    """A distribution: shares of the answers, the first the mode, and the mass of answers that come only once."""

    name: str
    shares: tuple[float, ...]
    single: float = 0.0

    @property
    def second(self) -> float:
        """The share of the second most probable answer."""
        return sorted(self.shares)[-2] if len(self.shares) > 1 else 0.0

    def bound(self, error: float) -> float:
        """Mean draws that no rule of this error can undercut."""
        first, second = self.shares[0], self.second
        total = first + second
        kl = first * log(2 * first / total) + (second * log(2 * second / total) if second else 0.0)
        return log(1 / (2.4 * error)) / kl


def normalised(*weights: float) -> tuple[float, ...]:
    """Weights as shares."""
    total = sum(weights)
    return tuple(w / total for w in weights)


CASES = (
    Case("2: .95/.05", (0.95, 0.05)),
    Case("2: .8/.2", (0.8, 0.2)),
    Case("2: .7/.3", (0.7, 0.3)),
    Case("2: .6/.4", (0.6, 0.4)),
    Case("2: .55/.45", (0.55, 0.45)),
    Case("2: .51/.49", (0.51, 0.49)),
    Case("2: .5001/.4999", (0.5001, 0.4999)),
    Case(".95 + .05 single", (0.95,), 0.05),
    Case(".9/.05/.05", (0.9, 0.05, 0.05)),
    Case("3: .5/.3/.2", (0.5, 0.3, 0.2)),
    Case("3: .4/.35/.25", (0.4, 0.35, 0.25)),
    Case("3: .36/.32/.32", (0.36, 0.32, 0.32)),
    Case("3: .334/.333/.333", (0.334, 0.333, 0.333)),
    Case("4: .2503+3x.2499", (0.2503, *[0.2499] * 3)),
    Case("10: .1009+9x.0999", (0.1009, *[0.0999] * 9)),
    Case(".3+14x.05", (0.3, *[0.05] * 14)),
    Case(".2+8x.1", (0.2, *[0.1] * 8)),
    Case(".15+17x.05", (0.15, *[0.05] * 17)),
    Case(".12+8x.11", (0.12, *[0.11] * 8)),
    Case("geometric .5^k", normalised(*(0.5**k for k in range(1, 41)))),
    Case("Zipf1 K=50", normalised(*(1 / k for k in range(1, 51)))),
    Case("Zipf1.5 K=1e5", normalised(*(k**-1.5 for k in range(1, 100_001)))),
    Case("Zipf2 K=1e5", normalised(*(k**-2.0 for k in range(1, 100_001)))),
    Case(".5 + .5 single", (0.5,), 0.5),
    Case(".3/.2 + .5 single", (0.3, 0.2), 0.5),
    Case(".45/.35 + .2 single", (0.45, 0.35), 0.2),
    Case(".1 + .9 single", (0.1,), 0.9),
    Case(".2/.1/.1/.1 + .5 single", (0.2, 0.1, 0.1, 0.1), 0.5),
    Case(".3501/.3499 + .3 single", (0.3501, 0.3499), 0.3),
)
TIES = (
    *(Case(f"{k} equal answers", (1 / k,) * k) for k in (2, 3, 4, 6, 12)),
    Case("2 equal + .5 single", (0.25, 0.25), 0.5),
)


# ---------------------------------------------------------------------------------------------- simulation


def sample(case: Case, runs: int, draws: int, generator: np.random.Generator) -> Int:
    """int32 [runs, draws]; 0 is the mode.

    Of the answers that come once, the first two of a run keep a label of their own and the rest become draws without
    an answer. That changes no decision: an answer that came once and never leads has the record of every other one,
    no bet is placed on it, and the first two hold whatever place one vote can give.
    """
    edges = np.cumsum(case.shares)
    labels = np.searchsorted(edges, generator.random((runs, draws)), side="right").astype(np.int32)
    once = labels >= len(edges) if case.single else np.zeros(labels.shape, bool)
    if not case.single:
        return labels.clip(max=len(edges) - 1)
    number = once.cumsum(1)
    return np.where(once, np.where(number <= 2, len(edges) + number - 1, -1), labels).astype(np.int32)


def dense(labels: Int) -> Int:
    """The same answers with small labels in each run; 0 keeps its name."""
    if labels.max(initial=0) < 60:
        return labels
    return np.array([np.unique(np.append(0, row), return_inverse=True)[1][1:] for row in labels], dtype=np.int32)


@dataclass(frozen=True)
class Seen:
    """What a stopping rule sees of a block: bets, and the two largest vote counts after each draw."""

    bets: Bets
    first: Int
    second: Int


StopRule = Callable[[Seen], Bool]


def by_bets(needed: Int) -> StopRule:
    """The certificate."""
    return lambda seen: certified(seen.bets, seen.bets.eliminated(needed))


def by_votes(needed: NDArray[np.integer]) -> StopRule:
    """A table of votes that the leader needs against the runner-up's."""
    return lambda seen: (seen.first >= needed[seen.second]) & (seen.first > 0)


def oracle(case: Case, error: float, cap: int) -> NDArray[np.int64]:
    """Votes needed where the odds of the first against the second are known."""
    odds = case.shares[0] / (case.shares[0] + case.second)
    needed = (log(1 / error) - np.arange(cap + 1) * log(2 - 2 * odds)) / log(2 * odds)
    return np.ceil(needed).clip(max=cap + 1).astype(np.int64)


def rules_for(case: Case, cap: int) -> dict[str, StopRule]:
    """Every rule by name."""
    rules = {f"certified {error}": by_bets(wins_needed(error, cap)) for error in ERRORS}
    rules |= {f"P0 {error}": by_votes(wins_needed(error, cap)) for error in SHOWN}
    rules["asc"] = by_votes(votes_needed(0.95, cap))
    if case.second:
        rules |= {f"oracle {error}": by_votes(oracle(case, error, cap)) for error in SHOWN}
    return rules


def seen_of(labels: Int) -> Seen:
    """Bets and the two largest counts."""
    bets = place_bets(labels)
    column = bets.leader[:, :, None].clip(min=0)
    first = np.take_along_axis(bets.votes, column, axis=2)[:, :, 0]
    rest = bets.votes.copy()
    np.put_along_axis(rest, column, 0, axis=2)
    return Seen(bets, first, rest.max(2))


@dataclass
class Stopped:
    """Per run the draw of the stop, 0 = never, and whether the leader was the mode then."""

    after: Int
    right: Bool

    def figures(self, cap: int) -> dict[str, float]:
        """Mean and 90 % quantile of the draws (never = cap), undecided and wrong shares."""
        draws = np.where(self.after > 0, self.after, cap)
        decided, wrong = self.after > 0, (self.after > 0) & ~self.right
        return {
            "mean": float(draws.mean()),
            "q90": float(np.quantile(draws, 0.9)),
            "undecided": float(1 - decided.mean()),
            "error": float(wrong.mean()),
            "wrong among decided": float(wrong.sum() / max(1, decided.sum())),
            "decided by 40": float((decided & (self.after <= 40)).mean()),
        }


def simulate(labels: Int, rules: dict[str, StopRule]) -> dict[str, Stopped]:
    """All rules on the same draws; runs that every rule has left are not looked at further."""
    runs, cap = labels.shape
    result = {name: Stopped(np.zeros(runs, np.int32), np.zeros(runs, bool)) for name in rules}
    for horizon in (*(stage for stage in STAGES if stage < cap), cap):
        pending = np.flatnonzero(np.any([stopped.after == 0 for stopped in result.values()], axis=0))
        part = dense(labels[pending, :horizon])
        for rows in blocks(part):
            seen = seen_of(part[rows])
            for name, rule in rules.items():
                _note(result[name], pending[rows], rule(seen), seen.bets.leader)
    return result


def _note(stopped: Stopped, runs: NDArray[np.intp], stops: Bool, leader: Int) -> None:
    found = np.flatnonzero(stops.any(1) & (stopped.after[runs] == 0))
    first = stops[found].argmax(1)
    stopped.after[runs[found]] = first + 1
    stopped.right[runs[found]] = leader[found, first] == 0


# ------------------------------------------------------------------------------------------------- results


def distributions(runs: int, cap: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by distribution and rule."""
    found = {}
    for number, case in enumerate(CASES):
        labels = sample(case, runs, cap, np.random.default_rng([seed, number]))
        stopped = simulate(labels, rules_for(case, cap))
        found[case.name] = {name: one.figures(cap) for name, one in stopped.items()}
    return found


def ties(runs: int, draws: int, seed: int) -> dict[str, dict[str, float]]:
    """Share of runs that certify another answer than the designated one, by tie and error."""
    found = {}
    for number, case in enumerate(TIES):
        labels = sample(case, runs, draws, np.random.default_rng([seed, 1000 + number]))
        rules = {str(error): by_bets(wins_needed(error, draws)) for error in ERRORS}
        stopped = simulate(labels, rules)
        found[case.name] = {name: one.figures(draws)["error"] for name, one in stopped.items()}
    return found


def enumerated(draws: int = 8) -> dict[int, float]:
    """Largest difference of the expected stake against a mode from 1, all sequences of 2, 3, 4 equal answers."""
    worst = {}
    for classes in (2, 3, 4):
        bets = place_bets(np.array(list(product(range(classes), repeat=draws)), dtype=np.int32))
        stakes = np.exp(log_mixture(np.arange(draws + 1)[:, None], np.arange(draws + 1)))[bets.wins, bets.losses]
        worst[classes] = float(np.abs(stakes[:, :, :classes].mean(0) - 1).max())
    return worst


def unanimous() -> dict[float, int]:
    """The draw with which unanimous draws are certified."""
    return {error: int(wins_needed(error, 100)[0]) + 1 for error in (0.05, 0.1, 0.01)}


@dataclass(frozen=True)
class Demand:
    """Something the certificate has to show, and what was found."""

    text: str
    found: str
    met: bool


def demands(result: dict[str, Any], runs: int, tie_runs: int) -> Iterator[Demand]:
    """The figures that were asked for before anything was measured."""
    for error in ERRORS:
        for title, size, errors in (
            (
                "29 distributions",
                runs,
                {n: f[f"certified {error}"]["error"] for n, f in result["distributions"].items()},
            ),
            ("exact ties", tie_runs, {n: f[str(error)] for n, f in result["ties"].items()}),
        ):
            limit = error + 2.33 * (error * (1 - error) / size) ** 0.5
            name, worst = max(errors.items(), key=lambda item: item[1])
            text = f"error at {error}, {title}: at most {limit:.4f} ({error} + 2.33 SE)"
            yield Demand(text, f"{worst:.4f} ({name})", worst <= limit)
    for error, limits in ((0.05, (4.6, 1.55)), (0.1, (6.0, 1.65))):
        ratios = list(price(result, error))
        for column, limit in zip(("LB", "oracle"), limits, strict=True):
            yield worst_ratio(ratios, column, limit, error, "all")
        pairs = [row for row in ratios if row[0].startswith("2:")]
        yield worst_ratio(pairs, "LB", 2.2 if error == 0.05 else 2.6, error, "two answers")
    yield worst_ratio(list(price(result, 0.05)), "P0", 1.25, 0.05, "all")
    for name, least, most in (
        ("2: .95/.05", 0.99, 1.0),
        ("2: .8/.2", 0.9, 1.0),
        ("2: .7/.3", 0.45, 0.55),
        ("2: .6/.4", 0.12, 0.18),
    ):
        share = result["distributions"][name]["certified 0.05"]["decided by 40"]
        span = f"at least {least}" if most == 1.0 else f"{least} to {most}"
        yield Demand(f"certified within 40 draws at 0.05, {name}: {span}", f"{share:.3f}", least <= share <= most)
    found = {float(error): draw for error, draw in result["unanimous"].items()}
    yield Demand(
        "unanimous draws: 7, 6, 10 at 0.05, 0.1, 0.01", str(list(found.values())), [*found.values()] == [7, 6, 10]
    )
    worst = max(result["enumeration"].values())
    yield Demand("enumeration, 8 draws, 2 to 4 equal answers: expected stake 1", f"1 +- {worst:.0e}", worst < 1e-12)


def worst_ratio(
    rows: list[tuple[str, dict[str, float]]], column: str, limit: float, error: float, which: str
) -> Demand:
    """The largest ratio of mean draws to another column against its limit."""
    known = [(ratios[column], name) for name, ratios in rows if column in ratios]
    text = f"draws / {column} at {error}, {which}, where 99 % are certified: at most {limit}"
    if not known:
        return Demand(text, "none is certified that often", False)
    worst, name = max(known)
    return Demand(text, f"{worst:.2f} ({name})", worst <= limit)


def price(result: dict[str, Any], error: float) -> Iterator[tuple[str, dict[str, float]]]:
    """Mean draws of `certified` over those of the others, where 99 % are certified."""
    for case in CASES:
        figures = result["distributions"][case.name]
        own = figures[f"certified {error}"]
        if own["undecided"] <= 0.01:
            others = {"LB": case.bound(error), "P0": figures[f"P0 {error}"]["mean"]}
            if case.second:
                others["oracle"] = figures[f"oracle {error}"]["mean"]
            yield case.name, {name: own["mean"] / value for name, value in others.items()}


def on_record(path: Path, repeats: int, seed: int, alpha: float = 0.05) -> list[dict[str, Any]]:
    """`certified` and `asc` replayed on recorded draws in random orders, and what e-BH chooses in the first one."""
    from consilience.record import read
    from consilience.replay import order, replay, tabulate
    from consilience.rules import Rule, View
    from consilience.text.stopping.asc import AdaptiveConsistency
    from consilience.text.stopping.certified import Certified
    from consilience.text.voting.plurality import Plurality

    recorded = tabulate(list(read(path)))
    most = int(recorded.counts.max())
    stops: dict[str, Any] = {f"certified:error={e},max={most}": Certified(e, most) for e in (0.01, 0.04, 0.05, 0.1)}
    stops[f"asc:threshold=0.95,max={most}"] = AdaptiveConsistency(0.95, most)
    shuffled = np.take_along_axis(recorded.labels, order(recorded, seed, 0), axis=1)
    rows = []
    for name, stop in stops.items():
        replayed = replay(recorded, Rule(name, stop, Plurality()), repeats=repeats, seed=seed)
        apart = float((replayed.decided & ~replayed.agrees).mean())
        view = View.single(shuffled, replayed.draws[0])
        chosen = int(stop.select(view, alpha).sum()) if isinstance(stop, Certified) else None
        rows.append(replayed.summary() | {"decided_apart": apart, "chosen": chosen})
    return rows


# -------------------------------------------------------------------------------------------------- output


def distribution_table(result: dict[str, Any], error: float, cap: int) -> str:
    """One line per distribution at one error."""
    head = ["distribution", "LB", "oracle", "`certified` mean", "q90", "undecided", "error", "wrong / certified"]
    head += ["P0", "`asc` mean", "`asc` undecided", "`asc` error", "/ LB", "/ oracle", "/ P0"]
    ratios = dict(price(result, error))
    rows = []
    for case in CASES:
        figures = result["distributions"][case.name]
        own, asc, bound = figures[f"certified {error}"], figures["asc"], case.bound(error)
        known = figures.get(f"oracle {error}")
        ratio = ratios.get(case.name, {})
        rows.append(
            [case.name, f"{bound:.1f}" if bound < 1e6 else f"{bound:.1e}", f"{known['mean']:.1f}" if known else ""]
            + [f"{own['mean']:.1f}", f"{own['q90']:.0f}", f"{own['undecided']:.3f}", f"{own['error']:.4f}"]
            + [f"{own['wrong among decided']:.3f}", f"{figures[f'P0 {error}']['mean']:.1f}"]
            + [f"{asc['mean']:.1f}", f"{asc['undecided']:.3f}", f"{asc['error']:.4f}"]
            + [f"{ratio[name]:.2f}" if name in ratio else "" for name in ("LB", "oracle", "P0")]
        )
    return f"Error {error}, at most {cap} draws:\n\n" + table(head, rows)


def cap_table(result: dict[str, Any]) -> str:
    """What is certified within 40 draws."""
    rows = []
    for case in CASES:
        figures = result["distributions"][case.name]
        shares = [f"{figures[f'certified {error}']['decided by 40']:.3f}" for error in SHOWN]
        rows.append([case.name, *shares, f"{figures['asc']['decided by 40']:.3f}", f"{figures['asc']['error']:.4f}"])
    return table(["distribution", "certified at 0.05", "at 0.1", "`asc` stops", "`asc` error in the end"], rows)


def record_table(rows: list[dict[str, Any]]) -> str:
    """The replay of a record."""
    head = ["policy", "accuracy", "draws per question", "decided", "agrees with the full vote"]
    head += ["decided, full vote differs", "chosen by e-BH at 0.05"]
    figures = ("accuracy", "mean_draws", "decided", "agreement_with_full_vote", "decided_apart")
    shown = [[row["policy"], *("" if row[name] is None else f"{row[name]:.4f}" for name in figures)] for row in rows]
    chosen = [["" if row["chosen"] is None else f"{row['chosen']} of {row['problems']}"] for row in rows]
    return table(head, [line + last for line, last in zip(shown, chosen, strict=True)])


def markdown(result: dict[str, Any], listed: list[Demand], options: Namespace) -> str:
    """The page's tables."""
    parts = [
        "## Figures asked for",
        table(["demand", "found", "met"], [[d.text, d.found, "yes" if d.met else "no"] for d in listed]),
    ]
    parts += [f"{sum(d.met for d in listed)} of {len(listed)} met."]
    for error in SHOWN:
        parts += [
            f"## {options.runs} runs per distribution, error {error}",
            distribution_table(result, error, options.cap),
        ]
    tie_rows = [[name, *(f"{found[str(error)]:.4f}" for error in ERRORS)] for name, found in result["ties"].items()]
    parts += [f"## Exact ties: another than the designated answer certified, {options.tie_runs} runs"]
    parts += [table(["answers", *(f"error {error}" for error in ERRORS)], tie_rows)]
    parts += ["## Within 40 draws", cap_table(result)]
    if result["record"]:
        parts += ["## Recorded draws", record_table(result["record"])]
    return "\n\n".join(parts)


def plot(path: str, result: dict[str, Any]) -> None:
    """Draws against the bound, and the errors, of `certified` and `asc`."""
    found = result["distributions"]
    with picture(path, 8.0, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        bounds = [case.bound(0.05) for case in CASES]
        for name, label, colour in (
            ("certified 0.05", "certified, error 0.05", COLOURS[0]),
            ("asc", "asc, 0.95", COLOURS[1]),
        ):
            decided = [n for n, case in enumerate(CASES) if found[case.name][name]["undecided"] <= 0.01]
            means = [found[CASES[n].name][name]["mean"] for n in decided]
            left.scatter([bounds[n] for n in decided], means, s=16, color=colour, label=label)
            errors = sorted((figures[name]["error"] for figures in found.values()), reverse=True)
            right.plot(range(1, len(errors) + 1), errors, "o-", ms=3, lw=1, color=colour, label=label)
        ends = np.array([2.0, 1000.0])
        left.plot(ends, ends, color=COLOURS[5], lw=1, label="lower bound at error 0.05")
        left.set(xscale="log", yscale="log", xlabel="lower bound on the mean draws", ylabel="mean draws")
        right.axhline(0.05, color=COLOURS[5], lw=1)
        right.text(len(found), 0.055, "0.05", ha="right", color=COLOURS[5])
        right.set(xlabel="29 distributions, worst first", ylabel="share stopped on another answer")
        left.legend(frameon=False)
        right.legend(frameon=False)


def main() -> None:
    """Print the tables."""
    flags = parser(__doc__, runs=2000, cap=2000, tie_runs=4000, tie_draws=600, seed=0, repeats=100)
    flags.add_argument("--plot", help="save a picture there")
    flags.add_argument("--record", type=Path, help="also replay this record")
    options = flags.parse_args()
    result: dict[str, Any] = {
        "distributions": distributions(options.runs, options.cap, options.seed),
        "ties": ties(options.tie_runs, options.tie_draws, options.seed),
        "enumeration": enumerated(),
        "unanimous": unanimous(),
        "record": on_record(options.record, options.repeats, options.seed) if options.record else [],
    }
    listed = list(demands(result, options.runs, options.tie_runs))
    result["demands"] = [{"demand": d.text, "found": d.found, "met": d.met} for d in listed]
    if options.plot:
        plot(options.plot, result)
    emit(options, result, markdown(result, listed, options))


if __name__ == "__main__":
    main()
