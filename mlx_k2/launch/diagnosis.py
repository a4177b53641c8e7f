"""Diagnosis of a stage's process that did not start or was lost, in words that follow its host's name. Pure."""

import re
import sys
from dataclasses import dataclass

from mlx_k2.launch.ssh import SSH_EXIT_CODE, explain_ssh_failure, install_commands
from mlx_k2.launch.stage_location import StageLocation

_NO_COMMAND_EXIT_CODES = (126, 127)  # of a shell that cannot run a command or does not find it
_NO_COMMAND = re.compile("not found|no such file|does not exist|cannot execute|permission denied", re.IGNORECASE)
_NO_PACKAGE = re.compile(r"No module named '?mlx_k2\b")
_GIVE_PYTHON = 'give the path of a Python that has mlx_k2 as "python" in the hostfile'
_OLD_PYTHON = re.compile(r"unknown option:? -P\b", re.IGNORECASE)


@dataclass(frozen=True)
class StartFailure:
    """The reason of a failed start, and whether another start command on the same host may work."""

    reason: str
    another_may_work: bool = False


def explain_start_failure(location: StageLocation, exit_code: int | None, stderr: str, problem: str) -> StartFailure:
    """Explain why a process ended before its opening mark. ``problem`` is the error that reading its output gave."""
    if location.ssh is not None and exit_code == SSH_EXIT_CODE:
        return StartFailure(explain_ssh_failure(location.ssh, stderr))
    if _OLD_PYTHON.search(stderr):  # -P is new in Python 3.11
        reason = f"its {location.python or sys.executable} is older than Python 3.11: {_GIVE_PYTHON}"
        return StartFailure(reason, another_may_work=True)
    lacks_package = _NO_PACKAGE.search(stderr) is not None
    lacks_command = exit_code in _NO_COMMAND_EXIT_CODES or (exit_code == 1 and _NO_COMMAND.search(stderr) is not None)
    if lacks_package or lacks_command:
        return StartFailure(_explain_missing(location, package_only=lacks_package), another_may_work=True)
    return StartFailure(": ".join([problem, *stderr.strip().splitlines()[-1:]]))


def explain_lost_connection(location: StageLocation, exit_code: int | None) -> str:
    """Explain why a connection ended without the guard's last frame. ``exit_code``: of ssh, or of a local guard."""
    if location.ssh is not None and exit_code == SSH_EXIT_CODE:
        return "the ssh connection was lost (cable, power, sleep, its sshd), or its guard was killed"
    if exit_code is not None and exit_code < 0:
        return f"its guard was ended by signal {-exit_code}"
    return "the connection ended without its guard's last frame"


def _explain_missing(location: StageLocation, *, package_only: bool) -> str:
    """Return which Python or package is missing, and how to install it."""
    python = location.python or sys.executable
    remedy = install_commands(location.ssh, python if package_only else "python3")
    if location.ssh is not None and location.python is None:
        problem = f"neither {python} nor mlx-k2 on its login shell's PATH can be run there"
    elif package_only:
        return f"its {python} has no mlx_k2: {remedy}"
    else:
        problem = f"it has no {python}"
    return f"{problem}: {remedy}, or {_GIVE_PYTHON}"
