"""Models in transformers' format as a source: the draws of a request are one batch that shares the prompt's cache.

Draw i of a request has its own random numbers, fixed by the request and i; which other draws share its batch changes
its logits by rounding alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from consilience.draws import Draw, Usage
from consilience.errors import BudgetSpent, InputError
from consilience.text.sources.base import Deliver, Message, Meter, Request

ROWS = 64
"""The most draws in one batch; halved for good when the device runs out of memory."""


@dataclass
class _Reply:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False


class HFSource:
    """A causal language model at a local path or hub name, on the GPU where there is one.

    Raises InputError when torch or transformers are missing or the model cannot be loaded.
    """

    priced = False
    embeds = True

    def __init__(self, path: str) -> None:
        self.name = f"hf:{path}"
        self.endpoint = "hf"
        self.notes: list[str] = []
        self._torch, self._model, self._tokenizer = _load(path)
        self.model = f"{path}@{_fingerprint(path, self._model)}"
        self._device = next(self._model.parameters()).device
        self._ends = _end_tokens(self._model, self._tokenizer)
        self._context = getattr(self._model.config, "max_position_embeddings", None)
        self._rows = ROWS
        self._turn = threading.Lock()
        self._closed = threading.Event()

    async def draw(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
        """Deliver one generation per index, batch by batch; a prompt that leaves no room fails each of its draws.

        A request with the parameter ``embedding`` gets the vector of its text in the draw's field ``embedding``.
        """
        if request.params.get("embedding"):
            await self._embed(request, indices, meter, deliver)
            return
        waiting = list(indices)
        while waiting:
            batch, waiting = waiting[: self._rows], waiting[self._rows :]
            async with meter.attempt(len(batch)) as attempt:
                try:
                    end = time.monotonic() + attempt.seconds_left
                    prompt, replies = await asyncio.to_thread(self._generate, request, batch, end)
                except BudgetSpent:
                    attempt.release()
                    raise
                except self._torch.OutOfMemoryError:
                    attempt.release()
                    if len(batch) == 1:
                        raise InputError(
                            f"{self.name}: out of memory with a single draw; use a smaller model"
                        ) from None
                    self._rows, waiting = max(1, len(batch) // 2), batch + waiting
                    continue
                except ValueError as error:
                    attempt.release()
                    for index in batch:
                        deliver(index, Draw(text="", error=f"{self.name}: {error}"))
                    continue
                completion = sum(len(reply.logprobs) for reply in replies)
                attempt.settle(Usage(prompt_tokens=prompt, completion_tokens=completion, requests=1))
            for number, (index, reply) in enumerate(zip(batch, replies, strict=True)):
                deliver(index, self._draw(reply, prompt if number == 0 else 0))

    async def _embed(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
        async with meter.attempt(len(indices)) as attempt:
            try:
                count, vector = await asyncio.to_thread(self.embedding, str(request.messages[-1]["content"]))
            except ValueError as error:
                attempt.release()
                draw = Draw(text="", error=f"{self.name}: {error}")
            else:
                attempt.settle(Usage(prompt_tokens=count, requests=1))
                fields: dict[str, Any] = {"prompt_tokens": count, "completion_tokens": 0, "embedding": vector}
                draw = Draw(text="", model=self.model, **fields)
        for index in indices:
            deliver(index, draw)

    def embedding(self, text: str) -> tuple[int, list[float]]:
        """How many tokens a text has, and the mean of the last hidden states over them.

        Raises ValueError for a text without tokens or one that is longer than the context.
        """
        ids = list(self._tokenizer(text)["input_ids"])
        if not ids or (self._context is not None and len(ids) > self._context):
            raise ValueError(f"the text has {len(ids)} tokens and the model's context {self._context}")
        torch = self._torch
        with self._turn, torch.inference_mode():
            out = self._model(torch.tensor([ids], device=self._device), output_hidden_states=True)
            return len(ids), out.hidden_states[-1][0].double().mean(0).tolist()

    async def close(self) -> None:
        """End a generation in progress after its next token."""
        self._closed.set()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation: by the model's chat template, without one the contents joined."""
        if getattr(self._tokenizer, "chat_template", None):
            found = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
            return list(found["input_ids"])
        return list(self._tokenizer("\n\n".join(str(m["content"]) for m in messages))["input_ids"])

    def _draw(self, reply: _Reply, prompt_tokens: int) -> Draw:
        return Draw(
            text=self._tokenizer.decode(reply.tokens, skip_special_tokens=True),
            model=self.model,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(reply.logprobs),
            logprob=float(sum(reply.logprobs)),
            finish_reason="stop" if reply.ended else "length",
            token_logprobs=[round(value, 6) for value in reply.logprobs],  # type: ignore[call-arg]
        )

    def _generate(self, request: Request, batch: Sequence[int], end: float) -> tuple[int, list[_Reply]]:
        params = request.params
        seeds = [request.call_seed(index) for index in batch]
        ids = self.prompt_ids(request.messages)
        temperature, top_p = float(params["temperature"]), float(params.get("top_p", 1.0))
        with self._turn:
            if time.monotonic() > end:
                raise BudgetSpent("seconds", "the time cap came before the model got to it")
            return len(ids), self.generate(ids, seeds, temperature, top_p, request.max_tokens)

    def generate(
        self, ids: Sequence[int], seeds: Sequence[int], temperature: float, top_p: float, max_tokens: int
    ) -> list[_Reply]:
        """One reply per seed to the prompt ``ids``: tokens and their natural log-probabilities under the raw model.

        Raises ValueError when the prompt is empty or fills the context.
        """
        room = max_tokens if self._context is None else min(max_tokens, self._context - len(ids))
        if not ids or room < 1:
            raise ValueError(f"the prompt has {len(ids)} tokens and the model's context {self._context}")
        torch = self._torch
        streams = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]
        replies = [_Reply() for _ in seeds]
        live = list(range(len(seeds)))
        with torch.inference_mode():
            out = self._model(torch.tensor([list(ids)], device=self._device), use_cache=True)
            cache = out.past_key_values
            cache.batch_repeat_interleave(len(seeds))
            logits = out.logits[:, -1].expand(len(seeds), -1)
            for _ in range(room):
                uniforms = [streams[row].random() for row in live]
                tokens, logprobs = choose(torch, logits.float(), uniforms, temperature, top_p)
                kept = self._append(replies, live, tokens.tolist(), logprobs.tolist())
                if not kept or self._closed.is_set():
                    break
                if len(kept) < len(live):
                    rows = torch.tensor(kept, device=self._device)
                    cache.batch_select_indices(rows)
                    tokens, live = tokens[rows], [live[row] for row in kept]
                logits = self._model(tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        return replies

    def _append(self, replies: list[_Reply], live: list[int], tokens: list[int], logprobs: list[float]) -> list[int]:
        """Add one token to each live reply; the positions in ``live`` of those that go on."""
        kept = []
        for position, (row, token, logprob) in enumerate(zip(live, tokens, logprobs, strict=True)):
            reply = replies[row]
            reply.logprobs.append(logprob)
            if token in self._ends:
                reply.ended = True
            else:
                reply.tokens.append(token)
                kept.append(position)
        return kept


def choose(torch: Any, logits: Any, uniforms: list[float], temperature: float, top_p: float) -> tuple[Any, Any]:
    """One token per row of ``logits`` [rows, vocab] by inverse CDF, and its log-probability at temperature 1.

    Temperature 0 is greedy; ``top_p`` keeps the smallest set of tokens whose mass reaches it (Holtzman et al. 2019,
    arXiv 1904.09751, section 3.1).
    """
    logprobs = torch.log_softmax(logits, -1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        weights = torch.softmax(logprobs.double() / temperature, -1)
        if top_p < 1:
            ranked, order = weights.sort(-1, descending=True, stable=True)
            ranked = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)
            weights = torch.zeros_like(weights).scatter(-1, order, ranked)
        total = weights.cumsum(-1)
        lots = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * total[:, -1:]
        tokens = (total <= lots).sum(-1).clamp(max=weights.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _load(path: str) -> tuple[Any, Any, Any]:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise InputError(f"model hf:{path} needs torch and transformers: pip install 'consilience[local]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    except (OSError, ValueError) as error:
        raise InputError(f"model hf:{path}: cannot be loaded ({str(error).splitlines()[0]})") from error
    return torch, model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _fingerprint(path: str, model: Any) -> str:
    """The hub's commit, or for a folder a digest of its weight files' names, sizes and times of change."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)[:12]
    files = sorted(p for p in Path(path).iterdir() if p.suffix in (".safetensors", ".bin", ".json"))
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    given = model.generation_config.eos_token_id
    found = given if isinstance(given, list) else [given, tokenizer.eos_token_id]
    return frozenset(token for token in found if token is not None)
