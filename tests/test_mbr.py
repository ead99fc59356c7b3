"""Minimum Bayes risk and its metrics: against independent definitions, by identities, and with embeddings asked for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.draws import Budget, Draw, Problem, Usage
from consilience.errors import BudgetSpent, EndpointError, InputError
from consilience.ledger import Ledger
from consilience.replay import tabulate
from consilience.rules import View
from consilience.testing.laws import ShuffledSource
from consilience.text.asking import Asker
from consilience.text.budget import Account
from consilience.text.session import Session
from consilience.text.sources.openai import OpenAISource
from consilience.text.transport import Retry
from consilience.text.voting.mbr import MinimumBayesRisk, first_best
from consilience.text.voting.plurality import Plurality
from consilience.text.voting.similarity import METRICS, cosine, similarity, tokens

words = st.lists(st.sampled_from(["a", "b", "ab", "c"]), max_size=9).map(" ".join)
short_texts = st.lists(words | st.text("abAB ,\u00e9", max_size=8), min_size=1, max_size=5)
answers = st.lists(st.sampled_from(["1", "2", "3", "4", None]), min_size=1, max_size=12)


def draws_of(given: Sequence[str | None]) -> list[Draw]:
    return [Draw(text=answer or "", answer=answer) for answer in given]


def concluded(procedure: Any, draws: Sequence[Draw], kind: str = "text", session: Any = None) -> Any:
    return asyncio.run(procedure(session, Problem(question="q", kind=kind), draws))


# ------------------------------------------------------------------------------- metrics, one pair at a time


def pair_token_f1(a: str, b: str) -> float:
    x, y = Counter(tokens(a)), Counter(tokens(b))
    size = x.total() + y.total()
    return 2 * (x & y).total() / size if size else 1.0


def pair_rouge_l(a: str, b: str) -> float:
    x, y = tokens(a), tokens(b)
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, s in enumerate(x):
        for j, t in enumerate(y):
            table[i + 1][j + 1] = table[i][j] + 1 if s == t else max(table[i][j + 1], table[i + 1][j])
    if not x and not y:
        return 1.0
    if not table[-1][-1]:
        return 0.0
    precision, recall = table[-1][-1] / len(x), table[-1][-1] / len(y)
    return 2 * precision * recall / (precision + recall)


def pair_edit(a: str, b: str) -> float:
    row = list(range(len(b) + 1))
    for i, s in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, t in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (s != t))
    return 1 - row[-1] / max(len(a), len(b)) if a or b else 1.0


def pair_chrf(a: str, b: str) -> float:
    x, y = "".join(a.split()), "".join(b.split())
    if not x and not y:
        return 1.0
    precisions, recalls = [], []
    for n in range(1, 7):
        mine, other = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (x, y))
        if mine and other:
            common = (mine & other).total()
            precisions.append(common / mine.total())
            recalls.append(common / other.total())
    if not precisions or not sum(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * p * r / (4 * p + r)


PAIRWISE: dict[str, Callable[[str, str], float]] = {
    "exact": lambda a, b: float(a.strip() == b.strip()),
    "token-f1": pair_token_f1,
    "rouge-l": pair_rouge_l,
    "chrf": pair_chrf,
    "edit": pair_edit,
}


def test_every_metric_has_an_independent_definition() -> None:
    assert set(PAIRWISE) == set(METRICS)


@pytest.mark.parametrize("metric", METRICS)
@given(texts=short_texts)
@settings(max_examples=40, deadline=None)
def test_a_table_is_its_definition_pair_by_pair(metric: str, texts: list[str]) -> None:
    table = similarity(texts, metric)
    expected = [[PAIRWISE[metric](a, b) for b in texts] for a in texts]
    np.testing.assert_allclose(table, expected, atol=1e-12)
    assert (np.diagonal(table) == 1).all()
    assert ((table >= 0) & (table <= 1 + 1e-12)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_long_texts_too(metric: str) -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(["one", "two", "three", "é", "x,"], size=size)) for size in (90, 71, 0, 128, 1)]
    expected = [[PAIRWISE[metric](a, b) for b in texts] for a in texts]
    np.testing.assert_allclose(similarity(texts, metric), expected, atol=1e-12)


def test_known_values() -> None:
    assert similarity(["kitten", "sitting"], "edit")[0, 1] == pytest.approx(1 - 3 / 7)
    assert similarity(["the cat sat", "the cat on the mat sat"], "rouge-l")[0, 1] == pytest.approx(2 * 3 / 9)
    assert similarity(["a b", "b c d"], "chrf")[0, 1] != similarity(["a b", "b c d"], "chrf")[1, 0]


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(ValueError, match="bleu"):
        similarity(["a"], "bleu")


def test_cosine() -> None:
    table = cosine(np.array([[3.0, 4.0], [4.0, 3.0], [-3.0, -4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(table[0], [1, 24 / 25, 0, 0])
    np.testing.assert_allclose(np.diagonal(table), 1)


# ---------------------------------------------------------------------------------------------- the choice


@given(given_answers=answers)
@settings(max_examples=60, deadline=None)
def test_exact_is_the_plurality(given_answers: list[str | None]) -> None:
    labels = [-1 if answer is None else int(answer) for answer in given_answers]
    winner, _ = Plurality().decide(View.single(np.array([labels])))
    verdict = concluded(MinimumBayesRisk("exact"), draws_of(given_answers), "number")
    parsed = [answer for answer in given_answers if answer is not None]
    assert verdict.answer == (str(winner[0]) if winner[0] >= 0 else None)
    assert verdict.abstained == (not parsed)
    assert verdict.confidence == pytest.approx(parsed.count(verdict.answer) / len(parsed) if parsed else 0)
    if parsed:
        assert verdict.chosen == given_answers.index(verdict.answer)


def test_exact_goes_by_the_answers_own_equality() -> None:
    draws = [Draw(text="x", answer="7"), Draw(text="y", answer="1/2"), Draw(text="z", answer="0.5")]
    assert concluded(MinimumBayesRisk("exact"), draws, "number").chosen == 1


@pytest.mark.parametrize("metric", METRICS)
@given(texts=st.lists(words.filter(bool), min_size=2, max_size=6), order=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_choice_is_brute_force_and_has_its_symmetries(metric: str, texts: list[str], order: Any) -> None:
    rule = MinimumBayesRisk(metric, over="answer")
    verdict = concluded(rule, draws_of(texts))
    if metric != "exact":  # which goes by the equality of kind text, not by the strings
        means = [sum(PAIRWISE[metric](a, b) for b in texts) / len(texts) for a in texts]
        best = next(n for n, mean in enumerate(means) if mean >= max(means) - 1e-9)
        without = [(mean * len(texts) - 1) / (len(texts) - 1) for mean in means]
        assert verdict.chosen == best == next(n for n, mean in enumerate(without) if mean >= max(without) - 1e-9)
        assert verdict.confidence == pytest.approx(max(means))
    shuffled = list(texts)
    order.shuffle(shuffled)
    assert concluded(rule, draws_of(shuffled)).confidence == pytest.approx(verdict.confidence)
    once_more = concluded(rule, draws_of([*texts, texts[verdict.chosen]]))
    assert once_more.chosen == verdict.chosen


def test_rounding_decides_no_tie() -> None:
    assert first_best(np.array([0.3, 0.1 + 0.2, 0.2])) == 0
    assert first_best(np.array([0.1 + 0.2 - 1e-16, 0.3])) == 0
    assert first_best(np.array([0.3 - 1e-9, 0.3])) == 1


def test_only_the_draws_of_the_arm_may_win_and_all_are_evidence() -> None:
    texts = ["red fox", "blue whale deep", "blue whale", "blue whale", "blue whale"]
    draws = [Draw(text=text, answer=text, arm=int(n > 1)) for n, text in enumerate(texts)]  # type: ignore[call-arg]
    assert concluded(MinimumBayesRisk("token-f1"), draws).chosen == 2
    assert concluded(MinimumBayesRisk("token-f1", arm=0), draws).chosen == 1
    assert concluded(MinimumBayesRisk("token-f1", arm=0), draws[:2]).chosen == 0  # without the evidence of arm 1
    missing = concluded(MinimumBayesRisk("token-f1", arm=7), draws)
    assert (missing.answer, missing.fallback) == ("blue whale", "no draw of arm 7 has an answer")


@pytest.mark.parametrize("bad", [{"metric": "bleu"}, {"over": "mind"}])
def test_what_is_not_there_is_refused(bad: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        MinimumBayesRisk(**bad)


def test_the_plurality_of_recorded_draws(recorded: Callable[[str], Path]) -> None:
    from consilience import record

    problems = list(record.read(recorded("esc-last-letters-a.jsonl.gz")))[:60]
    table = tabulate(problems)
    winners, _ = Plurality().decide(View.single(table.labels))
    for number, problem in enumerate(problems):
        verdict = concluded(MinimumBayesRisk("exact"), table_draws(problem), problem.kind)
        if winners[number] < 0:
            assert verdict.abstained
        else:
            assert table.labels[number, verdict.chosen] == winners[number]


def table_draws(problem: Problem) -> list[Draw]:
    from consilience.views import answer_of

    return [draw.model_copy(update={"answer": answer_of(draw, problem.kind)}) for draw in problem.draws]


# ------------------------------------------------------------------------------------------ embeddings


def embedded(texts: Sequence[str], vectors: Sequence[Sequence[float] | None]) -> list[Draw]:
    return [
        Draw(text=text, answer=text, **({"embedding": vector} if vector is not None else {}))  # type: ignore[arg-type]
        for text, vector in zip(texts, vectors, strict=True)
    ]


def test_recorded_embeddings_need_no_model() -> None:
    rule = MinimumBayesRisk("embedding")
    verdict = concluded(rule, embedded(["up", "slanted", "right"], [[1, 0], [1, 1], [0, 1]]))
    assert rule.asks
    assert not MinimumBayesRisk("chrf").asks
    assert (verdict.answer, verdict.chosen) == ("slanted", 1)
    assert verdict.confidence == pytest.approx((1 + 2 * np.sqrt(0.5)) / 3)


def test_embeddings_that_do_not_fit_are_refused() -> None:
    for wrong in ([[1.0], [1.0, 2.0]], [1.0, 2.0], [["x"], ["y"]]):
        with pytest.raises(InputError, match="embedding"):
            concluded(MinimumBayesRisk("embedding"), embedded(["a", "b"], wrong))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no model"):
        concluded(MinimumBayesRisk("embedding"), embedded(["a", "b"], [[1.0], None]))


VECTORS = {"up": [1.0, 0.0], "slanted": [1.0, 1.0], "right": [0.0, 1.0]}


@contextmanager
def embeddings_server(status: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server of /v1/embeddings that knows `VECTORS` and refuses other texts, or everything with ``status``."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append({"path": self.path, **body})
            known = VECTORS.get(body["input"])
            usage = {"prompt_tokens": 2, "total_tokens": 2}
            reply: Any = {"data": [{"index": 0, "embedding": known}], "model": "m", "usage": usage}
            code = status if status != 200 else 200 if known else 400
            if code != 200:
                reply = {"error": {"message": "scripted refusal", "type": "x", "param": None, "code": None}}
            raw = json.dumps(reply).encode()
            self.send_response(code)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def ask_for_embeddings(url: str, texts: Sequence[str], ledger: Path, budget: Budget | None = None) -> Any:
    source = OpenAISource("m", url, api_key=None, retry=Retry(tries=2, base=0.001))
    try:
        with Ledger(str(ledger)) as store:
            asker = Asker(Session(source, store, Account(budget or Budget())), params={"temperature": 1.0})
            return await asker.embed(texts), asker
    finally:
        await source.close()


async def test_embeddings_are_bought_once_and_in_the_texts_order(tmp_path: Path) -> None:
    texts = ["up", "slanted", "up", "right"]
    with embeddings_server() as (url, seen):
        first, asker = await ask_for_embeddings(url, texts, tmp_path / "l.db")
        assert sorted(call["input"] for call in seen) == ["right", "slanted", "up"]
        assert {call["path"] for call in seen} == {"/v1/embeddings"}
        assert "temperature" not in seen[0]
        again, _ = await ask_for_embeddings(url, texts, tmp_path / "l.db")
        assert len(seen) == 3
    np.testing.assert_array_equal(first, [VECTORS[text] for text in texts])
    np.testing.assert_array_equal(first, again)
    assert sum(draw.prompt_tokens or 0 for draw in asker.asked) == 6
    assert asker.session.account.spent == Usage(prompt_tokens=6, requests=3)


async def test_a_refused_text_has_no_vector_and_the_plurality_stands(tmp_path: Path) -> None:
    with embeddings_server() as (url, _):
        table, asker = await ask_for_embeddings(url, ["up", "odd"], tmp_path / "l.db")
        assert np.isfinite(table[0]).all()
        assert np.isnan(table[1]).all()
        source = OpenAISource("m", url, api_key=None, retry=Retry(tries=1))
        with Ledger(str(tmp_path / "m.db")) as store:
            asker = Asker(Session(source, store, Account(Budget())))
            draws = draws_of(["up", "odd", "odd"])
            verdict = await MinimumBayesRisk("embedding")(asker, Problem(question="q", kind="text"), draws)
        await source.close()
    assert (verdict.answer, verdict.fallback) == ("odd", "an embedding could not be had")


@pytest.mark.parametrize("status", [401, 404])
async def test_an_endpoint_without_embeddings_ends_the_run(status: int, tmp_path: Path) -> None:
    with embeddings_server(status) as (url, _), pytest.raises(EndpointError):
        await ask_for_embeddings(url, ["up", "slanted"], tmp_path / "l.db")


async def test_embeddings_stay_within_the_budget(tmp_path: Path) -> None:
    with embeddings_server() as (url, seen):
        with pytest.raises(BudgetSpent):
            await ask_for_embeddings(url, ["up", "slanted"], tmp_path / "l.db", Budget(draws=1))
        assert len(seen) == 1


async def test_a_source_without_embeddings_says_so(tmp_path: Path) -> None:
    with Ledger(str(tmp_path / "l.db")) as store:
        asker = Asker(Session(ShuffledSource({}), store, Account(Budget())))
        with pytest.raises(EndpointError, match="no embeddings"):
            await asker.embed(["a"])


async def test_local_models_embed_by_the_mean_of_the_last_hidden_states(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from consilience.text.sources.hf import HFSource

    torch.manual_seed(0)
    vocabulary = {word: n for n, word in enumerate(["<unk>", "<eos>", "up", "right", "left"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>").save_pretrained(
        folder
    )
    config = transformers.GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=2, n_head=2, eos_token_id=1)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    source = HFSource(str(folder))
    with Ledger(str(tmp_path / "l.db")) as store:
        asker = Asker(Session(source, store, Account(Budget())))
        table = await asker.embed(["up right left", "left", "up " * 20])
    with torch.no_grad():
        states = model.transformer(torch.tensor([[2, 3, 4]])).last_hidden_state[0]
    np.testing.assert_allclose(table[0], states.double().mean(0).numpy(), atol=1e-6)
    assert table.shape == (3, 8)
    assert np.isnan(table[2]).all()  # longer than the context
