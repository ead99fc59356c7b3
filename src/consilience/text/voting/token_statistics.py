"""Numbers per draw made of the log-probabilities of its tokens: the fields that votes by likelihood read."""

from __future__ import annotations

import math
from collections.abc import Sequence

FIELDS = ("logprob", "mean_logprob", "mean_token_prob", "min_token_logprob")
"""What `token_statistics` gives."""


def token_statistics(token_logprobs: Sequence[float]) -> dict[str, float]:
    """The fields of one draw from the natural log-probabilities of its tokens; empty without tokens.

    ``logprob``: their sum, the log-probability of the text; ``mean_logprob``: their mean, the logarithm of the
    geometric mean of the token probabilities (minus the log-perplexity); ``mean_token_prob``: the arithmetic mean of
    the token probabilities; ``min_token_logprob``: the smallest. Raises ValueError where one is nan or above 0 by more
    than rounding.
    """
    if not token_logprobs:
        return {}
    for index, value in enumerate(token_logprobs):
        if not value <= 1e-6:
            raise ValueError(f"token_logprobs[{index}] must be a log-probability, at most 0, got {value}")
    total, tokens = math.fsum(token_logprobs), len(token_logprobs)
    return {
        "logprob": total,
        "mean_logprob": total / tokens,
        "mean_token_prob": math.fsum(math.exp(value) for value in token_logprobs) / tokens,
        "min_token_logprob": min(token_logprobs),
    }
