"""Train the house model: a Llama of under a million parameters on generated problems, from scratch, on two cores.

The loss is on the reply alone. The first part of the budget trains on right chains, which teaches the tasks
sooner; the rest on chains that slip, which teaches the model to err as they do. Matrices are trained with Muon
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), embeddings and norms with AdamW, both with a short
warm-up and a cosine decay. The budget is in tokens, for the speed of a shared machine swings; the seed fixes data,
weights and order.

    python training/house/train.py --tokens 11e6 --seed 0 --out src/consilience/text/sources/house/weights
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from problems import TASKS, generate, stream
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

SPECIALS = ("<pad>", "<s>", "</s>", "<sep>", "<unk>")
PIECES = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9 ]| ")
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<sep>{% endif %}"
)
CONTEXT = 256
SHARES = (0.36, 0.13, 0.13, 0.38)  # of the problems, in the order of TASKS
HELD_OUT = ("house-test.jsonl", "house-questions.jsonl")


# --- vocabulary ------------------------------------------------------------------------------------------------


def vocabulary(sample: int = 20_000, seed: int = 9) -> dict[str, int]:
    """Token to id: specials, every printable ASCII character, 0 to 99, and the words of a sample of problems.

    A piece that is no token is spelled character by character, as the answers of the letters task are.
    """
    words: Counter[str] = Counter()
    for item in generate(seed, sample):
        reply = item["chain"]
        if item["task"] == "letters":
            reply = reply.replace(reply.rsplit(" ", 1)[1], "")
        for text in (item["question"], reply):
            words.update(PIECES.findall(" " + text))
    characters = [chr(code) for code in range(32, 127)]
    numbers = [f" {number}" for number in range(100)]
    found = sorted(word for word, count in words.items() if count >= 10 and len(word) > 1)
    return {token: number for number, token in enumerate(dict.fromkeys([*SPECIALS, *characters, *numbers, *found]))}


def write_tokenizer(folder: Path, vocab: dict[str, int]) -> None:
    """Write tokenizer.json and tokenizer_config.json for `AutoTokenizer`."""
    added = [
        {
            "id": vocab[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in SPECIALS
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Prepend", "prepend": " "},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": PIECES.pattern},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode(vocab: dict[str, int], text: str) -> list[int]:
    """Token ids of a text, a piece at a time."""
    ids: list[int] = []
    for piece in PIECES.findall(" " + text):
        if piece in vocab:
            ids.append(vocab[piece])
        else:
            ids.extend(vocab.get(character, vocab["<unk>"]) for character in piece)
    return ids


# --- batches ---------------------------------------------------------------------------------------------------


def example(vocab: dict[str, int], item: dict[str, str]) -> tuple[list[int], int]:
    """The ids of `<s> question <sep> reply </s>` and where the reply begins."""
    head = [vocab["<s>"], *encode(vocab, item["question"]), vocab["<sep>"]]
    return [*head, *encode(vocab, item["chain"]), vocab["</s>"]], len(head)


def collate(rows: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 [rows, longest - 1]; a target is -100 outside the reply."""
    longest = max(len(ids) for ids, _ in rows) - 1
    inputs = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full((len(rows), longest), -100)
    for row, (ids, begin) in enumerate(rows):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, begin - 1 : len(ids) - 1] = torch.tensor(ids[begin:])
    return inputs, targets


def batches(
    vocab: dict[str, int], items: Iterator[dict[str, str]], tokens: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of at most `tokens` tokens, rows of like length together."""
    order = torch.Generator().manual_seed(seed)
    while True:
        pool = sorted((example(vocab, next(items)) for _ in range(2048)), key=lambda row: len(row[0]))
        groups, rows = [], []
        for row in pool:
            if rows and (len(rows) + 1) * len(row[0]) > tokens:
                groups.append(rows)
                rows = []
            rows.append(row)
        for group in torch.randperm(len(groups), generator=order).tolist():
            yield collate(groups[group])


# --- optimisation ----------------------------------------------------------------------------------------------


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices of [n, rows <= columns] by five quintic Newton-Schulz steps."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon:
    """Momentum whose update is orthogonalized, for matrices; equal shapes are treated together."""

    def __init__(self, parameters: list[torch.nn.Parameter], momentum: float = 0.95) -> None:
        self.groups: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            rows, columns = sorted(parameter.shape)
            self.groups.setdefault((rows, columns), []).append(parameter)
        self.velocity = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float, decay: float = 0.01) -> None:
        for shape, group in self.groups.items():
            gradient = torch.stack([p.grad if p.shape == shape else p.grad.mT for p in group])
            velocity = self.velocity[shape]
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(velocity, self.momentum))
            for parameter, change in zip(group, update, strict=True):
                change = change if parameter.shape == shape else change.mT
                parameter.mul_(1 - lr * decay)
                parameter.add_(change, alpha=-lr * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5)


def schedule(done: float, warmup: float = 0.01) -> float:
    """The learning rate's factor when the share `done` of the budget is spent."""
    return done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


# --- training --------------------------------------------------------------------------------------------------


def build(size: int) -> LlamaForCausalLM:
    """The untrained model: Llama's layout, 128 wide, four layers, tied embeddings."""
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rms_norm_eps=1e-6,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.05)
    return model


def loss_of(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the reply's tokens. Padding is on the right, so no mask is needed."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    kept = targets != -100
    return cross_entropy(model.lm_head(hidden[kept]), targets[kept])


@torch.no_grad()
def followed(model: LlamaForCausalLM, vocab: dict[str, int], items: list[dict[str, str]]) -> float:
    """Share of right chains of which the model's most likely token is every token: about greedy accuracy."""
    inputs, targets = collate([example(vocab, item) for item in items])
    guess = model(input_ids=inputs, use_cache=False).logits.argmax(-1)
    return ((guess == targets) | (targets == -100)).all(1).double().mean().item()


def probes(seed: int = 77) -> dict[str, list[dict[str, str]]]:
    """Per task and difficulty, problems whose chain is right and has no opening."""
    found: dict[str, list[dict[str, str]]] = {}
    for item in generate(seed, 2000):
        opened = item["chain"].split(".")[0].split(",")[0] in (
            "Clearly",
            "Let us see",
            "Step by step",
            "First things first",
            "We work it out",
        )
        if not opened and item["chain"].endswith(f"The answer is {item['answer']}."):
            task = "boolean" if item["answer"] in ("True", "False") else item["task"]
            found.setdefault(f"{task}-{item['difficulty'][0]}", []).append(item)
    return {name: items[:64] for name, items in sorted(found.items())}


def held_out(folder: Path) -> set[str]:
    """The questions that must not be trained on."""
    lines = [line for name in HELD_OUT for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return {json.loads(line)["question"] for line in lines}


def save(model: LlamaForCausalLM, folder: Path) -> None:
    model.generation_config.do_sample = True
    model.generation_config.max_new_tokens = 128
    model.save_pretrained(folder)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    vocab = vocabulary()
    write_tokenizer(args.out, vocab)
    model = LlamaForCausalLM.from_pretrained(args.init) if args.init else build(len(vocab))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    held, shares = held_out(args.held_out), dict(zip(TASKS, args.shares, strict=True))
    clean = batches(vocab, stream(args.seed, shares, held, False, args.shuffled), args.batch, args.seed)
    slipping = batches(vocab, stream(args.seed + 1, shares, held, True, args.shuffled), args.batch, args.seed)
    checks = probes()
    size = sum(p.numel() for p in model.parameters())
    print(f"parameters {size} vocabulary {len(vocab)} shares {shares}", flush=True)
    spent, step, began, cpu, mean = 0, 0, time.time(), time.process_time(), 0.0
    next_check = args.check
    while spent < min(args.tokens, args.stop):
        inputs, targets = next(clean if spent < args.clean * args.tokens else slipping)
        factor = schedule(spent / args.tokens)
        loss = loss_of(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * factor
        muon.step(args.muon_lr * factor)
        adam.step()
        model.zero_grad(set_to_none=True)
        spent, step = spent + inputs.numel(), step + 1
        mean += (loss.item() - mean) * max(0.01, 1 / step)
        if spent >= min(next_check, args.tokens, args.stop):
            next_check += args.check
            greedy = " ".join(f"{name} {followed(model, vocab, items):.2f}" for name, items in checks.items())
            wall, used = time.time() - began, time.process_time() - cpu
            print(
                f"tokens {spent} step {step} loss {mean:.4f} wall_s {wall:.0f} cpu_s {used:.0f} "
                f"tokens/s {spent / wall:.0f} | {greedy}",
                flush=True,
            )
            save(model, args.out)
    print("done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the house model from scratch.")
    parser.add_argument("--tokens", type=float, default=11e6, help="budget, padding included")
    parser.add_argument("--clean", type=float, default=0.6, help="share of the budget before chains slip")
    parser.add_argument("--shares", type=float, nargs=4, default=SHARES, help="of arithmetic coin letters puzzle")
    parser.add_argument("--shuffled", action="store_true", help="clues of order puzzles in any order")
    parser.add_argument("--batch", type=int, default=1024, help="tokens a step")
    parser.add_argument("--stop", type=float, default=math.inf, help="stop here, with the schedule of --tokens")
    parser.add_argument("--init", type=Path, help="go on from the weights in this folder")
    parser.add_argument("--check", type=float, default=1e6, help="tokens between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--muon-lr", type=float, default=0.008)
    parser.add_argument("--adam-lr", type=float, default=1e-3)
    parser.add_argument("--held-out", type=Path, default=Path("examples"))
    parser.add_argument("--out", type=Path, required=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
