"""Prometheus metrics: TGI's names, vLLM's where routers scrape them, and our own for KV blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..core.messages import Stats

BACKEND_METRIC = "chipset_backend"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DURATIONS = tuple(0.00015 * 1.5**power for power in range(35))
LENGTHS = tuple(float(2**power) for power in range(21))


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestTimes:
    """One generation that came to its end. Moments are of time.monotonic, in seconds."""

    received: float
    validated: float
    first_token: float
    ended: float
    num_prompt: int
    num_generated: int
    max_new_tokens: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsRow:
    """One figure of Stats under one name."""

    name: str
    help: str
    value: Callable[[Stats], float]
    kind: str = "gauge"


def _kv_use(stats: Stats) -> float:
    return 1 - stats.blocks_free / stats.blocks_total if stats.blocks_total else 0.0


STATS: tuple[StatsRow, ...] = (
    StatsRow(
        name="tgi_batch_current_size", help="Requests in the batch", value=lambda s: s.running
    ),
    StatsRow(name="tgi_queue_size", help="Requests waiting", value=lambda s: s.waiting),
    StatsRow(name="vllm:num_requests_running", help="As TGI's", value=lambda s: s.running),
    StatsRow(name="vllm:num_requests_waiting", help="As TGI's", value=lambda s: s.waiting),
    StatsRow(name="vllm:kv_cache_usage_perc", help="Share of KV blocks in use", value=_kv_use),
    StatsRow(
        name="vllm:prompt_tokens",
        help="Prompt tokens computed",
        value=lambda s: s.prompt_tokens,
        kind="counter",
    ),
    StatsRow(
        name="vllm:generation_tokens",
        help="Tokens drawn",
        value=lambda s: s.generated_tokens,
        kind="counter",
    ),
    StatsRow(
        name="vllm:num_preemptions",
        help="Requests put back",
        value=lambda s: s.preemptions,
        kind="counter",
    ),
    StatsRow(
        name="vllm:prefix_cache_queries",
        help="Prompt tokens looked up in the prefix cache",
        value=lambda s: s.prefix_queries,
        kind="counter",
    ),
    StatsRow(
        name="vllm:prefix_cache_hits",
        help="Prompt tokens found there",
        value=lambda s: s.prefix_hits,
        kind="counter",
    ),
    StatsRow(name="chipset_kv_blocks", help="KV blocks", value=lambda s: s.blocks_total),
    StatsRow(
        name="chipset_kv_blocks_free", help="Free or only cached", value=lambda s: s.blocks_free
    ),
    StatsRow(
        name="chipset_kv_blocks_held",
        help="Held by running requests",
        value=lambda s: s.blocks_held,
    ),
    StatsRow(name="chipset_steps", help="Steps run", value=lambda s: s.steps, kind="counter"),
    StatsRow(
        name="chipset_cancelled",
        help="Requests whose client left",
        value=lambda s: s.cancelled,
        kind="counter",
    ),
    StatsRow(
        name="chipset_failed_steps",
        help="Steps that raised and were repeated in halves",
        value=lambda s: s.failed_steps,
        kind="counter",
    ),
)


class _StatsCollector:
    """The engine's last figures, read when somebody scrapes."""

    def __init__(self, stats: Callable[[], Stats | None], model: Callable[[], str]) -> None:
        self._stats = stats
        self._model = model

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        for row in STATS:
            # routers that know vLLM select by this label
            labels = {"model_name": self._model()} if row.name.startswith("vllm:") else {}
            family = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
            metric = family(row.name, row.help, labels=list(labels))
            metric.add_metric(list(labels.values()), row.value(stats))
            yield metric
        own = GaugeMetricFamily(BACKEND_METRIC, "What the backend counts itself", labels=["name"])
        for name, value in sorted(stats.backend.items()):
            own.add_metric([name], value)
        yield own


class _Tally:
    """Counters under exactly TGI's names, to which the client library would add a suffix."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str | None], int] = {
            ("tgi_request_count", None): 0,
            ("tgi_request_success", None): 0,
        }
        self._help = {
            "tgi_request_count": "Requests received",
            "tgi_request_success": "Generations that came to their end",
            "tgi_request_failure": "Requests that failed, by cause",
        }

    def add(self, name: str, cause: str | None = None) -> None:
        self.counts[name, cause] = self.counts.get((name, cause), 0) + 1

    def collect(self) -> Iterator[Metric]:
        for name, text in self._help.items():
            metric = Metric(name, text, "unknown")
            for (own, cause), count in self.counts.items():
                if own == name:
                    metric.add_sample(name, {} if cause is None else {"err": cause}, count)
            yield metric


class Metrics:
    """Of one server. `stats` and `model` are asked at each scrape."""

    def __init__(self, stats: Callable[[], Stats | None], model: Callable[[], str]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._tally = _Tally()
        self._registry.register(self._tally)
        self._registry.register(_StatsCollector(stats, model))
        self._restarts = Counter(
            "chipset_engine_restarts", "Engines that ended unasked", registry=self._registry
        )
        self._duration = self._histogram("tgi_request_duration", "Of a request", DURATIONS)
        self._validation = self._histogram(
            "tgi_request_validation_duration", "Checking and tokenizing", DURATIONS
        )
        self._inference = self._histogram(
            "tgi_request_inference_duration", "In the engine, waiting included", DURATIONS
        )
        self._per_token = self._histogram(
            "tgi_request_mean_time_per_token_duration", "After the first token", DURATIONS
        )
        self._input = self._histogram("tgi_request_input_length", "Prompt tokens", LENGTHS)
        self._generated = self._histogram("tgi_request_generated_tokens", "Tokens drawn", LENGTHS)
        self._max_new = self._histogram("tgi_request_max_new_tokens", "Tokens asked for", LENGTHS)
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "From receipt to the first token", DURATIONS
        )
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Of a request", DURATIONS)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, text, buckets=tuple(buckets), registry=self._registry)

    def restarted(self) -> None:
        """An engine ended unasked, and is started anew."""
        self._restarts.inc()

    def received(self) -> None:
        """A request for text came in."""
        self._tally.add("tgi_request_count")

    def failed(self, cause: str) -> None:
        """A request was answered with an error, or its client left ("dropped")."""
        self._tally.add("tgi_request_failure", cause)

    def finished(self, times: RequestTimes) -> None:
        """A generation came to its end."""
        self._tally.add("tgi_request_success")
        whole = times.ended - times.received
        self._duration.observe(whole)
        self._whole.observe(whole)
        self._validation.observe(times.validated - times.received)
        self._inference.observe(times.ended - times.validated)
        self._first.observe(times.first_token - times.received)
        if times.num_generated > 1:
            self._per_token.observe((times.ended - times.first_token) / (times.num_generated - 1))
        self._input.observe(times.num_prompt)
        self._generated.observe(times.num_generated)
        if times.max_new_tokens is not None:
            self._max_new.observe(times.max_new_tokens)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
