"""The property list with which macOS runs a server. Knows no model."""

import plistlib
from collections.abc import Sequence
from pathlib import Path

LABEL = "mlx-k2.serve"
_STAGES_END_S = 30
"""Seconds in which the stages end, after the running requests."""


def property_list(command: Sequence[str], folder: Path, home: Path, path_variable: str, drain_s: float) -> str:
    """Return a property list of launchd that runs ``command`` in ``folder`` at login, and again after a failure.

    ``home`` is the user's home folder, for the log, and ``path_variable`` the value of PATH. launchd kills the command
    if it has not ended ``drain_s`` + 30 s after SIGTERM.
    """
    log_path = str(home / "Library" / "Logs" / f"{LABEL}.log")
    entries = {
        "Label": LABEL,
        "ProgramArguments": list(command),
        "WorkingDirectory": str(folder),
        "EnvironmentVariables": {"PATH": path_variable},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ExitTimeOut": round(drain_s) + _STAGES_END_S,
        "ProcessType": "Interactive",  # macOS limits the CPU of other types
        "StandardErrorPath": log_path,
        "StandardOutPath": log_path,
    }
    return plistlib.dumps(entries, sort_keys=False).decode()
