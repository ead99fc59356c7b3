"""What several draws agree on where a framework makes the draws: a policy over the waves of one question."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from consilience.draws import Draw, Problem
from consilience.driver import conclude
from consilience.errors import InputError
from consilience.prefix import Prefix
from consilience.rules import Rule
from consilience.serve.policies import served_rule
from consilience.text.answers.kinds import check_words_kind

T = TypeVar("T")

PLACE = "place"
"""The field of a draw that holds its index."""


@dataclass(frozen=True, slots=True)
class Agreement(Generic[T]):
    """The agreed reply, as the framework made it, and what the vote says of it.

    ``chosen`` is the first draw that supports the winning answer; without one, the first that did not fail.
    ``verdict`` has the names that the server's extension object has.
    """

    chosen: T
    verdict: dict[str, Any]


def rule_of(policy: str, kind: str, gives: Collection[str] = ()) -> Rule:
    """The rule of a policy that a framework's draws can be judged by; ``gives`` names the numbers they come with.

    As on the server, sampling stops where no draw of the first wave has an answer. Raises InputError for a policy
    that asks a model by itself, draws from several, couples questions or reads what the draws do not have, and for a
    kind whose answers have to be run.
    """
    rule = served_rule(policy)
    try:
        check_words_kind(kind)
    except ValueError as error:
        raise InputError(f"kind: {error}") from error
    if rule.arms > 1 or rule.coupled or rule.traits:
        raise InputError(f"policy {rule.name}: needs more than the draws of one question; use `consilience solve`")
    if rule.procedure is not None and rule.procedure.asks:
        raise InputError(f"policy {rule.name}: asks a model by itself; use it through `consilience serve`")
    if missing := set(rule.needs) - set(gives):
        raise InputError(f"policy {rule.name}: reads {sorted(missing)[0]!r}, which draws made here do not have")
    return rule


async def agree(
    rule: Rule, question: str, kind: str, wave: Callable[[range], Awaitable[Sequence[tuple[Draw, T]]]]
) -> Agreement[T]:
    """Draw wave by wave until the rule is satisfied; ``wave`` makes the draws of these indices, in order.

    Each comes with what it stands for in the framework. A draw may have an ``error``: it keeps its place and does
    not vote. What ``wave`` raises ends it.
    """
    problem = Problem(question=question, kind=kind)
    prefix = Prefix(problem, kind)
    made: list[T] = []
    while prefix.judged() < rule.max and (count := int(prefix.want(rule)[0])):
        start = prefix.judged()
        draws = []
        for place, (draw, stands_for) in enumerate(await wave(range(start, start + count)), start):
            draws.append(draw.model_copy(update={PLACE: place}))
            made.append(stands_for)
        await prefix.take(draws)
    reason = "rule" if prefix.judged() < rule.max else "max"
    verdict, first = prefix.verdict(rule, reason)
    if rule.procedure is not None:
        verdict, first = await conclude(rule, None, problem, prefix, verdict)
    if first is None:
        first = next((draw for draw in prefix.draws if not draw.failed), prefix.draws[0])
        reason = reason if verdict.votes else "no answer"
    told = {
        "answer": verdict.answer,
        "confidence": None if verdict.answer is None else verdict.confidence,
        "votes": verdict.votes,
        "draws": verdict.draws,
        "failed": verdict.failed,
        "stopped_because": reason,
        "policy": rule.name,
        "kind": kind,
    }
    return Agreement(made[(first.model_extra or {})[PLACE]], told)
