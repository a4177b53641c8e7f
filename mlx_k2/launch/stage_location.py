"""The location of one stage, and the commands that start it there. Starts nothing itself."""

import shlex
import sys
from dataclasses import dataclass

from mlx_k2.launch.ssh import ssh_command

LOGIN_SHELL_COMMAND = """exec "$SHELL" -lc 'exec mlx-k2 stage'"""
"""The command for a host whose Python has another path than here. The first line of the mlx-k2 script there has it."""


@dataclass(frozen=True)
class StageLocation:
    """The host of one stage, and the path of the Python that starts the stage there.

    ``ssh`` is a name that the system's ssh knows; None is this machine. ``python`` None: try the path of this program's
    Python, and over ssh then ``mlx-k2`` on a login shell's PATH.
    """

    ssh: str | None = None
    python: str | None = None

    @property
    def host(self) -> str:
        """The host's name for messages."""
        return self.ssh or "this machine"

    def start_commands(self) -> tuple[tuple[str, ...], ...]:
        """Return the commands to try in order. Each is tried if the one before found no usable Python or no mlx_k2.

        With ``-P`` a stage imports nothing from its current folder.
        """
        python = self.python or sys.executable
        if self.ssh is None:
            return ((python, "-P", "-m", "mlx_k2.stage"),)
        path = "./" + python[2:] if python.startswith("~/") else python  # ssh starts in the home folder
        first = ssh_command(self.ssh, f"exec {shlex.quote(path)} -P -m mlx_k2.stage")
        if self.python is not None:
            return (first,)
        return (first, ssh_command(self.ssh, LOGIN_SHELL_COMMAND))
