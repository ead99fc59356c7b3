"""Replies by OpenAI's types: whole completions, and the chunks of a stream."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator
from typing import Any

from consilience.serve.core import Answer, Choice
from consilience.serve.schema import EXTENSION, Ask
from consilience.text.sources.openai import message_text

PIECE = 48
"""Characters of a chunk of a stream, at most."""


class Replies:
    """The reply to one request; its id and time are those of the request."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.id = ("chatcmpl-" if ask.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())

    def whole(self, answer: Answer) -> dict[str, Any]:
        """A ``chat.completion`` or ``text_completion`` with the extension."""
        make = self._chat_choice if self.ask.chat else self._text_choice
        choices = [make(index, choice) for index, choice in enumerate(answer.choices)]
        kind = "chat.completion" if self.ask.chat else "text_completion"
        return self._head(kind, answer) | {
            "choices": choices,
            "usage": usage_of(answer),
            EXTENSION: extension(answer),
        }

    def _head(self, kind: str, answer: Answer | None = None) -> dict[str, Any]:
        model = answer.choices[0].draw.model if answer is not None else None
        return {"id": self.id, "object": kind, "created": self.created, "model": model or self.ask.model}

    def _chat_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": message_of(choice),
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.draw.finish_reason or "stop",
        }

    def _text_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.draw.text,
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.draw.finish_reason or "stop",
        }

    def _logprobs(self, choice: Choice) -> Any:
        return finite(_kept(choice).get("logprobs")) if self.ask.logprobs else None

    # ------------------------------------------------------------------------------------------------- streams

    def _chunk(
        self, choices: list[dict[str, Any]], answer: Answer | None = None, more: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.ask.chat else "text_completion"
        usage = {"usage": None} if self.ask.include_usage else {}
        return self._head(kind, answer) | {"choices": choices} | usage | (more or {})

    def progress(self, votes: dict[int, dict[str, int]], judged: int) -> dict[str, Any]:
        """A chunk without choices that says how the votes stand."""
        standing = {"draws": judged, "votes": {str(index): tally for index, tally in votes.items()}}
        return self._chunk([], None, {EXTENSION: {"progress": standing}})

    def chunks(self, answer: Answer) -> Iterator[dict[str, Any]]:
        """The winner's message piece by piece, choice after choice, then the usage if it was asked for.

        The extension is in the last chunk that has a choice.
        """
        for index, choice in enumerate(answer.choices):
            deltas = self._chat_deltas(choice) if self.ask.chat else self._text_deltas(choice)
            for delta, logprobs in deltas:
                one = {"index": index} | delta | {"logprobs": logprobs, "finish_reason": None}
                yield self._chunk([one], answer)
            end: dict[str, Any] = {"delta": {}} if self.ask.chat else {"text": ""}
            end = {"index": index} | end | {"logprobs": None, "finish_reason": choice.draw.finish_reason or "stop"}
            last = index == len(answer.choices) - 1
            yield self._chunk([end], answer, {EXTENSION: extension(answer)} if last else None)
        if self.ask.include_usage:
            yield self._chunk([], answer, {"usage": usage_of(answer)})

    def _text_deltas(self, choice: Choice) -> Iterator[tuple[dict[str, Any], Any]]:
        for piece, logprobs in self._pieces(choice.draw.text, choice):
            yield {"text": piece}, logprobs

    def _chat_deltas(self, choice: Choice) -> Iterator[tuple[dict[str, Any], Any]]:
        message = message_of(choice)
        content, calls = message.pop("content"), message.pop("tool_calls", None)
        first = {"role": message.pop("role"), "content": None if calls and content is None else ""}
        rest = {name: value for name, value in message.items() if value is not None}
        yield {"delta": first | rest}, None
        text = content if isinstance(content, str) else message_text(content)
        for piece, logprobs in self._pieces(text, choice):
            yield {"delta": {"content": piece}}, logprobs
        for place, call in enumerate(calls or ()):
            yield {"delta": {"tool_calls": [{"index": place} | call]}}, None

    def _pieces(self, text: str, choice: Choice) -> Iterator[tuple[str, Any]]:
        """A text in pieces; in one where log-probabilities belong to it."""
        logprobs = self._logprobs(choice)
        if logprobs is not None:
            yield text, logprobs
            return
        while text:
            cut = text.rfind(" ", 1, PIECE) if len(text) > PIECE else len(text)
            cut = cut if cut > 0 else PIECE
            yield text[:cut], None
            text = text[cut:]


def finite(value: Any) -> Any:
    """Log-probabilities as JSON can hold them: OpenAI writes -9999 for a probability of nearly zero."""
    if isinstance(value, list):
        return [finite(one) for one in value]
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    return value if not isinstance(value, float) or math.isfinite(value) else -9999.0


def _kept(choice: Choice) -> dict[str, Any]:
    kept: dict[str, Any] = (choice.draw.model_extra or {}).get("choice") or {}
    return kept


def message_of(choice: Choice) -> dict[str, Any]:
    """The winning draw's message as the upstream gave it."""
    rest = _kept(choice).get("message") or {}
    return {"role": "assistant", "content": choice.draw.text, "refusal": None} | rest


def usage_of(answer: Answer) -> dict[str, int]:
    """The tokens of all draws used, by OpenAI's names."""
    usage = answer.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.tokens,
    }


def _verdict(choice: Choice) -> dict[str, Any]:
    verdict = choice.verdict
    return {
        "answer": verdict.answer,
        "confidence": choice.confidence,
        "votes": verdict.votes,
        "draws": verdict.draws,
        "failed": verdict.failed,
        "stopped_because": verdict.stopped_because,
    }


def extension(answer: Answer) -> dict[str, Any]:
    """What the reply says of its draws; where there are several choices, of each by itself in ``choices``."""
    totals = {
        "policy": answer.policy,
        "kind": answer.kind,
        "draws_bought": answer.draws_bought,
        "cost": answer.cost,
    }
    verdicts = [_verdict(choice) for choice in answer.choices]
    if len(verdicts) == 1:
        return totals | verdicts[0]
    nothing = dict.fromkeys(("answer", "confidence", "votes", "stopped_because"))
    sums = {name: sum(verdict[name] for verdict in verdicts) for name in ("draws", "failed")}
    return totals | nothing | sums | {"choices": verdicts}
