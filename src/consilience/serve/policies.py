"""Which policy a request is answered under, and the one thing the server adds to it: a poem costs one wave."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from consilience import methods, policy
from consilience.errors import InputError
from consilience.rules import Int, Rule, StopRule, View
from consilience.serve.errors import bad

NONE = "none"
"""The policy that passes a request through."""
MOST_DRAWS = 1000
"""The most draws that the policy of a request may take."""


def split_model(name: str) -> tuple[str, str | None]:
    """The model and the policy of a ``model`` field such as ``gpt-x@esc:window=5,max=40``.

    What follows the last ``@`` is a policy if it holds a colon or is a policy's name; else it belongs to the model.
    """
    model, at, tail = name.rpartition("@")
    if not at or not model:
        return name, None
    first = re.split(r"[:+]", tail, maxsplit=1)[0].strip()
    known = methods.register().get(first)
    if ":" in tail or first == NONE or (known is not None and known.role == "stop"):
        return model, tail
    return name, None


def rule_of(spec: str, param: str) -> Rule:
    """The rule of a policy that a request names in ``param``; raises ApiError, also for what only an operator may."""
    if spec.startswith("@"):
        raise bad("a request cannot name a policy file; write the policy out", param, "invalid_policy")
    try:
        rule = served_rule(spec)
    except InputError as error:
        raise bad(str(error), param, "invalid_policy") from None
    if rule.max > MOST_DRAWS:
        raise bad(f"policy {rule.name}: at most {MOST_DRAWS} draws per request", param, "invalid_policy")
    return rule


@lru_cache(maxsize=1024)
def served_rule(spec: str) -> Rule:
    """The rule of a policy as the server applies it; raises InputError, also for one that needs several models."""
    rule = policy.parse(spec)
    if rule.arms > 1 and rule.settings is None:
        raise InputError(f"policy {rule.name}: draws from {rule.arms} models, the server has one upstream")
    return replace(rule, stop=AnswersOrNothing(rule.stop))


class AnswersOrNothing:
    """A stopping rule that also stops where no draw so far has an answer; all else is the rule's within.

    It is asked after whole waves alone, so what it says of the first one is what matters; replay, which looks at every
    prefix, has no use for it.
    """

    def __init__(self, within: StopRule) -> None:
        self._within = within

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._within, name)

    @property
    def max(self) -> int:
        """See `StopRule.max`."""
        return self._within.max

    @property
    def needs(self) -> tuple[str, ...]:
        """See `StopRule.needs`."""
        return self._within.needs

    def want(self, view: View) -> Int:
        """See `StopRule.want`."""
        want = self._within.want(view)
        silent = np.asarray(view.drawn.any(axis=1) & (view.judged() < 0).all(axis=(1, 2)))
        return np.where(silent[:, None], np.int32(0), want) if silent.any() else want
