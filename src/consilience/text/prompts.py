"""What a model is asked: the question, plus one line that says how to end, by answer kind."""

from __future__ import annotations

from pathlib import Path

from consilience.errors import InputError
from consilience.text.sources.base import Message

ENDINGS = {
    "auto": "End with: The answer is ...",
    "number": "End with: The answer is <number>.",
    "math": "End with the final answer in \\boxed{}.",
    "choice": "End with: The answer is <letter>.",
    "text": "End with: The answer is <answer>.",
    "json": 'Reply with a JSON object whose field "answer" holds the final answer.',
    "code": "Reply with the code in one ```python block.",
    "sql": "Reply with one SQLite query in one ```sql block.",
    "open": "",
}


def read_template(path: str | Path) -> str:
    """A prompt template holding ``{question}`` and, if wanted, ``{ending}``; raises InputError otherwise."""
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"template {path}: cannot be read ({error})") from error
    if "{question}" not in template:
        raise InputError(f"template {path}: must contain {{question}}")
    return template


def messages(
    question: str, kind: str, *, system: str | None = None, template: str | None = None, bare: bool = False
) -> tuple[Message, ...]:
    """The chat messages for a question; ``bare`` asks the question alone (the house model knows its format)."""
    ending = ENDINGS[kind]
    if template is not None:
        content = template.replace("{ending}", ending).replace("{question}", question)
    else:
        content = question if bare or not ending else f"{question}\n\n{ending}"
    user = {"role": "user", "content": content}
    return ({"role": "system", "content": system}, user) if system else (user,)
