"""Tests with no home folder, with a low limit of open files, and with a full disk."""

import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import MLX_K2, CommandLine
from tests.pty_command import on_pty

GENERATE = (MLX_K2, "generate", "--stages", "1", "--max-tokens", "3", "--raw", "Hello")
AS_UNKNOWN_USER = ("unshare", "--user", "--map-user=54321")
"""Start of a command that runs as a user without a passwd entry, who may still read this program's files."""
WITHOUT_LIMIT_RIGHT = ("setpriv", "--bounding-set=-sys_resource")
"""Start of a command that runs without the right to raise hard limits, which root has."""


def can_run(command: Sequence[str]) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run([*command, "true"], capture_output=True).returncode == 0


needs_user_namespaces = pytest.mark.skipif(
    not can_run(AS_UNKNOWN_USER), reason="needs Linux: user namespaces, and unshare of util-linux 2.38"
)
needs_setpriv = pytest.mark.skipif(not can_run(WITHOUT_LIMIT_RIGHT), reason="needs Linux: setpriv of util-linux")
needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full: run on Linux")


def without_home(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without HOME and the variables that begin with XDG_ and end with _HOME."""
    return {name: value for name, value in environment.items() if "HOME" not in name}


@pytest.mark.slow
@needs_user_namespaces
def test_a_user_without_home_and_passwd_entry_gets_an_answer(command_line: CommandLine) -> None:
    environment = without_home(command_line.environment())
    result = subprocess.run(
        [*AS_UNKNOWN_USER, *GENERATE], env=environment, cwd="/", capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.slow
@needs_user_namespaces
def test_a_user_without_home_and_passwd_entry_can_chat_on_a_terminal(command_line: CommandLine, tmp_path: Path) -> None:
    environment = without_home(command_line.environment())

    def start(**options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*AS_UNKNOWN_USER, MLX_K2, "chat", "--stages", "1"], **options)

    with on_pty(start, env=environment, cwd=tmp_path) as chat:
        chat.wait_for("Ctrl-D leaves")
        chat.wait_for(">")
        chat.press(b"\x04")  # Ctrl-D
        assert chat.end() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_setpriv
def test_a_low_hard_limit_of_open_files_suffices(command_line: CommandLine) -> None:
    command = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *WITHOUT_LIMIT_RIGHT, *GENERATE]
    result = subprocess.run(command, env=command_line.environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.slow
@needs_full_device
def test_a_full_disk_for_standard_error_does_not_change_the_answer(command_line: CommandLine) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [MLX_K2, "generate", "--stages", "1", "--seed", "1", "What is 17 plus 25?"]
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=full, text=True, env=command_line.environment(), timeout=60
        )
    assert (result.returncode, result.stdout) == (0, "17 + 25 = 42\n")


@pytest.mark.slow
@needs_full_device
def test_a_full_disk_for_standard_output_is_named_and_the_conversation_is_saved(tmp_path: Path) -> None:
    command_line = CommandLine(tmp_path)  # a home folder with no other chats
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [MLX_K2, "chat", "--stages", "1", "--max-tokens", "50"],
            input=b"Hello\n",
            stdout=full,
            stderr=subprocess.PIPE,
            env=command_line.environment(),
            timeout=60,
        )
    assert result.returncode == 1, result.stderr
    assert b"error: No space left on device: standard output" in result.stderr
    assert b"Traceback" not in result.stderr
    (saved,) = (command_line.home / ".local" / "state" / "mlx-k2").glob("chat-*.json")
    assert b'"Hello"' in saved.read_bytes()
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
