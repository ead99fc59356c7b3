"""The nouns: a `Problem` is asked, each `Draw` is one sampled reply, `Usage` is what it took, a `Budget`
caps that, a `Verdict` is what the draws agree on.

Fields the library does not know are kept: they travel from the input through the ledger to the record.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.errors import InputError


class Usage(BaseModel):
    """Tokens (counted by the model's own tokenizer), money (USD) and requests sent."""

    model_config = ConfigDict(extra="allow")

    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)
    cost: float = Field(default=0.0, ge=0)
    requests: int = Field(default=0, ge=0)

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost=self.cost + other.cost,
            requests=self.requests + other.requests,
        )

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


class Budget(BaseModel):
    """Caps of a run: draws, tokens (prompt and completion), money (USD) and wall-clock seconds; None = no cap."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    draws: int | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=0)
    usd: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @classmethod
    def parse(cls, spec: str) -> Budget:
        """The budget written ``draws=,tokens=,usd=,seconds=``, any part of it; raises InputError otherwise."""
        pairs = [part.partition("=") for part in spec.split(",")]
        given = {key.strip(): value.strip() for key, _, value in pairs}
        try:
            if len(given) != len(pairs) or not all(separator for _, separator, _ in pairs):
                raise ValueError("expected draws=,tokens=,usd=,seconds=, each at most once")
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            known = ", ".join(cls.model_fields)
            message = f"unknown (there are: {known})" if first["type"] == "extra_forbidden" else first["msg"]
            raise InputError(f"budget {spec!r}: {first['loc'][0]}: {message}") from error
        except ValueError as error:
            raise InputError(f"budget {spec!r}: {error}") from error


class Draw(BaseModel):
    """One sampled reply.

    ``logprob`` is the natural logarithm of the reply's probability, summed over its tokens; ``cost`` is in USD;
    ``passed`` says that a check outside (tests, a judge) found it right. A draw with an ``error`` failed for
    good: it keeps its index, has no answer and never votes.
    """

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)

    text: str
    answer: str | None = None
    passed: bool | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprob: float | None = None
    reward: float | None = None
    cost: float | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def failed(self) -> bool:
        """True when the call for this draw failed for good."""
        return self.error is not None


class Verdict(BaseModel):
    """What a policy concluded on one problem.

    ``votes`` maps each answer to the votes counted for it (draws up to the stopping index), ``draws`` is that
    index, ``failed`` how many of those calls failed. ``usage`` counts all draws made for the problem in this run,
    also those past the stopping index. ``decided`` says that the rule stopped before its ``max``; ``abstained``
    that there is none: no draw had an answer, or the vote is one that may abstain and did.
    """

    model_config = ConfigDict(extra="allow")

    answer: str | None = None
    confidence: float = Field(default=0.0, ge=0, le=1)
    votes: dict[str, float] = Field(default_factory=dict)
    draws: int = 0
    failed: int = 0
    usage: Usage = Field(default_factory=Usage)
    cost: float = 0.0
    stopped_because: str = ""
    decided: bool = False
    abstained: bool = False


class Problem(BaseModel):
    """A question, with its gold ``answer`` where one is known, the ``draws`` made for it and the ``verdict``."""

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)

    question: str
    id: str = ""
    answer: str | None = None
    kind: str = "auto"
    draws: list[Draw] = Field(default_factory=list)
    verdict: Verdict | None = None
    collected_by: str | None = None
