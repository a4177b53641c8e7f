"""Test of a terminal whose reader is suspended during an answer: other answers end, and this one is complete later."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import hypothesis
import pytest

from tests.coordinator.blocked_writer import OTHER_REQUEST, WRITTEN_REQUEST
from tests.local_cluster import write_model

SUSPENDED_S = 30.0 if hypothesis.settings.get_current_profile_name() == "long" else 1.0


@pytest.mark.slow
def test_a_suspended_terminal_delays_no_other_answer_and_gets_its_own_complete(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    output = tmp_path / "output"
    master, slave = pty.openpty()
    program = [sys.executable, "-m", "tests.coordinator.blocked_writer", str(model)]
    with (
        output.open("wb") as file,
        subprocess.Popen(["cat"], stdin=master, stdout=file, stderr=subprocess.DEVNULL) as reader,
        subprocess.Popen(program, stdout=slave, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as writer,
    ):
        os.close(master)
        os.close(slave)
        try:
            suspend_and_resume(reader, writer, output)
        finally:
            reader.kill()
            writer.kill()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == WRITTEN_REQUEST.max_tokens == OTHER_REQUEST.max_tokens


def suspend_and_resume(reader: subprocess.Popen[bytes], writer: subprocess.Popen[bytes], output: Path) -> None:
    """Suspend the reader from the first tokens until both answers have ended in the engine, and SUSPENDED_S longer."""
    while not output.stat().st_size:
        assert writer.poll() is None
        threading.Event().wait(0.001)
    reader.send_signal(signal.SIGSTOP)
    assert writer.stderr is not None
    assert [writer.stderr.readline() for _ in range(2)] == [b"other ended\n", b"written answer ended\n"]
    size = output.stat().st_size
    threading.Event().wait(SUSPENDED_S)
    assert output.stat().st_size == size and writer.poll() is None, "the writer is not blocked"
    reader.send_signal(signal.SIGCONT)
    assert writer.wait(60) == 0
    reader.wait(60)
