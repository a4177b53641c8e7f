"""Tests of the log: a writer that blocks or fails delays neither the server nor its end."""

import threading
import time

from mlx_k2.server.line_log import MAX_LINES, LineLog


def test_lines_are_written_in_order_before_the_end() -> None:
    written_lines: list[str] = []
    with LineLog(written_lines.append) as log:
        for number in range(100):
            log.write(str(number))
    assert written_lines == [str(number) for number in range(100)]


def test_a_writer_that_blocks_delays_neither_write_nor_the_end() -> None:
    may_return = threading.Event()
    started_at = time.monotonic()

    def write(_: str) -> None:
        may_return.wait()

    with LineLog(write) as log:
        for number in range(MAX_LINES + 10):
            log.write(str(number))
    assert time.monotonic() - started_at < 10
    may_return.set()


def test_after_a_line_that_cannot_be_written_the_next_one_is() -> None:
    written_lines: list[str] = []

    def write(line: str) -> None:
        if line == "bad":
            raise BrokenPipeError
        written_lines.append(line)

    with LineLog(write) as log:
        for line in ("bad", "good"):
            log.write(line)
    assert written_lines == ["good"]
