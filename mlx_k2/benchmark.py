"""Benchmark of a deployment by prompt length, number of streams and tokens per stream. Knows no terminal."""

import math
import random
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_k2.coordinator.draft_times import DraftTimer, DraftTimes
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.coordinator.handle import Finished, Handle, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.pipeline import StageUse
from mlx_k2.deployment.deploy import Deployment
from mlx_k2.deployment.plan import DTYPE_BYTES
from mlx_k2.deployment.stage_report import StageReport
from mlx_k2.errors import RequestError
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.drafts import DraftCount, DraftTotals, merge_counts
from mlx_k2.scheduling.request import Request

WARM_UP_TOKENS = 8
_REPORTS_S = 5.0


@dataclass(frozen=True)
class Workload:
    """``streams`` concurrent sequences, each with ``prompt_tokens`` and then ``generate_tokens`` generated tokens."""

    prompt_tokens: int
    generate_tokens: int
    streams: int


@dataclass(frozen=True)
class StageTimes:
    """Times and bytes of one stage during a run. ``waiting_s`` is the rest of the time, when it had no plan."""

    compute_s: float
    receive_s: float
    send_s: float
    waiting_s: float
    hop_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Measured(DraftTotals):
    """Result of one run of a workload. Rates are totals over all streams; inter-token times are within a stream."""

    workload: Workload
    repeat: int
    time_to_first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    inter_token_p50_s: float | None
    inter_token_p95_s: float | None
    drafts: tuple[DraftCount, ...]
    wall_s: float
    stages: tuple[StageTimes, ...] = ()
    draft_times: DraftTimes | None = None
    """Times of steps with a draft head; None without right and wrong drafts."""

    @property
    def decode_tokens_per_s_per_stream(self) -> float | None:
        """Average rate of one stream."""
        return None if self.decode_tokens_per_s is None else self.decode_tokens_per_s / self.workload.streams

    @property
    def stage_busy(self) -> list[float]:
        """Fraction of the wall time that each stage computed."""
        return [stage.compute_s / self.wall_s for stage in self.stages]


@dataclass
class _Stream:
    """Arrival times of one stream's tokens, and its counts of drafts."""

    arrivals: list[float] = field(default_factory=list)
    drafts: tuple[DraftCount, ...] = ()


class ServerBenchmark:
    """Benchmark that submits requests by ``submit``, for instance to a server. Its results have no stage times."""

    def __init__(self, submit: Callable[[Request], Handle], vocab_size: int) -> None:
        self._submit = submit
        self._vocab_size = vocab_size
        self._seed = secrets.randbits(60)  # the server may still hold the prompts of an earlier benchmark

    def warm_up(self, workload: Workload) -> None:
        """Run ``workload`` with WARM_UP_TOKENS tokens, so that kernels are compiled and speeds are known."""
        self._run(Workload(workload.prompt_tokens, WARM_UP_TOKENS, workload.streams))

    def measure(self, workload: Workload, repeat: int = 0) -> Measured:
        """Run ``workload`` once, on prompts that are not cached. Stop tokens do not end a stream."""
        began = time.perf_counter()
        streams = self._run(workload)
        return _measured(workload, repeat, began, time.perf_counter() - began, streams)

    def _run(self, workload: Workload) -> list[_Stream]:
        first = self._seed + 1
        self._seed += workload.streams
        requests = [_random_request(workload, self._vocab_size, seed) for seed in range(first, self._seed + 1)]
        return [_read(handle) for handle in self._submit_all(requests)]

    def _submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        return [self._submit(request) for request in requests]


class Benchmark(ServerBenchmark):
    """Benchmark on ready stages, a context manager. A stage that fails ends it.

    ``on_report`` receives every finished step of a stage, except during warm-up.
    """

    def __init__(
        self, deployment: Deployment, *, draft_mode: DraftMode, on_report: Callable[[StageReport], None] | None = None
    ) -> None:
        self._deployment = deployment
        self._on_report = on_report
        self._is_warm = False
        self._timer = DraftTimer(deployment.group.size)
        self._engine = engine_on(deployment, draft_mode=draft_mode, prompts_first=True, on_report=self._report)
        super().__init__(self._engine.submit, deployment.model.config.vocab_size)
        self._seed = 0

    def __enter__(self) -> "Benchmark":
        self._engine.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._engine.__exit__(*error)

    def warm_up(self, workload: Workload) -> None:
        """Run ``workload`` without reports, as in the base class."""
        self._is_warm = False
        super().warm_up(workload)
        self._is_warm = True

    def measure(self, workload: Workload, repeat: int = 0) -> Measured:
        """Run ``workload`` once, as in the base class, and measure the stages and the draft head, too."""
        before = [replace(use) for use in self._engine.use]
        self._timer = DraftTimer(len(before))
        measured = super().measure(workload, repeat)
        runs = self._engine.use[-1].draft_runs - before[-1].draft_runs
        head_s = (self._engine.use[-1].draft_s - before[-1].draft_s) / max(1, runs)
        times = self._timer.times(head_s) if runs else None
        return replace(measured, draft_times=times, stages=self._stage_times(before, measured.wall_s))

    def _run(self, workload: Workload) -> list[_Stream]:
        streams = super()._run(workload)
        deadline = time.monotonic() + _REPORTS_S  # the last stage's last report may arrive before those of the others
        while len({use.steps_done for use in self._engine.use}) > 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        return streams

    def _submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        return self._engine.submit_all([Submission(request) for request in requests])

    def _report(self, report: StageReport) -> None:
        self._timer.add(report)
        if self._is_warm and self._on_report is not None:
            self._on_report(report)

    def _stage_times(self, before: Sequence[StageUse], wall_s: float) -> tuple[StageTimes, ...]:
        deployment = self._deployment
        token_bytes = deployment.model.config.hidden_size * DTYPE_BYTES[deployment.shape.dtype]
        times = []
        for rank, (old, new) in enumerate(zip(before, self._engine.use, strict=True)):
            compute_s = new.busy_s - old.busy_s
            receive_s, send_s = new.receive_s - old.receive_s, new.send_s - old.send_s
            sends = rank < len(before) - 1
            times.append(
                StageTimes(
                    compute_s=compute_s,
                    receive_s=receive_s,
                    send_s=send_s,
                    waiting_s=max(0.0, wall_s - compute_s - receive_s - send_s),
                    hop_bytes=(new.num_tokens - old.num_tokens) * token_bytes if sends else 0,
                    peak_bytes=max(new.peak_bytes, deployment.loaded[rank].peak_bytes),
                )
            )
        return tuple(times)


def _random_request(workload: Workload, vocab_size: int, seed: int) -> Request:
    """Return a request with a prompt of random tokens. The prompts of two seeds share no prefix."""
    generator = random.Random(seed)  # noqa: S311  # not for security
    prompt_ids = tuple(generator.randrange(vocab_size) for _ in range(workload.prompt_tokens))
    return Request(prompt_ids, workload.generate_tokens, Sampling(seed=0, temperature=0), frozenset())


def _read(handle: Handle) -> _Stream:
    """Read all events of a handle; errors are those of ``Handle.events``."""
    stream = _Stream()
    for event in handle.events():
        if isinstance(event, Token):
            stream.arrivals.append(event.arrived_at)
        elif isinstance(event, Finished):
            stream.drafts = event.summary.drafts
    return stream


def check_workloads(workloads: Sequence[Workload], context_tokens: int, longest: int) -> None:
    """Reject workloads that do not fit the context. ``longest`` is the largest context that can be set.

    Raises:
        RequestError: a prompt and its answer are longer than the context.
    """
    for workload in workloads:
        needed = workload.prompt_tokens + workload.generate_tokens
        if needed > context_tokens:
            way_out = f"give --context {needed}" if needed <= longest else f"at most {longest} are possible"
            raise RequestError(
                f"a prompt of {workload.prompt_tokens} tokens and {workload.generate_tokens} after it do not fit a "
                f"context of {context_tokens}: {way_out}"
            )


def _measured(workload: Workload, repeat: int, began: float, wall_s: float, streams: Sequence[_Stream]) -> Measured:
    """Return the result of a run.

    Decoding is measured while all streams decode: from the latest first token to the earliest last token.
    """
    firsts = [stream.arrivals[0] for stream in streams]
    gaps = sorted(
        later - earlier
        for stream in streams
        for earlier, later in zip(stream.arrivals, stream.arrivals[1:], strict=False)
    )
    all_began, first_ended = max(firsts), min(stream.arrivals[-1] for stream in streams)
    num_decoded = sum(all_began < moment <= first_ended for stream in streams for moment in stream.arrivals)
    decode_s = first_ended - all_began
    return Measured(
        workload=workload,
        repeat=repeat,
        time_to_first_token_s=statistics.median(firsts) - began,
        prefill_tokens_per_s=workload.prompt_tokens * workload.streams / (max(firsts) - began),
        decode_tokens_per_s=num_decoded / decode_s if decode_s > 0 else None,
        inter_token_p50_s=_percentile(gaps, 0.5),
        inter_token_p95_s=_percentile(gaps, 0.95),
        drafts=merge_counts(count for stream in streams for count in stream.drafts),
        wall_s=wall_s,
    )


def _percentile(ordered: Sequence[float], fraction: float) -> float | None:
    """Return the value that ``fraction`` of all values do not exceed; None if there are no values."""
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else None
