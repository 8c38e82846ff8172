"""Prometheus metrics of the server: few and standard."""

from __future__ import annotations

import itertools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from sparse_bitnet.serve.engine import Engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "sparse_bitnet_requests", "Requests taken on", ["route"], registry=registry
        )
        self._tokens = Counter("sparse_bitnet_tokens", "Tokens generated", registry=registry)
        self._first = Histogram(
            "sparse_bitnet_time_to_first_token_seconds",
            "From a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self._later = Histogram(
            "sparse_bitnet_time_per_token_seconds",
            "Between two tokens of an answer",
            buckets=SECONDS,
            registry=registry,
        )
        for name, text, read in (
            ("running", "Sequences that are computed or wait", lambda: len(engine.generations)),
            (
                "cache_use",
                "Tokens of all sequences by the tokens of the cache",
                lambda: engine.tokens_in_use / engine.cache_tokens,
            ),
        ):
            Gauge(f"sparse_bitnet_{name}", text, registry=registry).set_function(read)

    def tokens(self, times: list[float], are_first: bool) -> None:
        """Count an answer's tokens that were made at ``times[1:]``.

        The first time is that of the token before, or of the request if they are the first.
        """
        self._tokens.inc(len(times) - 1)
        for before, now in itertools.pairwise(times):
            (self._first if are_first else self._later).observe(now - before)
            are_first = False

    def text(self) -> tuple[bytes, str]:
        """All of them as Prometheus reads them, and the media type of that."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
