"""The house model: what transformers computes, draws that depend on their own seed alone, and honest data."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import threading
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
from scipy.stats import chi2

from consilience.text.sources.house import HouseModel
from consilience.text.sources.house.llama import BATCH, WEIGHTS, choose, multiply, nucleus

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "training" / "house"
EXAMPLES = ROOT / "examples"
ODD_TEXTS = (
    "Zyx has 100 apples & 3,000 pears!",
    "naïve café — ¿qué?\n\ttabs  and   spaces ",
    "x",
    "  leading and trailing  ",
    "漢字 and 🙂",
    '"quoted"(brackets)12x34',
    "line\r\nline\u2028line\x00end",
)


def script(name: str):
    """A script of training/house as a module."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@cache
def examples(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model() -> HouseModel:
    return HouseModel.load()


@pytest.fixture(scope="module")
def reference():
    """The same folder in transformers: (tokenizer, model)."""
    pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(WEIGHTS)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS).eval()


def by_task(task: str) -> list[dict]:
    return [item for item in examples("house-test.jsonl") if item["task"] == task]


# --- the same model as transformers ------------------------------------------------------------------------------


def test_logits_equal_transformers(model, reference):
    import torch

    _, hugging = reference
    for task in ("arithmetic", "coin", "letters", "puzzle"):
        for item in by_task(task)[:5]:
            reply = model.generate([item["question"]], [3], temperature=1.0)[0]
            ids = [*model.tokenizer.prompt(item["question"]), *reply.token_ids]
            with torch.no_grad():
                expected = hugging(torch.tensor([ids])).logits[0].numpy()
            got = model.logits(ids)
            assert got.dtype == np.float32
            assert np.abs(got - expected).max() < 1e-4


def test_logits_equal_transformers_over_the_whole_context(model, reference):
    import torch

    texts = [item["question"] for item in examples("house-test.jsonl")[:12]]
    ids = [number for text in texts for number in model.tokenizer.prompt(text)][: model.context]
    assert len(ids) == model.context
    with torch.no_grad():
        expected = reference[1](torch.tensor([ids])).logits[0].numpy()
    assert np.abs(model.logits(ids) - expected).max() < 1e-4


def test_token_ids_equal_autotokenizer(model, reference):
    tokenizer, _ = reference
    for item in examples("house-test.jsonl") + examples("house-questions.jsonl"):
        ids = model.tokenizer.encode(item["question"])
        assert ids == tokenizer(item["question"], add_special_tokens=False)["input_ids"]
        assert model.tokenizer.decode(ids) == item["question"] == tokenizer.decode(ids)
        assert model.tokenizer.unknown not in ids


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_token_ids_equal_autotokenizer_on_odd_text(model, reference, text):
    assert model.tokenizer.encode(text) == reference[0](text, add_special_tokens=False)["input_ids"]


def test_chat_template_gives_the_prompt(model, reference):
    tokenizer, _ = reference
    question = by_task("puzzle")[0]["question"]

    def ids(messages):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    assert ids([{"role": "user", "content": question}]) == model.tokenizer.prompt(question)
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": question}]
    assert ids(chat) == model.tokenizer.prompt(f"Think. {question}")


# --- tokenizer alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_text_is_tokenized_and_answered(model, text):
    ids = model.tokenizer.encode(text)
    assert all(0 <= number < len(model.embedding) for number in ids)
    assert model.count_tokens(text) == len(ids)
    model.generate([text], [0], max_tokens=4)


def test_unknown_characters_are_unknown_and_special_tokens_are_spelled(model):
    assert model.tokenizer.encode("é")[-1] == model.tokenizer.unknown
    spelled = model.tokenizer.encode("a</s>b<sep>")
    assert not set(spelled) & set(model.tokenizer.special.values())
    assert model.tokenizer.decode(spelled) == "a</s>b<sep>"


def test_decode_ignores_specials_and_ids_beyond_the_vocabulary(model):
    hello = model.tokenizer.encode("It is heads up.")
    assert model.tokenizer.decode([1, *hello, 2, 10**6]) == "It is heads up."


def test_replies_read_naturally(model):
    shape = re.compile(r"[A-Za-z0-9].*[^ ] The answer is [A-Za-z0-9]+\.", re.DOTALL)
    for item in examples("house-test.jsonl")[:40]:
        text = model.generate([item["question"]], [0], temperature=0.0)[0].text
        assert shape.fullmatch(text), text
        assert "  " not in text
        assert " ." not in text


# --- draws ---------------------------------------------------------------------------------------------------------


def test_a_draw_is_the_same_to_the_bit_whatever_shares_its_batch(model):
    questions = [
        by_task(task)[number]["question"] for number in range(3) for task in ("arithmetic", "coin", "letters", "puzzle")
    ]
    rows = [(questions[number % len(questions)], number) for number in range(40)]
    alone = [model.generate([question], [seed], temperature=1.0)[0] for question, seed in rows]
    rng = Random(1)
    for size in (2, 3, 7, 8, 9, 16, 17, 31, 40):
        chosen = rng.sample(range(40), size)
        made = model.generate([rows[i][0] for i in chosen], [rows[i][1] for i in chosen], temperature=1.0)
        assert made == [alone[i] for i in chosen]


def test_every_batch_size_of_one_prompt_gives_the_same_first_draw(model):
    question = by_task("arithmetic")[0]["question"]
    first = model.generate([question], [5], temperature=1.0)[0]
    for size in range(2, 41):
        made = model.generate([question] * size, [5, *range(100, 99 + size)], temperature=1.0, max_tokens=12)
        assert made[0].token_logprobs == first.token_logprobs[:12]


def test_a_product_on_tiles_does_not_depend_on_the_other_rows():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 128)).astype(np.float32)
    matrix = rng.standard_normal((128, 455)).astype(np.float32)
    whole = multiply(x, matrix)
    assert np.abs(whole - x.astype(np.float64) @ matrix).max() < 1e-4
    for size in range(1, 41):
        rows = rng.permutation(40)[:size]
        np.testing.assert_array_equal(multiply(x[rows], matrix), whole[rows])


def test_more_rows_than_one_batch_holds_are_drawn_the_same(model):
    question = by_task("coin")[0]["question"]
    many = model.generate([question] * (BATCH + 6), range(BATCH + 6), temperature=1.0, max_tokens=8)
    last = model.generate([question] * 6, range(BATCH, BATCH + 6), temperature=1.0, max_tokens=8)
    assert many[BATCH:] == last


def test_cached_steps_equal_one_pass(model):
    question = by_task("coin")[0]["question"]
    draw = model.generate([question] * 3, [0, 1, 2], temperature=1.0)[1]
    prompt = model.tokenizer.prompt(question)
    ids = [*prompt, *draw.token_ids, model.tokenizer.end]
    logits = model.logits(ids[:-1]).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [logprobs[len(prompt) - 1 + i, ids[len(prompt) + i]] for i in range(len(draw.token_ids) + 1)]
    np.testing.assert_allclose(draw.token_logprobs, expected, atol=1e-4)
    assert draw.logprob == pytest.approx(sum(expected), abs=1e-3)
    assert draw.prompt_tokens == len(prompt)
    assert draw.completion_tokens == len(draw.token_ids) + 1 == len(draw.token_logprobs)
    assert draw.finish_reason == "stop"


def test_temperature_zero_is_the_most_likely_token_and_ignores_the_seed(model):
    question = by_task("letters")[1]["question"]
    one, other = model.generate([question] * 2, [0, 99], temperature=0.0)
    assert one == other
    ids = model.tokenizer.prompt(question)
    for token in one.token_ids:
        assert model.logits(ids)[-1].argmax() == token
        ids.append(token)
    assert model.logits(ids)[-1].argmax() == model.tokenizer.end


def test_logprobs_do_not_depend_on_the_sampling_parameters(model):
    question = by_task("coin")[2]["question"]
    sampled = {draw.token_ids: draw.logprob for draw in model.generate([question] * 40, range(40), temperature=1.0)}
    cooler = model.generate([question] * 40, range(40), temperature=0.6, top_p=0.95)
    shared = [draw for draw in cooler if draw.token_ids in sampled]
    assert shared
    assert all(sampled[draw.token_ids] == draw.logprob for draw in shared)


def chi_square_fits(counts: np.ndarray, expected: np.ndarray, alarm: float) -> bool:
    """Pearson's test of counts against expected shares; cells expected below 5 are pooled."""
    expected = expected / expected.sum() * counts.sum()
    small = expected < 5
    seen, due = counts[~small].astype(float), expected[~small]
    if due.size == 0 or counts[expected == 0].any():
        return False
    if expected[small].sum() > 0:
        seen, due = np.append(seen, counts[small].sum()), np.append(due, max(expected[small].sum(), 1e-9))
    return chi2.sf(((seen - due) ** 2 / due).sum(), max(len(due) - 1, 1)) > alarm


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6), (1.5, 0.9)])
def test_the_first_token_follows_its_law(model, temperature, top_p):
    """4,000 draws against the exact law; seeds are fixed, the false-alarm rate is 1e-3 a case."""
    question = next(item["question"] for item in by_task("arithmetic") if "years old" in item["question"])
    logits = model.logits(model.tokenizer.prompt(question))[-1].astype(np.float64) / temperature
    law = np.exp(logits - logits.max())
    law /= law.sum()
    order = np.argsort(-law, kind="stable")
    size = int(np.searchsorted(np.cumsum(law[order]), top_p) + 1) if top_p < 1 else len(law)
    law[order[size:]] = 0
    made = model.generate([question] * 4000, range(4000), temperature=temperature, top_p=top_p, max_tokens=1)
    counts = np.bincount([(*draw.token_ids, model.tokenizer.end)[0] for draw in made], minlength=len(law))
    assert counts[law > 0.05].all()
    assert chi_square_fits(counts, law, alarm=1e-3)


def test_nucleus_keeps_the_smallest_set_with_the_mass():
    law = np.array([[0.1, 0.4, 0.2, 0.3]])
    assert nucleus(law, 0.4).tolist() == [[0, 0.4, 0, 0]]
    assert nucleus(law, 0.41).tolist() == [[0, 0.4, 0, 0.3]]
    assert nucleus(law, 0.7).tolist() == [[0, 0.4, 0, 0.3]]
    assert nucleus(law, 0.95).tolist() == law.tolist()
    rng = np.random.default_rng(3)
    for law in rng.dirichlet(np.full(20, 0.3), size=200):
        for top_p in (0.05, 0.5, 0.9, 0.99):
            kept = nucleus(law[None], top_p)[0]
            mass, least = kept.sum(), kept[kept > 0].min()
            assert mass >= top_p - 1e-9
            assert mass - least < top_p
            assert law[kept == 0].max(initial=0) <= least


def test_inverse_cdf_never_picks_a_token_without_mass():
    logprobs = np.log(np.array([[0.5, 1e-300, 0.5, 1e-300]]))
    edges = np.array([0.0, np.nextafter(0.5, 0), 0.5, np.nextafter(1, 0)])
    picked = choose(np.repeat(logprobs, 4, axis=0), edges, 1.0, 0.99)
    assert picked.tolist() == [0, 0, 2, 2]


def test_long_draws_end_at_the_context_and_at_max_tokens(model):
    question = by_task("coin")[0]["question"]
    short = model.generate([question], [0], max_tokens=3)[0]
    assert (short.finish_reason, short.completion_tokens, len(short.token_ids)) == ("length", 3, 3)
    full = "Ann flips the coin. " * 100
    words = full.split(" ")
    while len(model.tokenizer.prompt(" ".join(words))) > model.context - 2:
        words.pop()
    edge = " ".join(words)
    made = model.generate([edge, question], [0, 1], temperature=1.0, max_tokens=64)
    assert made[0].prompt_tokens + len(made[0].token_ids) <= model.context
    assert made[0] == model.generate([edge], [0], temperature=1.0, max_tokens=64)[0]
    assert made[1] == model.generate([question], [1], temperature=1.0, max_tokens=64)[0]


def test_a_set_stop_event_ends_the_draws(model):
    stop = threading.Event()
    stop.set()
    made = model.generate([by_task("coin")[0]["question"]] * 2, [0, 1], stop=stop)
    assert [draw.finish_reason for draw in made] == ["length", "length"]
    assert all(draw.completion_tokens == 1 for draw in made)


@pytest.mark.parametrize(
    ("prompts", "seeds", "options", "message"),
    [
        ([""], [0], {}, "prompt 0 is empty"),
        (["Ann", "  \n"], [0, 1], {}, "prompt 1 is empty"),
        (["Ann " * 300], [0], {}, "context is 256"),
        (["Ann"], [0, 1], {}, "1 prompts but 2 seeds"),
        ("Ann", [0, 1, 2], {}, "one string"),
        (["Ann"], [0], {"temperature": -1}, "temperature"),
        (["Ann"], [0], {"temperature": float("nan")}, "temperature"),
        (["Ann"], [0], {"top_p": 0}, "top_p"),
        (["Ann"], [0], {"top_p": 1.5}, "top_p"),
        (["Ann"], [0], {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_input_is_a_clear_error(model, prompts, seeds, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, seeds, **options)


def test_no_prompts_no_draws_and_no_tokens_no_logits(model):
    assert model.generate([], []) == []
    for ids in ([], [5] * (model.context + 1)):
        with pytest.raises(ValueError, match="the model reads 1 to 256"):
            model.logits(ids)


# --- weights, generator, gold answers --------------------------------------------------------------------------------


def test_the_weights_are_small_and_complete():
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 8 * 2**20
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names | {"README.md"} <= {file.name for file in WEIGHTS.iterdir()}


def test_a_model_of_another_layout_is_refused(tmp_path):
    config = json.loads((WEIGHTS / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 2}), encoding="utf-8")
    with pytest.raises(ValueError, match="only a plain Llama"):
        HouseModel.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        HouseModel.load(tmp_path / "missing")


def test_the_generator_is_a_function_of_its_seed():
    problems = script("problems")
    assert problems.generate(5, 200) == problems.generate(5, 200)
    assert problems.generate(5, 200) != problems.generate(6, 200)
    assert {item["task"] for item in problems.generate(5, 30, task="coin")} == {"coin"}
    with pytest.raises(ValueError, match="unknown task"):
        problems.generate(0, 1, task="chess")


def test_the_fixed_sets_are_balanced_and_disjoint():
    test, demo = examples("house-test.jsonl"), examples("house-questions.jsonl")
    for items, each in ((test, 120), (demo, 60)):
        for task in ("arithmetic", "coin", "letters", "puzzle"):
            own = [item for item in items if item["task"] == task]
            assert len(own) == each
            assert {item["kind"] for item in own} == {"number" if task == "arithmetic" else "text"}
            for difficulty in ("easy", "medium", "hard"):
                assert sum(item["difficulty"] == difficulty for item in own) == each // 3
    assert len({item["id"] for item in test}) == len(test)
    questions = [item["question"] for item in test + demo]
    assert len(set(questions)) == len(questions)


def test_the_training_stream_leaves_the_fixed_sets_out():
    problems = script("problems")
    held = {item["question"] for item in problems.generate(0, 300, task="puzzle", difficulty="easy")}
    stream = problems.stream(3, {"puzzle": 1.0}, held)
    assert not held & {next(stream)["question"] for _ in range(2000)}
    free = problems.stream(3, {"puzzle": 1.0})
    assert held & {next(free)["question"] for _ in range(2000)}, "the test above could not have failed"


def solve_arithmetic(question: str) -> str:
    question = re.sub(r"\w+ is \d+ years old\. ", "", question)
    compare = re.match(r"\w+ has (\d+) \w+\. \w+ has (\d+) more \w+ than \w+\.", question)
    if compare:
        fewer, more = map(int, compare.groups())
        return str(fewer + fewer + more)
    packs = re.match(r"\w+ has (\d+) (?:boxes|bags) with (\d+)", question)
    total = int(packs[1]) * int(packs[2]) if packs else int(re.match(r"\w+ has (\d+)", question)[1])
    for sentence in question.split(". ")[1:-1]:
        number = int(re.search(r"\d+", sentence)[0])
        total += number if sentence.endswith("more") else -number
    return str(total)


def solve_coin(question: str) -> str:
    flips = len(re.findall(r"flips the coin|turns the coin over", question))
    return "yes" if flips % 2 == 0 else "no"


def solve_letters(question: str) -> str:
    return "".join(word[-1] for word in question.split('"')[1].split())


def solve_puzzle(question: str) -> str:
    if re.search(r"True|False", question):
        text = question.replace(" equal to True or False?", "")
        text = re.sub(r"^(What is the value of|What is|Evaluate|Is) ", "", text).rstrip("?.")
        allowed = ast.Constant | ast.BoolOp | ast.UnaryOp | ast.Not | ast.And | ast.Or | ast.Expression
        assert all(isinstance(node, allowed) for node in ast.walk(ast.parse(text, mode="eval")))
        return str(eval(text))
    clues = re.findall(r"(\w+) is (\w+) than (\w+)\.", question)
    above = {first: second for first, _, second in clues}
    person = (set(above) - set(above.values())).pop()
    order = [person]
    while person in above:
        person = above[person]
        order.append(person)
    ordinal, asked = re.search(r"Who is the (?:(second|third) )?(\w+)\?", question).groups()
    if ordinal:
        return order[{"second": 1, "third": 2}[ordinal]]
    stem = clues[0][1].removesuffix("er").removesuffix("i")
    return order[0] if asked.startswith(stem) else order[-1]


SOLVERS = {"arithmetic": solve_arithmetic, "coin": solve_coin, "letters": solve_letters, "puzzle": solve_puzzle}


@pytest.mark.parametrize("task", list(SOLVERS))
def test_gold_answers_are_what_an_independent_solver_finds(task):
    items = [item for item in examples("house-test.jsonl") + examples("house-questions.jsonl") if item["task"] == task]
    items += script("problems").generate(11, 300, task=task)
    for item in items:
        assert SOLVERS[task](item["question"]) == item["answer"], item["question"]


def test_slips_put_the_designed_share_of_chains_right():
    """The mean over 2,000 chains a task; five standard errors of 0.011 on either side."""
    problems = script("problems")
    for task, low, high in (
        ("arithmetic", 0.64, 0.76),
        ("coin", 0.68, 0.79),
        ("letters", 0.62, 0.74),
        ("puzzle", 0.62, 0.76),
    ):
        items = problems.generate(13, 2000, task=task)
        right = np.mean([item["chain"].endswith(f"The answer is {item['answer']}.") for item in items])
        assert low < right < high, (task, right)


def test_the_slip_of_an_order_gives_the_wanted_share():
    """Simulated listings against the exact probability; 4,000 each, five standard errors."""
    problems, rng = script("problems"), Random(0)
    for count, rank in ((3, 0), (3, 2), (4, 1), (5, 2), (5, 4)):
        slip = problems.order_slip(count, rank, 0.7)
        names = list(range(count))
        right = np.mean([problems._listing(rng, names, slip)[rank] == rank for _ in range(4000)])
        assert right == pytest.approx(0.7, abs=5 * 0.0073), (count, rank)


# --- what the model can do -------------------------------------------------------------------------------------------


def test_accuracy_of_one_draw_and_of_the_vote(model):
    """Every eighth problem of the fixed test set, 40 draws at temperature 1.

    The full set's numbers are in the model card; the margins below are for 15 problems a task.
    """
    evaluate = script("evaluate")
    items = [item for task in SOLVERS for item in by_task(task)[::8]]
    records = evaluate.measure(model, items, draws=40, seed=1, orders=4)
    share = {
        column: {task: np.mean([r[column] for r in records if r["task"] == task]) for task in SOLVERS}
        for column in ("one", "plurality")
    }
    assert share["one"]["arithmetic"] >= 0.25
    for task in ("coin", "letters", "puzzle"):
        assert 0.35 <= share["one"][task] <= 0.80, share
    for task in SOLVERS:
        assert share["plurality"][task] >= share["one"][task], share
    gain = np.mean(list(share["plurality"].values())) - np.mean(list(share["one"].values()))
    assert gain >= 0.12, share
