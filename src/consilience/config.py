"""``consilience.toml``: prices, endpoints and defaults in one file; keys come only from the environment.

[defaults]
model = "openai:gpt-x@work"

[endpoints.work]
url = "https://llm.example.com/v1"
api_key_env = "WORK_API_KEY"

[prices."gpt-x"]          # USD per million tokens
input = 0.15
output = 0.60

[serve.keys.alice]        # a client of `consilience serve`
key_env = "ALICE_KEY"
policy = "esc:window=5,max=40"
budget = "usd=5"
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


class ServeKey(_Strict):
    """A client of the server: ``key_env`` names the environment variable that holds its key.

    ``policy`` is in force unless a request names one; ``budget`` caps what the client's requests spend together
    while the server runs.
    """

    key_env: str
    policy: str | None = None
    budget: str | None = None


class Serve(_Strict):
    """Settings of `consilience serve` that are no flags; ``open_metrics``: `/metrics` needs no key from any host."""

    keys: dict[str, ServeKey] = Field(default_factory=dict)
    max_body_bytes: int = Field(default=32 * 1024 * 1024, ge=1)
    open_metrics: bool = False


class Config(_Strict):
    """The whole file."""

    defaults: Defaults = Defaults()
    endpoints: dict[str, Endpoint] = Field(default_factory=dict)
    prices: dict[str, TokenPrice] = Field(default_factory=dict)
    serve: Serve = Serve()


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
