"""Tests of reads without an end: each is refused in one line, with bounded memory."""

import io
import subprocess
from pathlib import Path

import pytest

from mlx_k2.bounded_read import MAX_BYTES, read_file, read_stream
from tests.cli.command import MLX_K2, CommandLine

MEMORY_KIB = 4_000_000  # of address space: less than the file would need, more than the program needs


def test_a_read_of_the_limit_is_complete_and_one_more_byte_is_refused(tmp_path: Path) -> None:
    assert read_stream(io.BytesIO(b"abc"), max_bytes=3) == b"abc"
    with pytest.raises(OSError, match="it is longer than 0 MiB"):
        read_stream(io.BytesIO(b"abcd"), max_bytes=3)
    path = tmp_path / "file"
    path.write_bytes(bytes(MAX_BYTES))
    assert len(read_file(path)) == MAX_BYTES


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("generate < /dev/zero", "the prompt cannot be read from standard input: it is longer than 16 MiB"),
        ("generate Hi --json-schema /dev/zero", "--json-schema: /dev/zero cannot be read: it is longer than 16 MiB"),
        ("generate Hi --hostfile /dev/zero", "cannot read the hostfile /dev/zero: it is longer than 16 MiB"),
        ("generate Hi --mcp /dev/zero --yes", "/dev/zero cannot be read: it is longer than 16 MiB"),
        ("generate --prompts - --out out < /dev/zero", "standard input, line 1: it is longer than 16 MiB"),
    ],
)
def test_an_input_without_an_end_is_refused_in_one_line(arguments: str, error: str, tmp_path: Path) -> None:
    script = f"ulimit -v {MEMORY_KIB}; exec {MLX_K2} {arguments}"
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=CommandLine(tmp_path).environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {error}\n")
