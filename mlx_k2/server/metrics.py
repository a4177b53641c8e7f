"""Metrics for Prometheus: vLLM's names with our prefix. Knows no text and no client beyond counts and times."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import Event, Finished, Token
from mlx_k2.coordinator.pipeline import StageUse
from mlx_k2.scheduling.drafts import DraftSource
from mlx_k2.server.cluster_activity import ClusterActivity
from mlx_k2.server.request_record import RequestRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LONG_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 900, 1800)
_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.4, 1, 5, 30)
_TOKENS = (10, 100, 1000, 4000, 16000, 64000, 128000, 262144)


class Metrics:
    """The metrics of one server. ``records`` has the requests that wait or run; ``stage_totals`` is read each time."""

    def __init__(
        self,
        records: Mapping[str, RequestRecord],
        activity: ClusterActivity,
        stage_totals: Callable[[], tuple[StageUse, ...]],
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_CurrentValues(records, activity, stage_totals))
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens of finished requests.")
        self._cache_queries = self._counter("prefix_cache_queries", "Prompt tokens that were looked up in the cache.")
        self._cached = self._counter("prefix_cache_hits", "Prompt tokens that were cached.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Draft tokens.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Draft tokens that were accepted.")
        self._drafted_by, self._accepted_by = (
            Counter(f"mlx_k2_{name}", text, ["source", "position"], registry=self._registry)
            for name, text in (
                ("draft_tokens", "Draft tokens by source and position after the last known token."),
                ("accepted_draft_tokens", "Accepted draft tokens by source and position."),
            )
        )
        for drafter in DraftSource:
            self._drafted_by.labels(drafter.value, 1)
            self._accepted_by.labels(drafter.value, 1)
        self._ended = Counter(
            "mlx_k2_request_success", "Finished requests.", ["finished_reason"], registry=self._registry
        )
        self._first_token = self._histogram("time_to_first_token_seconds", "Seconds to the first token.", _LONG_S)
        self._queued = self._histogram("request_queue_time_seconds", "Seconds in the queue.", _LONG_S)
        self._prefill = self._histogram("request_prefill_time_seconds", "Seconds of the prompt's computation.", _LONG_S)
        self._between = self._histogram("inter_token_latency_seconds", "Seconds between two tokens.", _TOKEN_S)
        self._whole = self._histogram("e2e_request_latency_seconds", "Seconds of a whole request.", _LONG_S)
        self._decode = self._histogram("request_decode_time_seconds", "Seconds from first to last token.", _LONG_S)
        self._prompt_sizes = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._answer_sizes = self._histogram("request_generation_tokens", "Generated tokens of a request.", _TOKENS)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def add(self, record: RequestRecord, event: Event) -> None:
        """Count an event, before ``record`` has it."""
        if isinstance(event, Token):
            if record.last_token is None:
                started = event.arrived_at if record.started is None else record.started
                self._first_token.observe(event.arrived_at - record.began)
                self._queued.observe(started - record.began)
                self._prefill.observe(event.arrived_at - started)
            else:
                self._between.observe(event.arrived_at - record.last_token)
        elif isinstance(event, Finished):
            self._finish(record, event.summary)

    def _finish(self, record: RequestRecord, summary: AnswerSummary) -> None:
        self._prompt_tokens.inc(summary.prompt_tokens)
        self._generation_tokens.inc(summary.generated_tokens)
        self._cache_queries.inc(summary.prompt_tokens)
        self._cached.inc(summary.cached_tokens)
        self._drafted.inc(summary.drafted)
        self._accepted.inc(summary.accepted)
        for count in summary.drafts:
            self._drafted_by.labels(count.source.value, count.position).inc(count.num_drafted)
            self._accepted_by.labels(count.source.value, count.position).inc(count.num_accepted)
        self._ended.labels(summary.finish_reason.value).inc()
        self._prompt_sizes.observe(summary.prompt_tokens)
        self._answer_sizes.observe(summary.generated_tokens)
        if record.first_token is not None and record.last_token is not None:
            self._whole.observe(record.last_token - record.began)
            self._decode.observe(record.last_token - record.first_token)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"mlx_k2_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(f"mlx_k2_{name}", text, buckets=tuple(buckets), registry=self._registry)


@dataclass(eq=False)
class _CurrentValues(Collector):
    """Values that exist already and are read when they are asked for."""

    records: Mapping[str, RequestRecord]
    activity: ClusterActivity
    stage_totals: Callable[[], tuple[StageUse, ...]]

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        phases = [record.phase for record in self.records.values()]
        waiting = phases.count("queued")
        yield GaugeMetricFamily("mlx_k2_num_requests_waiting", "Requests that wait.", waiting)
        yield GaugeMetricFamily("mlx_k2_num_requests_running", "Requests that run.", len(phases) - waiting)
        activity = self.activity
        yield CounterMetricFamily("mlx_k2_restarts", "Restarts of all stages that succeeded.", activity.num_restarts)
        yield CounterMetricFamily("mlx_k2_faults", "Faults of the stages.", activity.faults.total())
        names = ("busy", "receive", "send")
        seconds = {
            name: CounterMetricFamily(f"mlx_k2_stage_{name}_seconds", f"Seconds: {name}.", labels=["stage"])
            for name in names
        }
        held = GaugeMetricFamily("mlx_k2_stage_held_bytes", "Bytes of a stage's shard in memory.", labels=["stage"])
        faults = CounterMetricFamily("mlx_k2_stage_faults", "Faults that a stage caused.", labels=["stage"])
        for rank in range(len(activity.plans)):
            held.add_metric([str(rank)], activity.loaded_bytes[rank])
            faults.add_metric([str(rank)], activity.faults[rank])
        peak = GaugeMetricFamily("mlx_k2_stage_peak_bytes", "Peak memory of a stage.", labels=["stage"])
        tokens = CounterMetricFamily("mlx_k2_stage_tokens", "Tokens that a stage has computed.", labels=["stage"])
        for rank, use in enumerate(self.stage_totals()):
            label = [str(rank)]
            for name, value in zip(names, (use.busy_s, use.receive_s, use.send_s), strict=True):
                seconds[name].add_metric(label, value)
            peak.add_metric(label, use.peak_bytes)
            tokens.add_metric(label, use.num_tokens)
        yield from (held, faults, *seconds.values(), peak, tokens)
