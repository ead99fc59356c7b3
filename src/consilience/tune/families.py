"""The policies that tune tries: a table of families, each a grid of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from consilience import policy
from consilience.errors import InputError
from consilience.rules import Rule


def _caps(most: int) -> list[int]:
    """Values of ``max``: all draws and three quarters, half, a quarter of them."""
    return sorted({most, *(most * share // 4 for share in (1, 2, 3))} - {0, 1})


def _sizes(most: int) -> list[int]:
    """Values of ``n``: each up to 10, then in steps of about a fifth, and all draws."""
    sizes = list(range(2, 11))
    while sizes[-1] < most:
        sizes.append(round(sizes[-1] * 1.2))
    return [size for size in sizes if size < most] + [most]


def _few_sizes(most: int) -> list[int]:
    """Values of ``n`` for the weighted votes: doubling, and all draws."""
    return sorted({most, *(2**power for power in range(1, 14) if 2**power < most)})


def _all(most: int) -> list[int]:
    return [most]


def _fixed(*values: float | str) -> Callable[[int], Sequence[Any]]:
    return lambda most: values


@dataclass(frozen=True, slots=True)
class Family:
    """Policies to try: every combination of ``parameters`` (values by the draws there are) with every vote."""

    stop: str
    parameters: Mapping[str, Callable[[int], Sequence[Any]]] = dataclasses.field(default_factory=dict)
    votes: tuple[str, ...] = ("",)

    def specs(self, most: int) -> list[str]:
        """The specifications for a record of ``most`` draws per problem."""
        grids = [values(most) for values in self.parameters.values()]
        settings = [",".join(map("{}={}".format, self.parameters, values)) for values in product(*grids)]
        stops = [f"{self.stop}:{setting}" if setting else self.stop for setting in settings]
        return [f"{stop}+{vote}" if vote else stop for stop in stops for vote in self.votes]


def _weighted(*votes: str) -> tuple[Family, ...]:
    """A weighted vote over a fixed number of draws, and over those of adaptive consistency."""
    return (
        Family("sc", {"n": _few_sizes}, votes),
        Family("asc", {"threshold": _fixed(0.8, 0.95), "max": _all}, votes),
    )


_THRESHOLDS = _fixed(0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995)

_CONFIDENT = _fixed(0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_BEST, _SUM = "best-of-n:field=confidence", "reward-weighted:field=confidence"

FAMILIES: dict[str, tuple[Family, ...]] = {
    "one": (Family("one"),),
    "sc": (Family("sc", {"n": _sizes}),),
    "esc": (Family("esc", {"window": _fixed(2, 3, 4, 5, 6, 8, 10), "max": _caps}),),
    "asc": (Family("asc", {"threshold": _THRESHOLDS, "max": _caps}),),
    "asc-dirichlet": (Family("asc-dirichlet", {"threshold": _fixed(0.8, 0.9, 0.95, 0.99), "max": _all}),),
    "asc-entropy": (Family("asc-entropy", {"threshold": _fixed(0.5, 0.75, 0.9), "max": _all}),),
    "asc-majority": (Family("asc-majority", {"threshold": _fixed(0.6, 0.7, 0.8, 0.9), "max": _all}),),
    "certified": (Family("certified", {"error": _fixed(0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01), "max": _caps}),),
    "reward-weighted": _weighted("reward-weighted", "reward-weighted:weights=softmax"),
    "best-of-n": _weighted("best-of-n:field=reward", "best-of-n:field=logprob"),
    "logprob-weighted": _weighted("logprob-weighted:normalised=true", "logprob-weighted:normalised=false"),
    "soft-sc": _weighted("soft-sc:aggregate=mean", "soft-sc:aggregate=min", "soft-sc:aggregate=product"),
    "self-certainty": _weighted("self-certainty:power=0.5", "self-certainty:power=2.0"),
    "self-calibration": (
        Family("self-calibration", {"threshold": _CONFIDENT, "max": _all, "of": _fixed("draw")}, (_BEST,)),
        Family("self-calibration", {"threshold": _CONFIDENT, "max": _all, "of": _fixed("vote")}, (_SUM,)),
    ),
    "rpc": _weighted("rpc:pruning=false", "rpc:normalised=false,pruning=false"),  # the pruning's fits take minutes
}
"""What is tried, by name; a family whose votes read a field is tried only on records that have it."""


def candidates(most: int, families: Iterable[str] | None = None) -> list[Rule]:
    """The policies of these families (default: all) that ask for at most ``most`` draws, without repetition.

    Combinations that a rule refuses (a window above its max, a max too small for a certificate) are left out.
    Raises InputError for a family that is not in `FAMILIES`.
    """
    chosen = list(FAMILIES if families is None else families)
    if unknown := [name for name in chosen if name not in FAMILIES]:
        raise InputError(f"unknown family {unknown[0]!r} (there are: {', '.join(FAMILIES)})")
    rules: dict[str, Rule] = {}
    for spec in (spec for name in chosen for family in FAMILIES[name] for spec in family.specs(most)):
        try:
            rule = policy.parse(spec)
        except InputError:
            continue
        if rule.max <= most:
            rules.setdefault(rule.name, rule)
    return list(rules.values())
