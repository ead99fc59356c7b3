"""``/metrics`` for Prometheus: what was asked, what it took, what it saved.

Every label has few values: a policy goes by the name of its stopping rule, a model by its own only if it has a price.
Of several workers each keeps its counts in files of a folder that all of them read (`PROMETHEUS_MULTIPROC_DIR`, set by
the supervisor), so that whoever is asked answers for all.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.requests import Request
from starlette.responses import Response

from consilience import methods
from consilience.serve.core import Core
from consilience.serve.errors import ApiError
from consilience.serve.gate import Gate
from consilience.serve.observe import Served
from consilience.serve.policies import NONE
from consilience.text.budget import PICO
from consilience.text.sources.openai import OpenAISource

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)
CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
OTHER = "other"
FRESH = 0.5
"""Seconds after which other workers see what is in flight here, and what was spent on requests that are not over."""


def family(policy: str) -> str:
    """The stopping rule of a policy if it is a registered one, ``none``, else ``other``."""
    first = re.split(r"[:+]", policy, maxsplit=1)[0].strip()
    known = methods.register().get(first)
    return first if first == NONE or (known is not None and known.role == "stop") else OTHER


class Metrics:
    """The counts of one server, in a registry of its own; an observer of its requests."""

    def __init__(self, core: Core, gate: Gate) -> None:
        self._core = core
        self._models = {"house"} if core.house else set(core.config.prices)
        self.registry = registry = CollectorRegistry()
        labels = ("path", "policy", "model", "status")
        self._requests = Counter("consilience_requests", "Requests by how they ended", labels, registry=registry)
        self._seconds = Histogram(
            "consilience_request_seconds",
            "From the first byte of a request to the last of its reply",
            ("path", "policy"),
            buckets=SECONDS,
            registry=registry,
        )
        self._confidence = Histogram(
            "consilience_confidence",
            "Confidence of the first choice of replies that have one",
            buckets=CONFIDENCE,
            registry=registry,
        )
        self._draws = _counter(registry, "draws", "Draws that answered requests used")
        self._bought = _counter(registry, "draws_bought", "Draws that the upstream was paid for")
        self._saved = _counter(registry, "draws_saved", "Draws that the policies' maxima would have taken on top")
        self._failed = _counter(registry, "draws_failed", "Draws that failed for good, after all tries")
        self._refused = Counter(
            "consilience_upstream_errors", "Requests that failed as the upstream did", ("status",), registry=registry
        )
        self._tokens = Counter("consilience_tokens", "Tokens paid for", ("type",), registry=registry)
        self._spent_usd = _counter(registry, "spent_usd", "USD spent, at the prices that are configured")
        self._calls = _counter(registry, "upstream_calls", "Calls to the upstream that have ended, each try of its own")
        self._attempts = Counter(
            "consilience_upstream_attempts_failed",
            "Attempts at calls that failed in passing: sent again, unless they were the last try",
            ("reason",),
            registry=registry,
        )
        self._told, self._told_failed = (0, 0, 0, 0), dict[str, int]()
        self._gate = gate
        self._inside = _gauge(registry, "requests_in_flight", "Requests being answered now")
        self._coming = _gauge(registry, "draws_in_flight", "Draws asked for and not yet there")
        _gauge(registry, "requests_most", "Requests that may be answered at once").set(gate.room)
        self._several = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._keeping: asyncio.Task[None] | None = None
        self._refresh()

    def start(self) -> None:
        """Keep what other workers show of this one fresh; call from a running event loop."""
        if self._several:
            self._keeping = asyncio.ensure_future(self._keep())

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(FRESH)
            self._refresh()

    def _refresh(self) -> None:
        """Take over what is counted elsewhere: the account's sums, of requests that failed or were left too."""
        account = self._core.account
        now = (account.prompt_tokens, account.tokens - account.prompt_tokens, account.pico, account.requests)
        prompt, completion, pico, calls = (new - old for new, old in zip(now, self._told, strict=True))
        self._told = now
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)
        self._spent_usd.inc(pico / PICO)
        self._calls.inc(calls)
        failed = self._core.source.failed_attempts() if isinstance(self._core.source, OpenAISource) else {}
        for reason, count in failed.items():
            self._attempts.labels(reason).inc(count - self._told_failed.get(reason, 0))
        self._told_failed = failed
        self._inside.set(self._gate.busy)
        self._coming.set(self._core.draws_in_flight())

    def observe(self, served: Served) -> None:
        """Count a request that is over."""
        policy = family(served.policy) if served.policy else "unknown"
        model = served.model if served.model in self._models else OTHER
        self._requests.labels(served.path, policy, model, str(served.status)).inc()
        self._seconds.labels(served.path, policy).observe(served.seconds)
        if served.confidence is not None:
            self._confidence.observe(served.confidence)
        self._draws.inc(served.draws)
        self._bought.inc(served.draws_bought)
        self._saved.inc(served.saved)
        self._failed.inc(served.failed)
        if served.upstream_failed:
            self._refused.labels(str(served.status)).inc()
        if self._several:
            self._refresh()

    async def __call__(self, request: Request) -> Response:
        """The endpoint: open to this machine; others need a key if there are any, unless ``open_metrics`` is set."""
        if not (self._core.config.serve.open_metrics or _local(request)):
            try:
                self._core.keyring.identify(request.headers.get("authorization", ""))
            except ApiError as error:
                return Response(error.body, error.status, error.headers, "application/json")
        self._refresh()
        return Response(await asyncio.to_thread(self._shown), media_type=CONTENT_TYPE_LATEST)

    def _shown(self) -> bytes:
        if not self._several:
            return generate_latest(self.registry)
        everyone = CollectorRegistry()
        MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
        return generate_latest(everyone)


def _counter(registry: CollectorRegistry, name: str, text: str) -> Counter:
    return Counter(f"consilience_{name}", text, registry=registry)


def _gauge(registry: CollectorRegistry, name: str, text: str) -> Gauge:
    return Gauge(f"consilience_{name}", text, registry=registry, multiprocess_mode="livesum")


def _local(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
