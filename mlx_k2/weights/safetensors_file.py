"""The safetensors container: an 8-byte header length, a JSON header, then the tensors' bytes. Knows no model.

https://github.com/huggingface/safetensors describes the format. Reading is limited to headers. The package safetensors
decides whether a file is accepted; this module adds the tensors' offsets, and error messages for refused files.
"""

import errno
import math
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from safetensors import SafetensorError, safe_open

from mlx_k2.errors import CheckpointError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import convert, read_json
from mlx_k2.weights.inventory import TensorSpec

MAX_HEADER_BYTES = 100_000_000
"""Largest header that the format allows."""

# First bytes, in lower case, of other formats that occur under the name of a checkpoint's file.
_LFS_POINTER = b"version https://git-lfs"
_OTHER_FORMATS: Mapping[bytes, str] = {
    b"gguf": "it is a GGUF file, which mlx-k2 does not read: fetch the original checkpoint",
    b"<!doctype html": "it is an HTML page, for instance of an error or a login: fetch the file again",
    b"<html": "it is an HTML page, for instance of an error or a login: fetch the file again",
    b"<?xml": "it is an XML page, for instance of an error: fetch the file again",
    b"pk\x03\x04": "it is a ZIP archive, for instance of PyTorch: fetch the original checkpoint",
}
_PEEK_BYTES = 64

TensorBytes = Callable[[TensorSpec], Iterable[bytes]]
"""A function that yields a tensor's data in pieces."""


class StoredTensor(msgspec.Struct, frozen=True):
    """The header's entry of one tensor; ``data_offsets`` are its first and end byte, counted from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """Bytes between the two offsets."""
        return self.data_offsets[1] - self.data_offsets[0]


class Header(msgspec.Struct, frozen=True):
    """A file's tensors by name, and the byte at which their data starts."""

    tensors: Mapping[str, StoredTensor]
    data_start: int


def open_regular(path: Path) -> BinaryIO:
    """Open a file of a checkpoint to read. Refuse pipes and devices, which may never end, and known other formats.

    Raises:
        OSError: the file cannot be opened, is not a regular file, or its first bytes are those of another format.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # otherwise the open of a pipe waits for a writer

    file = open(path, "rb", opener=opener)  # noqa: SIM115 - the caller closes it
    is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    problem = _other_format(file.read(_PEEK_BYTES), path) if is_regular else "it is not a regular file"
    if problem is not None:
        file.close()
        raise OSError(errno.EINVAL, problem, str(path))
    file.seek(0)
    return file


def _other_format(start: bytes, path: Path) -> str | None:
    """Return the error text for a file whose first bytes ``start`` show that it is not a checkpoint's; else None."""
    start = start.lstrip().lower()
    if not start.strip(b"\0"):
        return "it is empty or begins with zeros, as an interrupted download leaves it: fetch the file again"
    if start.startswith(_LFS_POINTER):
        pull = f"git -C {shlex.quote(str(path.parent))} lfs pull"
        return (
            f"it is a Git LFS pointer, because its repository was cloned without git-lfs: install it and run `{pull}`"
        )
    return next((problem for beginning, problem in _OTHER_FORMATS.items() if start.startswith(beginning)), None)


def read_header(path: Path) -> Header:
    """Return the header of ``path``, checked against the file's length. Read no tensor.

    Raises:
        CheckpointError: the file is missing, is not safetensors, or is truncated.
    """
    raw, file_bytes = _read_raw_header(path)
    data_start = 8 + len(raw)
    try:
        with safe_open(path, framework="numpy") as file:
            tensors, end = {}, 0
            for name in file.offset_keys():  # in the order of the tensors' data, which have no gaps between them
                entry = file.get_slice(name)
                first, shape = end, tuple(entry.get_shape())
                end += _num_bytes(entry.get_dtype(), shape)
                tensors[name] = StoredTensor(entry.get_dtype(), shape, (first, end))
    except (SafetensorError, OSError) as error:
        _raise_known_reason(raw, path, file_bytes - data_start)
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    return Header(tensors, data_start)


def _read_raw_header(path: Path) -> tuple[bytes, int]:
    """Return the header's bytes, and the file's length."""
    try:
        with open_regular(path) as file:
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is truncated: it has {len(prefix)} bytes; fetch the file again")
            if header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is not a safetensors file: it does not begin with a header's length")
            raw = file.read(header_bytes)
            file_bytes = file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete; fetch it again") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if len(raw) < header_bytes:
        raise CheckpointError(f"{path} is truncated: its header alone has {header_bytes} bytes; fetch the file again")
    return raw, file_bytes


def write_file(path: Path, specs: Sequence[TensorSpec], tensor_bytes: TensorBytes) -> int:
    """Write the tensors ``specs`` in order, with the data that ``tensor_bytes`` yields. Return their total bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        header[spec.name] = StoredTensor(spec.dtype, spec.shape, (end, end + spec.num_bytes))
        end += spec.num_bytes
    raw = msgspec.json.encode(header)
    raw += b" " * (-len(raw) % 8)  # aligns the data to a multiple of 8
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for spec in specs:
            num_bytes = sum(file.write(piece) for piece in tensor_bytes(spec))
            assert num_bytes == spec.num_bytes, (
                f"{spec.name}: {num_bytes} bytes written, its shape has {spec.num_bytes}"
            )
    return end


def _num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor. Each dtype but BOOL (8 bits) has its bits in its name, for instance F8_E4M3."""
    bits = re.search(r"\d+", dtype)
    return math.prod(shape) * (int(bits[0]) if bits else 8) // 8


def _raise_known_reason(raw: bytes, path: Path, data_bytes: int) -> None:
    """Raise a CheckpointError if a file's header ``raw`` or the ``data_bytes`` after it show why it was refused."""
    try:
        fields = read_json(raw, dict[str, Any])
        fields.pop("__metadata__", None)
        tensors = convert(fields, dict[str, StoredTensor])
    except JsonError as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header cannot be read ({error})") from None
    expected_bytes = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        first, end = tensor.data_offsets
        if first != expected_bytes or end < first:
            position = f"is at bytes {first} to {end}, where byte {expected_bytes} should follow"
            raise CheckpointError(f"{path}: {name} {position}")
        expected_bytes = end
    if data_bytes < expected_bytes:
        missing, file_bytes = expected_bytes - data_bytes, 8 + len(raw) + expected_bytes
        raise CheckpointError(f"{path} is truncated: {missing} of its {file_bytes} bytes are missing; fetch it again")
    if data_bytes > expected_bytes:
        raise CheckpointError(f"{path} has {data_bytes - expected_bytes} bytes after its last tensor; fetch it again")
    for name, tensor in tensors.items():
        needed_bytes = _num_bytes(tensor.dtype, tensor.shape)
        if needed_bytes != tensor.num_bytes:
            raise CheckpointError(f"{path}: {name} spans {tensor.num_bytes} bytes where its shape has {needed_bytes}")
