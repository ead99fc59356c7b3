"""Sources of draws, and the model specifications that name them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from consilience.errors import InputError
from consilience.text.sources.base import Source

if TYPE_CHECKING:
    from consilience.config import Config

FORMS = "house, hf:PATH, record:FILE, openai:MODEL@URL"
OPENAI_URL = "https://api.openai.com/v1"


def open_source(spec: str, config: Config, *, concurrency: int = 8, seed: int = 0) -> Source:
    """The source that a model specification names.

    ``openai:MODEL@URL`` splits at the last ``@http``; ``openai:MODEL@NAME`` takes URL and key variable from the
    configuration's endpoint NAME. Raises InputError saying what would be possible.
    """
    kind, _, rest = spec.partition(":")
    if spec == "house":
        from consilience.text.sources.house_source import HouseSource

        return HouseSource()
    if kind == "hf" and rest:
        from consilience.text.sources.hf import HFSource

        return HFSource(rest)
    if kind == "record" and rest:
        from consilience.text.sources.record import RecordSource

        return RecordSource(rest)
    if kind == "openai" and rest:
        return _open_openai(rest, config, concurrency, seed)
    raise InputError(f"model {spec!r}: unknown form (there are: {FORMS})")


def _open_openai(rest: str, config: Config, concurrency: int, seed: int) -> Source:
    from consilience.text.sources.openai import OpenAISource

    split = rest.rfind("@http")
    model, url, variable = rest[:split], rest[split + 1 :], "OPENAI_API_KEY"
    if split < 0:
        model, at, name = rest.rpartition("@")
        if at and name in config.endpoints:
            url, variable = config.endpoints[name].url, config.endpoints[name].api_key_env
        elif at and not os.environ.get("OPENAI_BASE_URL"):  # never send a mistyped name to a third party
            there = ", ".join(config.endpoints) or "none configured"
            raise InputError(f"model 'openai:{rest}': no endpoint {name!r} (there are: {there}) and no http URL")
        else:
            model, url = rest, os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    if not model:
        raise InputError(f"model 'openai:{rest}': expected openai:MODEL@URL")
    return OpenAISource(
        model, url, api_key=os.environ.get(variable), key_variable=variable, concurrency=concurrency, seed=seed
    )
