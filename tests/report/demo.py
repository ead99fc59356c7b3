"""A page as a real run would fill it: questions of mixed difficulty, recorded draws, policies live and replayed."""

from __future__ import annotations

import functools

import numpy as np

from consilience.montecarlo.estimators import proportion_interval
from consilience.report import Curve, Page, PolicyRow, QuestionRow, ReplyRow

DRAWS = 40
RIGHT = 0  # the class of the right answer


def record(questions: int, seed: int = 7) -> np.ndarray:
    """Answer classes, int [questions, DRAWS]: 0 is right, 1..5 are wrong, -1 is a draw without answer."""
    rng = np.random.default_rng(seed)
    skill = rng.beta(1.6, 1.2, questions)
    lure = rng.dirichlet([1.2, 0.5, 0.3, 0.2, 0.1], questions)
    table = np.zeros((questions, DRAWS), np.int64)
    for row in range(questions):
        wrong = 1 + rng.choice(5, DRAWS, p=lure[row])
        table[row] = np.where(rng.random(DRAWS) < skill[row], RIGHT, wrong)
    table[rng.random(table.shape) < 0.03] = -1
    return table


def verdict(labels: np.ndarray, window: int, most: int) -> tuple[int, float, int, bool]:
    """Class, confidence, draws used and whether decided, of a vote that stops after ``window`` equal answers."""
    run = 0
    for used in range(1, most + 1):
        run = run + 1 if used > 1 and labels[used - 1] == labels[used - 2] >= 0 else 1
        if window and run >= window:
            break
    seen = labels[:used][labels[:used] >= 0]
    if not len(seen):
        return -1, 0.0, used, False
    counts = np.bincount(seen)
    winner = int(counts.argmax())
    return winner, float((counts[winner] + 1) / (len(seen) + 2)), used, used < most


def policy(name: str, origin: str, table: np.ndarray, window: int, most: int) -> PolicyRow:
    """One row of the table of policies, from verdicts on every question."""
    verdicts = [verdict(labels, window, most) for labels in table]
    right = [float(winner == RIGHT) for winner, *_ in verdicts]
    used = [draws for _, _, draws, _ in verdicts]
    return PolicyRow(
        name=name,
        origin=origin,  # type: ignore[arg-type]
        accuracy=float(np.mean(right)),
        accuracy_ci=proportion_interval(right),
        mean_draws=float(np.mean(used)),
        mean_tokens=61.4 * float(np.mean(used)),
        mean_cost=61.4e-7 * float(np.mean(used)),
        decided=float(np.mean([decided for *_, decided in verdicts])),
        abstained=float(np.mean([winner < 0 for winner, *_ in verdicts])),
        draws_used=[float(draws) for draws in used],
        confidence=[sure for _, sure, *_ in verdicts],
        right=list(right),
    )


def question(row: int, labels: np.ndarray, known: bool = True) -> QuestionRow:
    """One question with its draws; a small word problem."""
    first, second, third = 3 + row % 17, 2 + row % 11, 1 + row % 7
    gold = first * second - third
    names = {RIGHT: str(gold), **{wrong: str(gold + 2 * wrong - 5) for wrong in range(1, 6)}}
    winner, sure, used, decided = verdict(labels, 4, DRAWS)
    votes: dict[str, float] = {}
    replies = []
    for place, label in enumerate(labels[: min(DRAWS, used + 3)].tolist()):
        answer = names.get(label)
        if label < 0 and (row + place) % 2:
            replies.append(ReplyRow("", None, "HTTP 502 after 4 tries: upstream closed the connection", place < used))
            continue
        tail = f"The answer is {answer}." if answer else "I am not sure how many"
        text = (
            f"Each of the {first} shelves holds {second} jars, that is {first} * {second} = {first * second}.\n"
            f"Then {third} are taken away.\n{tail}"
        )
        replies.append(ReplyRow(text, answer, None, place < used))
        if answer and place < used:
            votes[answer] = votes.get(answer, 0) + 1
    return QuestionRow(
        id=f"arith-{row:04d}",
        question=f"A pantry has {first} shelves with {second} jars each. Mia takes {third} jars away. "
        "How many jars are left in the pantry?",
        gold=str(gold) if known else None,
        answer=names.get(winner),
        right=(winner == RIGHT) if known else None,
        confidence=sure,
        draws=used,
        votes=votes,
        stopped_because="4 equal answers in a row" if decided else "limit of 40 draws",
        replies=replies,
        decided=decided,
    )


@functools.lru_cache
def demo(questions: int = 240) -> Page:
    """Three live policies and three replayed ones over ``questions`` questions with 40 recorded draws each."""
    table = record(questions)
    right = np.zeros((questions, 6), np.bool_)
    right[:, RIGHT] = True
    policies = [
        policy("sc:n=40+plurality", "live", table, 0, 40),
        policy("esc:window=5,max=40+plurality", "live", table, 5, 40),
        policy("asc:threshold=0.95,max=40+plurality", "live", table, 4, 40),
        policy("sc:n=20+plurality", "replay", table, 0, 20),
        policy("esc:window=3,max=20+plurality", "replay", table, 3, 20),
        policy("asc:threshold=0.8,max=20+plurality", "replay", table, 2, 20),
    ]
    return Page(
        title="240 arithmetic, coin and letter questions",
        model="house",
        command="consilience solve questions.jsonl --model house --policy asc:threshold=0.95,max=40 --out record.jsonl",
        created="2026-01-05 14:20 UTC",
        policies=policies,
        questions=[question(row, labels) for row, labels in enumerate(table)],
        curve=Curve.estimate(table, right),
        totals={
            "questions": questions,
            "answered": questions - 1,
            "abstained": 1,
            "draws": questions * 40,
            "failed": int((table < 0).sum() // 2),
            "tokens": questions * 40 * 61,
            "cost": 0.0589,
            "requests": questions * 5,
            "seconds": 148.2,
        },
        duplicate_share=0.412,
        notes=["The endpoint offers no logprobs; policies that need them cannot run on this record."],
        ledger="sqlite .consilience/ledger.db",
        verdicts_of="asc:threshold=0.95,max=40+plurality",
    )
