"""Tests of the frames of a stream and of the mark that opens it."""

import io
import re
import struct
from contextlib import suppress
from typing import IO, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2 import __version__
from mlx_k2.errors import ProtocolError
from mlx_k2.protocol.framing import (
    MARK,
    MARK_START,
    MAX_PAYLOAD_BYTES,
    MAX_SHELL_OUTPUT_BYTES,
    Frame,
    Kind,
    encode_frame,
    read_frame,
    skip_to_mark,
)

frames = st.lists(st.builds(Frame, st.sampled_from(Kind), st.binary(max_size=50)), max_size=8)


class ShortReads(io.RawIOBase):
    """A stream that returns at most ``max_bytes`` at a time, as an unbuffered pipe may."""

    def __init__(self, data: bytes, max_bytes: int) -> None:
        self._data = io.BytesIO(data)
        self._max_bytes = max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._data.read(min(len(buffer), self._max_bytes))
        buffer[: len(data)] = data
        return len(data)


@given(frames, st.integers(1, 9))
def test_frames_are_read_from_a_stream_that_arrives_in_pieces_of_any_size(written: list[Frame], max_bytes: int) -> None:
    stream = cast(IO[bytes], ShortReads(b"".join(encode_frame(*frame) for frame in written), max_bytes))
    for frame in written:
        assert read_frame(stream) == frame
    assert read_frame(stream) is None


@given(frames, st.data())
def test_a_stream_that_ends_inside_a_frame_is_refused(complete: list[Frame], data: st.DataObject) -> None:
    last = encode_frame(Kind.MESSAGE, b"the last frame")
    num_bytes = data.draw(st.integers(1, len(last) - 1))
    stream = io.BytesIO(b"".join(encode_frame(*frame) for frame in complete) + last[:num_bytes])
    for _ in complete:
        read_frame(stream)
    with pytest.raises(ProtocolError, match="middle of a frame"):
        read_frame(stream)


@given(st.binary(max_size=200))
def test_random_bytes_are_read_as_frames_or_refused(data: bytes) -> None:
    stream = io.BytesIO(data)
    with suppress(ProtocolError):
        while read_frame(stream) is not None:
            pass


@pytest.mark.parametrize(
    "header",
    [struct.pack("<IB", 0, 99), struct.pack("<IB", MAX_PAYLOAD_BYTES + 1, Kind.MESSAGE)],
    ids=["unknown kind", "too large a length"],
)
def test_a_header_with_an_unknown_kind_or_too_large_a_length_is_refused_before_its_payload(header: bytes) -> None:
    with pytest.raises(ProtocolError, match="bytes that are not frames"):
        read_frame(io.BytesIO(header))


# The output may end with a part of the mark's start, but together with the mark after it must not form an earlier mark.
@given(st.binary(max_size=300).filter(lambda shell_output: MARK_START not in shell_output + MARK_START[:-1]))
def test_the_output_of_a_login_shell_before_the_opening_mark_is_skipped(shell_output: bytes) -> None:
    stream = io.BytesIO(shell_output + MARK + encode_frame(Kind.HEARTBEAT, b"beat"))
    assert skip_to_mark(stream) == shell_output
    assert read_frame(stream) == Frame(Kind.HEARTBEAT, b"beat")


def test_up_to_64_kb_before_the_opening_mark_is_skipped_and_more_is_refused() -> None:
    assert len(skip_to_mark(io.BytesIO(b"x" * MAX_SHELL_OUTPUT_BYTES + MARK))) == MAX_SHELL_OUTPUT_BYTES
    with pytest.raises(ProtocolError, match="sent 64 KB without its opening mark"):
        skip_to_mark(io.BytesIO(b"x" * (MAX_SHELL_OUTPUT_BYTES + 1) + MARK))


def test_output_without_an_opening_mark_is_quoted_in_the_error() -> None:
    with pytest.raises(ProtocolError, match="ended without its opening mark: no such command"):
        skip_to_mark(io.BytesIO(b"no such command\n"))


@pytest.mark.parametrize(
    ("mark", "version"),
    [
        (b"mlx-k2 control 0.0.9\n", "0.0.9"),
        (b"mlx-k2 control 9.1.dev3+g1234\n" + b"\xff" * 50, "9.1.dev3+g1234"),
        (b"mlx-k2 control 2" + bytes(100), "of another version"),  # the line is too long
        (b"mlx-k2 control 2", "of another version"),  # the line does not end
        (b"mlx-k2 control \x1b[31m\n", "of another version"),  # a version that is not printed
    ],
)
def test_the_mark_of_another_version_is_refused_with_both_versions(mark: bytes, version: str) -> None:
    error = f"its mlx-k2 is {version}, and that of this machine is {__version__}: install the same on both"
    with pytest.raises(ProtocolError, match=re.escape(error)):
        skip_to_mark(io.BytesIO(b"Welcome!\n" + mark))
