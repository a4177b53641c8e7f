"""The model of a server: its stages and its engine, from loading to the end of the server. Knows no routes."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from mlx_k2.cli.console import ConsoleListener, opening_lines, restart_lines
from mlx_k2.cli.main import Interrupted
from mlx_k2.cli.serve_options import ServeOptions
from mlx_k2.coordinator.engine import Engine, engine_on
from mlx_k2.deployment.cluster_options import DeploymentRequest
from mlx_k2.deployment.listener import StageReport
from mlx_k2.deployment.plan import StagePlan
from mlx_k2.deployment.restarting import WAITING, Restart, RestartingDeployment
from mlx_k2.errors import ClusterError, MlxK2Error
from mlx_k2.protocol.messages import FromStage
from mlx_k2.server.client_settings import CLAUDE_CODE_CONTEXT_TOKENS
from mlx_k2.server.cluster_activity import ClusterActivity, CountedRestarts
from mlx_k2.server.http_server import HttpServer
from mlx_k2.server.language_model import LanguageModel
from mlx_k2.server.server_state import ServerState
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_frontend import ModelFrontend

MAX_RESTART_WAIT_S = 60.0
"""Longest wait before a restart. The waits double, because a server restarts without a limit."""


class ModelService:
    """The service of one model to the clients of ``server``. ``write`` writes a line to the log and never blocks."""

    def __init__(
        self, options: ServeOptions, state: ServerState, server: HttpServer, write: Callable[[str], None]
    ) -> None:
        self._options = options
        self._state = state
        self._server = server
        self._write = write
        self._failure: MlxK2Error | None = None

    def run(self, request: DeploymentRequest, model: ModelDescription | None) -> None:
        """Load the model and serve clients until a signal arrives. Running requests then continue for --drain seconds.

        Raises:
            MlxK2Error: the model cannot be loaded, a fault cannot be recovered, or the HTTP server has ended.
        """
        _keep_awake()
        options, state = self._options, self._state
        listener = _ServeListener(options.verbose, self._write, state.activity)
        stages = RestartingDeployment(
            request,
            model,
            listener,
            limit=None,
            log_dir=options.log_dir,
            log_tokens=options.log_tokens,
            longest_wait_s=MAX_RESTART_WAIT_S,
        )
        with listener, stages:
            listener.hide_progress()
            state.activity.deployed(stages.deployment)
            frontend = ModelFrontend(stages.deployment.model, stages.deployment.shape.context_tokens)
            language_model = LanguageModel(frontend, state.model_name, tool_grammar=options.tool_grammar)
            with self._engine_on(stages) as engine:
                state.serve(engine, language_model)
                self._log_start(frontend, engine.num_slots)
                self._wait_for_end()

    def _engine_on(self, stages: RestartingDeployment) -> Engine:
        """Return an engine whose steps and restarts are recorded for /v1/status."""

        def report(stage_report: StageReport) -> None:
            self._state.activity.add_report(stage_report)
            if stages.on_report is not None:
                stages.on_report(stage_report)

        return engine_on(
            stages.deployment,
            draft_mode=self._options.draft_mode,
            on_report=report,
            restarts=CountedRestarts(self._state.activity, stages),
            on_restart=self._on_restart,
            on_failure=self._on_failure,
            max_queued=self._options.max_queued,
        )

    def _on_restart(self, restart: Restart, phase: str) -> None:
        self._state.activity.phase = phase
        if phase == WAITING:
            self._write(f"{restart_lines(restart)}; running answers then continue")

    def _on_failure(self, error: MlxK2Error) -> None:
        if self._failure is None:
            self._failure = error
        self._server.must_end.set()

    def _log_start(self, frontend: ModelFrontend, num_slots: int) -> None:
        for line in opening_lines(self._options.cluster, frontend):
            self._write(line)
        if frontend.context_tokens < CLAUDE_CODE_CONTEXT_TOKENS:
            self._write(f"Claude Code needs: export CLAUDE_CODE_AUTO_COMPACT_WINDOW={frontend.context_tokens}")
        self._write(
            f"serving {self._state.model_name} at {self._server.url}/v1: {num_slots} requests at once, "
            f"{frontend.context_tokens} tokens each"
        )

    def _wait_for_end(self) -> None:
        try:
            self._server.must_end.wait()
        except Interrupted:
            drain_s = self._options.drain_s
            self._write(f"ending: running requests may continue for {drain_s:g} s; a second signal ends at once")
            self._state.is_ending = True
            self._server.drain()
        else:
            raise ClusterError("the HTTP server has ended") if self._failure is None else self._failure


class _ServeListener(ConsoleListener):
    """A console listener that also records what the stages load, for /v1/status."""

    def __init__(self, verbose: bool, write: Callable[[str], None], activity: ClusterActivity) -> None:
        super().__init__(verbose, write)
        self._activity = activity

    def phase(self, what: str) -> None:
        self._activity.phase = what
        super().phase(what)

    def planned(self, model: ModelDescription, plans: Sequence[StagePlan]) -> None:
        self._activity.plans = plans
        super().planned(model, plans)

    def progress(self, rank: int, message: FromStage) -> None:
        self._activity.progress(rank, message)
        super().progress(rank, message)


def _keep_awake() -> None:
    """Keep this Mac from sleeping while this process runs. On hosts with a stage, the stage does so."""
    if sys.platform == "darwin":
        subprocess.Popen(["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())], stdin=subprocess.DEVNULL)
