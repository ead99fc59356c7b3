"""The stopping and voting rules against their definitions, and the laws against broken rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from math import comb
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betainc

from consilience import policy
from consilience.rules import Rule, View, top_two, vote_counts
from consilience.testing import laws
from consilience.text.stopping.asc import AdaptiveConsistency
from consilience.text.stopping.criteria import votes_needed
from consilience.text.stopping.esc import EarlyStopping
from consilience.text.stopping.fixed import SelfConsistency
from consilience.text.voting.plurality import Plurality

POLICIES = [
    "one",
    "sc:n=1",
    "sc:n=7",
    "sc:n=40",
    "esc",
    "esc:window=1,max=4",
    "esc:window=3,max=10",
    "asc",
    "asc:max=1",
    "asc:threshold=0.6,max=5",
    "asc:threshold=0.99,max=60",
]
draws = st.lists(st.integers(-1, 3), max_size=30)


@pytest.mark.parametrize("spec", POLICIES)
def test_pure_laws(spec: str) -> None:
    laws.check_rule(policy.parse(spec), trials=300, seed=1)


@pytest.mark.parametrize("spec", ["one", "sc:n=7", "esc", "esc:window=3,max=10", "asc", "asc:threshold=0.8,max=11"])
def test_live_equals_replay(spec: str) -> None:
    laws.check_live_equals_replay(policy.parse(spec), problems=25, seed=2)


def test_adaptive_consistency_table_is_exact() -> None:
    for threshold in (0.6, 0.75, 0.95, 0.99):
        table = votes_needed(threshold, 40)
        for second in range(41):
            reach = [
                first
                for first in range(41 - second)
                if Fraction(sum(comb(first + second + 1, j) for j in range(first + 1)), 2 ** (first + second + 1))
                >= Fraction(threshold)
            ]
            assert table[second] == (reach[0] if reach else 41)


@given(st.integers(0, 40), st.integers(0, 40))
def test_adaptive_consistency_is_the_beta_posterior(first: int, second: int) -> None:
    first, second = max(first, second), min(first, second)
    posterior = 1 - betainc(first + 1, second + 1, 0.5)
    labels = np.array([[0] * first + [1] * second])
    want = AdaptiveConsistency(threshold=0.95, max=1000).want(View.single(labels))
    if abs(posterior - 0.95) > 1e-12:
        assert (want[0, 0] == 0) == (posterior >= 0.95)


@given(draws, st.integers(1, 6), st.integers(0, 20))
def test_early_stopping_is_the_loop_of_the_paper(labels: list[int], window: int, more: int) -> None:
    most = window + more
    drawn, stopped = 0, False
    while drawn < min(most, len(labels)) and not stopped:
        part = labels[drawn : min(drawn + window, most)]
        complete = len(part) == min(window, most - drawn)
        drawn += len(part)
        stopped = complete and len(set(part)) == 1 and part[0] != -1
    rule = EarlyStopping(window=window, max=most)
    taken = 0
    while want := int(rule.want(View.single(np.array([labels], dtype=np.int32).reshape(1, -1), [taken]))[0, 0]):
        if taken == len(labels):
            break
        taken = min(taken + want, len(labels))
    assert taken == drawn


@given(draws)
def test_plurality_is_the_most_frequent_answer_seen_first(labels: list[int]) -> None:
    answer, confidence = Plurality().decide(View.single(np.array([labels], dtype=np.int32).reshape(1, -1)))
    given_answers = [label for label in labels if label >= 0]
    if not given_answers:
        assert (answer[0], confidence[0]) == (-1, 0)
        return
    counts = Counter(given_answers)
    expected = next(label for label in given_answers if counts[label] == max(counts.values()))
    assert answer[0] == expected
    assert confidence[0] == pytest.approx((counts[expected] + 1) / (len(given_answers) + 2))


@given(st.lists(draws, min_size=1, max_size=5))
def test_counts_equal_counter(rows: list[list[int]]) -> None:
    width = max(len(row) for row in rows)
    table = np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int32).reshape(len(rows), width)
    view = View.single(table)
    counts = vote_counts(view)
    first, second = top_two(view)
    for number, row in enumerate(rows):
        expected = Counter(label for label in row if label >= 0)
        assert {label: n for label, n in enumerate(counts[number]) if n} == dict(expected)
        top = [*sorted(expected.values(), reverse=True), 0, 0]
        assert (first[number], second[number]) == (top[0], top[1])


def test_arms_vote_together_and_ties_go_to_the_earlier_draw() -> None:
    answers = np.array([[[2, 0, -1], [1, 1, 0]]], dtype=np.int32)
    answer, _ = Plurality().decide(View(answers, np.array([[3, 3]], dtype=np.int32)))
    assert answer[0] == 1  # 1 and 0 have two votes each; 1 was drawn first, in the second arm


@pytest.mark.parametrize(
    "build",
    [
        lambda: SelfConsistency(n=0),
        lambda: EarlyStopping(window=0),
        lambda: EarlyStopping(window=9, max=8),
        lambda: AdaptiveConsistency(threshold=0.5),
        lambda: AdaptiveConsistency(threshold=1.0),
        lambda: AdaptiveConsistency(threshold=float("nan")),
        lambda: AdaptiveConsistency(max=0),
        lambda: AdaptiveConsistency(max=10**9),
        lambda: View.single(np.zeros(3, int)),
    ],
)
def test_parameters_out_of_range_are_refused(build) -> None:
    with pytest.raises(ValueError, match="must"):
        build()


@dataclass(frozen=True)
class Broken:
    """A stopping rule of five draws with one fault."""

    fault: str
    max: int = 5
    needs: ClassVar[tuple[str, ...]] = ()

    def want(self, view: View) -> np.ndarray:
        left = (5 - view.drawn).clip(min=0)
        leader = vote_counts(view).max(1, initial=0)[:, None]
        return {
            "peeks ahead": left * (view.answers[:, :, -1] != 0),
            "prefers a label": left * ~((view.judged()[:, :, :1] == 0).any(2) & (view.drawn > 0)),
            "misses a stop": np.where(leader >= 2, 0, left),
            "passes max": left + 3,
            "negative": -left,
            "looks at neighbours": left * (view.drawn.sum() % 2),
        }[self.fault].astype(np.int32)


@pytest.mark.parametrize(
    "fault", ["peeks ahead", "prefers a label", "misses a stop", "passes max", "negative", "looks at neighbours"]
)
def test_the_laws_catch_a_broken_rule(fault: str) -> None:
    with pytest.raises(AssertionError):
        laws.check_rule(Rule("broken", Broken(fault), Plurality()))


class FirstLabel:
    """A vote that reads meaning into labels."""

    needs: ClassVar[tuple[str, ...]] = ()

    def decide(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        judged = np.where(view.judged() < 0, 99, view.judged())
        lowest = judged.reshape(len(judged), -1).min(1, initial=99)
        return np.where(lowest == 99, -1, lowest).astype(np.int32), np.zeros(len(judged))


def test_the_laws_catch_a_vote_for_a_label() -> None:
    with pytest.raises(AssertionError, match="relabelling"):
        laws.check_rule(Rule("broken", SelfConsistency(n=5), FirstLabel()))
