"""Tests of the reader of safetensors headers: it accepts exactly the files that the package safetensors accepts."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from mlx_k2.errors import CheckpointError
from mlx_k2.weights.safetensors_file import read_header
from tests.examples import at_least

pytestmark = pytest.mark.timeout(120)

DTYPE_BYTES = {"F32": 4, "BF16": 2, "I32": 4, "U8": 1, "BOOL": 1, "I64": 8, "F8_E4M3": 1}
VALID_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@st.composite
def valid_headers(choose: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Generate a valid header as a dictionary, and the number of bytes of its data."""
    header: dict[str, Any] = {}
    end = 0
    names = choose(st.lists(st.text(max_size=4), unique=True, max_size=4))
    for name in names:
        dtype = choose(st.sampled_from(sorted(DTYPE_BYTES)))
        shape = choose(st.lists(st.integers(0, 3), max_size=3))
        first, end = end, end + DTYPE_BYTES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}
    items = choose(st.permutations(list(header.items())))
    metadata = choose(st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    return dict(items) | ({} if metadata is None else {"__metadata__": metadata}), end


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**65)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([*DTYPE_BYTES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed_files(choose: st.DrawFn) -> bytes:
    """Generate a valid file, or one with a single change: in the header, its text, its length or the data."""
    header, num_bytes = choose(valid_headers())
    changed = choose(st.sampled_from(["nothing", "field", "entry", "metadata", "text", "length", "data"]))
    entries = [name for name in header if name != "__metadata__"]
    if changed == "field" and entries:
        name = choose(st.sampled_from(entries))
        field = choose(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
        header[name] = header[name] | {field: choose(JSON_VALUES)}
    elif changed == "entry":
        header[choose(st.text(max_size=3))] = choose(JSON_VALUES)
    elif changed == "metadata":
        header["__metadata__"] = choose(JSON_VALUES)
    raw = json.dumps(header, ensure_ascii=choose(st.booleans())).encode("utf-8", "surrogatepass")
    if changed == "text" and raw:
        index = choose(st.integers(0, len(raw)))
        raw = raw[:index] + choose(st.binary(max_size=2)) + raw[index + choose(st.integers(0, 2)) :]
    header_length = len(raw) + (choose(st.integers(-2, 2)) if changed == "length" else 0)
    data_length = num_bytes + (choose(st.integers(-2, 2)) if changed == "data" else 0)
    return max(0, header_length).to_bytes(8, "little") + raw + bytes(max(0, data_length))


def file_of(header: bytes, data_length: int = 8) -> bytes:
    """Return the contents of a file with a header and data of zeros."""
    return len(header).to_bytes(8, "little") + header + bytes(data_length)


@settings(max_examples=at_least(300))
@given(changed_files())
@example(
    file_of(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    )
)
@example(file_of(b'{"a":["F32",[2],[0,8]]}'))
@example(file_of(b'\xef\xbb\xbf{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'))
@example(file_of(json.dumps({"a": VALID_ENTRY | {"dtype": "XX"}}).encode()))
@example(file_of(json.dumps({"a": VALID_ENTRY | {"shape": [3]}}).encode()))
@example(file_of(json.dumps({"a": VALID_ENTRY, "b": VALID_ENTRY | {"data_offsets": [4, 12]}}).encode(), 12))
@example(file_of(json.dumps({"__metadata__": {"a": 1}, "a": VALID_ENTRY}).encode()))
@example(file_of(b"", 0))
def test_the_reader_accepts_the_files_that_the_package_accepts_with_the_same_tensors(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(data)
    try:
        with safe_open(path, framework="numpy") as file:
            expected = {
                name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
                for name in file.offset_keys()
            }
    except SafetensorError:
        with pytest.raises(CheckpointError, match=str(path)):
            read_header(path)
        return
    header = read_header(path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()} == expected
    assert header.data_start == 8 + int.from_bytes(data[:8], "little")


@settings(max_examples=at_least(100))
@given(valid_headers())
def test_the_offsets_come_from_the_header(
    tmp_path_factory: pytest.TempPathFactory, header_and_length: tuple[Any, int]
) -> None:
    header, num_bytes = header_and_length
    path = tmp_path_factory.getbasetemp() / "offsets.safetensors"
    path.write_bytes(file_of(json.dumps(header).encode(), num_bytes))
    offsets = {name: list(tensor.data_offsets) for name, tensor in read_header(path).tensors.items()}
    assert offsets == {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
