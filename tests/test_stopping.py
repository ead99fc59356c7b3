"""Whole sequences at once: `stopping_index` against asking draw by draw, and the criteria against their definitions.

The simulations fail by chance with probability below 1e-6 each; seeds are fixed.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from math import comb, log, sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betainc

from consilience.montecarlo.dirichlet import largest_share, largest_share_exact
from consilience.rules import Rule, StopRule, View
from consilience.testing import laws
from consilience.text.answers import AnswerClasses, extract
from consilience.text.stopping.asc import BY_CRITERION, AdaptiveConsistency
from consilience.text.stopping.certified import Certified
from consilience.text.stopping.counts import first_stop, running_counts, running_max, running_sums, top_counts
from consilience.text.stopping.criteria import LOOKAHEAD
from consilience.text.stopping.esc import EarlyStopping
from consilience.text.stopping.fixed import One, SelfConsistency
from consilience.text.stopping.self_calibration import SelfCalibration
from consilience.text.voting.best_of_n import BestOfN
from consilience.text.voting.plurality import Plurality
from consilience.text.voting.reward_weighted import RewardWeighted

ADAPTIVE = [
    AdaptiveConsistency(),
    AdaptiveConsistency(threshold=0.6, max=3),
    AdaptiveConsistency(threshold=0.99, max=80),
    BY_CRITERION["dirichlet"](),
    BY_CRITERION["dirichlet"](threshold=0.7, max=12),
    BY_CRITERION["dirichlet"](threshold=0.8, max=70),
    BY_CRITERION["entropy"](),
    BY_CRITERION["entropy"](threshold=0.4, max=90),
    BY_CRITERION["majority"](),
    BY_CRITERION["majority"](threshold=0.35, max=70),
]
CALIBRATED = [
    SelfCalibration(),
    SelfCalibration(threshold=0.95, max=75),
    SelfCalibration(of="vote"),
    SelfCalibration(threshold=0.6, max=75, of="vote"),
]
RULES: list[StopRule] = [
    One(),
    SelfConsistency(n=7),
    SelfConsistency(n=40),
    EarlyStopping(),
    EarlyStopping(window=1, max=4),
    EarlyStopping(window=3, max=10),
    EarlyStopping(window=4, max=90),
    EarlyStopping(window=9, max=9),
    *ADAPTIVE,
    *CALIBRATED,
    Certified(),
    Certified(error=0.5, max=6),
    Certified(error=0.3, max=80),
]
labels = st.lists(st.integers(-1, 4), max_size=25)


def asked(rule: StopRule, view: View) -> tuple[list[int], list[bool]]:
    """The law: ask with every prefix, in turn, until the rule wants nothing or the draws end."""
    index, stopped = [], []
    for row in range(len(view.drawn)):
        available = int(view.drawn[row, 0])
        drawn, want = 0, -1
        while True:
            fields = {name: values[row : row + 1] for name, values in view.fields.items()}
            part = View(view.answers[row : row + 1], np.array([[drawn]], np.int32), fields)
            want = int(rule.want(part)[0, 0])
            if want == 0 or drawn == available:
                break
            drawn += 1
        index.append(drawn)
        stopped.append(want == 0)
    return index, stopped


def random_view(generator: np.random.Generator, problems: int, draws: int, classes: int) -> View:
    """Skewed answers, some missing, any number of them available, and confidences that may be absent."""
    shares = generator.dirichlet(np.full(classes, 0.4), size=problems)
    answers = np.array([generator.choice(classes, size=draws, p=p) for p in shares], dtype=np.int32)
    answers[generator.random(answers.shape) < 0.1] = -1
    drawn = generator.integers(0, draws + 1, size=(problems, 1)).astype(np.int32)
    confidence = generator.random((problems, 1, draws))
    confidence[generator.random(confidence.shape) < 0.1] = np.nan
    return View(answers[:, None], drawn, {"confidence": confidence})


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_stopping_index_is_asking_with_every_prefix(rule: StopRule) -> None:
    generator = np.random.default_rng(11)
    for problems, draws, classes in ((60, 12, 3), (12, 100, 2), (12, 100, 12), (3, 1, 2), (0, 5, 2), (4, 0, 1)):
        view = random_view(generator, problems, draws, classes)
        index, stopped = rule.stopping_index(view)  # type: ignore[attr-defined]
        assert index.dtype == np.int32
        assert stopped.dtype == bool
        assert (index.tolist(), stopped.tolist()) == asked(rule, view)


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=30)
@given(rows=st.lists(labels, min_size=1, max_size=4))
def test_stopping_index_of_any_labels(rule: StopRule, rows: list[list[int]]) -> None:
    width = max(map(len, rows))
    table = np.array([row + [7] * (width - len(row)) for row in rows], np.int32).reshape(len(rows), width)
    drawn = np.array([[len(row)] for row in rows], np.int32)
    confidence = np.where(table % 2 == 0, 0.85, 0.3)[:, None]
    view = View(table[:, None], drawn, {"confidence": confidence})
    index, stopped = rule.stopping_index(view)  # type: ignore[attr-defined]
    assert (index.tolist(), stopped.tolist()) == asked(rule, view)


def test_stopping_index_of_labels_beyond_int8() -> None:
    table = np.array([[300, 301, 300, 300, 300, 300], [128, 256, 384, 128, 128, 128]], np.int32)
    view = View.single(table)
    for rule in (AdaptiveConsistency(threshold=0.8), EarlyStopping(window=2), BY_CRITERION["entropy"]()):
        index, stopped = rule.stopping_index(view)
        assert (index.tolist(), stopped.tolist()) == asked(rule, view)


def test_draws_past_those_available_change_nothing() -> None:
    view = random_view(np.random.default_rng(12), 100, 30, 3)
    other = np.where(np.arange(30) >= view.drawn[:, :, None], np.int32(500), view.answers)
    for rule in RULES:
        before, after = (rule.stopping_index(v) for v in (view, View(other, view.drawn, view.fields)))  # type: ignore[attr-defined]
        assert np.array_equal(before, after)


def test_several_arms_are_refused() -> None:
    view = View(np.zeros((2, 2, 3), np.int32), np.full((2, 2), 3, np.int32))
    with pytest.raises(ValueError, match="one arm"):
        AdaptiveConsistency().stopping_index(view)


def test_recorded_draws(recorded: Callable[[str], Path]) -> None:
    rows = []
    with gzip.open(recorded("esc-last-letters-a.jsonl.gz"), "rt", encoding="utf-8") as lines:
        for line in lines:
            classes = AnswerClasses("text")
            rows.append([classes.add(extract(draw["text"], "text")) for draw in json.loads(line)["draws"]])
    view = View.single(np.random.default_rng(13).permuted(np.array(rows), axis=1))
    view = View(view.answers, view.drawn, {"confidence": np.random.default_rng(14).random(view.answers.shape)})
    for rule in (EarlyStopping(), AdaptiveConsistency(), Certified(), SelfCalibration(of="vote"), ADAPTIVE[3]):
        drawn = np.zeros_like(view.drawn)
        stopped = np.zeros(len(drawn), bool)
        for _ in range(41):
            want = rule.want(View(view.answers, drawn, view.fields))
            stopped = want[:, 0] == 0
            drawn = drawn + np.minimum(np.minimum(want, 1), view.drawn - drawn)
        index, over = rule.stopping_index(view)
        assert np.array_equal(index, drawn[:, 0])
        assert np.array_equal(over, stopped)


@pytest.mark.parametrize("stop", [*ADAPTIVE[3:], *CALIBRATED], ids=str)
def test_laws_of_a_rule(stop: StopRule) -> None:
    vote = Plurality()
    if isinstance(stop, SelfCalibration):
        vote = BestOfN(field="confidence") if stop.of == "draw" else RewardWeighted(field="confidence")
    laws.check_rule(Rule(str(stop), stop, vote), trials=150, seed=3)


# ------------------------------------------------------------------------------------------ counts after every draw


@settings(max_examples=60)
@given(rows=st.lists(st.lists(st.integers(-1, 5), min_size=9, max_size=9), min_size=1, max_size=4), wide=st.booleans())
def test_counts_after_every_draw(rows: list[list[int]], wide: bool) -> None:
    table = np.tile(np.array(rows), (1, 9 if wide else 1))
    weights = np.random.default_rng(15).random(table.shape)
    narrow = table.T.astype(np.int8)
    own, sums, tops = running_counts(narrow), running_sums(narrow, weights.T), top_counts(narrow, 3)
    for row, line in enumerate(table.tolist()):
        for draw, label in enumerate(line):
            counts = Counter(x for x in line[: draw + 1] if x >= 0)
            assert own[draw, row] == counts[label]
            mine = [w for x, w in zip(line[: draw + 1], weights[row], strict=False) if x == label and x >= 0]
            assert sums[draw, row] == pytest.approx(sum(mine))
            highest = [*sorted(counts.values(), reverse=True), 0, 0, 0][:3]
            assert [top[draw, row] for top in tops] == highest
    assert np.array_equal(running_max(weights.T), np.maximum.accumulate(weights.T, axis=0))


def test_first_stop_takes_the_first_of_every_row() -> None:
    generator = np.random.default_rng(16)
    hits = generator.random((300, 90)) < 0.03
    drawn = generator.integers(0, 91, size=300)
    view = View.single(np.zeros((300, 90), np.int32), drawn)
    index, stopped = first_stop(view, 80, lambda rows, width: hits[rows, :width].T)
    for row in range(300):
        first = next((n + 1 for n in range(min(drawn[row], 80)) if hits[row, n]), None)
        assert stopped[row] == (first is not None or drawn[row] >= 80)
        assert index[row] == (first or min(drawn[row], 80))


# ------------------------------------------------------------------------------------------ adaptive consistency


def partitions(total: int, most: int) -> list[tuple[int, ...]]:
    """All count vectors of ``total`` votes, in falling order, none larger than ``most``."""
    if total == 0:
        return [()]
    return [(c, *rest) for c in range(min(total, most), 0, -1) for rest in partitions(total - c, c)]


def holds(criterion: str, counts: tuple[int, ...], threshold: float) -> bool:
    """A criterion as its definition says it, by exact fractions where it is a probability."""
    votes, top = sum(counts), [*counts, 0, 0]
    if criterion == "majority":
        return votes > 1 and counts[0] / votes >= threshold
    if criterion == "entropy":
        padded = (*counts, 1) if len(counts) == 1 else counts
        shares = [c / sum(padded) for c in padded]
        return votes > 1 and -sum(p * log(p) for p in shares) / log(len(padded)) <= threshold + 1e-12
    if criterion == "dirichlet" and len(counts) > 2:
        return race(counts[:5]) >= Fraction(threshold)
    n = top[0] + top[1] + 1
    return Fraction(sum(comb(n, j) for j in range(top[0] + 1)), 2**n) >= Fraction(threshold)


def race(counts: tuple[int, ...]) -> Fraction:
    """P(the first share is largest), by Poisson streams: the last of them to reach its count + 1 has the largest Gamma.

    An arrival is in each of the streams left with equal probability; a stream leaves when it is complete.
    """
    memory: dict[tuple[int, ...], Fraction] = {}

    def last(state: tuple[int, ...]) -> Fraction:
        first, others = state[0], state[1:]
        if not others:
            return Fraction(1)
        if first == 0:
            return Fraction(0)
        if state not in memory:
            total = last((first - 1, *others))
            for place in range(len(others)):
                left = others[place] - 1
                total += last((first, *sorted((*others[:place], *((left,) if left else ()), *others[place + 1 :]))))
            memory[state] = total / len(state)
        return memory[state]

    return last((counts[0] + 1, *sorted(c + 1 for c in counts[1:])))


@pytest.mark.parametrize("criterion", BY_CRITERION)
def test_criteria_are_their_definitions(criterion: str) -> None:
    """For all count vectors up to 9 votes, and both ways of asking."""
    threshold = BY_CRITERION[criterion]().threshold
    for limit in (threshold, 0.65):
        rule = BY_CRITERION[criterion](threshold=limit, max=60)
        for counts in (c for total in range(10) for c in partitions(total, total)):
            answers = np.repeat(np.arange(len(counts)), counts)[None].astype(np.int32)
            expected = bool(counts) and holds(criterion, counts, limit)
            assert (rule.want(View.single(answers))[0, 0] == 0) == expected, counts
            if counts:
                assert BY_CRITERION[criterion].criterion(limit, 60).stops(answers.T)[-1, 0] == expected, counts


@pytest.mark.parametrize("criterion", BY_CRITERION)
def test_want_is_certain_and_tight(criterion: str) -> None:
    """No completion with fewer draws than wanted holds, and one with as many does."""
    for limit in (BY_CRITERION[criterion]().threshold, 0.55):
        rule = BY_CRITERION[criterion](threshold=limit, max=60)
        for counts in (c for total in range(6) for c in partitions(total, total)):
            answers = np.repeat(np.arange(len(counts)), counts)[None].astype(np.int32)
            want = int(rule.want(View.single(answers))[0, 0])
            possible = [any(holds(criterion, c, limit) for c in completions(counts, more)) for more in range(5)]
            assert not any(possible[:want])
            assert want >= len(possible) or possible[want]


def completions(counts: tuple[int, ...], more: int) -> set[tuple[int, ...]]:
    """Count vectors after ``more`` draws, each with an answer, old or new."""
    reached = set()
    for choice in product(range(len(counts) + more), repeat=more):
        grown = Counter(dict(enumerate(counts)))
        grown.update(choice)
        reached.add(tuple(sorted(grown.values(), reverse=True)))
    return reached - {()}


def test_want_looks_ahead_so_far_and_no_further() -> None:
    rule = BY_CRITERION["entropy"](threshold=0.05, max=100)
    assert rule.want(View.single(np.repeat([[0, 1]], 10, axis=1).astype(np.int32)))[0, 0] == LOOKAHEAD


def test_default_thresholds() -> None:
    found = {criterion: BY_CRITERION[criterion]().threshold for criterion in BY_CRITERION}
    assert found == {"beta": 0.95, "dirichlet": 0.95, "entropy": 0.75, "majority": 0.8}


@pytest.mark.parametrize(
    "build",
    [
        lambda: BY_CRITERION["dirichlet"](threshold=0.5),
        lambda: BY_CRITERION["entropy"](threshold=1.0),
        lambda: BY_CRITERION["majority"](threshold=-0.1),
        lambda: SelfCalibration(of="answer"),
        lambda: SelfCalibration(threshold=0.0),
        lambda: SelfCalibration(threshold=1.2, of="vote"),
        lambda: SelfCalibration(max=0),
        lambda: largest_share([[1, -1]]),
        lambda: largest_share([[]]),
        lambda: largest_share_exact([]),
    ],
)
def test_parameters_out_of_range_are_refused(build) -> None:
    with pytest.raises(ValueError, match="must"):
        build()


def test_largest_share_is_exact() -> None:
    generator = np.random.default_rng(17)
    for classes in range(1, 6):
        counts = generator.integers(0, 12, size=(8, classes))
        for row, value in zip(counts, largest_share(counts), strict=True):
            exact = race(tuple(row.tolist()))
            assert largest_share_exact(row) == exact
            assert value == pytest.approx(float(exact), abs=1e-12)


def test_largest_share_of_large_counts() -> None:
    """Two classes are the Beta posterior; of any classes, exactly one share is the largest."""
    for first, second in ((40, 31), (400, 380), (5000, 4900), (3, 900)):
        expected = betainc(second + 1, first + 1, 0.5)
        assert largest_share([[first, second]])[0] == pytest.approx(expected, abs=1e-11)
    for counts in ([9, 8, 8, 1], [120, 100, 90, 90, 3], [3000, 2950, 10]):
        turned = [np.roll(counts, shift) for shift in range(len(counts))]
        assert largest_share(turned).sum() == pytest.approx(1, abs=1e-11)


def test_largest_share_by_simulation() -> None:
    counts = [7, 4, 4, 2, 0]
    shares = np.random.default_rng(18).dirichlet(np.array(counts) + 1.0, size=100_000)
    value = largest_share([counts])[0]
    assert abs((shares.argmax(1) == 0).mean() - value) < 5 * sqrt(value * (1 - value) / len(shares))


# ------------------------------------------------------------------------------------------ self-calibration


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(-1, 2), st.sampled_from([0.05, 0.3, 0.5, 0.9, None])), max_size=20),
    st.sampled_from([0.3, 0.55, 0.8]),
    st.integers(1, 18),
)
def test_self_calibration_is_the_loop_of_the_authors(given_: list, threshold: float, most: int) -> None:
    by_draw = by_vote = min(len(given_), most)
    sums: Counter[int] = Counter()
    votes = 0
    for number, (label, confidence) in reversed(list(enumerate(given_[:most], 1))):
        if label >= 0 and confidence is not None and confidence >= threshold:
            by_draw = number
    for number, (label, confidence) in enumerate(given_[:most], 1):
        if label >= 0 and confidence is not None:
            votes += 1
            sums[label] += confidence
        if votes > 1 and max(sums.values()) / sum(sums.values()) >= threshold - 1e-12:
            by_vote = number
            break
    answers = np.array([[label for label, _ in given_]], np.int32).reshape(1, -1)
    values = np.array([[np.nan if c is None else c for _, c in given_]]).reshape(1, 1, -1)
    view = View(answers[:, None], np.array([[len(given_)]], np.int32), {"confidence": values})
    for of, expected in (("draw", by_draw), ("vote", by_vote)):
        index, _ = SelfCalibration(threshold=threshold, max=most, of=of).stopping_index(view)
        assert index[0] == expected


def test_self_calibration_needs_its_field() -> None:
    assert SelfCalibration(field="p_true").needs == ("p_true",)
