"""Tests of FrameReader and FrameWriter, the threads that read and write the frames of a pipe."""

import gc
import os
import queue
import random
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import pytest

from mlx_k2.errors import ProtocolError
from mlx_k2.protocol.framing import MAX_QUEUED_FRAMES, Frame, FrameReader, FrameWriter, Kind

NUM_INTERRUPTS = 200


class Pipe:
    """A pipe between a writer and a reader, with the arguments of the reader's calls of on_frame and of on_end."""

    def __init__(self) -> None:
        read_fd, write_fd = os.pipe()
        self.read_end = os.fdopen(read_fd, "rb")
        self.write_end = os.fdopen(write_fd, "wb")
        self.frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self.ends: queue.SimpleQueue[ProtocolError | None] = queue.SimpleQueue()

    def start_reader(self) -> FrameReader:
        return FrameReader(self.read_end, "test", self.frames.put, self.ends.put)


def fill_queue(writer: FrameWriter) -> None:
    """Put frames until the queue of a writer, whose pipe nobody reads, is full and ``put`` raises."""
    writer.put(Kind.MESSAGE, bytes(1_000_000))  # more than a pipe holds, so that the writing thread blocks
    for _ in range(MAX_QUEUED_FRAMES + 1):
        writer.put(Kind.MESSAGE, b"")


def test_frames_arrive_in_order_followed_by_the_end_of_the_stream() -> None:
    pipe = Pipe()
    writer = FrameWriter(pipe.write_end, "test")
    payloads = [bytes([value]) for value in range(100)]
    for payload in payloads:
        writer.put(Kind.MESSAGE, payload)
    writer.close(5)
    pipe.start_reader().join(30)
    assert [pipe.frames.get(timeout=30).payload for _ in range(100)] == payloads
    assert pipe.ends.get(timeout=30) is None


def test_flush_returns_when_the_frames_so_far_are_written_or_its_time_is_over() -> None:
    pipe = Pipe()
    writer = FrameWriter(pipe.write_end, "test")
    writer.put(Kind.MESSAGE, b"first")
    writer.flush(30)
    assert pipe.read_end.read1(100).endswith(b"first")
    writer.put(Kind.MESSAGE, bytes(1_000_000))
    writer.flush(0.05)  # the pipe is full
    assert not pipe.write_end.closed


def test_put_does_not_block_and_a_full_queue_is_an_error_that_names_the_peer() -> None:
    pipe = Pipe()
    writer = FrameWriter(pipe.write_end, "stage 1 on mac-2")
    with pytest.raises(ProtocolError, match="stage 1 on mac-2 has stopped reading"):
        fill_queue(writer)


def test_close_returns_after_its_timeout_and_the_stream_closes_when_the_peer_reads() -> None:
    pipe = Pipe()
    writer = FrameWriter(pipe.write_end, "test")
    for _ in range(10):
        writer.put(Kind.MESSAGE, bytes(100_000))  # in all more than a pipe holds
    writer.close(0.05)
    assert not pipe.write_end.closed
    pipe.start_reader()
    assert pipe.ends.get(timeout=30) is None
    assert pipe.frames.qsize() == 10


def test_a_full_queue_does_not_prevent_closing_the_stream() -> None:
    pipe = Pipe()
    writer = FrameWriter(pipe.write_end, "test")
    with pytest.raises(ProtocolError):
        fill_queue(writer)
    writer.close(0)
    pipe.start_reader()
    assert pipe.ends.get(timeout=30) is None


def test_frames_for_a_closed_peer_are_dropped_and_the_stream_is_closed() -> None:
    pipe = Pipe()
    pipe.read_end.close()
    writer = FrameWriter(pipe.write_end, "test")
    writer.put(Kind.MESSAGE, b"lost")
    writer.close(5)
    assert pipe.write_end.closed
    writer.put(Kind.MESSAGE, b"lost too")


class _Interrupted(BaseException):
    """The exception that the signal handler of the next test raises."""


@pytest.mark.slow
def test_a_writer_still_works_after_a_signal_handler_raises_inside_put() -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _Interrupted

    def send_signals() -> None:
        main = threading.main_thread().ident or 0
        for _ in range(NUM_INTERRUPTS):
            putting.get()
            time.sleep(rng.uniform(0, 2e-4))
            signal.pthread_kill(main, signal.SIGUSR1)

    def put_until_stopped() -> NoReturn:
        while True:
            with suppress(ProtocolError):  # the reader is slower
                writer.put(Kind.MESSAGE, b"")

    rng = random.Random(0)
    putting: queue.SimpleQueue[None] = queue.SimpleQueue()
    pipe = Pipe()
    pipe.start_reader()
    writer = FrameWriter(pipe.write_end, "test")
    previous_handler = signal.signal(signal.SIGUSR1, interrupt)
    sender = threading.Thread(target=send_signals)
    sender.start()
    gc.disable()  # if the signal interrupts a callback of the collector (Hypothesis has one), the exception is lost
    for _ in range(NUM_INTERRUPTS):
        with suppress(_Interrupted):
            putting.put(None)
            put_until_stopped()
    gc.enable()
    sender.join()
    signal.signal(signal.SIGUSR1, previous_handler)
    writer.close(5)
    assert pipe.ends.get(timeout=30) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_whose_frame_handler_fails_reports_a_protocol_error_as_the_end() -> None:
    def fail(_: Frame) -> None:
        raise RuntimeError("a fault of the handler")

    pipe = Pipe()
    reader = FrameReader(pipe.read_end, "test", fail, pipe.ends.put)
    FrameWriter(pipe.write_end, "test").put(Kind.MESSAGE, b"")
    assert isinstance(pipe.ends.get(timeout=30), ProtocolError)
    reader.join(30)


def test_the_error_of_a_frame_handler_that_refuses_a_frame_is_the_end() -> None:
    def refuse(_: Frame) -> None:
        raise ProtocolError("not this one")

    pipe = Pipe()
    FrameReader(pipe.read_end, "test", refuse, pipe.ends.put)
    FrameWriter(pipe.write_end, "test").put(Kind.MESSAGE, b"")
    assert str(pipe.ends.get(timeout=30)) == "not this one"
