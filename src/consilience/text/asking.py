"""Asking: what a procedure does with a session beside looking at draws.

An ask is a request like any other, so its replies are bought once, within the run's budget, and are in the ledger
before the procedure sees them: the same ask in a later run, or in a replay, costs nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.draws import Draw
from consilience.errors import EndpointError
from consilience.text.session import Session
from consilience.text.sources.base import Message, Request


@dataclass
class Asker:
    """One problem's line to the model. ``asked`` holds every reply it got, for the problem's usage.

    ``params`` are the run's sampling parameters by their OpenAI names; an ask may override them. ``required`` names
    those the user set himself.
    """

    session: Session
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    required: frozenset[str] = frozenset()
    asked: list[Draw] = field(default_factory=list)

    async def ask(
        self, prompt: str | Sequence[Message], *, n: int = 1, response_format: Any = None, **params: Any
    ) -> list[Draw]:
        """``n`` replies to a prompt (a user message, or a whole chat); a reply that failed for good has its ``error``.

        Raises BudgetSpent unless all of them can be had, EndpointError when the run cannot go on.
        """
        chat = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
        request = Request(
            endpoint=self.session.source.endpoint,
            model=self.session.source.model,
            messages=chat,
            params={**self.params, **params},
            seed=self.seed,
            response_format=response_format,
            required=self.required - set(params),
            question=str(chat[-1].get("content", "")),
        )
        return await self._draw(request, n)

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """A vector per text, float64 [texts, dims]; a text whose embedding failed for good has a row of nan.

        A text is one request and its vector one draw of it (field ``embedding``), bought once like any other. Raises
        EndpointError where the source gives no embeddings, or such of different lengths; BudgetSpent.
        """
        source = self.session.source
        if not getattr(source, "embeds", False):
            raise EndpointError(f"{source.name} gives no embeddings; use an openai: or hf: model, or a metric on texts")
        requests = {text: self._embedding_request(text) for text in texts}
        drawn = await asyncio.gather(*(self._draw(request, 1) for request in requests.values()), return_exceptions=True)
        vectors: dict[str, Any] = {}
        for text, draws in zip(requests, drawn, strict=True):
            if isinstance(draws, BaseException):
                raise draws
            vectors[text] = (draws[0].model_extra or {}).get("embedding")
        dims = {len(vector) for vector in vectors.values() if vector is not None}
        if len(dims) > 1:
            raise EndpointError(f"{source.name} gave embeddings of different lengths: {sorted(dims)}")
        missing = [np.nan] * (dims.pop() if dims else 1)
        return np.array([missing if vectors[text] is None else vectors[text] for text in texts], dtype=np.float64)

    def _embedding_request(self, text: str) -> Request:
        return Request(
            endpoint=self.session.source.endpoint,
            model=self.session.source.model,
            messages=({"role": "user", "content": text},),
            params={"embedding": True, "max_tokens": 0},
            question=text,
        )

    async def _draw(self, request: Request, n: int) -> list[Draw]:
        replies: list[Draw] = []
        self.session.asking[request.hash] += 1
        await self.session.open([request])
        try:
            while len(replies) < n:  # a budget may end a wave early: the next one says so
                replies += await self.session.draw(request, range(len(replies), n))
        finally:
            self.asked += replies
            self.session.release(request)
            self.session.asking -= Counter([request.hash])
        return replies
