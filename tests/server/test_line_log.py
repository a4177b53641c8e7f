"""Tests of the log: it never holds up the server, and ends when its writer does not."""

import threading
import time

from mlx_k2.server.line_log import MAX_LINES, LineLog


def test_lines_are_written_in_order_before_the_end() -> None:
    written: list[str] = []
    with LineLog(written.append) as log:
        for number in range(100):
            log.write(str(number))
    assert written == [str(number) for number in range(100)]


def test_a_writer_that_blocks_holds_up_neither_writing_nor_the_end() -> None:
    blocked = threading.Event()
    began = time.monotonic()

    def write(_: str) -> None:
        blocked.wait()

    with LineLog(write) as log:
        for number in range(MAX_LINES + 10):
            log.write(str(number))
    assert time.monotonic() - began < 10
    blocked.set()


def test_lines_after_one_that_the_writer_refuses_are_written() -> None:
    written: list[str] = []

    def write(line: str) -> None:
        if line == "bad":
            raise BrokenPipeError
        written.append(line)

    with LineLog(write) as log:
        for line in ("bad", "good"):
            log.write(line)
    assert written == ["good"]
