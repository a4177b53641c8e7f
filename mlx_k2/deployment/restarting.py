"""Restarting deployment: ends and starts all stages again after a fault. Knows no sequences and no tokens."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlx_k2.deployment.cluster_options import DeploymentRequest
from mlx_k2.deployment.deploy import Deployment, deploy
from mlx_k2.deployment.listener import DeploymentListener, StageReport
from mlx_k2.deployment.plan import StagePlan
from mlx_k2.deployment.run_log import RunLog
from mlx_k2.errors import Cancelled, ClusterError, NotFinite
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.health_monitor import HealthMonitor
from mlx_k2.protocol.messages import FromStage, LayerLoaded
from mlx_k2.weights.checkpoint import ModelDescription

OnRestart = Callable[["Restart", str], None]
"""Callback for a restart and its present phase, such as "loading, 40%". In the first call the phase is WAITING."""
WAITING = "waiting"
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
_MAX_DOUBLINGS = 16  # limit of the exponent in the computation of a wait, which would overflow a float
HEALTHY_S = 600.0  # after this time without a fault, restarts are counted from 0 again


@dataclass(frozen=True)
class Restart:
    """A restart of all stages."""

    reason: str
    number: int
    """How many restarts there were since the last healthy time, this one included."""
    limit: int | None
    """The maximum of ``number``; None: no limit."""
    wait_s: float
    """Wait before the stages are started."""

    @property
    def count(self) -> str:
        """The number and the limit in words, such as "2 of at most 3"."""
        return str(self.number) if self.limit is None else f"{self.number} of at most {self.limit}"


class RestartingDeployment:
    """A deployment that starts all stages again after a fault. A context manager around the stages, as ``deploy``.

    ``limit`` is the maximum number of restarts, failed ones included, without HEALTHY_S between two of them; with 0 the
    first fault is final. None sets no limit; then a restart is tried again after any error, also one that is no
    ClusterError, such as too little free memory. With a limit, a NotFinite after a restart for NotFinite is final.
    Each wait is twice the previous one, up to ``longest_wait_s``. Logs and fault reports go to ``log_dir``, with token
    ids if ``log_tokens``.
    """

    def __init__(
        self,
        request: DeploymentRequest,
        model: ModelDescription | None,
        listener: DeploymentListener,
        limit: int | None,
        log_dir: Path | None = None,
        log_tokens: bool = False,
        first_wait_s: float = FIRST_WAIT_S,
        longest_wait_s: float = LONGEST_WAIT_S,
    ) -> None:
        self._request = request
        self._model = model
        self._log = None if log_dir is None else RunLog(log_dir, listener, log_tokens)
        self._listener = self._log or listener
        self._limit = limit
        self._first_wait_s = first_wait_s
        self._longest_wait_s = longest_wait_s
        self._stack = ExitStack()
        self._num_restarts = 0
        self._was_not_finite = False
        """Whether NotFinite caused the last restart. If it comes again, the weights are broken."""
        self._cancelled = threading.Event()

    def __enter__(self) -> "RestartingDeployment":
        try:
            self._start(self._model, self._listener)
        except ClusterError as error:
            self._report(error, ())
            raise
        return self

    @property
    def on_report(self) -> Callable[[StageReport], None] | None:
        """Callback for each step that a stage has finished; None without a log."""
        return None if self._log is None else self._log.step_done

    def __exit__(self, *error: object) -> None:
        self.cancel()
        self._stack.close()

    def restart(self, error: ClusterError, on_restart: OnRestart) -> StageGroup:
        """End all stages after ``error`` and start them again, with the same shape and layers; return the new group.

        ``on_restart`` is called before each attempt, and for each phase of it.

        Raises:
            ClusterError: no other restart is allowed; the last error, with the number of restarts.
            Exception: a restart failed with an error that is no ClusterError, and there is a limit.
            Cancelled: ``cancel`` was called.
        """
        if time.monotonic() - self._ready_at > HEALTHY_S:
            self._num_restarts = 0
            self._was_not_finite = False
        statuses: Sequence[str] = HealthMonitor(self.deployment.group).describe_all()
        while self._may_restart(error):
            wait_s = min(self._longest_wait_s, self._first_wait_s * 2 ** min(self._num_restarts, _MAX_DOUBLINGS))
            self._num_restarts += 1
            self._was_not_finite = isinstance(error, NotFinite)
            restart = Restart(str(error), self._num_restarts, self._limit, wait_s)
            on_restart(restart, WAITING)
            listener = _RestartListener(self._listener, self.deployment.plans, partial(on_restart, restart))
            try:
                self._end(error, statuses)
                if self._cancelled.wait(wait_s):
                    raise Cancelled("the restart was cancelled")
                self._start(self.deployment.model, listener, self.deployment)
            except ClusterError as next_error:
                error = next_error
            except Cancelled:
                raise
            except Exception as unexpected:
                if self._limit is not None:
                    raise
                error = ClusterError(str(unexpected) or type(unexpected).__name__)
            else:
                return self.deployment.group
            statuses = ()  # the stages of the failed start have ended
        self._end(error, statuses)
        if self._num_restarts:
            raise type(error)(f"{error} (given up after {self._num_restarts} restarts)", error.rank)
        raise error

    def cancel(self) -> None:
        """Cancel the restart that runs, which then raises Cancelled. No other restart follows. Any thread may call."""
        self._cancelled.set()

    def _may_restart(self, error: ClusterError) -> bool:
        if self._limit is None:
            return True
        return self._num_restarts < self._limit and not (self._was_not_finite and isinstance(error, NotFinite))

    def _end(self, error: ClusterError, statuses: Sequence[str]) -> None:
        """End the stages, then write the report: so it has the lines about how each stage ended."""
        self._stack.close()
        self._report(error, statuses)

    def _report(self, error: ClusterError, statuses: Sequence[str]) -> None:
        if self._log is not None and (path := self._log.write_report(str(error), statuses)) is not None:
            self._listener.notify(f"a report is in {path}")

    def _start(
        self, model: ModelDescription | None, listener: DeploymentListener, before: Deployment | None = None
    ) -> None:
        stages = deploy(self._request, model, listener, before, self._cancelled)
        self.deployment: Deployment = self._stack.enter_context(stages)
        self._ready_at = time.monotonic()


class _RestartListener(DeploymentListener):
    """Listener of a restart. It forwards log lines and messages for the user, and phases also to ``on_phase``.

    It does not forward the plan, which is the one before, nor progress: ``on_phase`` gets the loaded percentage of the
    shards of ``plans``.
    """

    def __init__(
        self, listener: DeploymentListener, plans: Sequence[StagePlan], on_phase: Callable[[str], None]
    ) -> None:
        self._listener = listener
        self._total_bytes = sum(plan.shard_bytes for plan in plans)
        self._on_phase = on_phase
        self._held_bytes = 0
        self._percent = 0

    def log(self, line: str) -> None:
        self._listener.log(line)

    def notify(self, line: str) -> None:
        self._listener.notify(line)

    def phase(self, what: str) -> None:
        self._listener.phase(what)
        self._on_phase(what)

    def progress(self, rank: int, message: FromStage) -> None:  # noqa: ARG002 - the listener's argument
        if isinstance(message, LayerLoaded):
            self._held_bytes += message.held_bytes
            percent = 100 * self._held_bytes // max(1, self._total_bytes)
            if percent > self._percent:
                self._percent = percent
                self._on_phase(f"loading, {percent}%")
