"""What Prometheus reads. The names end as vLLM's do where they mean the same."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from rondo_serve.api.calls import Engine
from rondo_serve.requests import Finished, Load, Receipt

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

GAUGES = {
    "num_requests_running": ("Requests in flight.", "running"),
    "num_requests_waiting": ("Requests in the queue.", "waiting"),
    "kv_cache_pages": ("Pages of keys and values that are held.", "pages"),
    "kv_cache_prefix_pages": ("Those held by cached prefixes only.", "cached_pages"),
    "kv_cache_total_pages": ("Pages that there are.", "total_pages"),
}
COUNTERS = {
    "ticks": ("Ticks of the engine.", "ticks"),
    "core_tokens": ("Tokens times iterations that the core took.", "core_tokens"),
}


class LoadCollector(Collector):
    """Reads how busy an engine is whenever metrics are asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's gauges and counters."""
        load: Load = self._engine.load()
        for name, (told, field) in GAUGES.items():
            yield GaugeMetricFamily(f"rondo_{name}", told, value=getattr(load, field))
        used = load.pages / load.total_pages if load.total_pages else 0.0
        told = "Share of the pages that is held, 1 is all."
        yield GaugeMetricFamily("rondo_kv_cache_usage_perc", told, value=used)
        for name, (told, field) in COUNTERS.items():
            yield CounterMetricFamily(f"rondo_{name}", told, value=getattr(load, field))


class Metrics:
    """The metrics of one server; `depth` is the depth that a request was given.

    Args:
        engine: Whose load is told.
        cap: Deepest depth there is.
    """

    def __init__(self, engine: Engine, cap: int):
        self.registry = CollectorRegistry()
        self.registry.register(LoadCollector(engine))
        depths = tuple(float(depth) for depth in (*(d for d in DEPTHS if d < cap), cap))
        self._recurrences = self._histogram(
            "token_recurrences", "Iterations of a generated token.", depths
        )
        self._queued = self._histogram(
            "request_queue_time_seconds", "Seconds before the engine took a request up.", SECONDS
        )
        self._first = self._histogram(
            "time_to_first_token_seconds", "Seconds from asking to the first token.", SECONDS
        )
        self._each = self._histogram(
            "time_per_output_token_seconds", "Seconds from a token to the next.", PER_TOKEN
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "Seconds from asking to the end.", SECONDS
        )
        self._outcomes = self._counter("requests", "Answers by how they ended.", "outcome")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.", "depth")
        self._cached = self._counter(
            "cached_tokens", "Tokens of prompts whose keys and values were there.", "depth"
        )
        self._new = self._counter("generation_tokens", "Tokens generated.", "depth")
        self._flops = self._counter("executed_flops", "FLOPs executed.", "depth")

    def _histogram(self, name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"rondo_{name}", told, ["depth"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, told: str, label: str) -> Counter:
        return Counter(f"rondo_{name}", told, [label], registry=self.registry)

    def refused(self, outcome: str) -> None:
        """Count a request that was not taken."""
        self._outcomes.labels(outcome).inc()

    def finished(self, end: Finished) -> None:
        """Count an answer."""
        receipt: Receipt = end.receipt
        depth = str(receipt.allowed)
        self._outcomes.labels(end.reason).inc()
        for iterations, count in receipt.depths.items():
            observe = self._recurrences.labels(depth).observe
            for _ in range(count):
                observe(iterations)
        self._queued.labels(depth).observe(receipt.queued)
        self._whole.labels(depth).observe(receipt.seconds)
        if receipt.first_token is not None:
            first = receipt.queued + receipt.first_token
            self._first.labels(depth).observe(first)
            if receipt.new_tokens > 1:
                each = (receipt.seconds - first) / (receipt.new_tokens - 1)
                self._each.labels(depth).observe(max(0.0, each))
        self._prompt.labels(depth).inc(receipt.prompt_tokens)
        self._cached.labels(depth).inc(receipt.cached_tokens)
        self._new.labels(depth).inc(receipt.new_tokens)
        self._flops.labels(depth).inc(receipt.flops)

    def text(self) -> bytes:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self.registry)
