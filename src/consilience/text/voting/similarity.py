"""How alike texts are: square tables of utilities in [0, 1], fast enough for a hundred texts of some hundred words.

``table[i, j]`` is the utility of text i where text j is the reference. A text has utility 1 with itself; two empty
texts are alike, an empty and another one are not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from consilience.rules import Float

_TOKEN = re.compile(r"\w+|[^\w\s]")
CHRF_ORDER, CHRF_BETA = 6, 2.0


def similarity(texts: Sequence[str], metric: str) -> Float:
    """The table of a metric, float64 [texts, texts]; raises ValueError for a metric that is not in `METRICS`."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    distinct = list(dict.fromkeys(texts))
    place = {text: number for number, text in enumerate(distinct)}
    rows = np.array([place[text] for text in texts], dtype=np.intp)
    return METRICS[metric](distinct)[np.ix_(rows, rows)]


def tokens(text: str) -> list[str]:
    """Words (letters, digits, underscores) and single signs, in lower case."""
    return _TOKEN.findall(text.lower())


def exact(texts: Sequence[str]) -> Float:
    """1 for equal texts, up to white space at the ends, else 0."""
    stripped = np.array([text.strip() for text in texts], dtype=object)
    return (stripped[:, None] == stripped[None, :]).astype(np.float64)


def token_f1(texts: Sequence[str]) -> Float:
    """F1 of the bags of tokens: twice their overlap over the sum of their sizes; symmetric."""
    overlap, size = _overlap([tokens(text) for text in texts])
    return _of_both(2 * overlap, size[:, None] + size[None, :])


def rouge_l(texts: Sequence[str]) -> Float:
    """ROUGE-L with F1: twice the longest common subsequence of tokens over the sum of the lengths; symmetric.

    Source: Lin 2004 (ACL workshop on text summarization); bit-parallel as in Hyyrö 2004 (AWOCA).
    """
    sequences = [tokens(text) for text in texts]
    size = np.array([len(sequence) for sequence in sequences], dtype=np.float64)
    return _of_both(2 * common_subsequences(sequences), size[:, None] + size[None, :])


def edit(texts: Sequence[str]) -> Float:
    """1 - Levenshtein distance in characters / length of the longer text; symmetric.

    Source: Levenshtein 1966; bit-parallel as in Myers 1999 (J. ACM 46) and Hyyrö 2003.
    """
    size = np.array([len(text) for text in texts], dtype=np.float64)
    longer = np.maximum(size[:, None], size[None, :])
    return _of_both(longer - edit_distances(texts), longer)


def chrf(texts: Sequence[str]) -> Float:
    """Character n-gram F-score, n = 1 to 6, recall weighted twice (beta = 2), white space left out; not symmetric.

    Precision and recall are means over the orders that both texts are long enough for. Source: Popović 2015 (WMT).
    """
    plain = ["".join(text.split()) for text in texts]
    precision, recall, orders = (np.zeros((len(texts), len(texts))) for _ in range(3))
    for n in range(1, CHRF_ORDER + 1):
        overlap, size = _overlap([[text[i : i + n] for i in range(len(text) - n + 1)] for text in plain])
        there = size > 0
        precision += np.divide(overlap, size[:, None], out=np.zeros_like(overlap), where=there[:, None])
        recall += np.divide(overlap, size[None, :], out=np.zeros_like(overlap), where=there[None, :])
        orders += there[:, None] & there[None, :]
    beta = CHRF_BETA**2
    below = (beta * precision + recall) * np.maximum(orders, 1)
    score = np.divide((1 + beta) * precision * recall, below, out=np.zeros_like(below), where=below > 0)
    empty = np.array([not text for text in plain])
    return np.where(empty[:, None] & empty[None, :], 1.0, score)


def cosine(vectors: NDArray[np.floating]) -> Float:
    """Cosine of each pair of rows of [texts, dims], negative ones as 0; a row of zeros is like no other."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, length, out=np.zeros(vectors.shape), where=length > 0)
    table: Float = np.clip(unit @ unit.T, 0.0, 1.0)
    np.fill_diagonal(table, 1.0)
    return table


METRICS: dict[str, Callable[[Sequence[str]], Float]] = {
    "exact": exact,
    "token-f1": token_f1,
    "rouge-l": rouge_l,
    "chrf": chrf,
    "edit": edit,
}
"""The metrics on texts by name."""


def _of_both(above: Float, below: Float) -> Float:
    """A ratio that is 1 where both texts are empty."""
    return np.divide(above, below, out=np.ones_like(below), where=below > 0)


def _overlap(bags: Sequence[Sequence[Hashable]]) -> tuple[Float, Float]:
    """The sizes of the intersections of multisets, float64 [bags, bags], and their own sizes, [bags].

    The k-th occurrence of an item is an item of its own, so that the intersections are those of sets: a product of
    sparse matrices of zeros and ones.
    """
    from scipy.sparse import csr_array  # type: ignore[import-untyped,unused-ignore]

    column: dict[tuple[Hashable, int], int] = {}
    where, ends = [], [0]
    for bag in bags:
        seen: Counter[Hashable] = Counter()
        for item in bag:
            where.append(column.setdefault((item, seen[item]), len(column)))
            seen[item] += 1
        ends.append(len(where))
    entries = (np.ones(len(where)), np.array(where, np.int64), np.array(ends))
    table = csr_array(entries, (len(bags), max(len(column), 1)))
    return (table @ table.T).toarray(), np.diff(ends).astype(np.float64)


# --------------------------------------------------------------------------- bit-parallel, all texts at once


class _SideBySide:
    """Sequences beside each other in one integer, a bit per symbol and an empty bit behind each sequence.

    A sum's carry out of a sequence ends in its empty bit, so that one operation serves all of them.
    """

    def __init__(self, sequences: Sequence[Sequence[Hashable]]) -> None:
        numbers: dict[Hashable, int] = {}
        coded = [[numbers.setdefault(symbol, len(numbers)) for symbol in sequence] for sequence in sequences]
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]]).astype(np.int64)
        self.ends = self.starts + lengths
        self.bits = int(lengths.sum()) + len(sequences)
        flat = np.full(self.bits, -1, dtype=np.int64)
        for start, codes in zip(self.starts, coded, strict=True):
            flat[start : start + len(codes)] = codes
        self.coded = coded
        self.ones = _integer(flat >= 0)
        self.firsts = _integer(np.isin(np.arange(self.bits), self.starts[lengths > 0]))
        self.where = [_integer(flat == number) for number in range(len(numbers))]

    def count(self, number: int) -> NDArray[np.int64]:
        """The bits that are set in each sequence's part, int64 [sequences]."""
        raw = np.frombuffer(number.to_bytes(self.bits // 8 + 1, "little"), dtype=np.uint8)
        total = np.concatenate([[0], np.cumsum(np.unpackbits(raw, bitorder="little"), dtype=np.int64)])
        counts: NDArray[np.int64] = total[self.ends] - total[self.starts]
        return counts


def common_subsequences(sequences: Sequence[Sequence[Hashable]]) -> Float:
    """Lengths of the longest common subsequences of all pairs, float64 [sequences, sequences]."""

    def lengths(packed: _SideBySide, sequence: Sequence[int], start: int) -> NDArray[np.int64]:
        ones = packed.ones >> start
        free = ones
        for symbol in sequence:
            met = free & (packed.where[symbol] >> start)
            free = ((free + met) | (free - met)) & ones
        return packed.count((ones ^ free) << start)

    return _all_pairs(sequences, lengths)


def edit_distances(sequences: Sequence[Sequence[Hashable]]) -> Float:
    """Levenshtein distances of all pairs, float64 [sequences, sequences]."""

    def distances(packed: _SideBySide, sequence: Sequence[int], start: int) -> NDArray[np.int64]:
        up, down = _vertical(packed, sequence, start)
        return len(sequence) + packed.count(up << start) - packed.count(down << start)

    return _all_pairs(sequences, distances)


def _all_pairs(
    sequences: Sequence[Sequence[Hashable]], row: Callable[[_SideBySide, Sequence[int], int], NDArray[np.int64]]
) -> Float:
    """A symmetric table from its rows; ``row`` is to compare a sequence with those from bit ``start`` on."""
    packed = _SideBySide(sequences)
    table = np.zeros((len(sequences), len(sequences)))
    for number, sequence in enumerate(packed.coded):
        table[number, number:] = row(packed, sequence, int(packed.starts[number]))[number:]
    return np.maximum(table, table.T)


def _vertical(packed: _SideBySide, sequence: Sequence[int], start: int) -> tuple[int, int]:
    """Where the last column of the distance matrix rises and falls by one, for the sequences from bit ``start`` on."""
    ones, firsts = packed.ones >> start, packed.firsts >> start
    same_as = {symbol: packed.where[symbol] >> start for symbol in set(sequence)}
    up, down = ones, 0
    for symbol in sequence:
        same = same_as[symbol]
        diagonal = ((((same & up) + up) ^ up) & ones) | same | down
        right_up = (((down | (ones ^ (diagonal | up))) << 1) | firsts) & ones
        right_down = ((diagonal & up) << 1) & ones
        up, down = right_down | (ones ^ (diagonal | right_up)), right_up & diagonal
    return up, down


def _integer(bits: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")
