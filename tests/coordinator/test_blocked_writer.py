"""Test of an answer to a terminal whose reader is suspended: another answer ends, and this one is complete later."""

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

from tests.coordinator.blocked_writer import NUM_TOKENS
from tests.local_cluster import write_model

SUSPENDED_S = 30.0 if hypothesis.settings.get_current_profile_name() == "long" else 1.0
"""Time for which the reader stays suspended after both answers have ended in the engine."""


@pytest.mark.slow
def test_a_suspended_terminal_delays_no_other_answer_and_gets_its_whole_answer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    transcript = tmp_path / "transcript"
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "tests.coordinator.blocked_writer", str(model)]
    with (
        transcript.open("wb") as file,
        subprocess.Popen(["cat"], stdin=master, stdout=file, stderr=subprocess.DEVNULL) as reader,
        subprocess.Popen(command, stdout=slave, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as writer,
    ):
        os.close(master)
        os.close(slave)
        try:
            suspend_and_resume(reader, writer, transcript)
        finally:
            reader.kill()
            writer.kill()
    assert len([json.loads(line) for line in transcript.read_text().splitlines()]) == NUM_TOKENS


def suspend_and_resume(reader: subprocess.Popen[bytes], writer: subprocess.Popen[bytes], transcript: Path) -> None:
    """Suspend the reader from the first token until SUSPENDED_S after the end of both answers in the engine."""
    while not transcript.stat().st_size:
        assert writer.poll() is None
        threading.Event().wait(0.001)
    reader.send_signal(signal.SIGSTOP)
    assert writer.stderr is not None
    assert [writer.stderr.readline() for _ in range(2)] == [b"other ended\n", b"written answer ended\n"]
    size_bytes = transcript.stat().st_size
    threading.Event().wait(SUSPENDED_S)
    assert transcript.stat().st_size == size_bytes and writer.poll() is None, "the writer is not blocked"
    reader.send_signal(signal.SIGCONT)
    assert writer.wait(60) == 0
    reader.wait(60)
