"""The house model's tokenizer, read from its tokenizer.json, without the `tokenizers` package.

A text is split into pieces (a word or a number with the space before it, or one other character); a piece in the
vocabulary is one token, any other is spelled character by character, and a character outside the vocabulary is
`<unk>`. In the file this is a BPE without merges (`ignore_merges`), which `AutoTokenizer` reads to the same ids;
decoding is concatenation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path


class Tokenizer:
    """Text to token ids and back, for one tokenizer.json in the house model's form.

    Special tokens written out in a text (such as "</s>") are spelled like any other characters, so that a
    question cannot smuggle them in; `AutoTokenizer` would parse them.
    """

    def __init__(self, vocabulary: dict[str, int], special: dict[str, int], pattern: str) -> None:
        self.vocabulary = vocabulary
        self.special = special
        self.begin = special["<s>"]
        self.end = special["</s>"]
        self.separator = special["<sep>"]
        self.unknown = special["<unk>"]
        self._pieces = re.compile(pattern)
        self._plain = {token: number for token, number in vocabulary.items() if token not in special}
        self._text = {number: token for token, number in self._plain.items()}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json. Raises ValueError when it is not a BPE without merges."""
        data = json.loads(path.read_text(encoding="utf-8"))
        model = data["model"]
        if model["type"] != "BPE" or model["merges"] or not model.get("ignore_merges"):
            raise ValueError(f"{path}: not a tokenizer of the house model (a BPE with ignore_merges and no merges)")
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        return cls(model["vocab"], special, data["pre_tokenizer"]["pattern"]["Regex"])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; an empty text has none."""
        ids: list[int] = []
        for piece in self._pieces.findall(" " + text) if text else ():
            known = self._plain.get(piece)
            if known is not None:
                ids.append(known)
            else:
                ids.extend(self._plain.get(character, self.unknown) for character in piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens, unknown ids and the leading space."""
        return "".join(self._text.get(int(number), "") for number in ids).removeprefix(" ")

    def prompt(self, question: str) -> list[int]:
        """The ids the model is prompted with: `<s> question <sep>`.

        This is the one place that says so; `chat_template` in tokenizer_config.json mirrors it. The messages of a
        chat are joined by a space, in order, before they come here.
        """
        return [self.begin, *self.encode(question), self.separator]
