"""What the papers of the registered methods report, and how to compute the same quantity from a reading's figures.

Figures are those of the papers' abstracts, cited by arXiv id. Used by benchmarks/every_policy.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Data = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A quantity a paper reports and the function that finds it in the figures of one reading, None: not
    there. ``note`` says what is different here."""

    method: str
    arxiv: str
    reported: str
    here: Callable[[Data], str | None]
    note: str = ""


def row_of(data: Data, start: str) -> Mapping[str, Any] | None:
    """The first policy whose canonical name begins so."""
    return next((row for row in data["rows"] if row["policy"].startswith(start)), None)


def signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-0.0", "+0.0")


def gain(row: Mapping[str, Any]) -> str:
    """The difference to the full vote with its interval, in points."""
    middle, low, high = row["over_full"]
    return f"{signed(middle)} ({signed(low)} to {signed(high)})"


def saving(start: str) -> Callable[[Data], str | None]:
    """Draws saved against the full vote, and the accuracy that costs."""

    def here(data: Data) -> str | None:
        row = row_of(data, start)
        return row and f"-{100 * row['saved']:.1f} % draws, {signed(row['over_full'][0])} points"  # type: ignore[return-value]

    return here


def times(start: str) -> Callable[[Data], str | None]:
    """How many times fewer draws than the full vote, and the accuracy that costs."""

    def here(data: Data) -> str | None:
        row = row_of(data, start)
        return row and f"{data['mean_draws'] / row['draws']:.1f} times, {signed(row['over_full'][0])} points"  # type: ignore[return-value]

    return here


def over_vote(part: str, draws: Callable[[int], int] = lambda most: most) -> Callable[[Data], str | None]:
    """A weighted vote over so many draws against the plurality of all."""

    def here(data: Data) -> str | None:
        row = row_of(data, f"sc:n={draws(data['draws'])}+{part}")
        return row and gain(row)  # type: ignore[return-value]

    return here


def over_single(data: Data) -> str | None:
    """The full vote against one draw."""
    row = row_of(data, "one")
    assert row is not None
    middle, low, high = row["over_full"]
    return f"{signed(-middle)} ({signed(-high)} to {signed(-low)})"


def at_same_cost(start: str) -> Callable[[Data], str | None]:
    """Against self-consistency at the same number of draws."""

    def here(data: Data) -> str | None:
        row = row_of(data, start)
        if row is None:
            return None
        middle, low, high = row["over_plain"]
        return f"{signed(middle)} ({signed(low)} to {signed(high)}) at {row['draws']:.1f} draws"

    return here


def abstention(data: Data) -> str | None:
    """How often the abstaining vote abstains, and how often it is right when it does not."""
    row = row_of(data, f"sc:n={data['draws']}+selective-ensembles")
    if row is None:
        return None
    right = f"{100 * row['accuracy'] / row['answered']:.1f} %" if row["answered"] else "-"
    return f"abstains {100 * (1 - row['answered']):.1f} %, else right {right}"


def half(most: int) -> int:
    return most // 2


def by_confidence(data: Data) -> str | None:
    """Early stopping of best-of-N by a confidence: its gain and saving."""
    row = row_of(data, "self-calibration")
    return row and f"{gain(row)}, -{100 * row['saved']:.1f} % draws"  # type: ignore[return-value]


CLAIMS = (
    Claim(
        "sc",
        "2203.11171",
        "over greedy decoding: GSM8K +17.9 points, SVAMP +11.0, AQuA +12.2, StrategyQA +6.4, ARC-challenge +3.9",
        over_single,
        " (over a sampled draw)",
    ),
    Claim(
        "esc",
        "2401.10480",
        "samples saved at comparable accuracy: Last Letters -67.4 %, GSM8K -80.1 %, MATH -33.8 %, StrategyQA -76.8 %, "
        "CommonsenseQA -78.5 %, Coin Flip -84.2 %",
        saving("esc"),
    ),
    Claim(
        "asc",
        "2305.11860",
        "up to 7.9 times fewer samples, accuracy lower by less than 0.1 % on average; 17 data sets, three models",
        times("asc:"),
    ),
    Claim(
        "soft-sc",
        "2402.13212",
        "over self-consistency at as many samples: bash +1.3 points, WebShop +6.6, ALFWorld +4.7",
        over_vote("soft-sc:aggregate=mean"),
    ),
    Claim(
        "soft-sc",
        "2402.13212",
        "half the samples for comparable or better success",
        over_vote("soft-sc:aggregate=mean", half),
        " (half the draws against the plurality of all)",
    ),
    Claim(
        "rpc",
        "2502.00511",
        "as accurate as self-consistency at 50 % of the sampling cost (abstract of the NeurIPS 2025 version), seven "
        "data sets",
        over_vote("rpc", half),
        " (half the draws against the plurality of all)",
    ),
    Claim(
        "self-calibration",
        "2503.00031",
        "early stopping of best-of-N, 16 draws: MathQA 81.0 to 83.6 %, with confidences of a model trained for it",
        by_confidence,
        " (over the full vote, the mean token probability standing in for the trained confidence)",
    ),
    Claim(
        "reward-weighted",
        "2206.02336",
        "GSM8K 74.4 to 83.2 %, with diverse prompts and a step-aware verifier",
        over_vote("reward-weighted:weights=raw"),
    ),
    Claim(
        "dsc",
        "2408.13457",
        "cheaper than `asc` and `esc` by a significant margin at comparable accuracy (no figure in the abstract)",
        saving("dsc"),
        " (by the source's level of the problem, not a model's ranking)",
    ),
    Claim(
        "knowledge-gradient",
        "2410.04707",
        "up to 50 % less computation at equal quality, or up to 10 % better at equal computation, by a learned "
        "predictor that this rule does without",
        at_same_cost("knowledge-gradient"),
        " (over `sc` at as many draws)",
    ),
    Claim(
        "modelswitch",
        "2504.00762",
        "more accurate than self-consistency of one model at a lower cost, six data sets (no figure in the abstract)",
        saving("modelswitch"),
        " (against the pool of all draws; against single models: [Routing](routing.md))",
    ),
    Claim(
        "cascade",
        "2310.03094",
        "comparable to the stronger model alone at 40 % of its cost; six data sets, GPT-3.5 and GPT-4",
        saving("cascade"),
        " (against the pool of all draws; in price and against the stronger model, also on that paper's own draws: "
        "[Routing](routing.md))",
    ),
    Claim(
        "selective-ensembles",
        "2111.08230",
        "abstention as low as 1.5 %, no inconsistent prediction (trained classifiers, not draws)",
        abstention,
    ),
)

NOT_COMPARABLE = (
    (
        ("self-certainty",),
        "2502.18581",
        "grows with the number of draws as reward models do (no figure in the abstract)",
        "the score needs the whole next-token distribution, which no record has; below is its Borda vote by another "
        "number",
    ),
    (
        ("best-of-n",),
        "2110.14168",
        "a verifier trained on GSM8K",
        "the one record with rewards has another model's, on another task; see its table",
    ),
    (
        ("csc-sql",),
        "2505.13271",
        "BIRD dev, execution accuracy: 3B 65.28 %, 7B 69.19 %",
        "no record of SQL drafts, and it asks models that the paper trained; [scripted models](procedures.md) instead",
    ),
    (
        ("a2c",),
        "2308.09138",
        "TruthfulQA, closed book: accuracy up by up to 47 %",
        "it asks a model; [scripted models](procedures.md) instead",
    ),
    (
        ("usc",),
        "2311.17311",
        "as good as self-consistency on mathematics and as a vote by execution on code, better where neither applies",
        "it asks a model; [scripted models](procedures.md) instead",
    ),
    (
        ("fsc",),
        "2407.02056",
        "gains on summaries, code and mathematics by GPT-3.5-turbo and GPT-4 (no figure in the abstract)",
        "it asks a model; [scripted models](procedures.md) instead",
    ),
    (
        ("hedged", "hedged-chops"),
        "2506.20544",
        "win rate +6.8 for 8B models on m-ArenaHard-v2.0, +9.0 for Command-A with five samples",
        "no record has a greedy draw beside sampled ones, or win rates",
    ),
    (
        ("mbr",),
        "2005.10283",
        "on the mode and the mean utility in translation; no accuracy",
        "its rows below are accuracies",
    ),
    (
        ("ll-monkeys",),
        "2407.21787",
        "SWE-bench Lite: coverage 15.9 % with 1 draw, 56 % with 250",
        'an estimator, no policy; "any right" is coverage at all draws, and [Repeated sampling](repeated-sampling.md) '
        "has the curves",
    ),
    (
        ("flaws",),
        "2411.17501",
        "the best number of draws can be below 10 with an imperfect verifier, HumanEval and MBPP",
        "an estimator, no policy: [Repeated sampling](repeated-sampling.md)",
    ),
)
