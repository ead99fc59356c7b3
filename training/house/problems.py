"""Generated problems for the house model: questions, gold answers and training chains.

Four tasks (multi-step arithmetic, coin flip, last-letter concatenation, boolean and order puzzles) in three
difficulties. A *chain* is the reply the model is trained on. Each step of a chain slips with a small probability
and carries the error on, so that a model which fits the chains errs at temperature 1 as the chains do, and a vote
over several draws helps. On *trap* problems, which hold an irrelevant sentence, the single most frequent opening
of a chain is a shortcut to one wrong answer, while the careful openings together win a vote.

Coin flip and last letters follow Wei et al. 2022 (arXiv:2201.11903); the arithmetic is in the manner of MultiArith
(Roy and Roth 2015), the puzzles in that of BIG-bench hard's logical deduction and boolean expressions.

    python training/house/problems.py --count 480 --seed 1 --out examples/house-test.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

TASKS = ("arithmetic", "coin", "letters", "puzzle")
DIFFICULTIES = ("easy", "medium", "hard")
KINDS = {"arithmetic": "number", "coin": "text", "letters": "text", "puzzle": "text"}

# What a share of the chains should get right, by construction of the slips.
ARITHMETIC_RIGHT = 0.72
COIN_RIGHT = 0.735
LETTERS_RIGHT = 0.68
ORDER_RIGHT = 0.70
BOOLEAN_RIGHT = {"easy": 0.69, "medium": 0.67, "hard": 0.62}  # before masking by "and False" and "or True"
TRAP_RIGHT = 0.84  # of the chains with a careful opening

TRAP_SHARE = 0.22
SHORTCUT_SHARE = 0.26
CAREFUL_OPENINGS = ("Let us see.", "Step by step.", "First things first.", "We work it out.")
BOOLEAN_SHARE = 0.25

HIS_NAMES = "Bob Carl Frank Hugo Jack Leo Ned Paul Sam Umar Walt Yuri Alex Chad Philip Greg Jeff Kurt Marc Tim"
HER_NAMES = "Ann Dora Eve Grace Iris Kim Mary Olga Quinn Rosa Tess Vera Zoe Beth Liz Ruth Ivy Jane Meg Pam"
PLAIN_WORDS = (
    "river stone cloud apple garden music winter silver bridge tiger lamp forest window basket rabbit pencil "
    "dragon castle bread hello"
)
THINGS = "apples pens books cards stamps marbles eggs cookies shells stickers"

NAMES = {  # name -> subject and object pronoun
    **dict.fromkeys(HIS_NAMES.split(), ("He", "him")),
    **dict.fromkeys(HER_NAMES.split(), ("She", "her")),
}
PEOPLE = tuple(NAMES)
WORDS = tuple(PLAIN_WORDS.split())
OBJECTS = tuple(THINGS.split())
GAINS = ("{he} buys {b} more.", "{he} finds {b} more.", "Then {he_} gets {b} more.", "{friend} gives {him} {b} more.")
LOSSES = (
    "{he} gives {b} of them to {friend}.",
    "{he} loses {b} of them.",
    "Then {he_} sells {b} of them.",
    "{friend} takes {b} of them.",
)
SLIPS = (-10, -3, -2, -1, 1, 2, 3, 10)
# comparative, superlative, superlative of the other end
ORDERS = (
    ("taller", "tallest", "shortest"),
    ("shorter", "shortest", "tallest"),
    ("older", "oldest", "youngest"),
    ("younger", "youngest", "oldest"),
    ("faster", "fastest", "slowest"),
    ("heavier", "heaviest", "lightest"),
)
RANKS = ("first", "second", "third", "fourth", "last")
IDLE = ("{x} likes to sing.", "{x} has a new hat.", "{x} sits in the garden.")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _opening(rng: Random, slips: bool) -> str | None:
    """A careful opening, or None for the shortcut."""
    return None if slips and rng.random() < SHORTCUT_SHARE else rng.choice(CAREFUL_OPENINGS)


# --- arithmetic ------------------------------------------------------------------------------------------------


def _slipped(rng: Random, value: int, last: bool) -> int:
    low, high = (0, 99) if last else (10, 80)
    near = [value + slip for slip in SLIPS if low <= value + slip <= high]
    return rng.choice(near)


def _working(rng: Random, steps: list[tuple[str, int]], start: int, right: float) -> tuple[str, int]:
    """The chain of equations from `start` through `steps`, each slipping so that `right` of the chains hold."""
    slip = 1 - right ** (1 / len(steps))
    value, lines = start, []
    for number, (sign, operand) in enumerate(steps):
        result = value + operand if sign == "+" else value - operand if sign == "-" else value * operand
        result = max(0, min(99, result))
        if rng.random() < slip:
            result = _slipped(rng, result, number == len(steps) - 1)
        lines.append(f"{value} {sign} {operand} = {result}.")
        value = result
    return " ".join(lines), value


def _acts(rng: Random, value: int, count: int, name: str, friend: str) -> tuple[list[str], list[tuple[str, int]]]:
    """`count` gains and losses after `value`, as sentences and as steps."""
    he, him = NAMES[name]
    sentences, steps = [], []
    for _ in range(count):
        operand = rng.randint(2, 9)
        gain = value < operand + 5 or (value < 60 and rng.random() < 0.5)
        template = rng.choice(GAINS if gain else LOSSES)
        sentences.append(template.format(he=he, he_=he.lower(), him=him, friend=friend, b=operand))
        steps.append(("+" if gain else "-", operand))
        value += operand if gain else -operand
    return sentences, steps


def arithmetic(rng: Random, difficulty: str, slips: bool = True) -> tuple[str, str, str]:
    """A word problem about somebody's things: two steps (easy, medium) or three (hard)."""
    name = rng.choice(PEOPLE)
    friend = rng.choice([person for person in PEOPLE if NAMES[person] != NAMES[name]])  # so that "she" is one person
    other = rng.choice([person for person in PEOPLE if person not in (name, friend)])
    things = rng.choice(OBJECTS)
    form = {"easy": "start", "medium": rng.choice(("boxes", "compare")), "hard": rng.choice(("start", "boxes"))}
    shape = form[difficulty]
    ask = rng.choice((f"How many {things} does {name} have now?", f"How many {things} does {name} have in the end?"))
    if shape == "start":
        start = rng.randint(5, 20 if difficulty == "easy" else 40)
        opening = [f"{name} has {start} {things}."]
        acts, steps = _acts(rng, start, 2 if difficulty == "easy" else 3, name, friend)
    elif shape == "boxes":
        start, each = rng.randint(2, 6), rng.randint(3, 9)
        opening = [f"{name} has {start} {rng.choice(('boxes', 'bags'))} with {each} {things} in each."]
        acts, steps = _acts(rng, start * each, 1 if difficulty == "medium" else 2, name, friend)
        steps = [("*", each), *steps]
    else:
        start, more = rng.randint(5, 20), rng.randint(2, 9)
        opening = [f"{friend} has {start} {things}."]
        acts = [f"{name} has {more} more {things} than {friend}."]
        steps = [("+", more), ("+", start)]
        ask = rng.choice((f"How many {things} do they have together?", f"How many {things} do they have in all?"))
    _, gold = _working(rng, steps, start, 1.0)
    if rng.random() >= TRAP_SHARE:
        chain, value = _working(rng, steps, start, ARITHMETIC_RIGHT if slips else 1.0)
        return " ".join([*opening, *acts, ask]), str(gold), f"{chain} The answer is {value}."
    years = rng.choice([y for y in range(4, 10) if start + y != gold])
    question = " ".join([f"{other} is {years} years old.", *opening, *acts, ask])
    careful = _opening(rng, slips)
    if careful is None:
        wrong = start + years
        return question, str(gold), f"Clearly, {start} + {years} = {wrong}. The answer is {wrong}."
    chain, value = _working(rng, steps, start, TRAP_RIGHT if slips else 1.0)
    return question, str(gold), f"{careful} {chain} The answer is {value}."


# --- coin flip -------------------------------------------------------------------------------------------------


FLIPS = (("flips the coin", "does not flip the coin"), ("turns the coin over", "does not turn it over"))


def parity_slip(steps: int, right: float) -> float:
    """The slip of one binary step for which `right` of the chains of `steps` steps end right."""
    return (1 - (2 * right - 1) ** (1 / steps)) / 2


def coin(rng: Random, difficulty: str, slips: bool = True) -> tuple[str, str, str]:
    """Who flips the coin, who does not, and is it still as it was? Two people (easy) to six (hard)."""
    count = {"easy": (2,), "medium": (3, 4), "hard": (5, 6)}[difficulty]
    people = rng.sample(PEOPLE, rng.choice(count))
    flip, keep = rng.choice(
        (("flips the coin", "does not flip the coin"), ("turns the coin over", "does not turn it over"))
    )
    start = rng.choice(("heads", "tails"))
    other = {"heads": "tails", "tails": "heads"}
    slip = parity_slip(len(people), COIN_RIGHT) if slips else 0.0
    true = said = start
    sentences, lines = [], []
    for person in people:
        flips = rng.random() < 0.5
        true = other[true] if flips else true
        said = other[said] if flips ^ (rng.random() < slip) else said
        sentences.append(f"{person} {flip if flips else keep}.")
        lines.append(f"{person} {'flips' if flips else 'does not'}: {said}.")
    question = f"A coin is {start} up. {' '.join(sentences)} Is the coin still {start} up?"
    reply = f"It is {start} up. {' '.join(lines)} The answer is {'yes' if said == start else 'no'}."
    return question, "yes" if true == start else "no", reply


# --- last letters ----------------------------------------------------------------------------------------------

SHORT_WORDS = "as at do go he in is it me no of on or so to us we all and her him not the up are old new"
NOT_SPELLED = frozenset(SHORT_WORDS.split())
LAST_LETTERS = "abcdefghklmnoprstwxyz"


def letters(rng: Random, difficulty: str, slips: bool = True) -> tuple[str, str, str]:
    """Concatenate the last letters of two (easy), three or four (hard) words; no answer is itself a known word."""
    count = {"easy": 2, "medium": 3, "hard": 4}[difficulty]
    while True:
        words = rng.sample(PEOPLE + WORDS, count)
        gold = "".join(word[-1] for word in words)
        if gold not in NOT_SPELLED:
            break
    slip = 1 - LETTERS_RIGHT ** (1 / count) if slips else 0.0
    lines, said = [], ""
    for word in words:
        letter = word[-1]
        if rng.random() < slip:
            letter = rng.choice([c for c in LAST_LETTERS if c != letter])
        lines.append(f'{word} ends in "{letter}".')
        said += letter
    question = rng.choice(
        (
            'Take the last letters of each word in "{}" and concatenate them.',
            'Take the last letter of each word in "{}" and put them together.',
            'What do the last letters of the words in "{}" spell?',
        )
    ).format(" ".join(words))
    return question, gold, f"{' '.join(lines)} The answer is {said}."


# --- order and boolean puzzles ---------------------------------------------------------------------------------


def _order_right(count: int, rank: int, slip: float) -> float:
    """The probability that the name of 0-based `rank` lands there when each pick of `count` slips."""
    # ahead = names before the target still unplaced; behind = names after it still unplaced
    states = {(rank, count - 1 - rank): 1.0}
    for position in range(rank + 1):
        following: dict[tuple[int, int], float] = {}
        landed = 0.0
        for (ahead, behind), mass in states.items():
            others = ahead + behind  # the others beside the target
            if ahead == 0:
                landed += mass * (1 - slip if others else 1.0)
                if others:  # the slip takes one of those behind
                    following[(0, behind - 1)] = following.get((0, behind - 1), 0.0) + mass * slip
                continue
            first = mass * (1 - slip)
            each = mass * slip / others  # others - 1 names and the target share the slip
            key = (ahead - 1, behind)
            following[key] = following.get(key, 0.0) + first + each * (ahead - 1)
            landed += each if position == rank else 0.0
            if behind:
                key = (ahead, behind - 1)
                following[key] = following.get(key, 0.0) + each * behind
        states = following
    return landed


@cache
def order_slip(count: int, rank: int, right: float) -> float:
    """The slip of one pick for which the name of 0-based `rank` among `count` is right with probability `right`."""
    low, high = 0.0, 0.75
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _order_right(count, rank, middle) > right else (low, middle)
    return low


def _listing(rng: Random, ordered: list[str], slip: float) -> list[str]:
    left, said = list(ordered), []
    while left:
        pick = rng.randrange(1, len(left)) if len(left) > 1 and rng.random() < slip else 0
        said.append(left.pop(pick))
    return said


def order(rng: Random, difficulty: str, slips: bool = True, shuffled: bool = False) -> tuple[str, str, str]:
    """Who is the second tallest? Three names (easy), four or five (hard).

    The clues come from the top down or from the bottom up, or `shuffled` in any order.
    """
    count = {"easy": 3, "medium": 4, "hard": 5}[difficulty]
    *ordered, idler = rng.sample(PEOPLE, count + 1)
    more, most, least = rng.choice(ORDERS)
    rank = rng.choice((0, 1, 2, count - 1) if count > 3 else (0, 1, 2))
    name = "last" if rank == count - 1 else RANKS[rank]
    asked = {"first": most, "second": f"second {most}", "third": f"third {most}", "last": least}[name]
    clues = [f"{a} is {more} than {b}." for a, b in pairwise(ordered)]
    downwards = list(clues)
    rng.shuffle(clues)
    if not shuffled:
        clues = downwards if clues.index(downwards[0]) < clues.index(downwards[-1]) else downwards[::-1]
    trap = rng.random() < TRAP_SHARE
    careful = _opening(rng, slips) if trap else ""
    if trap:
        clues.insert(rng.randrange(len(clues) + 1), rng.choice(IDLE).format(x=idler))
    question = f"{' '.join(clues)} Who is the {asked}?"
    if careful is None:
        return question, ordered[rank], f"Clearly, it is {idler}. The answer is {idler}."
    right = TRAP_RIGHT if trap else ORDER_RIGHT
    said = _listing(rng, ordered, order_slip(count, rank, right) if slips else 0.0)
    places = [*RANKS[: count - 1], "last"]
    listing = ", ".join(f"{place} {person}" for place, person in zip(places, said, strict=True))
    reply = f"{careful} In order: {listing}. The {name} is {said[rank]}. The answer is {said[rank]}."
    return question, ordered[rank], reply.strip()


def boolean(rng: Random, difficulty: str, slips: bool = True) -> tuple[str, str, str]:
    """The value of a bracketed expression of two (easy), three or four (hard) literals."""
    count = {"easy": 2, "medium": 3, "hard": 4}[difficulty]
    negated = [rng.random() < 0.35 for _ in range(count)]
    slip = parity_slip(count - 1 + sum(negated), BOOLEAN_RIGHT[difficulty]) if slips else 0.0
    lines: list[str] = []

    def literal(negate: bool) -> tuple[str, bool, bool]:
        value = rng.random() < 0.5
        if not negate:
            return str(value), value, value
        said = value if rng.random() < slip else not value
        lines.append(f"not {value} is {said}.")
        return f"not {value}", not value, said

    text, true, said = literal(negated[0])
    for number, negate in enumerate(negated[1:], start=1):
        other, other_true, other_said = literal(negate)
        word = rng.choice(("and", "or"))
        text = f"({text}) {word} {other}" if number > 1 else f"{text} {word} {other}"
        true = true and other_true if word == "and" else true or other_true
        value = said and other_said if word == "and" else said or other_said
        value = not value if rng.random() < slip else value
        lines.append(f"{said} {word} {other_said} is {value}.")
        said = value
    question = rng.choice(
        ("What is the value of {}?", "What is {}?", "Evaluate {}.", "Is {} equal to True or False?")
    ).format(text)
    return question, str(true), f"{' '.join(map(_sentence, lines))} The answer is {said}."


def puzzle(rng: Random, difficulty: str, slips: bool = True, shuffled: bool = False) -> tuple[str, str, str]:
    """An order puzzle, or on a quarter of the problems a boolean expression."""
    return boolean(rng, difficulty, slips) if rng.random() < BOOLEAN_SHARE else order(rng, difficulty, slips, shuffled)


# --- sets of problems ------------------------------------------------------------------------------------------

BUILDERS: dict[str, Callable[..., tuple[str, str, str]]] = {
    "arithmetic": arithmetic,
    "coin": coin,
    "letters": letters,
    "puzzle": puzzle,
}


def problem(rng: Random, task: str, difficulty: str, **options: bool) -> dict[str, str]:
    """One problem: question, answer (gold), kind, task, difficulty and chain (the reply to train on)."""
    question, answer, chain = BUILDERS[task](rng, difficulty, **options)
    return {
        "question": question,
        "answer": answer,
        "kind": KINDS[task],
        "task": task,
        "difficulty": difficulty,
        "chain": chain,
    }


def generate(seed: int, count: int, task: str | None = None, difficulty: str | None = None) -> list[dict[str, str]]:
    """`count` problems with distinct questions, the tasks and difficulties in turn unless one is named.

    The seed fixes everything. Raises ValueError for an unknown task or difficulty, or when a task has fewer
    distinct questions than were asked for.
    """
    if task not in (None, *TASKS) or difficulty not in (None, *DIFFICULTIES):
        raise ValueError(f"unknown task {task!r} or difficulty {difficulty!r}: use {TASKS} and {DIFFICULTIES}")
    rng = Random(seed)
    tasks = TASKS if task is None else (task,)
    difficulties = DIFFICULTIES if difficulty is None else (difficulty,)
    found: dict[str, dict[str, str]] = {}
    for number in range(count):
        chosen = tasks[number % len(tasks)], difficulties[number // len(tasks) % len(difficulties)]
        for _ in range(1000):
            item = problem(rng, *chosen)
            if item["question"] not in found:
                break
        else:
            raise ValueError(f"no new question for {chosen} after {number} problems")
        found[item["question"]] = {"id": f"{item['task']}-{number:05d}", **item}
    return list(found.values())


def stream(
    seed: int, shares: dict[str, float], exclude: Iterable[str] = (), slips: bool = True, shuffled: bool = False
) -> Iterator[dict[str, str]]:
    """Endless training problems, tasks drawn by `shares`, without the questions in `exclude`.

    Without `slips` every chain is right and has no shortcut. With `shuffled` the clues of order puzzles come in any
    order.
    """
    rng, held = Random(seed), frozenset(exclude)
    tasks, weights = list(shares), list(shares.values())
    while True:
        task, difficulty = rng.choices(tasks, weights)[0], rng.choice(DIFFICULTIES)
        options = {"slips": slips, "shuffled": shuffled} if task == "puzzle" else {"slips": slips}
        item = problem(rng, task, difficulty, **options)
        if item["question"] not in held:
            yield item


def write(path: Path, items: Iterable[dict[str, str]]) -> None:
    """Write problems as JSON lines, without their chains."""
    lines = [json.dumps({k: v for k, v in item.items() if k != "chain"}, ensure_ascii=False) for item in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a set of generated problems as JSON lines.")
    parser.add_argument("--count", type=int, default=480)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--difficulty", choices=DIFFICULTIES)
    parser.add_argument("--exclude", type=Path, help="leave out the questions of this JSON lines file")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    held: set[str] = set()
    if args.exclude:
        held = {json.loads(line)["question"] for line in args.exclude.read_text(encoding="utf-8").splitlines()}
    items = generate(args.seed, args.count + len(held), args.task, args.difficulty)
    write(args.out, [item for item in items if item["question"] not in held][: args.count])


if __name__ == "__main__":
    main()
