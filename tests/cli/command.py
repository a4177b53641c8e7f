"""The command as a user runs it: a process of its own, with a home of its own."""

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
    """Runs ``mlx-k2`` for a user whose home is ``home``."""

    home: Path

    def environment(self, **changes: str) -> Mapping[str, str]:
        """This process's environment with that home, and without what would change how output looks."""
        kept = {name: value for name, value in os.environ.items() if name not in _OURS}
        caches = {"HOME": str(self.home), "XDG_CACHE_HOME": str(self.home / "cache")}
        return kept | caches | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"} | changes

    def run(self, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            [MLX_K2, *arguments],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            env=self.environment(**environment),
        )

    def start(self, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        """Start it in a session of its own, as a terminal would: its process group is what Ctrl-C reaches."""
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
    """All that it started, directly or not: they have sessions of their own, and it is still their ancestor."""
    return psutil.Process(process.pid).children(recursive=True)
