"""Run log: log lines and steps in files of bounded size, and for each fault a report with the last of them.

A step's entry holds each row's slot, position and number of tokens. It holds the token ids only on request.
"""

import json
import platform
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from mlx_k2.deployment.listener import DeploymentListener, StageReport
from mlx_k2.deployment.plan import StagePlan
from mlx_k2.errors import RequestError
from mlx_k2.private_files import open_private_no_symlink, write_private
from mlx_k2.protocol.messages import FromStage
from mlx_k2.weights.checkpoint import ModelDescription

MAX_FILE_BYTES = 4_000_000
MAX_STEPS = 300  # number of last steps in a report
MAX_LINES = 200  # number of last lines of each stage in a report
MAX_REPORTS = 20
"""Older reports of the same run are deleted."""


class RunLog(DeploymentListener):
    """Listener that forwards its calls to ``listener`` and logs them in ``folder``. A full disk does not stop the run.

    ``log_tokens`` also logs the token ids of prompts and answers.

    Raises:
        RequestError: the folder cannot be created.
    """

    def __init__(self, folder: Path, listener: DeploymentListener, log_tokens: bool = False) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"--log-dir {folder}: the folder cannot be created: {error.strerror}") from None
        self._folder = folder
        self._listener = listener
        self._log_tokens = log_tokens
        self._has_write_failed = False
        self._num_reports = 0
        self._reports: deque[Path] = deque()
        self._lock = threading.Lock()  # each stage's lines arrive on its own thread
        self._lines: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=MAX_LINES))
        """The last lines by the stage that wrote them, or "coordinator"."""
        self._steps: deque[str] = deque(maxlen=MAX_STEPS)
        self._hosts: list[str] = []
        self._model = ""

    def log(self, line: str) -> None:
        """Log and forward a line of a stage's stderr, which begins with the stage and its host in brackets."""
        self._record(line.partition("]")[0].strip("["), line)
        self._listener.log(line)

    def notify(self, line: str) -> None:
        """Log and forward a message for the user."""
        self._record("coordinator", f"[coordinator] {line}")
        self._listener.notify(line)

    def phase(self, what: str) -> None:
        """Log and forward the next phase of all stages."""
        self._record("coordinator", f"[coordinator] {what}")
        self._listener.phase(what)

    def planned(self, model: ModelDescription, plans: Sequence[StagePlan]) -> None:
        """Record the plan for later reports, and forward it."""
        self._model = f"{model.config.num_hidden_layers} layers, digest {model.digest}"
        self._hosts = [
            f"stage {plan.rank} on {plan.host.ssh}: layers {plan.assignment.first_layer} to "
            f"{plan.assignment.end_layer - 1}, {plan.needed_bytes / 1e9:.1f} GB"
            for plan in plans
        ]
        self._listener.planned(model, plans)

    def progress(self, rank: int, message: FromStage) -> None:
        """Forward a stage's LayerLoaded or DownloadProgress."""
        self._listener.progress(rank, message)

    def step_done(self, report: StageReport) -> None:
        """Log a step that a stage has finished."""
        rows = [
            {
                "slot": row.slot,
                "position": row.position,
                "tokens": row.token_ids if self._log_tokens else len(row.token_ids),
                "prompt": row.is_prompt,
            }
            for row in (planned.row for planned in report.microbatch.rows)
        ]
        done = report.done
        times = {"busy_s": done.busy_s, "receive_s": done.receive_s, "send_s": done.send_s}
        line = {"at": _now(), "step": done.number, "stage": report.rank, "rows": rows, **times}
        with self._lock:
            self._steps.append(json.dumps(line))
            self._append("steps.jsonl", self._steps[-1])

    def write_report(self, reason: str, status: Sequence[str]) -> Path | None:
        """Write one file to attach to an issue; return its path, None if it cannot be written.

        ``status`` has a line for each stage, made before the stages were ended. The log lines show how each ended.
        """
        self._num_reports += 1
        path = self._folder / f"report-{time.strftime('%Y%m%d-%H%M%S')}-{self._num_reports}.txt"
        python = f"Python {platform.python_version()} on {platform.platform(terse=True)}"
        with self._lock:
            parts = (
                ("what happened", [f"{_now()} {reason}"]),
                ("status of the stages at the fault", status),
                ("versions", [f"mlx-k2 {version('mlx-k2')}, mlx {version('mlx')}, {python}"]),
                ("model and stages", [self._model, *self._hosts]),
                ("last steps" if self._log_tokens else "last steps, without tokens", list(self._steps)),
                *((f"last lines of {name}", list(lines)) for name, lines in sorted(self._lines.items())),
            )
        text = "\n".join("\n".join((f"== {title}", *lines, "")) for title, lines in parts)
        try:
            write_private(path, text.encode(errors="backslashreplace"))
            self._reports.append(path)
            if len(self._reports) > MAX_REPORTS:
                self._reports.popleft().unlink(missing_ok=True)
        except OSError as error:
            self._listener.notify(f"no report could be written: {path}: {error.strerror}")
            return None
        return path

    def _record(self, writer: str, line: str) -> None:
        stamped = f"{_now()} {line}"
        with self._lock:
            self._lines[writer].append(stamped)
            self._append("stages.log", stamped)

    def _append(self, name: str, line: str) -> None:
        path = self._folder / name
        try:
            if path.exists() and path.stat().st_size > MAX_FILE_BYTES:
                path.replace(path.with_suffix(path.suffix + ".before"))
            with open(path, "ab", opener=open_private_no_symlink) as file:
                file.write(line.encode(errors="backslashreplace") + b"\n")
            self._has_write_failed = False
        except OSError as error:
            if not self._has_write_failed:
                self._listener.notify(f"the log cannot be written: {path}: {error.strerror}; the run continues")
            self._has_write_failed = True


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")
