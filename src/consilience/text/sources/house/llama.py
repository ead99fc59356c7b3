"""Llama inference in NumPy, for the small language model that ships with Consilience.

The transformer of Touvron et al. 2023 (arXiv:2302.13971): RMS norm before each block, rotary positions (Su et al.
2021, arXiv:2104.09864), causal self-attention, a SwiGLU feed-forward block, no biases. Weights are float32.

A draw is a function of its prompt, its seed and the sampling parameters alone, to the bit: whichever other draws
share its batch. Three things make it so. Matrix products run on tiles of a fixed number of rows; everything else is
row by row; and each row attends over a window whose width depends on that row's own length alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from .tokenizer import Tokenizer

WEIGHTS = Path(__file__).with_name("weights")
TILE = 8  # rows of every matrix product
WINDOW = 32  # an attention window is a multiple of this many positions
BATCH = 64  # rows decoded together at most, which bounds the memory of a long list of prompts


@dataclass(frozen=True, slots=True)
class Generation:
    """One draw: its text and what it cost.

    `logprob` is the sum of `token_logprobs`, the natural log-probabilities of the sampled tokens, the end-of-text
    token included, under the raw model (temperature 1, no truncation), whatever the sampling parameters were.
    `finish_reason` is "stop" at the end-of-text token, else "length". `token_ids` leaves the end-of-text token out;
    `completion_tokens` counts it.
    """

    text: str
    token_ids: tuple[int, ...]
    logprob: float
    token_logprobs: tuple[float, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one block, transposed so that a row vector is multiplied from the left."""

    attention_norm: np.ndarray  # [width]
    qkv: np.ndarray  # [width, 3 width]
    output: np.ndarray  # [width, width]
    feed_norm: np.ndarray  # [width]
    gate_up: np.ndarray  # [width, 2 inner]
    down: np.ndarray  # [inner, width]


@dataclass(slots=True)
class Row:
    """A draw in the making."""

    generator: np.random.Generator
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False


# --- the arithmetic of a row ---------------------------------------------------------------------------------


def multiply(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """x [rows, n] times matrix [n, m], on tiles of `TILE` rows.

    A BLAS may choose another order of summation for another number of rows, so the product of a row would depend
    on how many others there are; with tiles of one shape it does not.
    """
    rows, width = x.shape
    tiles = -(-rows // TILE)
    if rows != tiles * TILE:
        padded = np.zeros((tiles * TILE, width), np.float32)
        padded[:rows] = x
        x = padded
    out = np.matmul(x.reshape(tiles, TILE, width), matrix)
    return out.reshape(tiles * TILE, -1)[:rows]


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """x [rows, width] over its root mean square, times `weight`."""
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return x / np.sqrt(mean + np.float32(epsilon)) * weight


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary position embedding of x [rows, heads, size] by cos and sin [rows, 1, size]."""
    first, second = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate([-second, first], axis=-1) * sin


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    x /= x.sum(axis=-1, keepdims=True)
    return x


def swish_gate(x: np.ndarray) -> np.ndarray:
    """SwiGLU's gate: x [rows, 2 inner] holds gate and up side by side."""
    gate, up = np.split(x, 2, axis=-1)
    with np.errstate(over="ignore"):  # exp(-gate) may be infinite, and the quotient is then rightly 0
        return gate / (np.float32(1) + np.exp(-gate)) * up


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities, float64 [rows, vocab], of logits float32 [rows, vocab]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Keep the smallest set of tokens whose mass is at least `top_p` (Holtzman et al. 2020, arXiv:1904.09751).

    `probabilities` [rows, vocab]; what is dropped becomes 0 and the rest is not renormalised. Among equal
    probabilities the lower token id goes first.
    """
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, axis=-1)
    before = np.cumsum(ranked, axis=-1) - ranked
    kept = np.where(before < top_p * (1 - 1e-12), ranked, 0.0)
    out = np.zeros_like(probabilities)
    np.put_along_axis(out, order, kept, axis=-1)
    return out


def choose(logprobs: np.ndarray, uniforms: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """One token a row by inverse CDF: logprobs [rows, vocab], uniforms [rows] in [0, 1) -> int64 [rows]."""
    if temperature == 0:
        return logprobs.argmax(axis=-1)
    scaled = logprobs / temperature
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    if top_p < 1:
        weights = nucleus(weights, top_p)
    cumulative = np.cumsum(weights, axis=-1)
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(axis=-1)


# --- the keys and values of a batch ---------------------------------------------------------------------------


class Cache:
    """Keys and values of a batch of rows, [layers, rows, heads, positions, size], and each row's length."""

    def __init__(self, layers: int, rows: int, heads: int, positions: int, size: int) -> None:
        shape = (layers, rows, heads, positions, size)
        self.keys = np.zeros(shape, np.float32)
        self.values = np.zeros(shape, np.float32)
        self.lengths = np.zeros(rows, np.int64)

    def reserve(self, positions: int) -> None:
        """Make room for this many positions."""
        missing = positions - self.keys.shape[3]
        if missing > 0:
            more = ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0))
            self.keys, self.values = np.pad(self.keys, more), np.pad(self.values, more)

    def keep(self, rows: np.ndarray) -> None:
        """Drop all rows but these."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]


# --- the model --------------------------------------------------------------------------------------------------


class HouseModel:
    """A small Llama in NumPy: `HouseModel.load().generate(["A coin is heads up. ..."], seeds=[0])`."""

    def __init__(self, config: dict[str, Any], weights: dict[str, np.ndarray], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.context = int(config["max_position_embeddings"])
        self.heads = int(config["num_attention_heads"])
        self.size = int(config["hidden_size"]) // self.heads
        self.epsilon = float(config["rms_norm_eps"])
        self.embedding = weights["model.embed_tokens.weight"]
        self.unembedding = np.ascontiguousarray(self.embedding.T)
        self.norm = weights["model.norm.weight"]
        self.layers = [_layer(weights, number) for number in range(int(config["num_hidden_layers"]))]
        self.cos, self.sin = _rotations(config, self.size)

    @classmethod
    def load(cls, path: str | Path | None = None) -> HouseModel:
        """Read a folder in transformers' layout; the model of the package by default.

        Raises FileNotFoundError when a file is missing and ValueError for a model this code does not run.
        """
        folder = WEIGHTS if path is None else Path(path)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check(config, folder)
        weights = load_file(folder / "model.safetensors")
        return cls(config, weights, Tokenizer.load(folder / "tokenizer.json"))

    def count_tokens(self, text: str) -> int:
        """How many tokens a text is, without the prompt's special tokens."""
        return len(self.tokenizer.encode(text))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """The logits after each of n token ids, float32 [n, vocab]. Raises ValueError when n is 0 or too long."""
        ids = np.asarray(token_ids, np.int64)
        if not 0 < len(ids) <= self.context:
            raise ValueError(f"{len(ids)} tokens: the model reads 1 to {self.context}")
        hidden, _, _ = self._read(ids)
        return multiply(hidden, self.unembedding)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        temperature: float = 0.7,
        top_p: float = 1.0,
        max_tokens: int = 128,
        stop: threading.Event | None = None,
    ) -> list[Generation]:
        """One draw for each prompt and its seed, in order. A prompt is the bare question.

        Equal prompts are read once. Draw i depends on prompt i, seed i and the sampling parameters alone.
        `temperature` 0 is greedy; `top_p` keeps the smallest set of tokens with that mass. A set `stop` event ends
        the draws after the current token, with finish reason "length".

        Raises ValueError for an empty prompt, a prompt that leaves no room in the context, unequal numbers of
        prompts and seeds, or a parameter out of range.
        """
        _check_sampling(prompts, seeds, temperature, top_p, max_tokens)
        rows = [
            Row(np.random.Generator(np.random.PCG64(seed)), self._prompt(prompt, number))
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        for begin in range(0, len(rows), BATCH):
            batch = rows[begin : begin + BATCH]
            logits, cache = self._prefill(batch)
            self._decode(batch, logits, cache, temperature, top_p, max_tokens, stop)
        return [self._generation(row) for row in rows]

    # --- generation ---------------------------------------------------------------------------------------------

    def _prompt(self, question: str, number: int) -> tuple[int, ...]:
        if not question.strip():
            raise ValueError(f"prompt {number} is empty")
        ids = tuple(self.tokenizer.prompt(question))
        if len(ids) >= self.context:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens; the house model's context is {self.context} tokens, "
                f"prompt and reply together"
            )
        return ids

    def _prefill(self, rows: list[Row]) -> tuple[np.ndarray, Cache]:
        """Read each distinct prompt once: logits [rows, vocab] of the first tokens, and the filled cache."""
        longest = max(len(row.prompt) for row in rows)
        cache = Cache(len(self.layers), len(rows), self.heads, longest, self.size)
        logits = np.empty((len(rows), len(self.embedding)), np.float32)
        same: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            same.setdefault(row.prompt, []).append(number)
        for prompt, members in same.items():
            hidden, keys, values = self._read(np.asarray(prompt))
            cache.keys[:, members, :, : len(prompt)] = keys[:, None]
            cache.values[:, members, :, : len(prompt)] = values[:, None]
            cache.lengths[members] = len(prompt)
            logits[members] = multiply(hidden[-1:], self.unembedding)
        return logits, cache

    def _decode(
        self,
        rows: list[Row],
        logits: np.ndarray,
        cache: Cache,
        temperature: float,
        top_p: float,
        max_tokens: int,
        stop: threading.Event | None,
    ) -> None:
        """Draw tokens into `rows` until all have ended; ended rows leave the batch a quarter at a time."""
        for _ in range(max_tokens):
            tokens = self._draw(rows, logits, temperature, top_p)
            live = np.array([not row.ended and len(row.prompt) + len(row.tokens) < self.context for row in rows])
            if not live.any() or (stop is not None and stop.is_set()):
                return
            if live.sum() <= 0.75 * len(rows) or not live[cache.lengths >= self.context - 1].all():
                kept = np.flatnonzero(live)
                rows, tokens = [rows[number] for number in kept], tokens[kept]
                cache.keep(kept)
            logits = self._step(tokens, cache)

    def _draw(self, rows: list[Row], logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
        """The next token of each row, int64 [rows]; a row that has ended draws nothing more."""
        logprobs = log_softmax(logits)
        uniforms = np.array([row.generator.random() for row in rows])
        tokens = choose(logprobs, uniforms, temperature, top_p)
        chosen = logprobs[np.arange(len(rows)), tokens]
        for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
            if row.ended:
                continue
            row.logprobs.append(logprob)
            if token == self.tokenizer.end:
                row.ended = True
            else:
                row.tokens.append(token)
        return tokens

    def _generation(self, row: Row) -> Generation:
        return Generation(
            text=self.tokenizer.decode(row.tokens),
            token_ids=tuple(row.tokens),
            logprob=float(sum(row.logprobs)),
            token_logprobs=tuple(row.logprobs),
            finish_reason="stop" if row.ended else "length",
            prompt_tokens=len(row.prompt),
            completion_tokens=len(row.logprobs),
        )

    # --- the transformer ----------------------------------------------------------------------------------------

    def _read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A whole sequence [n]: last hidden states [n, width], keys and values [layers, heads, n, size]."""
        count = len(ids)
        x = self.embedding[ids]
        cos, sin = self.cos[:count, None], self.sin[:count, None]
        future = np.triu(np.full((count, count), -np.inf, np.float32), 1)
        keys, values = [], []
        for layer in self.layers:
            q, k, v = self._qkv(layer, x, cos, sin)
            q, k, v = (np.ascontiguousarray(part.swapaxes(0, 1)) for part in (q, k, v))
            scores = softmax(q @ k.swapaxes(1, 2) + future)
            x = self._mix(layer, x, (scores @ v).swapaxes(0, 1).reshape(count, -1))
            keys.append(k)
            values.append(v)
        return rms_norm(x, self.norm, self.epsilon), np.stack(keys), np.stack(values)

    def _step(self, tokens: np.ndarray, cache: Cache) -> np.ndarray:
        """One more token for each row [rows]: logits [rows, vocab]. The cache grows by one position."""
        positions = cache.lengths
        x = self.embedding[tokens]
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        windows = (positions // WINDOW + 1) * WINDOW
        cache.reserve(int(windows.max()))
        groups = [(int(width), np.flatnonzero(windows == width)) for width in np.unique(windows)]
        every = np.arange(len(tokens))
        for number, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            cache.keys[number, every, :, positions] = k
            cache.values[number, every, :, positions] = v
            mixed = np.empty_like(q)
            for width, members in groups:
                chosen: slice | np.ndarray = slice(None) if len(groups) == 1 else members
                past = np.arange(width) <= positions[chosen, None]
                mixed[chosen] = attend(
                    q[chosen],
                    cache.keys[number, :, :, :width][chosen],
                    cache.values[number, :, :, :width][chosen],
                    past,
                )
            x = self._mix(layer, x, mixed.reshape(len(tokens), -1))
        cache.lengths = positions + 1
        return multiply(rms_norm(x, self.norm, self.epsilon), self.unembedding)

    def _qkv(
        self, layer: Layer, x: np.ndarray, cos: np.ndarray, sin: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rotated and scaled queries, rotated keys, values: each [rows, heads, size]."""
        joint = multiply(rms_norm(x, layer.attention_norm, self.epsilon), layer.qkv)
        q, k, v = (part.reshape(len(x), self.heads, self.size) for part in np.split(joint, 3, axis=-1))
        return rotate(q, cos, sin) * np.float32(self.size**-0.5), rotate(k, cos, sin), v

    def _mix(self, layer: Layer, x: np.ndarray, mixed: np.ndarray) -> np.ndarray:
        """The rest of a block: attention's output and the feed-forward block, each added to the stream."""
        x = x + multiply(mixed, layer.output)
        inner = multiply(rms_norm(x, layer.feed_norm, self.epsilon), layer.gate_up)
        return x + multiply(swish_gate(inner), layer.down)


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, past: np.ndarray) -> np.ndarray:
    """Attention of one query a row: q [rows, heads, size] over keys and values [rows, heads, width, size].

    `past` [rows, width] is true where the row may look.
    """
    scores = np.matmul(keys, q[..., None])[..., 0]
    scores = softmax(np.where(past[:, None], scores, np.float32(-np.inf)))
    return np.matmul(scores[:, :, None], values)[:, :, 0]


# --- loading and checking ---------------------------------------------------------------------------------------


def _layer(weights: dict[str, np.ndarray], number: int) -> Layer:
    def matrices(*names: str) -> np.ndarray:
        parts = [weights[f"model.layers.{number}.{name}.weight"].T for name in names]
        return np.ascontiguousarray(np.concatenate(parts, axis=1))

    return Layer(
        attention_norm=weights[f"model.layers.{number}.input_layernorm.weight"],
        qkv=matrices("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=matrices("self_attn.o_proj"),
        feed_norm=weights[f"model.layers.{number}.post_attention_layernorm.weight"],
        gate_up=matrices("mlp.gate_proj", "mlp.up_proj"),
        down=matrices("mlp.down_proj"),
    )


def _rotations(config: dict[str, Any], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary positions, float32 [context, size]."""
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    inverse = 1.0 / float(theta) ** (np.arange(0, size, 2, dtype=np.float32) / size)
    angles = np.outer(np.arange(config["max_position_embeddings"], dtype=np.float32), inverse.astype(np.float32))
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _check(config: dict[str, Any], folder: Path) -> None:
    """Raise ValueError for a model beyond this code: another layout, grouped keys, biases, untied embeddings."""
    plain = (
        config.get("model_type") == "llama"
        and config.get("num_key_value_heads", config["num_attention_heads"]) == config["num_attention_heads"]
        and config.get("tie_word_embeddings", False)
        and not config.get("attention_bias", False)
        and not config.get("mlp_bias", False)
        and (config.get("rope_parameters") or {}).get("rope_type", "default") == "default"
    )
    if not plain:
        raise ValueError(f"{folder}: only a plain Llama runs here (tied, no biases, one key head a query head)")


def _check_sampling(
    prompts: Sequence[str], seeds: Sequence[int], temperature: float, top_p: float, max_tokens: int
) -> None:
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; give a list of prompts")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    if not temperature >= 0 or not np.isfinite(temperature):
        raise ValueError(f"temperature {temperature}: must be 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: must be above 0 and at most 1")
    if max_tokens < 1:
        raise ValueError(f"max_tokens {max_tokens}: must be at least 1")
