"""Rules of several models and of a shared budget, against their definitions, enumerations and limits."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import product
from math import comb, log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betainc, betaln

from consilience.draws import Draw, Problem
from consilience.rules import Rule, View
from consilience.testing import laws
from consilience.text.routing import knowledge_gradient, ranking
from consilience.text.routing.arms import numbers, votes_for
from consilience.text.routing.cascade import Cascade
from consilience.text.routing.dsc import DifficultyAdaptive, needed_draws
from consilience.text.routing.knowledge_gradient import KnowledgeGradient
from consilience.text.routing.last_arm import LastArm
from consilience.text.routing.modelswitch import ModelSwitch
from consilience.text.routing.thresholds import choose_thresholds, outcome
from consilience.text.stopping.asc import AdaptiveConsistency
from consilience.text.stopping.fixed import SelfConsistency
from consilience.text.voting.entropy_weighted import EntropyWeighted, internal_weights
from consilience.text.voting.plurality import Plurality
from consilience.views import number_of, trait_of

PLURAL, LAST, ENTROPY = Plurality(), LastArm(), EntropyWeighted()
RULES = [
    Rule("modelswitch", ModelSwitch(), PLURAL),
    Rule("modelswitch", ModelSwitch(models=3, draws=4, threshold=0.7), EntropyWeighted(prior="1,0.5,2")),
    Rule("modelswitch", ModelSwitch(models=1, draws=3), ENTROPY),
    Rule("cascade", Cascade(), LAST),
    Rule("cascade", Cascade(models=3, draws="7,5,3", threshold="0.6,1"), LAST),
    Rule("cascade", Cascade(models=4, draws="1", threshold="0.9"), LAST),
    Rule("dsc", DifficultyAdaptive(), PLURAL),
    Rule("dsc", DifficultyAdaptive(presample=3, run=2, neighbours=3, window=2, max=11), PLURAL),
    Rule("knowledge-gradient", KnowledgeGradient(), PLURAL),
    Rule("knowledge-gradient", KnowledgeGradient(mean=3.3, min=1, max=7), PLURAL),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.stop}")
def test_pure_laws(rule: Rule) -> None:
    laws.check_rule(rule, trials=200, seed=3)


@pytest.mark.parametrize("rule", [RULES[number] for number in (1, 4, 7, 9)], ids=lambda rule: rule.name)
def test_live_equals_replay(rule: Rule) -> None:
    laws.check_live_equals_replay(rule, problems=12, seed=2)


# ------------------------------------------------------------------------------------------- models in an order


def first_of_most(answers: list[int]) -> int:
    """The most frequent answer, the one seen first among equals."""
    counts = Counter(answers)
    return next(answer for answer in answers if counts[answer] == max(counts.values()))


def sequences(classes: int, draws: int, arms: int) -> np.ndarray:
    """Every table of answers [arms, draws] there is, int32 [tables, arms, draws]."""
    every = list(product(range(classes), repeat=draws * arms))
    return np.array(every, dtype=np.int32).reshape(-1, arms, draws)


def probabilities(tables: np.ndarray, shares: list[list[float]]) -> np.ndarray:
    """The probability of each table under independent draws, arm i from ``shares[i]``."""
    each = [np.array(share)[tables[:, arm]].prod(1) for arm, share in enumerate(shares)]
    return np.prod(each, axis=0)


SHARES = [[0.55, 0.35, 0.1], [0.6, 0.1, 0.3]]


@pytest.mark.parametrize(("draws", "threshold"), [(1, 1.0), (2, 1.0), (3, 1.0), (3, 2 / 3)])
def test_modelswitch_is_its_enumeration(draws: int, threshold: float) -> None:
    """Mean draws and accuracy over all sequences, by rule and vote and by the loop of the paper."""
    tables = sequences(3, draws, 2)
    weights = probabilities(tables, SHARES)
    rule = Rule("modelswitch", ModelSwitch(models=2, draws=draws, threshold=threshold), PLURAL)
    full = View(tables, np.full(tables.shape[:2], draws, np.int32))
    drawn, stopped = rule.stopping_index(full)
    answer, _ = rule.decide(View(tables, drawn))
    assert stopped.all()
    cost = accuracy = 0.0
    for table, weight, own, got in zip(tables.tolist(), weights, drawn, answer, strict=True):
        pool = list(table[0])
        if max(Counter(pool).values()) / draws < threshold - 1e-9:
            pool = [label for pair in zip(*table, strict=True) for label in pair]  # by draw index, then by arm
        assert own.sum() == len(pool)
        assert got == first_of_most(pool)
        cost += weight * len(pool)
        accuracy += weight * (first_of_most(pool) == 0)
    assert weights.sum() == pytest.approx(1)
    assert (weights * drawn.sum(1)).sum() == pytest.approx(cost)
    assert (weights * (answer == 0)).sum() == pytest.approx(accuracy)
    if threshold == 1:  # the second model is asked where the first contradicts itself
        agree = sum(share**draws for share in SHARES[0])
        assert cost == pytest.approx(draws + (1 - agree) * draws)


def test_modelswitch_beats_the_best_single_model_at_no_more_draws() -> None:
    """Two models of complementary errors, consistent where right; 20 000 simulated questions, seed 5.

    The better model alone with as many draws loses some 5 points; the difference must be 6 standard errors, which
    chance alone does once in 10^9.
    """
    generator = np.random.default_rng(5)
    right = np.where(generator.random((20_000, 2)) < [0.7, 0.65], 0.95, 0.3)  # the share of right draws
    answers = np.where(generator.random((20_000, 2, 12)) < right[:, :, None], 0, 1).astype(np.int32)
    wrong = answers == 1
    answers[wrong] = generator.integers(1, 5, size=int(wrong.sum()))
    rule = Rule("modelswitch", ModelSwitch(models=2, draws=5), PLURAL)
    drawn, _ = rule.stopping_index(View(answers, np.full((20_000, 2), 12, np.int32)))
    switched = rule.decide(View(answers, drawn))[0] == 0
    draws = int(np.ceil(drawn.sum(1).mean()))
    alone = PLURAL.decide(View.single(answers[:, 0, :draws]))[0] == 0
    gain = switched.astype(float) - alone
    assert drawn.sum(1).mean() <= draws < 10
    assert gain.mean() > 6 * gain.std() / np.sqrt(len(gain))


@given(st.lists(st.lists(st.integers(-1, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_internal_weight_is_the_released_formula(rows: list[list[int]]) -> None:
    answers = np.array([rows], dtype=np.int32)
    got = internal_weights(View(answers, np.full((1, len(rows)), 6, np.int32)))[0]
    for row, weight in zip(rows, got, strict=True):
        counts = Counter(label for label in row if label >= 0)
        n = sum(counts.values())
        entropy = -sum(count / n * log(count / n) for count in counts.values())
        expected = 1 / n + (1 - 1 / n) * (1 - entropy / log(len(counts))) if len(counts) > 1 else 1.0
        assert weight == pytest.approx(expected)
        assert 0 < weight <= 1


def test_entropy_weighted_limits() -> None:
    generator = np.random.default_rng(0)
    answers = generator.integers(-1, 4, size=(200, 3, 5)).astype(np.int32)
    one = View(answers[:, :1], np.full((200, 1), 5, np.int32))
    assert np.array_equal(ENTROPY.decide(one)[0], PLURAL.decide(one)[0])  # one arm: every draw weighs the same
    many = View(answers, np.full((200, 3), 5, np.int32))
    alone, _ = PLURAL.decide(View(answers[:, 1:2], np.full((200, 1), 5, np.int32)))
    heavy, confidence = EntropyWeighted(prior="1e-6,1,1e-6").decide(many)
    counts = np.array([np.bincount(row[row >= 0], minlength=5) for row in answers[:, 1]])
    clear = np.sort(counts, axis=1)[:, -1] > np.sort(counts, axis=1)[:, -2]
    assert np.array_equal(heavy[clear], alone[clear])  # a prior that dwarfs the others decides alone
    assert ((confidence >= 0) & (confidence <= 1)).all()


def test_entropy_weighted_lets_the_consistent_model_win() -> None:
    scattered, agreed = [0, 0, 1, 2, 3], [4, 4, 4, 4, 5]
    view = View(np.array([[scattered, agreed]], dtype=np.int32), np.full((1, 2), 5, np.int32))
    weights = internal_weights(view)[0]
    assert weights[1] > weights[0]
    assert ENTROPY.decide(view)[0][0] == 4
    assert EntropyWeighted(prior="10,1").decide(view)[0][0] == 0


CASCADES = [("2", "1"), ("3", "0.6"), ("3", "1"), ("3,1", "0.66"), ("1,3", "1"), ("2,3", "0.9")]


@pytest.mark.parametrize(("draws", "threshold"), CASCADES)
def test_cascade_gives_the_answers_of_whole_tests_with_fewer_draws(draws: str, threshold: str) -> None:
    """Over all sequences of three answers: what is saved by settling a test early changes no verdict."""
    rule = Rule("cascade", Cascade(models=2, draws=draws, threshold=threshold), LAST)
    counts = Cascade(draws=draws, threshold=threshold).counts
    tables = sequences(3, max(counts), 2)
    drawn, stopped = rule.stopping_index(View(tables, np.full(tables.shape[:2], max(counts), np.int32)))
    answer, _ = rule.decide(View(tables, drawn))
    assert stopped.all()
    assert (drawn <= counts).all()
    assert drawn.sum() < len(tables) * sum(counts)
    for table, got, used in zip(tables.tolist(), answer, drawn, strict=True):
        cheap = table[0][: counts[0]]
        accepted = max(Counter(cheap).values()) >= float(threshold) * counts[0] - 1e-9
        assert got == first_of_most(cheap if accepted else table[1][: counts[1]])
        assert (used[1] == 0) == accepted


def test_last_arm_falls_back_to_the_last_model_with_an_answer() -> None:
    answers = np.array([[[0, 0, 1], [2, 2, 2]], [[0, 1, 1], [-1, -1, -1]], [[-1] * 3] * 2], dtype=np.int32)
    answer, confidence = LAST.decide(View(answers, np.full((3, 2), 3, np.int32)))
    assert answer.tolist() == [2, 1, -1]
    assert confidence.tolist() == pytest.approx([4 / 5, 3 / 5, 0])


# ------------------------------------------------------------------------------------------- thresholds of a cascade


def training(seed: int, models: int = 3, problems: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    agreement = generator.integers(1, 6, size=(problems, models)) / 5
    right = generator.random((problems, models)) < 0.3 + 0.6 * agreement
    return agreement, right, np.array([1.0, 4.0, 30.0])[:models]


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_are_the_best_of_all(seed: int) -> None:
    agreement, right, cost = training(seed)
    levels = (0.6, 0.8, 1.0)
    tried = []
    for one, two in product(levels, levels):
        hits = spent = 0.0
        for shares, correct in zip(agreement, right, strict=True):
            model = 0 if shares[0] >= one - 1e-9 else 1 if shares[1] >= two - 1e-9 else 2
            hits, spent = hits + correct[model], spent + cost[: model + 1].sum()
        tried.append(((one, two), hits / len(right), spent / len(right)))
    for budget in sorted({spent for _, _, spent in tried}):
        best = choose_thresholds(agreement, right, cost, budget=budget)
        assert best.cost <= budget + 1e-9
        assert best.accuracy == pytest.approx(max(share for _, share, spent in tried if spent <= budget + 1e-9))
    for target in sorted({share for _, share, _ in tried}):
        best = choose_thresholds(agreement, right, cost, accuracy=target)
        assert best.accuracy >= target - 1e-9
        assert best.cost == pytest.approx(min(spent for _, share, spent in tried if share >= target - 1e-9))


def test_more_budget_is_never_worse_and_a_target_out_of_reach_is_said() -> None:
    agreement, right, cost = training(9)
    accuracies = [choose_thresholds(agreement, right, cost, budget=limit).accuracy for limit in (15, 20, 25, 30, 35)]
    assert accuracies == sorted(accuracies)
    with pytest.raises(ValueError, match=r"no thresholds cost 0\.5 or less"):
        choose_thresholds(agreement, right, cost, budget=0.5)
    with pytest.raises(ValueError, match="no thresholds reach"):
        choose_thresholds(agreement, right, cost, accuracy=1.0)
    with pytest.raises(ValueError, match="either"):
        choose_thresholds(agreement, right, cost)
    with pytest.raises(ValueError, match="cost must be"):
        choose_thresholds(agreement, right, [1.0, 2.0], budget=3)


def test_what_the_thresholds_promise_is_what_the_cascade_does() -> None:
    """The accuracy that `outcome` states on a record is that of the rule with its vote on the same draws."""
    generator = np.random.default_rng(2)
    answers = generator.choice(3, p=[0.6, 0.25, 0.15], size=(300, 3, 5)).astype(np.int32)
    full = View(answers, np.full((300, 3), 5, np.int32))
    winners = np.stack([PLURAL.decide(View.single(answers[:, arm]))[0] for arm in range(3)], axis=1)
    agreement = np.array([[max(Counter(row).values()) / 5 for row in table] for table in answers.tolist()])
    for thresholds in product((0.6, 0.8, 1.0), repeat=2):
        given_ = ",".join(map(str, thresholds))
        rule = Rule("cascade", Cascade(models=3, draws="5", threshold=given_), LAST)
        drawn, _ = rule.stopping_index(full)
        right = (rule.decide(View(answers, drawn))[0] == 0).mean()
        assert right == pytest.approx(outcome(agreement, winners == 0, np.ones((300, 3)), thresholds)[0])


# ------------------------------------------------------------------------------------------- difficulty


def with_difficulty(answers: np.ndarray, difficulty: np.ndarray, drawn: np.ndarray | None = None) -> View:
    view = View.single(answers, drawn)
    return View(view.answers, view.drawn, {}, {"difficulty": np.asarray(difficulty, float)})


def questions(count: int, seed: int, draws: int = 40, hard: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """Answers [count, draws] of simulated questions, 0 = right, and the probability of a right draw."""
    generator = np.random.default_rng(seed)
    share = generator.beta(2.0, hard, size=count)
    answers = np.where(generator.random((count, draws)) < share[:, None], 0, 1)
    other = answers == 1
    answers[other] = generator.integers(1, 4, size=int(other.sum()))
    return answers.astype(np.int32), share


@given(st.lists(st.lists(st.integers(-1, 2), min_size=12, max_size=12), min_size=1, max_size=6))
def test_needed_draws_are_those_of_adaptive_consistency(rows: list[list[int]]) -> None:
    labels = np.array(rows, dtype=np.int32)
    drawn, _ = Rule("asc", AdaptiveConsistency(max=12), PLURAL).stopping_index(View.single(labels))
    needed = needed_draws(labels, 0.95, 12)
    met = Rule("asc", AdaptiveConsistency(max=99), PLURAL).stopping_index(View.single(labels))[1]
    assert np.array_equal(np.where(met, drawn[:, 0], 0), needed)


def searched(agreed: list[bool], run: int) -> tuple[int, int]:
    """The paper's search over questions from the hardest on: how many are looked at, and how many are hard."""
    length = 0
    for number, one in enumerate(agreed):
        length = length + 1 if one else 0
        if length == run:
            return number + 1, number + 1 - run
    return len(agreed), len(agreed)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(0.3, 1.0))
def test_partition_is_the_search_of_the_paper(seed: int, run: int, agreeing: float) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 40))
    alike = generator.random(count) < agreeing
    answers = np.zeros((count, 10), np.int32)
    answers[~alike, :10] = np.arange(10)  # never settled: drawn to the end
    difficulty = generator.permutation(count)
    rule = Rule("dsc", DifficultyAdaptive(presample=4, run=run, window=1, max=10), PLURAL)
    drawn, stopped = rule.stopping_index(with_difficulty(answers, difficulty))
    order = np.argsort(-difficulty)
    looked, hard = searched(alike[order].tolist(), run)
    expected = np.ones(count, int)
    expected[order[:looked]] = 4
    expected[order[:hard]] = np.where(alike[order[:hard]], 4, 10)
    assert np.array_equal(drawn[:, 0], expected)
    assert stopped.all()


def test_hard_questions_are_predicted_from_the_block_before() -> None:
    """Against a plain loop over blocks, from the easiest hard question up; no run of easy ones can be found."""
    answers, share = questions(90, seed=4)
    presample, neighbours, window, most = 4, 8, 4, 40
    stop = DifficultyAdaptive(presample, 91, neighbours, window, 0.95, most)
    drawn, _ = Rule("dsc", stop, PLURAL).stopping_index(with_difficulty(answers, -share))
    order = np.argsort(share)[::-1]  # the easiest first
    predicted, expected = presample, np.zeros(90, int)
    for start in range(0, 90, neighbours):
        sizes = []
        for row in order[start : start + neighbours]:
            needed = int(needed_draws(answers[row : row + 1], 0.95, most)[0]) or most
            size = presample if needed <= presample else predicted
            while size < needed:
                size = min(size + window, most)
            expected[row] = size
            sizes.append(needed)
        predicted = min(max(round(np.mean(sizes) / window) * window, presample), most)
    assert np.array_equal(drawn[:, 0], expected)
    assert len(set(expected.tolist())) > 3


def test_without_neighbours_windows_or_easy_questions_it_is_adaptive_consistency() -> None:
    answers, _ = questions(60, seed=8)
    stop = DifficultyAdaptive(presample=1, run=61, neighbours=60, window=1)
    drawn, _ = Rule("dsc", stop, PLURAL).stopping_index(with_difficulty(answers, np.full(60, np.nan)))
    expected, _ = Rule("asc", AdaptiveConsistency(), PLURAL).stopping_index(View.single(answers))
    assert np.array_equal(drawn, expected)


def test_good_ranks_save_draws_and_useless_ones_cost_what_adaptive_consistency_costs() -> None:
    """Three times 600 simulated questions, most of them easy (seeds 6 to 8): draws by rank noise, and the accuracy."""

    def figures(rule: Rule, seed: int, noise: float) -> tuple[float, float]:
        answers, share = questions(600, seed=seed, hard=0.2)
        difficulty = noise * np.random.default_rng(seed).normal(size=600) - share
        view = with_difficulty(answers, difficulty)
        drawn, _ = rule.stopping_index(view)
        won, _ = rule.decide(View(view.answers, drawn))
        return float(drawn.mean()), float((won == 0).mean())

    def mean(rule: Rule, noise: float) -> tuple[float, ...]:
        return tuple(np.mean([figures(rule, seed, noise) for seed in (6, 7, 8)], axis=0))

    dsc = Rule("dsc", DifficultyAdaptive(), PLURAL)
    asc_draws, asc_right = mean(Rule("asc", AdaptiveConsistency(), PLURAL), 0)
    (draws, right), (noisy_draws, noisy_right) = mean(dsc, 0), mean(dsc, 100)
    assert draws < 0.9 * asc_draws
    assert draws < noisy_draws < 1.1 * asc_draws  # windows of 4 round up what it would need draw by draw
    assert abs(right - asc_right) < 0.01
    assert abs(noisy_right - asc_right) < 0.02


# ------------------------------------------------------------------------------------------- ranking by a model


class Judge:
    """A scripted model of stated ability: it sees each question's number with Gaussian noise and ranks by that."""

    def __init__(self, noise: float = 0.0, seed: int = 0, spoil: str | None = None) -> None:
        self.noise, self.seed, self.spoil, self.asked = noise, seed, spoil, list[list[int]]()
        self.generator = np.random.default_rng(seed)

    async def ask(self, prompt: str, **params: Any) -> list[Any]:
        assert params == {"temperature": 0.0}
        numbers_ = [int(number) for number in re.findall(r"^Q\d+: question (\d+)$", prompt, re.MULTILINE)]
        self.asked.append(numbers_)
        seen = np.array(numbers_) + self.noise * self.generator.normal(size=len(numbers_))
        labels = [f"Q{place + 1}" for place in np.argsort(seen)]
        return [SimpleNamespace(text=self.spoil if self.spoil is not None else f"Ranking: {', '.join(labels)}")]


def problems(count: int) -> list[Any]:
    return [SimpleNamespace(question=f"question {number}") for number in range(count)]


def ranked(judge: Judge, count: int) -> list[float]:
    stop = DifficultyAdaptive()
    found = asyncio.run(stop.prepare(judge, problems(count)))
    assert list(found) == list(stop.traits)
    return found["difficulty"]


def test_a_perfect_judge_is_believed_and_a_noisy_one_less() -> None:
    """Rank correlation with the truth over 100 questions: 1 within one batch, high for 13 batches dealt 5 times."""
    assert np.array_equal(np.argsort(ranked(Judge(), 8)), np.arange(8))
    correlations = []
    for noise in (0.0, 30.0, 1e6):
        difficulty = ranked(Judge(noise), 100)
        assert all(0 <= value <= 1 for value in difficulty)
        correlations.append(np.corrcoef(np.argsort(np.argsort(difficulty)), np.arange(100))[0, 1])
    assert correlations[0] > 0.9
    assert correlations[0] > correlations[1] > correlations[2]
    assert abs(correlations[2]) < 0.4  # 4 standard errors of a correlation of nothing: 6 in 100 000


def test_every_question_is_dealt_to_a_full_batch_in_every_shuffling() -> None:
    judge = Judge(seed=3)
    ranked(judge, 21)
    assert len(judge.asked) == 3 * ranking.SHUFFLINGS
    assert all(len(batch) == len(set(batch)) == ranking.BATCH for batch in judge.asked)
    for start in range(0, len(judge.asked), 3):
        assert set().union(*judge.asked[start : start + 3]) == set(range(21))
    again = Judge(seed=3)
    ranked(again, 21)
    assert again.asked == judge.asked


@pytest.mark.parametrize("reply", ["", "Q1, Q2", "I think Q1 is the easiest.", "Q1, Q2, Q3, Q4, Q5, Q6, Q7, Q7"])
def test_questions_without_a_readable_ranking_are_taken_for_hard(reply: str) -> None:
    assert ranked(Judge(spoil=reply), 8) == [1.0] * 8


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_asked_about_fewer_than_two_questions(count: int) -> None:
    judge = Judge()
    assert len(ranked(judge, count)) == count
    assert not judge.asked


def test_rankings_are_read_strictly() -> None:
    read = ranking.read_ranking
    assert read("Q2, Q1, Q3", 3) == [1, 0, 2]
    assert read("Some thoughts.\nRanking: [q3, q1, q2].", 3) == [2, 0, 1]
    assert read("Q1 > Q2\n", 2) == [0, 1]
    assert read("Q1, Q2\nfrom easy to hard", 2) == [0, 1]
    assert read("Q1, Q2, Q4", 3) is None
    assert read("Q1, Q1", 2) is None
    assert read("1, 2", 2) is None


def test_what_asking_raises_is_raised() -> None:
    class Broke(Judge):
        async def ask(self, prompt: str, **params: Any) -> list[Any]:
            if len(self.asked) > 3:
                raise RuntimeError("the budget is spent")
            return await super().ask(prompt, **params)

    with pytest.raises(RuntimeError, match="the budget is spent"):
        ranked(Broke(), 40)


# ------------------------------------------------------------------------------------------- a shared budget


def test_posterior_table_is_the_beta_distribution() -> None:
    first, second = np.meshgrid(np.arange(60), np.arange(60), indexing="ij")
    assert np.allclose(knowledge_gradient.beta_above_half(60), 1 - betainc(first + 1, second + 1, 0.5), atol=1e-12)


def test_gains_are_the_expectation_over_all_outcomes() -> None:
    """Against the Beta-binomial sum over the outcomes of every number of further votes."""
    most = 20
    gains = knowledge_gradient.gains(most)

    def best(first: int, second: int) -> float:
        ahead = 1 - betainc(first + 1, second + 1, 0.5)
        now, largest = max(ahead, 1 - ahead), 0.0
        for more in range(1, most - first - second + 1):
            value = 0.0
            for own in range(more + 1):
                end = (first + own, second + more - own)
                log_ratio = betaln(end[0] + 1, end[1] + 1) - betaln(first + 1, second + 1)
                share = 1 - betainc(end[0] + 1, end[1] + 1, 0.5)
                value += comb(more, own) * np.exp(log_ratio) * max(share, 1 - share)
            largest = max(largest, (value - now) / more)
        return largest

    for first in range(0, most + 1, 3):
        for second in range(0, most + 1, 2):
            assert gains[first, second] == pytest.approx(best(first, second), abs=1e-12)
    assert np.allclose(gains, gains.T)
    assert (np.diff(gains[4:, 4]) <= 1e-12).all()  # a longer lead makes a further draw worth less


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 4), st.floats(0, 6), st.integers(0, 6))
def test_the_total_is_spent_and_never_passed(seed: int, count: int, least: int, extra: float, more: int) -> None:
    generator = np.random.default_rng(seed)
    mean = least + extra
    most = int(np.ceil(mean)) + more
    stop = KnowledgeGradient(mean, least, most)
    answers = generator.choice(4, p=generator.dirichlet(np.ones(4)), size=(count, most)).astype(np.int32)
    answers[generator.random(answers.shape) < 0.1] = -1
    drawn = np.zeros((count, 1), np.int32)
    total = int(np.floor(mean * count + 1e-9))
    rounds = 0
    while (want := stop.want(View(answers[:, None], drawn))).any():
        assert drawn.sum() + want.sum() <= total
        drawn, rounds = drawn + want, rounds + 1
    assert drawn.sum() == min(total, most * count)
    assert drawn.min() >= least
    assert drawn.max() <= most
    assert rounds <= 1 + np.log(max(total, 2)) / knowledge_gradient.ROUND + 1 / knowledge_gradient.ROUND


def test_limits_of_the_budget() -> None:
    answers, _ = questions(50, seed=1)
    for mean, least, most in ((3, 3, 40), (40, 2, 40)):
        drawn, stopped = Rule("kg", KnowledgeGradient(mean, least, most), PLURAL).stopping_index(View.single(answers))
        assert (drawn == mean).all()
        assert stopped.all()
    spent = View.single(answers, np.full(50, 20))
    assert not KnowledgeGradient(mean=10).want(spent).any()  # more was drawn than there is budget for


def test_draws_go_where_the_vote_is_close() -> None:
    answers = np.zeros((20, 30), np.int32)
    answers[10:, ::2] = 1
    drawn, _ = Rule("kg", KnowledgeGradient(mean=8, min=2, max=30), PLURAL).stopping_index(View.single(answers))
    assert drawn[:10].max() < drawn[10:].min()


def test_it_names_the_likeliest_answer_more_often_than_equal_shares() -> None:
    """1500 simulated questions at 6 draws each, seed 11: the difference must be 4 standard errors (1 in 30 000)."""
    answers, share = questions(1500, seed=11)
    mode = np.where(share > (1 - share) / 3, 0, -2)
    known = mode == 0
    view = View.single(answers)
    right = []
    for stop in (KnowledgeGradient(mean=6), SelfConsistency(n=6)):
        drawn, _ = Rule("budget", stop, PLURAL).stopping_index(view)
        assert drawn.sum() == 9000
        right.append((PLURAL.decide(View(view.answers, drawn))[0] == mode)[known])
    gain = right[0].astype(float) - right[1]
    assert gain.mean() > 4 * gain.std() / np.sqrt(len(gain))


# ------------------------------------------------------------------------------------------- parameters


THREE_ARMS = View(np.zeros((2, 3, 4), np.int32), np.full((2, 3), 4, np.int32))


@pytest.mark.parametrize(
    "build",
    [
        lambda: ModelSwitch(models=0),
        lambda: ModelSwitch(draws=0),
        lambda: ModelSwitch(threshold=0),
        lambda: ModelSwitch(threshold=float("nan")),
        lambda: Cascade(models=1),
        lambda: Cascade(draws="5,0"),
        lambda: Cascade(draws="2.5"),
        lambda: Cascade(draws="5,5,5"),
        lambda: Cascade(threshold="0.5"),
        lambda: Cascade(threshold="0.8,0.8"),
        lambda: Cascade(threshold="high"),
        lambda: EntropyWeighted(prior="0"),
        lambda: EntropyWeighted(prior="1,x"),
        lambda: DifficultyAdaptive(presample=41),
        lambda: DifficultyAdaptive(run=0),
        lambda: DifficultyAdaptive(threshold=0.5),
        lambda: DifficultyAdaptive(max=10**6),
        lambda: KnowledgeGradient(mean=1, min=2),
        lambda: KnowledgeGradient(mean=50, max=40),
        lambda: KnowledgeGradient(mean=float("nan")),
        lambda: KnowledgeGradient(max=301),
        lambda: EntropyWeighted(prior="1,2").decide(THREE_ARMS),
    ],
)
def test_parameters_out_of_range_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        build()


def test_lists_of_numbers_and_shares_of_draws() -> None:
    assert numbers("0.5", "x", 3) == (0.5, 0.5, 0.5)
    assert numbers("1,2", "x", 2) == (1.0, 2.0)
    assert [votes_for(share, 5) for share in (0.6, 0.61, 0.8, 1.0)] == [3, 4, 4, 5]
    assert votes_for(2 / 3, 3) == 2


# ------------------------------------------------------------------------------------------- the benchmark


def test_benchmark_agrees_with_itself() -> None:
    """At a tiny size, without any record: budgets are kept, and the differences are those of the accuracies."""
    script = Path(__file__).parents[1] / "benchmarks" / "routing.py"
    command = [sys.executable, str(script), "--repeats", "1", "--questions", "60", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for mean, block in zip(found["budget"][0]["means"], found["budget"][0]["blocks"], strict=True):
        equal, adaptive, shared = block["rows"]
        assert equal["cost"] == shared["cost"] == mean
        assert adaptive["cost"] <= 1.02 * mean
        assert shared["gain"][0] == pytest.approx(shared["accuracy"] - equal["accuracy"])
    draws = [row["cost"] for row in found["difficulty"][0]["rows"]]
    assert draws[0] == 40
    assert max(draws[3:]) < 40


@pytest.mark.parametrize("number", [10**400, -(10**400)], ids=["above", "below"])
def test_a_whole_number_beyond_all_floats_is_infinite(number: int) -> None:
    problem = Problem.model_validate({"id": "1", "question": "q?", "difficulty": number})
    assert trait_of(problem, "difficulty") == (np.inf if number > 0 else -np.inf)
    assert number_of(Draw.model_validate({"text": "", "confidence": number}), "confidence") == trait_of(
        problem, "difficulty"
    )
