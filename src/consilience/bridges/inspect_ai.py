"""A solver for Inspect: the model of an evaluation answers each sample by what several of its replies agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from inspect_ai.solver import Generate, Solver, TaskState, fork, generate, solver

from consilience.bridges.agreement import agree, rule_of
from consilience.draws import Draw
from consilience.serve.schema import EXTENSION
from consilience.text.voting.token_statistics import FIELDS

CUT_SHORT = ("max_tokens", "model_length")
"""Inspect's stop reasons for a reply that did not come to its end."""


@solver
def self_consistency(policy: str = "asc", kind: str = "auto", seed: int | None = None) -> Solver:
    """Sample the model until its answers agree, and go on with the first reply that supports the winner.

    It stands where ``generate()`` would, after the solvers that write the prompt. Each draw is a fork of the sample
    with a tool loop of its own; draws are never cached. The sample's state becomes that of the winning draw, and
    ``consilience`` in its store and metadata says answer, confidence, votes, draws and why it stopped.

    ``seed`` gives every draw a seed of its own, by sample, epoch and index; a seed of the evaluation would make all
    draws alike. Raises InputError for a policy that needs more than the draws, and for a kind whose answers have to
    be run. After Wang et al., self-consistency, arXiv:2203.11171, section 2.
    """
    rule = rule_of(policy, kind, gives=FIELDS)

    async def solve(state: TaskState, _: Generate) -> TaskState:
        async def wave(indices: range) -> Sequence[tuple[Draw, TaskState]]:
            config = [{"seed": _seed(seed, state, index)} if seed is not None else {} for index in indices]
            likelihood = {"logprobs": True} if rule.needs else {}
            drawn = await fork(state, [generate(cache=False, **likelihood, **own) for own in config])
            return [(_draw(one), one) for one in drawn]

        agreed = await agree(rule, state.input_text, kind, wave)
        chosen = agreed.chosen
        for key, value in (*chosen.store.items(), (EXTENSION, agreed.verdict)):
            state.store.set(key, value)
        state.messages, state.output = chosen.messages, chosen.output
        state.metadata = {**chosen.metadata, EXTENSION: agreed.verdict}
        return state

    return solve


def _draw(state: TaskState) -> Draw:
    choice = state.output.choices[0]
    reason = "length" if choice.stop_reason in CUT_SHORT else choice.stop_reason
    draw = Draw(text=state.output.completion, finish_reason=reason)
    if choice.logprobs is None:
        return draw
    return draw.model_copy(update={"token_logprobs": [token.logprob for token in choice.logprobs.content]})


def _seed(seed: int, state: TaskState, index: int) -> int:
    """31 bits of SHA-256(seed, sample, epoch, index)."""
    digest = hashlib.sha256(f"{seed}:{state.sample_id}:{state.epoch}:{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
