"""The mlx-k2 command run as a user runs it: in its own process, with its own home folder."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

MLX_K2 = str(Path(sys.executable).with_name("mlx-k2"))
_OURS = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONPATH")


@dataclass(frozen=True)
class CommandLine:
    """A runner of ``mlx-k2`` for a user whose home folder is ``home``."""

    home: Path

    def environment(self, **changes: str) -> Mapping[str, str]:
        """Return this process's environment with that home folder, without variables that change the output's look."""
        kept = {name: value for name, value in os.environ.items() if name not in _OURS}
        caches = {"HOME": str(self.home), "XDG_CACHE_HOME": str(self.home / "cache")}
        return kept | caches | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"} | changes

    def run(
        self, *arguments: str, stdin: str = "", cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end, in the folder ``cwd``."""
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


def processes_below(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return all descendants of ``process``. They have their own sessions, but ``process`` is still their ancestor."""
    return psutil.Process(process.pid).children(recursive=True)
