"""Metrics for Prometheus: the prefix mlx_k2, and vLLM's name if vLLM has the metric. Knows no text and no client."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
_REQUEST_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 900, 1800)
_GAP_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.4, 1, 5, 30)
_SIZE_BUCKETS = (10, 100, 1000, 4000, 16000, 64000, 128000, 262144)


class Metrics:
    """The metrics of one server. ``records`` are its open requests; ``stage_totals`` returns the use of each stage."""

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
        labels = ("source", "position")
        self._drafted_by = self._counter(
            "draft_tokens", "Draft tokens by source and position after the last known token.", labels
        )
        self._accepted_by = self._counter(
            "accepted_draft_tokens", "Accepted draft tokens by source and position.", labels
        )
        for source in DraftSource:  # so that both counters exist, as 0, before the first draft
            self._drafted_by.labels(source.value, 1)
            self._accepted_by.labels(source.value, 1)
        self._finished = self._counter("request_success", "Finished requests.", ("finished_reason",))
        self._first_token = self._histogram("time_to_first_token_seconds", "Seconds to the first token.")
        self._queue_time = self._histogram("request_queue_time_seconds", "Seconds in the queue.")
        self._prefill_time = self._histogram("request_prefill_time_seconds", "Seconds of the prompt's computation.")
        self._token_gap = self._histogram("inter_token_latency_seconds", "Seconds between two tokens.", _GAP_BUCKETS_S)
        self._request_time = self._histogram("e2e_request_latency_seconds", "Seconds of a whole request.")
        self._decode_time = self._histogram("request_decode_time_seconds", "Seconds from first to last token.")
        self._prompt_size = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _SIZE_BUCKETS)
        self._reply_size = self._histogram("request_generation_tokens", "Generated tokens of a request.", _SIZE_BUCKETS)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def add(self, record: RequestRecord, event: Event) -> None:
        """Count an event of a request. Call this before the event is added to ``record``."""
        if isinstance(event, Token):
            if record.last_token_at is None:
                prefill_started_at = record.prefill_started_at or event.arrived_at
                self._first_token.observe(event.arrived_at - record.created_at)
                self._queue_time.observe(prefill_started_at - record.created_at)
                self._prefill_time.observe(event.arrived_at - prefill_started_at)
            else:
                self._token_gap.observe(event.arrived_at - record.last_token_at)
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
        self._finished.labels(summary.finish_reason.value).inc()
        self._prompt_size.observe(summary.prompt_tokens)
        self._reply_size.observe(summary.generated_tokens)
        if record.first_token_at is not None and record.last_token_at is not None:
            self._request_time.observe(record.last_token_at - record.created_at)
            self._decode_time.observe(record.last_token_at - record.first_token_at)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"mlx_k2_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _REQUEST_BUCKETS_S) -> Histogram:
        return Histogram(f"mlx_k2_{name}", text, buckets=buckets, registry=self._registry)


@dataclass(eq=False)
class _CurrentValues(Collector):
    """A collector of values that other objects hold. It reads them at each call of ``Metrics.text``."""

    records: Mapping[str, RequestRecord]
    activity: ClusterActivity
    stage_totals: Callable[[], tuple[StageUse, ...]]

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics with their current values."""
        phases = [record.phase for record in self.records.values()]
        num_waiting = phases.count("queued")
        yield GaugeMetricFamily("mlx_k2_num_requests_waiting", "Requests that wait.", num_waiting)
        yield GaugeMetricFamily("mlx_k2_num_requests_running", "Requests that run.", len(phases) - num_waiting)
        activity = self.activity
        yield CounterMetricFamily("mlx_k2_restarts", "Restarts of all stages that succeeded.", activity.num_restarts)
        yield CounterMetricFamily("mlx_k2_faults", "Faults of the stages.", activity.faults.total())
        names = ("busy", "receive", "send")
        seconds = {
            name: CounterMetricFamily(f"mlx_k2_stage_{name}_seconds", f"Seconds: {name}.", labels=["stage"])
            for name in names
        }
        loaded = GaugeMetricFamily("mlx_k2_stage_held_bytes", "Bytes of a stage's shard in memory.", labels=["stage"])
        faults = CounterMetricFamily("mlx_k2_stage_faults", "Faults that a stage caused.", labels=["stage"])
        for rank in range(len(activity.plans)):
            loaded.add_metric([str(rank)], activity.loaded_bytes[rank])
            faults.add_metric([str(rank)], activity.faults[rank])
        peak_bytes = GaugeMetricFamily("mlx_k2_stage_peak_bytes", "Peak memory of a stage.", labels=["stage"])
        tokens = CounterMetricFamily("mlx_k2_stage_tokens", "Tokens that a stage has computed.", labels=["stage"])
        for rank, use in enumerate(self.stage_totals()):
            label = [str(rank)]
            for name, value in zip(names, (use.busy_s, use.receive_s, use.send_s), strict=True):
                seconds[name].add_metric(label, value)
            peak_bytes.add_metric(label, use.peak_bytes)
            tokens.add_metric(label, use.num_tokens)
        yield from (loaded, faults, *seconds.values(), peak_bytes, tokens)
