"""Engine: one thread that owns the scheduler and the pipeline. Every other thread sends it commands through a queue.

Knows requests and token policies, but no messages, no terminal and no arrays.
"""

import gc
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from mlx_k2.coordinator.answer_summary import AnswerTimer
from mlx_k2.coordinator.engine_loop import EngineLoop, Restarts
from mlx_k2.coordinator.handle import Handle
from mlx_k2.coordinator.jobs import Job, Submission
from mlx_k2.coordinator.pipeline import Pipeline, StageUse, StepTimeout
from mlx_k2.deployment.deploy import Deployment
from mlx_k2.deployment.listener import StageReport
from mlx_k2.deployment.restarting import OnRestart
from mlx_k2.errors import Cancelled, ClusterError, EngineBusy, MlxK2Error
from mlx_k2.scheduling.drafter import DraftMode, effective_mode
from mlx_k2.scheduling.request import FinishReason, Request, check_request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import StepPolicy
from mlx_k2.scheduling.token_policy import TokenPolicy

MAX_QUEUED = 256  # default maximum number of requests that wait for their first step
SWITCH_INTERVAL_S = 0.0002
"""Python's switch interval while an engine runs. A token passes through three threads before the next plan is sent, and
each may wait this long for a thread that computes."""
_NUM_DURATIONS = 32  # the requests that ended last, whose mean time from submission to end gives the expected wait
_MIN_WAIT_S = 1.0


class _ShortInterval:
    """Python's switch interval, which is SWITCH_INTERVAL_S or less while an engine of this process runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_engines = 0

    def begin(self) -> None:
        """Count one more engine. With the first one the interval becomes short."""
        with self._lock:
            if not self._num_engines:
                self._usual_s = sys.getswitchinterval()
            self._num_engines += 1
            sys.setswitchinterval(min(SWITCH_INTERVAL_S, self._usual_s))

    def end(self) -> None:
        """Count one engine less. After the last engine the interval is what it was before the first one."""
        with self._lock:
            self._num_engines -= 1
            if not self._num_engines:
                sys.setswitchinterval(self._usual_s)


_SHORT_INTERVAL = _ShortInterval()


class Engine:
    """The engine of ready stages. A context manager: its exit cancels all requests and waits for the engine thread.

    After a fault the engine gets new stages from ``restarts`` and computes every running sequence again from its
    tokens. Without ``restarts``, or if ``restarts.restart`` raises an error, every request ends with the error,
    ``on_failure`` is called on the engine thread, and ``submit`` raises the error. ``on_restart`` is called on another
    thread for each restart and each of its phases.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        scheduler: Scheduler,
        *,
        restarts: Restarts | None = None,
        on_restart: OnRestart | None = None,
        on_failure: Callable[[MlxK2Error], None] | None = None,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        self.num_slots = scheduler.limits.num_slots
        """The number of requests that can run at once."""
        self.max_requests = self.num_slots + max_queued
        """The maximum number of requests that run and wait."""
        self._context_tokens = scheduler.limits.context_tokens
        self._pipeline = pipeline
        self._on_failure = on_failure
        self._max_queued = max_queued
        self._durations_s: deque[float] = deque(maxlen=_NUM_DURATIONS)
        self._lock = threading.Lock()  # guards _error and _jobs
        self._error: MlxK2Error | None = None
        self._jobs: dict[Handle, Job] = {}
        self._restarts = restarts
        self._loop = EngineLoop(pipeline, scheduler, restarts, on_restart, self._on_ended)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "Engine":
        self._thread.start()
        _SHORT_INTERVAL.begin()
        # A full collection stops all threads for 14 to 28 ms (measured), mostly for objects of imports: exempt these.
        gc.freeze()
        return self

    def __exit__(self, *error: object) -> None:
        if self._restarts is not None:
            self._restarts.cancel()
        self._loop.put(self._loop.close)
        self._thread.join()  # the end of a restart's stages has its own deadline, in StageGroup.stop
        gc.unfreeze()
        _SHORT_INTERVAL.end()

    @property
    def is_restarting(self) -> bool:
        """True while all stages start again after a fault."""
        return self._loop.is_restarting

    @property
    def use(self) -> tuple[StageUse, ...]:
        """The totals of each stage so far, by rank."""
        return self._pipeline.use

    def submit(
        self,
        request: Request,
        policy: TokenPolicy | None = None,
        notify: Callable[[Handle], None] | None = None,
    ) -> Handle:
        """Queue a request and return its handle. Any thread may call this, also while other requests run.

        ``policy`` belongs to this request; None allows every token and makes no text. ``notify`` is called for each
        new event of the handle, mostly on the engine thread, and must not block.

        Raises:
            RequestError: the request can never run (``check_request``).
            EngineBusy: the queue is full; has the expected wait.
            MlxK2Error: the stages have failed and are not restarted, mostly ClusterError; or the engine is closed.
        """
        return self.submit_all([Submission(request, policy, notify)])[0]

    def submit_all(self, submissions: Sequence[Submission]) -> list[Handle]:
        """Queue several requests, all or none, so that the first plan can have all. Raises the errors of ``submit``."""
        now = time.perf_counter()
        jobs = []
        for submission in submissions:
            check_request(submission.request, self._pipeline.vocab_size, self._context_tokens)
            handle = Handle(submission.request, self._cancel, submission.notify)
            jobs.append(Job(submission, handle, AnswerTimer(now)))
        with self._lock:
            if self._error is not None:
                raise self._error.with_traceback(None)  # else each call would add its frames to the one error
            num_queued = self._num_queued
            if num_queued + len(jobs) > self._max_queued:
                wait_s = self.expected_wait_s
                raise EngineBusy(
                    f"{num_queued} requests wait already, of at most {self._max_queued}: "
                    f"try again in about {wait_s:.0f} s",
                    wait_s,
                )
            self._jobs |= {job.handle: job for job in jobs}
            self._loop.put(partial(self._loop.submit, jobs))
        return [job.handle for job in jobs]

    def _cancel(self, handle: Handle) -> None:
        """End a handle at once, and stop its sequence soon. A signal handler may call this: it uses no lock."""
        job = self._jobs.get(handle)
        if job is not None and handle.end(job.finish(FinishReason.CANCELLED)):
            self._loop.put(partial(self._loop.stop, job))

    @property
    def _num_queued(self) -> int:
        return sum(job.is_queued for job in list(self._jobs.values()))

    @property
    def expected_wait_s(self) -> float:
        """The expected seconds until all requests that wait now have started; at least _MIN_WAIT_S."""
        durations_s = list(self._durations_s)
        mean_s = sum(durations_s) / len(durations_s) if durations_s else _MIN_WAIT_S
        return max(_MIN_WAIT_S, mean_s * self._num_queued / self.num_slots)

    # ---- on the engine thread

    def _run(self) -> None:
        error: MlxK2Error = Cancelled("the engine is closed")
        try:
            self._loop.run()
        except MlxK2Error as failure:
            error = failure
        except BaseException as defect:  # noqa: BLE001 - readers must not wait without a limit
            error = ClusterError(f"the engine failed: {type(defect).__name__}: {defect}")
            error.__cause__ = defect
        with self._lock:
            self._error = error
            jobs = list(self._jobs.values())
            self._jobs.clear()
        for job in jobs:
            job.handle.end(job.finish(FinishReason.CANCELLED) if isinstance(error, Cancelled) else error)
        if self._on_failure is not None and not isinstance(error, Cancelled):
            self._on_failure(error)

    def _on_ended(self, job: Job) -> None:
        self._durations_s.append(time.perf_counter() - job.timer.began)
        with self._lock:
            del self._jobs[job.handle]


def engine_on(
    deployment: Deployment,
    *,
    draft_mode: DraftMode,
    prompts_first: bool = False,
    step_timeout: StepTimeout | None = None,
    on_report: Callable[[StageReport], None] | None = None,
    restarts: Restarts | None = None,
    on_restart: OnRestart | None = None,
    on_failure: Callable[[MlxK2Error], None] | None = None,
    max_queued: int = MAX_QUEUED,
) -> Engine:
    """Return an engine for ready stages. ``draft_mode`` is the source of drafts for a sequence that runs alone.

    ``prompts_first`` runs all prefill before decode: more tokens per second in total. ``on_report`` is called on the
    engine thread for each step that a stage has finished. The other parameters are those of Engine and Pipeline.
    """
    shape = deployment.shape
    num_stages = deployment.group.size
    limits = SchedulerLimits(shape.num_slots, shape.context_tokens, shape.chunk_tokens, num_stages, prompts_first)
    policy = StepPolicy(deployment.costs)
    has_head = deployment.request.draft_head is not None
    # One stage is never idle while a sequence runs, and drafts are computed by idle stages.
    mode = DraftMode.OFF if num_stages == 1 else effective_mode(draft_mode, has_head=has_head)
    scheduler = Scheduler(limits, policy, draft_mode=mode)
    vocab_size = deployment.model.config.vocab_size
    pipeline = Pipeline(deployment.group, scheduler, policy, vocab_size, step_timeout, on_report)
    return Engine(
        pipeline, scheduler, restarts=restarts, on_restart=on_restart, on_failure=on_failure, max_queued=max_queued
    )
