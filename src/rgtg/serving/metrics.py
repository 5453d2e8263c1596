"""Prometheus metrics, named as vLLM names them, with what guidance adds."""

import time
from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from rgtg.serving.engine.engine import Snapshot
from rgtg.serving.engine.request import Event, Failed, Finished, Step

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_NATS = (0, 0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)


class Metrics:
    """Everything ``/metrics`` shows; one per app, so that several in a process do not mix."""

    def __init__(self, snapshot: Callable[[], Snapshot | None]) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.prompt_tokens = counter("rgtg:prompt_tokens", "Prompt tokens taken in.")
        self.generation_tokens = counter("rgtg:generation_tokens", "Tokens made.")
        self.first_token = histogram(
            "rgtg:time_to_first_token_seconds", "From arrival to a row's first token.", buckets=_SECONDS
        )
        self.between_tokens = histogram(
            "rgtg:inter_token_latency_seconds", "Between a row's tokens.", buckets=_PER_TOKEN
        )
        self.latency = histogram("rgtg:e2e_request_latency_seconds", "From arrival to a row's end.", buckets=_SECONDS)
        self.success = counter(
            "rgtg:request_success", "Rows that ended, by why: stop, length, abort.", ["finished_reason"]
        )
        self.kl = histogram("rgtg:guidance_kl_nats", "Guided - policy log-probability of a row.", buckets=_NATS)
        self.rejected = counter("rgtg:rejected", "Requests that were refused, by the error's code.", ["reason"])
        self.fallback = counter("rgtg:fallback", "Rows with tokens left to the policy, for a scorer's NaN.")
        self.scored_nan = 0  # texts of /v1/score
        self.registry.register(_Engine(self, snapshot))

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)

    def clock(self) -> "Clock":
        """A clock for a request that comes now."""
        return Clock(self)


class Clock:
    """Times of one request's rows."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.start = metrics, time.monotonic()
        self._last: dict[int, float] = {}

    def hear(self, row: int, event: Event) -> None:
        """Count an event, as it arrives."""
        now = time.monotonic()
        match event:
            case Step():
                if row in self._last:
                    self.metrics.between_tokens.observe(now - self._last[row])
                else:
                    self.metrics.first_token.observe(now - self.start)
                self._last[row] = now
            case Finished():
                self._finished(row, event, now)
            case Failed():
                self.metrics.success.labels("abort").inc()

    def _finished(self, row: int, event: Finished, now: float) -> None:
        made = event.completion
        if row not in self._last:  # chosen among several, and told at the end
            self.metrics.first_token.observe(now - self.start)
        self.metrics.latency.observe(now - self.start)
        self.metrics.success.labels(made.finish_reason).inc()
        self.metrics.generation_tokens.inc(len(made.token_ids))
        self.metrics.kl.observe(made.guided_log_prob - made.policy_log_prob + made.selection_nats)
        if event.fallback:
            self.metrics.fallback.inc()


class _Engine:
    """What the engine knows, read when it is asked for."""

    def __init__(self, metrics: Metrics, snapshot: Callable[[], Snapshot | None]) -> None:
        self.metrics, self.snapshot = metrics, snapshot

    def describe(self) -> Iterator[Metric]:
        """No names before there is an engine."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Gauges of now, and counters since the start; none while models are loaded."""
        if (now := self.snapshot()) is None:
            return
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Completions being decoded.", now.running),
            "num_requests_waiting": ("Completions in the queue.", now.waiting),
            "kv_cache_bytes": ("Keys and values of what runs.", now.cache_bytes),
            "prefix_cache_bytes": ("Texts kept for requests that begin alike.", now.prefix_bytes),
        }
        counters: dict[str, tuple[str, float]] = {
            "prefix_cache_queries": ("Prompt tokens that were looked up.", now.prompt_tokens),
            "prefix_cache_hits": ("Of those, how many were found.", now.cached_tokens),
            "nan": ("Rows that failed, and tokens left to the policy, for NaN.", now.nan + self.metrics.scored_nan),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"rgtg:{name}", text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"rgtg:{name}", text, value=value)
        seconds = CounterMetricFamily("rgtg:scorer_seconds", "Spent by each scorer on candidates.", labels=["scorer"])
        for scorer, spent in now.scorer_seconds.items():
            seconds.add_metric([scorer], spent)
        yield seconds
