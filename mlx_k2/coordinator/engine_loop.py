"""Engine loop: executes commands, sends plans, waits for reports of stages, delivers events, and starts restarts.

All of it runs on the engine thread, except ``put`` and ``is_restarting`` (any thread), and ``_restart`` and
``_on_restart_phase`` (the thread of a restart).
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol

from mlx_k2.coordinator.handle import Finished, Handle, PrefillProgress, Progress, Queued, Restarting, Token
from mlx_k2.coordinator.jobs import Job
from mlx_k2.coordinator.pipeline import Pipeline, StepResult
from mlx_k2.deployment.restarting import OnRestart, Restart
from mlx_k2.errors import ClusterError, MlxK2Error, NotFinite, RequestFailed
from mlx_k2.launch.group import StageGroup
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.scheduling.scheduler import AppendedTokens, Scheduler
from mlx_k2.scheduling.sequence import Sequence

_MAX_WAIT_S = 3600.0  # limit of one wait for a command: ``queue.get`` takes no infinite timeout


class Restarts(Protocol):
    """A source of new stages after a fault, such as RestartingDeployment."""

    def restart(self, error: ClusterError, on_restart: OnRestart) -> StageGroup:
        """End the failed stages, start new ones with the same shape and layers, and return them when they are ready.

        Raises:
            MlxK2Error: the stages cannot be started again; mostly ClusterError.
            Cancelled: ``cancel`` was called.
        """

    def cancel(self) -> None:
        """End the restart that runs, if one does. Any thread may call this."""


class EngineLoop:
    """The loop over one scheduler and one pipeline. ``on_ended`` is called once for each job after its end."""

    def __init__(
        self,
        pipeline: Pipeline,
        scheduler: Scheduler,
        restarts: Restarts | None,
        on_restart: OnRestart | None,
        on_ended: Callable[[Job], None],
    ) -> None:
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._restarts = restarts
        self._on_restart = on_restart
        self._on_ended = on_ended
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._jobs: dict[Sequence, Job] = {}
        self._outbox: list[tuple[Handle, Token | Progress | Finished | MlxK2Error]] = []
        self._last_waiting: list[Sequence] = []  # the waiting sequences whose positions were reported last, in order
        self._restart_thread: threading.Thread | None = None
        self._restarting: Restarting | None = None  # the last event of the restart that runs, if any
        self._suspects: dict[tuple[Sequence, int], range] = {}
        """The positions of each sequence in the step in which a stage failed last, by sequence and rank."""
        self._is_closing = False

    @property
    def is_restarting(self) -> bool:
        """True while all stages start again after a fault."""
        return self._restart_thread is not None

    def put(self, command: Callable[[], None]) -> None:
        """Let the engine thread execute a command soon. Any thread may call this, also a signal handler."""
        self._commands.put(command)
        self._pipeline.group.wake()  # if the group is just being replaced, the loop reads all commands afterwards

    def run(self) -> None:
        """Run until ``close``.

        Raises:
            ClusterError: the stages failed, and there are no ``restarts``.
            MlxK2Error: ``restarts`` raised it.
        """
        try:
            while not self._is_closing:
                if self._restart_thread is None:
                    self._step()
                else:
                    self._wait_for_restart()
        finally:
            if self._restart_thread is not None:
                self._restart_thread.join()
            self._deliver()

    def _step(self) -> None:
        """Execute commands, send the plans that can go, deliver the events of the step before, await the next report.

        Until the report comes, the idle time is used to index n-grams for drafts.
        """
        try:
            while not self._commands.empty():
                self._run_command(self._commands.get())
            if self._is_closing:
                return
            for microbatch in self._pipeline.send_plans():
                self._start_jobs(microbatch)
            self._deliver()
            self._pipeline.observe_steps()
            while not self._pipeline.group.has_event and self._scheduler.index_drafts():
                pass
            result = self._pipeline.receive(self._first_time_limit())
            if result is not None:
                self._on_result(result)
            self._stop_timed_out()
        except ClusterError as error:
            self._on_fault(error)

    def _wait_for_restart(self) -> None:
        """Wait for the next command while the stages restart. Requests may be submitted, time out and be cancelled."""
        timeout_s = min(self._first_time_limit() - time.monotonic(), _MAX_WAIT_S)
        try:
            self._run_command(self._commands.get(timeout=max(0.0, timeout_s)))
        except Empty:
            self._stop_timed_out()
        self._deliver()

    # ---- commands, each for ``put``

    def _run_command(self, command: Callable[[], None]) -> None:
        command()
        self._end_jobs()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Submit the jobs to the scheduler, in order."""
        for job in jobs:
            self._submit(job)

    def stop(self, job: Job) -> None:
        """Stop the sequence of a job whose handle has ended."""
        if job.sequence is not None:
            self._scheduler.stop(job.sequence, FinishReason.CANCELLED)

    def close(self) -> None:
        """End ``run``."""
        self._is_closing = True

    def _report_restart(self, restart: Restart, phase: str) -> None:
        self._restarting = Restarting(restart, phase)
        self._outbox += [(job.handle, self._restarting) for job in self._jobs.values()]

    def _end_restart(self, outcome: StageGroup | MlxK2Error) -> None:
        self._restart_thread = self._restarting = None
        if isinstance(outcome, MlxK2Error):
            raise outcome
        self._pipeline.continue_on(outcome)

    def _submit(self, job: Job) -> None:
        submission = job.submission
        forced = self._scheduler.submit(submission.request, submission.policy)
        job.sequence = forced.sequence
        self._jobs[forced.sequence] = job
        if self._restarting is not None:
            self._outbox.append((job.handle, self._restarting))
        self._add_tokens(forced)
        if job.handle.has_ended:  # the request was cancelled before this command was executed
            self._scheduler.stop(forced.sequence, FinishReason.CANCELLED)

    # ---- progress of jobs

    def _start_jobs(self, microbatch: Microbatch) -> None:
        """Report the start of each request whose first step was sent, and begin its time limit."""
        for sequence in (planned.sequence for planned in microbatch.rows):
            job = self._jobs.get(sequence)
            if job is not None and job.is_queued:
                job.is_queued = False
                self._outbox.append((job.handle, PrefillProgress(sequence.num_cached or 0, sequence.num_prompt)))
                if sequence.request.timeout_s is not None:
                    job.ends_at = time.monotonic() + sequence.request.timeout_s

    def _on_result(self, result: StepResult) -> None:
        """Collect the events of a finished step: prompt progress and tokens."""
        for planned in result.microbatch.rows:
            job = self._jobs.get(planned.sequence)
            # A row with logits is the end of the prompt: the event is its token.
            if planned.row.is_prompt and not planned.row.needs_logits and job is not None:
                progress = PrefillProgress(planned.row.end, planned.sequence.num_prompt)
                self._outbox.append((job.handle, progress))
        for added in result.appended:
            self._add_tokens(added)
        self._end_jobs()

    def _add_tokens(self, added: AppendedTokens) -> None:
        now = time.perf_counter()
        for appended in added.tokens:
            job = self._jobs[added.sequence]
            job.timer.add(now, is_forced=appended.is_forced)
            token, accepted = appended.token, appended.accepted
            event = Token(
                token.token_id, accepted.text, accepted.parts, token.logprob, token.top, appended.is_forced, now
            )
            self._outbox.append((job.handle, event))

    def _end_jobs(self) -> None:
        """End the jobs of the sequences that have ended."""
        for sequence in self._scheduler.pop_ended():
            job = self._jobs.pop(sequence)
            reason = sequence.finish_reason
            assert reason is not None, "an ended sequence has a reason"
            self._outbox.append((job.handle, sequence.error or job.finish(reason)))
            self._on_ended(job)

    def _deliver(self) -> None:
        """Put the collected events into their handles. Called after the next plans are sent, which thus do not wait."""
        waiting = self._scheduler.waiting
        # While the stages restart, Restarting stays the latest progress of every handle.
        if waiting != self._last_waiting and self._restart_thread is None:
            self._last_waiting = waiting
            self._outbox += [(self._jobs[each].handle, Queued(position)) for position, each in enumerate(waiting)]
        outbox, self._outbox = self._outbox, []
        for handle, event in outbox:
            match event:
                case Token():
                    handle.put_token(event)
                case Queued() | PrefillProgress() | Restarting():
                    handle.put_progress(event)
                case _:
                    handle.end(event)

    def _first_time_limit(self) -> float:
        """Return the earliest time limit of a running request, in monotonic seconds."""
        return min((job.ends_at for job in self._jobs.values()), default=math.inf)

    def _stop_timed_out(self) -> None:
        now = time.monotonic()
        for sequence, job in list(self._jobs.items()):
            if now >= job.ends_at:
                self._scheduler.stop(sequence, FinishReason.TIMEOUT)
        self._end_jobs()

    # ---- faults

    def _on_fault(self, error: ClusterError) -> None:
        """End the requests that may have caused the fault, and start the stages again for the others."""
        if error.rank is not None and not isinstance(error, NotFinite):  # broken weights cause NotFinite, no request
            self._end_suspects(error.rank)
        self._deliver()
        self._pipeline.drop_plans()
        self._scheduler.reset()
        if self._restarts is None:
            raise error
        self._restart_thread = threading.Thread(
            target=self._restart, args=[self._restarts, error], name="restart", daemon=True
        )
        self._restart_thread.start()

    def _end_suspects(self, rank: int) -> None:
        """End the sequences that were in a step on stage ``rank`` at the same positions when it failed before."""
        step = self._pipeline.step_of(rank)
        suspects_before, self._suspects = self._suspects, {}
        for planned in [] if step is None else step.rows:
            sequence, row = planned.sequence, planned.row
            if sequence.finish_reason is not None:
                continue
            before = suspects_before.get((sequence, rank), range(0))
            if before.start < row.end and row.position < before.stop:
                sequence.error = RequestFailed(f"request ended: it was running when stage {rank} failed twice")
                self._scheduler.stop(sequence, FinishReason.ERROR)
            else:
                self._suspects[sequence, rank] = range(row.position, row.end)
        self._end_jobs()

    def _restart(self, restarts: Restarts, error: ClusterError) -> None:
        """Get new stages, then let the engine thread continue on them. Runs on a thread of its own."""
        try:
            outcome: StageGroup | MlxK2Error = restarts.restart(error, self._on_restart_phase)
        except MlxK2Error as failure:
            outcome = failure
        except BaseException as defect:  # noqa: BLE001 - the engine must not wait without a limit
            outcome = ClusterError(f"the restart failed: {type(defect).__name__}: {defect}")
            outcome.__cause__ = defect
        self._commands.put(partial(self._end_restart, outcome))

    def _on_restart_phase(self, restart: Restart, phase: str) -> None:
        self._commands.put(partial(self._report_restart, restart, phase))
        if self._on_restart is not None:
            try:
                self._on_restart(restart, phase)
            except Exception:  # an error of the callback, such as of a closed terminal, must not end the restart
                logging.getLogger(__name__).exception("a callback for restarts failed")
