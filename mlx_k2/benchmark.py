"""Benchmark of a deployment by prompt length, number of streams and tokens per stream. Knows no terminal."""

import math
import random
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from mlx_k2.coordinator.draft_times import DraftTimer, DraftTimes
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.coordinator.handle import Finished, Handle, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.pipeline import StageUse
from mlx_k2.deployment.deploy import Deployment
from mlx_k2.deployment.listener import StageReport
from mlx_k2.deployment.plan import DTYPE_BYTES
from mlx_k2.errors import RequestError
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.drafts import DraftCount, merge_counts
from mlx_k2.scheduling.request import Request

WARM_UP_TOKENS = 8
_LAST_REPORTS_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Workload:
    """A number of concurrent sequences (``streams``), and the tokens of the prompt and the answer of each."""

    prompt_tokens: int
    generate_tokens: int
    streams: int


@dataclass(frozen=True)
class StageTimes:
    """Times and bytes of one stage during one run of a workload.

    ``waiting_s`` is the time without a step. ``hop_bytes`` are the hidden states that the stage sent. ``peak_bytes`` is
    the largest memory of the stage since it started.
    """

    compute_s: float
    receive_s: float
    send_s: float
    waiting_s: float
    hop_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class WorkloadResult:
    """Result of one run of a workload.

    ``repeat`` is the number of the run, from 0. The time to the first token is the median of the streams, rates are
    totals over all streams, and inter-token times are between tokens of one stream. ``wall_s`` is the time of the run.
    """

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
    """Times of steps with a draft head; None without one, on a single stage, or if all or no tokens were its drafts."""

    @property
    def decode_tokens_per_s_per_stream(self) -> float | None:
        """Mean rate of one stream."""
        return None if self.decode_tokens_per_s is None else self.decode_tokens_per_s / self.workload.streams

    @property
    def num_drafted(self) -> int:
        """Number of draft tokens that were computed."""
        return sum(count.num_drafted for count in self.drafts)

    @property
    def num_accepted(self) -> int:
        """Number of draft tokens that are part of the answers."""
        return sum(count.num_accepted for count in self.drafts)

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
    """Benchmark whose requests go to ``submit``, for instance to a running server. Stages are not timed."""

    def __init__(self, submit: Callable[[Request], Handle], vocab_size: int) -> None:
        self._submit = submit
        self._vocab_size = vocab_size
        self._last_seed = secrets.randbits(60)  # random: the server may have the prompts of an earlier run cached

    def warm_up(self, workload: Workload) -> None:
        """Run ``workload`` with WARM_UP_TOKENS tokens per answer, to compile kernels and to fill speed estimates."""
        self._run_streams(Workload(workload.prompt_tokens, WARM_UP_TOKENS, workload.streams))

    def measure(self, workload: Workload, repeat: int = 0) -> WorkloadResult:
        """Run ``workload`` once, on prompts that are not cached. Stop tokens do not end a stream."""
        started_at = time.perf_counter()
        streams = self._run_streams(workload)
        return _workload_result(workload, repeat, started_at, time.perf_counter() - started_at, streams)

    def _run_streams(self, workload: Workload) -> list[_Stream]:
        first_seed = self._last_seed + 1
        self._last_seed += workload.streams
        seeds = range(first_seed, self._last_seed + 1)
        requests = [_random_request(workload, self._vocab_size, seed) for seed in seeds]
        return [_read_stream(handle) for handle in self._submit_all(requests)]

    def _submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        return [self._submit(request) for request in requests]


class Benchmark(ServerBenchmark):
    """Benchmark on ready stages, a context manager. A failed stage raises ClusterError; there is no restart.

    ``on_report`` receives every finished step of a stage, except during warm-up.
    """

    def __init__(
        self, deployment: Deployment, *, draft_mode: DraftMode, on_report: Callable[[StageReport], None] | None = None
    ) -> None:
        self._deployment = deployment
        self._on_report = on_report
        self._is_warming_up = False
        self._timer = DraftTimer(deployment.group.size)
        # prompts first: all streams decode at the same time, while the decode rate is measured
        self._engine = engine_on(deployment, draft_mode=draft_mode, prompts_first=True, on_report=self._report)
        super().__init__(self._engine.submit, deployment.model.config.vocab_size)
        self._last_seed = 0  # fixed, because new stages have nothing cached: every benchmark has the same prompts

    def __enter__(self) -> "Benchmark":
        self._engine.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.__exit__(*error)

    def warm_up(self, workload: Workload) -> None:
        """Run ``workload`` as the base class does, without calls of ``on_report``."""
        self._is_warming_up = True
        super().warm_up(workload)
        self._is_warming_up = False

    def measure(self, workload: Workload, repeat: int = 0) -> WorkloadResult:
        """Run ``workload`` once, as the base class does, and measure the stages and the draft head, too."""
        use_before = [replace(use) for use in self._engine.use]  # copies: the engine adds to its own
        self._timer = DraftTimer(len(use_before))
        result = super().measure(workload, repeat)
        num_head_runs = self._engine.use[-1].draft_runs - use_before[-1].draft_runs
        draft_times = None
        if num_head_runs:
            head_s = (self._engine.use[-1].draft_s - use_before[-1].draft_s) / num_head_runs
            draft_times = self._timer.times(head_s)
        return replace(result, draft_times=draft_times, stages=self._stage_times(use_before, result.wall_s))

    def _run_streams(self, workload: Workload) -> list[_Stream]:
        streams = super()._run_streams(workload)
        # the last stage's last report, which ends the streams, may arrive before those of the other stages
        deadline = time.monotonic() + _LAST_REPORTS_TIMEOUT_S
        while len({use.steps_done for use in self._engine.use}) > 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        return streams

    def _submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        return self._engine.submit_all([Submission(request) for request in requests])

    def _report(self, report: StageReport) -> None:
        self._timer.add(report)
        if self._on_report is not None and not self._is_warming_up:
            self._on_report(report)

    def _stage_times(self, use_before: Sequence[StageUse], wall_s: float) -> tuple[StageTimes, ...]:
        deployment = self._deployment
        token_bytes = deployment.model.config.hidden_size * DTYPE_BYTES[deployment.shape.dtype]
        times = []
        for rank, (before, after) in enumerate(zip(use_before, self._engine.use, strict=True)):
            compute_s = after.busy_s - before.busy_s
            receive_s, send_s = after.receive_s - before.receive_s, after.send_s - before.send_s
            has_next_stage = rank < len(use_before) - 1
            times.append(
                StageTimes(
                    compute_s=compute_s,
                    receive_s=receive_s,
                    send_s=send_s,
                    waiting_s=max(0.0, wall_s - compute_s - receive_s - send_s),
                    hop_bytes=(after.num_tokens - before.num_tokens) * token_bytes if has_next_stage else 0,
                    peak_bytes=max(after.peak_bytes, deployment.loaded[rank].peak_bytes),
                )
            )
        return tuple(times)


def _random_request(workload: Workload, vocab_size: int, seed: int) -> Request:
    """Return a request with a prompt of random tokens; prompts of different seeds almost never begin alike."""
    generator = random.Random(seed)  # noqa: S311  # not for security
    prompt_ids = tuple(generator.randrange(vocab_size) for _ in range(workload.prompt_tokens))
    return Request(
        prompt_ids,
        max_tokens=workload.generate_tokens,
        sampling=Sampling(seed=0, temperature=0),
        stop_ids=frozenset(),  # no token ends a stream
    )


def _read_stream(handle: Handle) -> _Stream:
    """Read all events of a handle; raise the errors of ``Handle.events``."""
    stream = _Stream()
    for event in handle.events():
        if isinstance(event, Token):
            stream.arrivals.append(event.arrived_at)
        elif isinstance(event, Finished):
            stream.drafts = event.summary.drafts
    return stream


def check_workloads(workloads: Sequence[Workload], context_tokens: int, max_context_tokens: int) -> None:
    """Refuse workloads that do not fit into the context, which can be set to at most ``max_context_tokens``.

    Raises:
        RequestError: a prompt and its answer are longer than the context.
    """
    for workload in workloads:
        needed_tokens = workload.prompt_tokens + workload.generate_tokens
        if needed_tokens > context_tokens:
            can_be_set = needed_tokens <= max_context_tokens
            advice = f"give --context {needed_tokens}" if can_be_set else f"at most {max_context_tokens} are possible"
            raise RequestError(
                f"a prompt of {workload.prompt_tokens} tokens and an answer of {workload.generate_tokens} do not fit "
                f"into a context of {context_tokens} tokens: {advice}"
            )


def _workload_result(
    workload: Workload, repeat: int, started_at: float, wall_s: float, streams: Sequence[_Stream]
) -> WorkloadResult:
    """Return the result of one run.

    The decode rate is measured while all streams decode: from the latest first token to the earliest last token.
    """
    first_arrivals = [stream.arrivals[0] for stream in streams]
    inter_token_s = sorted(later - earlier for stream in streams for earlier, later in pairwise(stream.arrivals))
    decode_from, decode_until = max(first_arrivals), min(stream.arrivals[-1] for stream in streams)
    arrivals = [arrival for stream in streams for arrival in stream.arrivals]
    num_decoded = sum(decode_from < arrival <= decode_until for arrival in arrivals)
    decode_s = decode_until - decode_from
    return WorkloadResult(
        workload=workload,
        repeat=repeat,
        time_to_first_token_s=statistics.median(first_arrivals) - started_at,
        prefill_tokens_per_s=workload.prompt_tokens * workload.streams / (max(first_arrivals) - started_at),
        decode_tokens_per_s=num_decoded / decode_s if decode_s > 0 else None,
        inter_token_p50_s=_percentile(inter_token_s, 0.5),
        inter_token_p95_s=_percentile(inter_token_s, 0.95),
        drafts=merge_counts(count for stream in streams for count in stream.drafts),
        wall_s=wall_s,
    )


def _percentile(sorted_values: Sequence[float], fraction: float) -> float | None:
    """Return the smallest of the ascending values that ``fraction`` of them do not exceed; None without values."""
    return sorted_values[max(0, math.ceil(fraction * len(sorted_values)) - 1)] if sorted_values else None
