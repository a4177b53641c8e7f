"""Tests on machines without a home folder, with few open files and with a full disk: the cause is named."""

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cli.command import MLX_K2, CommandLine

ANSWER = (MLX_K2, "generate", "--stages", "1", "--max-tokens", "3", "--raw", "Hello")
NO_ENTRY = ("unshare", "--user", "--map-user=54321")
"""Runs a command as a user without a passwd entry, who may still read this program's files."""
NO_RAISING = ("setpriv", "--bounding-set=-sys_resource")
"""Runs a command without the right to raise hard limits, which root has."""


def works(command: Sequence[str]) -> bool:
    return (
        shutil.which(command[0]) is not None and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not works(NO_ENTRY), reason="needs Linux: user namespaces, and unshare of util-linux 2.38")
def test_a_user_without_home_and_passwd_entry_gets_an_answer(command_line: CommandLine) -> None:
    environment = {name: value for name, value in command_line.environment().items() if "HOME" not in name}
    done = subprocess.run([*NO_ENTRY, *ANSWER], env=environment, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not works(NO_ENTRY), reason="needs Linux: user namespaces, and unshare of util-linux 2.38")
def test_a_user_without_home_and_passwd_entry_can_chat_on_a_terminal(command_line: CommandLine, tmp_path: Path) -> None:
    environment = {name: value for name, value in command_line.environment().items() if "HOME" not in name}
    terminal, inner = os.openpty()
    command = [*NO_ENTRY, MLX_K2, "chat", "--stages", "1"]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdin=inner, stdout=inner, stderr=inner) as chat:
        os.close(inner)
        shown = b""
        while b"Ctrl-D leaves" not in shown:
            shown += os.read(terminal, 65536)  # an error if the chat has ended
        while chat.poll() is None:
            os.write(terminal, b"\x04")
            with contextlib.suppress(subprocess.TimeoutExpired):
                chat.wait(0.2)
    os.close(terminal)
    assert chat.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not works(NO_RAISING), reason="needs Linux: setpriv of util-linux")
def test_a_low_hard_limit_of_open_files_suffices(command_line: CommandLine) -> None:
    command = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *NO_RAISING, *ANSWER]
    done = subprocess.run(command, env=command_line.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full: run on Linux")
def test_a_full_disk_for_messages_ends_nothing_and_the_answer_is_whole(command_line: CommandLine) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [MLX_K2, "generate", "--stages", "1", "--seed", "1", "What is 17 plus 25?"]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=full, text=True, env=command_line.environment(), timeout=60
        )
    assert (done.returncode, done.stdout) == (0, "17 + 25 = 42\n")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full: run on Linux")
def test_a_full_disk_for_standard_output_is_named_and_the_chat_is_kept(tmp_path: Path) -> None:
    command_line = CommandLine(tmp_path)  # a home folder with no other chats
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [MLX_K2, "chat", "--stages", "1", "--max-tokens", "50"],
            input=b"Hello\n",
            stdout=full,
            stderr=subprocess.PIPE,
            env=command_line.environment(),
            timeout=60,
        )
    assert done.returncode == 1, done.stderr
    assert b"error: No space left on device: standard output" in done.stderr
    assert b"Traceback" not in done.stderr
    (kept,) = (command_line.home / ".local" / "state" / "mlx-k2").glob("chat-2*.json")
    assert b'"Hello"' in kept.read_bytes()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    kept.unlink()
