"""``/metrics`` for Prometheus: what was asked, what it took, what it saved.

Every label has few values: a policy goes by the name of its stopping rule, a model by its own only if it has a price.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from consilience import methods
from consilience.serve.core import Core
from consilience.serve.errors import ApiError
from consilience.serve.gate import Gate
from consilience.serve.observe import Served
from consilience.serve.policies import NONE
from consilience.text.budget import PICO

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)
CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
OTHER = "other"


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
        self._gauges(gate)
        registry.register(_Spent(core))

    def _gauges(self, gate: Gate) -> None:
        inside = Gauge("consilience_requests_in_flight", "Requests being answered now", registry=self.registry)
        inside.set_function(lambda: gate.busy)
        room = Gauge("consilience_requests_most", "Requests that may be answered at once", registry=self.registry)
        room.set(gate.room)
        coming = Gauge("consilience_draws_in_flight", "Draws asked for and not yet there", registry=self.registry)
        coming.set_function(self._core.draws_in_flight)

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

    async def __call__(self, request: Request) -> Response:
        """The endpoint: open to this machine; others need a key if there are any, unless ``open_metrics`` is set."""
        if not (self._core.config.serve.open_metrics or _local(request)):
            try:
                self._core.keyring.identify(request.headers.get("authorization", ""))
            except ApiError as error:
                return Response(error.body, error.status, error.headers, "application/json")
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


def _counter(registry: CollectorRegistry, name: str, text: str) -> Counter:
    return Counter(f"consilience_{name}", text, registry=registry)


def _local(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


class _Spent(Collector):
    """What the server's account has settled, of requests that failed or were left too."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def collect(self) -> Iterator[Metric]:
        """Read the account."""
        account = self._core.account
        tokens = CounterMetricFamily("consilience_tokens", "Tokens paid for", labels=("type",))
        tokens.add_metric(("prompt",), account.prompt_tokens)
        tokens.add_metric(("completion",), account.tokens - account.prompt_tokens)
        yield tokens
        yield CounterMetricFamily(
            "consilience_spent_usd", "USD spent, at the prices that are configured", account.pico / PICO
        )
        yield CounterMetricFamily(
            "consilience_upstream_calls", "Calls to the upstream that have ended, each try of its own", account.requests
        )
