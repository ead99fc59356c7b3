"""``consilience.toml``: prices, endpoints and defaults in one file; keys come only from the environment.

[defaults]
model = "openai:gpt-x@work"

[endpoints.work]
url = "https://llm.example.com/v1"
api_key_env = "WORK_API_KEY"

[prices."gpt-x"]          # USD per million tokens
input = 0.15
output = 0.60
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.errors import InputError

FILE = "consilience.toml"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Endpoint(_Strict):
    """An OpenAI-compatible endpoint; ``api_key_env`` names the environment variable that holds its key."""

    url: str
    api_key_env: str = "OPENAI_API_KEY"


class TokenPrice(_Strict):
    """USD per million tokens."""

    input: float = Field(ge=0, allow_inf_nan=False)
    output: float = Field(ge=0, allow_inf_nan=False)


class Defaults(_Strict):
    """What a flag that is not given falls back to."""

    model: str | None = None
    policy: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    concurrency: int | None = None
    ledger: str | None = None


class Config(_Strict):
    """The whole file."""

    defaults: Defaults = Defaults()
    endpoints: dict[str, Endpoint] = Field(default_factory=dict)
    prices: dict[str, TokenPrice] = Field(default_factory=dict)


def read(path: str | Path | None = None) -> Config:
    """The configuration at ``path``, else ``consilience.toml`` in the working directory, else an empty one.

    Raises InputError naming the file and the field.
    """
    file = Path(path) if path is not None else Path(FILE)
    if path is None and not file.exists():
        return Config()
    try:
        return Config.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file}: not TOML ({error})") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file}: {place}: {first['msg']}") from error
