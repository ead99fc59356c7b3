"""The solver in real evaluations by Inspect: scripted replies of its own mock model, and a real HTTP endpoint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .conftest import needed

inspect_ai = needed("inspect_ai")

from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import Logprob, Logprobs, Model, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import match
from inspect_ai.solver import generate, prompt_template, use_tools
from inspect_ai.tool import tool

from consilience.bridges.inspect_ai import self_consistency
from consilience.errors import InputError
from consilience.testing import ScriptedServer

USAGE = ModelUsage(input_tokens=7, output_tokens=3, total_tokens=10)


def says(text: str, logprob: float | None = None, stop: str = "stop") -> ModelOutput:
    output = ModelOutput.from_content("mockllm/model", text, stop_reason=stop)  # type: ignore[arg-type]
    output.usage = USAGE  # else Inspect fetches a tokenizer
    if logprob is not None:
        output.choices[0].logprobs = Logprobs(content=[Logprob(token=text, logprob=logprob)])
    return output


def mock(*outputs: ModelOutput, seen: list[Any] | None = None) -> Model:
    """Inspect's mock model, giving these outputs in turn; notes the configuration of each call."""
    left = list(outputs)

    def give(messages: Any, tools: Any, choice: Any, config: Any) -> ModelOutput:
        if seen is not None:
            seen.append(config)
        return left.pop(0)

    return get_model("mockllm/model", custom_outputs=give, memoize=False)


def run(folder: Path, model: Model, solver: Any, samples: list[Sample], **more: Any) -> EvalLog:
    """A real evaluation; the log as it was written to disk."""
    task = inspect_ai.Task(MemoryDataset(samples), solver=solver, scorer=match(location="any", numeric=True))
    [log] = inspect_ai.eval(task, model=model, log_dir=str(folder), display="none", max_samples=1, **more)
    assert log.status == "success", log.error
    return read_eval_log(log.location)


def accuracy(log: EvalLog) -> float:
    return log.results.scores[0].metrics["accuracy"].value


def test_the_sample_goes_on_with_the_first_reply_that_supports_the_winner(tmp_path: Path) -> None:
    texts = ["No idea.", "So: the answer is 7.", "The answer is 8.", "I say: the answer is 7.", "The answer is 7"]
    samples = [Sample(input="3 + 4?", target="7", metadata={"topic": "sums"})]
    solver = [prompt_template("Work it out. {prompt}"), self_consistency("sc:n=5")]
    log = run(tmp_path, mock(*map(says, texts)), solver, samples)
    sample = log.samples[0]
    told = sample.store["consilience"]
    assert sample.metadata == {"topic": "sums", "consilience": told}
    assert (told["answer"], told["votes"], told["draws"]) == ("7", {"7": 3.0, "8": 1.0}, 5)
    assert told["confidence"] == pytest.approx((3 + 1) / (4 + 2))
    assert (told["stopped_because"], told["policy"], told["kind"]) == ("max", "sc:n=5", "auto")
    assert sample.output.completion == texts[1]
    assert [message.text for message in sample.messages] == ["Work it out. 3 + 4?", texts[1]]
    assert accuracy(log) == 1.0
    assert sum(event.event == "model" for event in sample.events) == 5
    assert log.stats.model_usage["mockllm/model"].total_tokens == 5 * 10


def test_an_adaptive_policy_stops_each_sample_on_its_own(tmp_path: Path) -> None:
    plain = ["The answer is 1."] * 3
    split = ["The answer is 2.", "The answer is 1.", "The answer is 2."] + ["The answer is 2."] * 3
    samples = [Sample(input="a", target="1"), Sample(input="b", target="2")]
    solver = self_consistency("esc:window=3,max=12")
    log = run(tmp_path, mock(*map(says, [*plain, *split])), solver, samples)
    told = [sample.store["consilience"] for sample in log.samples]
    assert [one["draws"] for one in told] == [3, 6]
    assert [one["stopped_because"] for one in told] == ["rule", "rule"]
    assert accuracy(log) == 1.0


def test_draws_are_not_cached_and_each_has_a_seed_of_its_own(tmp_path: Path) -> None:
    def drawn(folder: str, seed: int | None) -> list[Any]:
        seen: list[Any] = []
        outputs = [says("The answer is 1.")] * 12
        samples = [Sample(input="a", target="1", id="x"), Sample(input="a", target="1", id="y")]
        run(tmp_path / folder, mock(*outputs, seen=seen), self_consistency("sc:n=3", seed=seed), samples, epochs=2)
        assert len(seen) == 12
        return [config.seed for config in seen]

    seeds = drawn("a", 5)
    assert len(set(seeds)) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert Counter(seeds) == Counter(drawn("b", 5))
    assert not set(seeds) & set(drawn("c", 6))
    assert set(drawn("d", None)) == {None}


def test_without_an_answer_one_wave_and_a_reply_cut_short_does_not_vote(tmp_path: Path) -> None:
    samples = [Sample(input="A poem!", target="x")]
    log = run(tmp_path / "a", mock(*map(says, "abcde")), self_consistency("esc:window=5,max=40"), samples)
    told = log.samples[0].store["consilience"]
    assert (told["confidence"], told["stopped_because"], told["draws"]) == (None, "no answer", 5)
    assert log.samples[0].output.completion == "a"
    outputs = [says("Let me think: 3 + 4 = 7 and 7 +", stop="max_tokens"), says("The answer is 8.")]
    log = run(tmp_path / "b", mock(*outputs), self_consistency("sc:n=2"), samples)
    assert log.samples[0].store["consilience"]["votes"] == {"8": 1.0}


def test_a_vote_by_likelihood_asks_for_log_probabilities(tmp_path: Path) -> None:
    outputs = [says("The answer is 1.", -3.0), says("The answer is 1.", -3.0), says("The answer is 2.", -0.01)]
    seen: list[Any] = []
    solver = self_consistency("sc:n=3+logprob-weighted")
    log = run(tmp_path, mock(*outputs, seen=seen), solver, [Sample(input="a", target="2")])
    assert all(config.logprobs for config in seen)
    assert log.samples[0].store["consilience"]["answer"] == "2"


@tool
def add():
    async def execute(x: int, y: int) -> int:
        """Add two numbers.

        Args:
            x: one of them
            y: the other
        """
        return x + y

    return execute


def test_every_draw_has_a_tool_loop_of_its_own(tmp_path: Path) -> None:
    def reply(messages: Any, tools: Any, choice: Any, config: Any) -> ModelOutput:
        if messages[-1].role == "user":
            output = ModelOutput.for_tool_call("mockllm/model", "add", {"x": 3, "y": 4})
        else:
            output = says(f"The answer is {messages[-1].text}.")
        output.usage = USAGE
        return output

    model = get_model("mockllm/model", custom_outputs=reply, memoize=False)
    log = run(tmp_path, model, [use_tools(add()), self_consistency("sc:n=3")], [Sample(input="3 + 4?", target="7")])
    sample = log.samples[0]
    assert sample.store["consilience"]["votes"] == {"7": 3.0}
    assert [message.role for message in sample.messages] == ["user", "assistant", "tool", "assistant"]
    assert sum(event.event == "model" for event in sample.events) == 6


def test_a_limit_of_inspect_ends_the_sample(tmp_path: Path) -> None:
    outputs = [says("The answer is 1.")] * 40
    task = [Sample(input="a", target="1")]
    log = run(tmp_path, mock(*outputs), self_consistency("sc:n=40"), task, token_limit=25)
    assert log.samples[0].limit.type == "token"


def test_a_bad_policy_is_told_when_the_task_is_built() -> None:
    with pytest.raises(InputError, match="asks a model"):
        self_consistency("sc+usc")


def test_over_http_the_votes_are_the_endpoints_own(tmp_path: Path) -> None:
    answers = {f"question {n}?": {"1": 0.7, "2": 0.3} for n in range(4)}
    with ScriptedServer(answers=answers, supports_n=False) as upstream:
        model = get_model("openai-api/local/m", base_url=upstream.url, api_key="x", memoize=False)
        samples = [Sample(input=question, target="1") for question in answers]
        log = run(tmp_path, model, self_consistency("esc:window=4,max=12"), samples)
        drawn = upstream.counts["draws"]
    told = [sample.store["consilience"] for sample in log.samples]
    assert sum(one["draws"] for one in told) == drawn
    assert accuracy(log) == sum(one["answer"] == "1" for one in told) / 4
    for sample, one in zip(log.samples, told, strict=True):
        texts = [event.output.completion for event in sample.events if event.event == "model"]
        votes = Counter(text.rstrip(".").split()[-1] for text in texts)
        assert one["votes"] == votes
        assert sample.output.completion in texts


def test_through_the_server_a_plain_task_gets_agreed_answers(tmp_path: Path, serve: Any) -> None:
    with ScriptedServer(answers={"1": 0.9, "2": 0.1}) as upstream:  # the other wins with a chance of 5e-6
        url = serve(upstream, "--policy", "sc:n=21")
        model = get_model("openai-api/local/m", base_url=url, api_key="x", memoize=False)
        log = run(tmp_path, model, generate(), [Sample(input=text, target="1") for text in "ab"])
        assert upstream.counts["draws"] == 42
    assert accuracy(log) == 1.0
    [call] = [event.call for event in log.samples[0].events if event.event == "model"]
    assert call.response["consilience"]["draws"] == 21
