"""Prometheus metrics with vLLM's names, plus metrics of guidance."""

from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from rgtg.serving.engine.engine import Snapshot

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_SECONDS_PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_NATS = (0, 0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)


class Metrics:
    """The metrics of one app, with a registry of their own, so that several apps in a process do not mix."""

    def __init__(self, snapshot: Callable[[], Snapshot | None]) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.prompt_tokens = counter("rgtg:prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation_tokens = counter("rgtg:generation_tokens", "Generated tokens.")
        self.first_token = histogram(
            "rgtg:time_to_first_token_seconds", "From arrival to a row's first token.", buckets=_SECONDS
        )
        self.between_tokens = histogram(
            "rgtg:inter_token_latency_seconds", "Between two tokens of a row.", buckets=_SECONDS_PER_TOKEN
        )
        self.latency = histogram("rgtg:e2e_request_latency_seconds", "From arrival to a row's end.", buckets=_SECONDS)
        self.success = counter(
            "rgtg:request_success", "Rows that ended, by reason: stop, length, abort.", ["finished_reason"]
        )
        self.kl = histogram("rgtg:guidance_kl_nats", "Guided - policy log-probability of a row.", buckets=_NATS)
        self.rejected = counter("rgtg:rejected", "Requests that got an error, by its code.", ["reason"])
        self.fallback = counter("rgtg:fallback", "Rows with unguided tokens because a scorer returned NaN.")
        self.scores_nan = 0  # requests to /v1/score that got NaN; part of rgtg:nan
        self.registry.register(_EngineCollector(self, snapshot))

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector:
    """Metrics that are read from the engine when they are collected."""

    def __init__(self, metrics: Metrics, snapshot: Callable[[], Snapshot | None]) -> None:
        self.metrics, self.snapshot = metrics, snapshot

    def describe(self) -> Iterator[Metric]:
        """No names, so that registering does not call ``collect``."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Current gauges and counters since the start; nothing while the models are loading."""
        if (now := self.snapshot()) is None:
            return
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Completions being decoded.", now.running),
            "num_requests_waiting": ("Completions in the queue.", now.waiting),
            "kv_cache_bytes": ("Key-value cache of running completions.", now.cache_bytes),
            "prefix_cache_bytes": ("Prefixes kept for later requests.", now.prefix_bytes),
        }
        counters: dict[str, tuple[str, float]] = {
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", now.prompt_tokens),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", now.cached_tokens),
            "nan": ("Rows that failed and tokens drawn unguided because of NaN.", now.nan + self.metrics.scores_nan),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"rgtg:{name}", text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"rgtg:{name}", text, value=value)
        seconds = CounterMetricFamily("rgtg:scorer_seconds", "Time each scorer spent on candidates.", labels=["scorer"])
        for scorer, spent in now.scorer_seconds.items():
            seconds.add_metric([scorer], spent)
        yield seconds
