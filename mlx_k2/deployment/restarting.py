"""Keeps a deployment going: after a fault all stages are ended and started again. Knows no sequences and no tokens."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mlx_k2.deployment.deploy import Deployment, deploy
from mlx_k2.deployment.deployment_request import DeploymentRequest
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.run_log import RunLog
from mlx_k2.deployment.stage_report import StageReport
from mlx_k2.errors import ClusterError
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.health_monitor import HealthMonitor
from mlx_k2.weights.checkpoint import ModelDescription

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
HEALTHY_S = 600.0
"""Stages that ran for so long without a fault are trusted again: restarts are counted from one."""


@dataclass(frozen=True)
class Restart:
    """What went wrong, and that all stages start again in ``wait_s``: the ``number``-th time of at most ``limit``."""

    reason: str
    number: int
    limit: int
    wait_s: float


class RestartingDeployment:
    """A context: on entry the stages are ready as after ``deploy``, on exit none is left.

    ``limit`` is how many restarts in a row there may be, failed ones included; with 0 a fault is final. The wait
    before each is twice the one before it. Logs and reports of faults go to ``log_dir``, token ids with ``log_tokens``.
    """

    def __init__(
        self,
        request: DeploymentRequest,
        model: ModelDescription | None,
        listener: DeploymentListener,
        limit: int,
        log_dir: Path | None = None,
        log_tokens: bool = False,
        first_wait_s: float = FIRST_WAIT_S,
    ) -> None:
        self._request = request
        self._model = model
        self._log = None if log_dir is None else RunLog(log_dir, listener, log_tokens)
        self._listener = self._log or listener
        self._limit = limit
        self._first_wait_s = first_wait_s
        self._stack = ExitStack()
        self._num_restarts = 0

    def __enter__(self) -> "RestartingDeployment":
        try:
            self._start(self._model, self._listener)
        except ClusterError as error:
            self._report(error, ())
            raise
        return self

    @property
    def on_report(self) -> Callable[[StageReport], None] | None:
        """What is to be told of each step that a stage has finished."""
        return None if self._log is None else self._log.step_done

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def restart(self, error: ClusterError, on_restart: Callable[[Restart], None]) -> StageGroup:
        """End all stages after ``error`` and start them again. ``on_restart`` is called before each attempt.

        Raises:
            ClusterError: the limit is reached; the last error, with the number of restarts.
        """
        if time.monotonic() - self._ready_at > HEALTHY_S:
            self._num_restarts = 0
        status = HealthMonitor(self.deployment.group).describe_all()
        while self._num_restarts < self._limit:
            wait_s = min(LONGEST_WAIT_S, self._first_wait_s * 2**self._num_restarts)
            self._num_restarts += 1
            on_restart(Restart(str(error), self._num_restarts, self._limit, wait_s))
            self._end(error, status)
            status = ()
            time.sleep(wait_s)
            try:
                self._start(self.deployment.model, _Again(self._listener))
            except ClusterError as next_error:
                error = next_error
            else:
                return self.deployment.group
        self._end(error, status)
        if self._limit:
            raise type(error)(f"{error} (given up after {self._num_restarts} restarts)")
        raise error

    def _end(self, error: ClusterError, status: Sequence[str]) -> None:
        """End the stages; how each of them ended is in the log by then, and so in the report."""
        self._stack.close()
        self._report(error, status)

    def _report(self, error: ClusterError, status: Sequence[str]) -> None:
        if self._log is not None and (path := self._log.write_report(str(error), status)) is not None:
            self._listener.notify(f"a report is in {path}")

    def _start(self, model: ModelDescription | None, listener: DeploymentListener) -> None:
        self.deployment: Deployment = self._stack.enter_context(deploy(self._request, model, listener))
        self._ready_at = time.monotonic()


class _Again(DeploymentListener):
    """Passes on what a restart has in common with the first start; the plan and the model are known by then."""

    def __init__(self, listener: DeploymentListener) -> None:
        self._listener = listener

    def log(self, line: str) -> None:
        self._listener.log(line)

    def notify(self, line: str) -> None:
        self._listener.notify(line)

    def phase(self, what: str) -> None:
        self._listener.phase(what)
