"""The mlx-k2 command run as a user runs it: in its own process, with its own home folder."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

MLX_K2 = str(Path(sys.executable).with_name("mlx-k2"))
_REMOVED_VARIABLES = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONPATH")
"""Variables of this process that would change the output of the command, or the code that it runs."""


@dataclass(frozen=True)
class CommandLine:
    """A runner of ``mlx-k2`` for a user whose home folder is ``home``."""

    home: Path

    def environment(self, **changes: str) -> Mapping[str, str]:
        """Return this process's environment with the home folder and ``changes``, without _REMOVED_VARIABLES."""
        inherited = {name: value for name, value in os.environ.items() if name not in _REMOVED_VARIABLES}
        folders = {"HOME": str(self.home), "XDG_CACHE_HOME": str(self.home / "cache")}
        return inherited | folders | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"} | changes

    def run(
        self, *arguments: str, stdin: str = "", cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end, at most 60 s, in the folder ``cwd``. ``environment`` has changed variables."""
        return subprocess.run(
            [MLX_K2, *arguments],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            cwd=cwd,
            env=self.environment(**environment),
        )

    def start(self, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        """Start the command in its own session, as a terminal does: Ctrl-C signals its process group."""
        return subprocess.Popen(
            [MLX_K2, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,
            env=self.environment(),
            start_new_session=True,
        )


def descendants_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes that ``process`` and its descendants have started and that still run."""
    return psutil.Process(process.pid).children(recursive=True)


def stage_processes(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the stages among ``processes``, without guards and watchdogs, in the order of their start."""
    stages = [process for process in processes if "mlx_k2.stage.program" in process.cmdline()]
    return sorted(stages, key=psutil.Process.create_time)


def read_terminal(controller: int) -> str:
    """Return the output on a pseudo-terminal until its program has ended, and close ``controller``, our side of it."""
    output = b""
    with contextlib.suppress(OSError):  # Linux reports the end as an error
        while data := os.read(controller, 65536):
            output += data
    os.close(controller)
    return output.decode()
