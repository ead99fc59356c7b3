"""Who asks: the clients of the configuration by their keys, and the seed that ties a repeated request to its draws."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from consilience.config import Config
from consilience.draws import Budget
from consilience.errors import InputError
from consilience.serve.errors import ApiError
from consilience.serve.policies import NONE, served_rule
from consilience.text.budget import Account


@dataclass(frozen=True, slots=True)
class Client:
    """Who sent a request: the name that separates his draws from others', his default policy, his account."""

    name: str
    policy: str | None
    account: Account

    @property
    def shown(self) -> str:
        """The name for people, too short to test a guessed key against."""
        return self.name if self.name.startswith("key:") else self.name[:12]


def total_budget(spec: str, where: str) -> Budget:
    """The budget of a server or a client, while the server runs; raises InputError, also for ``seconds``."""
    budget = Budget.parse(spec)
    if budget.seconds is not None:
        raise InputError(f"{where}: `seconds` is a cap for single requests; a server and its clients have none")
    return budget


class Keyring:
    """The clients of a server. Without keys in the configuration any key, and none, is accepted.

    ``open_account`` makes the account of a client who has a budget, by name, budget and the account above.
    Raises InputError where a key's variable is not set, is shared, or a policy or budget cannot be read.
    """

    def __init__(
        self,
        config: Config,
        account: Account,
        open_account: Callable[[str, Budget, Account], Account] = lambda _, budget, above: Account(budget, above),
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._account = account
        self._clients: list[tuple[bytes, Client]] = []
        for name, entry in config.serve.keys.items():
            where = f"[serve.keys.{name}]"
            key = environment.get(entry.key_env, "").strip()
            if not key:
                raise InputError(f"{where}: the environment variable {entry.key_env} is not set")
            if any(hmac.compare_digest(_digest(key), known) for known, _ in self._clients):
                raise InputError(f"{where}: the key in {entry.key_env} is another client's too")
            if entry.policy is not None and entry.policy != NONE:
                served_rule(entry.policy)
            own = account
            if entry.budget is not None:
                own = open_account(f"key:{name}", total_budget(entry.budget, where), account)
            self._clients.append((_digest(key), Client(f"key:{name}", entry.policy, own)))

    def __len__(self) -> int:
        return len(self._clients)

    def identify(self, authorization: str) -> Client:
        """The client of an ``Authorization`` header; raises ApiError (401) for one that is not known."""
        scheme, _, given = authorization.strip().partition(" ")
        digest = _digest(given.strip() if scheme.lower() == "bearer" else "")
        if not self._clients:
            return Client(f"any:{digest.hex()}", None, self._account)
        found = None
        for known, client in self._clients:  # all of them, so that the time says nothing
            if hmac.compare_digest(digest, known):
                found = client
        if found is None:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def run_seed(client: Client, idempotency: str | None, seed: int | None) -> int:
    """The seed of a request's draws, 63 bits: the same for the same client and ``Idempotency-Key`` or ``seed``.

    Random where there is neither, so that every request draws afresh.
    """
    if idempotency is None and seed is None:
        return secrets.randbits(63)
    tied = json.dumps([client.name, idempotency, seed])
    return int.from_bytes(hashlib.sha256(tied.encode()).digest()[:8], "big") >> 1
