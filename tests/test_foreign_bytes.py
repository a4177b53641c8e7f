"""Tests of untrusted input: any bytes from a pipe, a hostfile or a checkpoint give a value or an MlxK2Error."""

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_k2.cli.prompt_files import read_prompt_lines
from mlx_k2.cli.repl.saved_chat import load_chat
from mlx_k2.cli.result_file import ResultFile
from mlx_k2.cluster.host_facts import Command, RunningStage
from mlx_k2.cluster.hostfile import parse_hostfile
from mlx_k2.config import ModelConfig
from mlx_k2.errors import (
    CheckpointError,
    ConfigError,
    HostfileError,
    MlxK2Error,
    ProtocolError,
    RequestError,
    TokenizerError,
    ToolsError,
)
from mlx_k2.kernels import check_cache
from mlx_k2.protocol.framing import MARK, MARK_START, Kind, encode_frame, read_frame, skip_to_mark
from mlx_k2.protocol.guard_messages import GuardSettings, Phase, PhaseUpdate, StageExit, StageStatus
from mlx_k2.protocol.messages import Hello, Step, StepDone, decode_from_stage, decode_to_stage, encode_message
from mlx_k2.sampling import GenerationConfig, Sampling
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.stage.mlx_settings import load_limits
from mlx_k2.text.chat_template import load_chat_template
from mlx_k2.text.tokenizer import load_tokenizer
from mlx_k2.text.tool_call import read_call
from mlx_k2.tools.servers import read_mcp_file
from mlx_k2.weights.index import CheckpointIndex
from mlx_k2.weights.safetensors_file import read_header
from tests.examples import at_least
from tests.text.fixtures import FILES, VOCAB_SIZE

JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
STEP = Step(3, (Row(slot=0, position=5, token_ids=(1, 2, 3), is_prompt=True, sampling=Sampling(seed=1)),))
ENCODED_VALUES = (
    PhaseUpdate(Phase.RECEIVING, step=7, limit_s=60.0).to_json(),
    StageStatus(PhaseUpdate(Phase.IDLE), for_s=1.5).to_json(),
    GuardSettings(lease_s=20.0, held_bytes=10).to_json(),
    StageExit(exit_code=None, signal=9, reason="why").to_json(),
    encode_message(STEP),
    encode_message(StepDone(3, busy_s=0.1)),
)
DECODERS: tuple[Callable[[bytes], object], ...] = (
    PhaseUpdate.from_json,
    StageStatus.from_json,
    GuardSettings.from_json,
    StageExit.from_json,
    decode_to_stage,
    decode_from_stage,
)


def step_with_top_p_0() -> bytes:
    """Return an encoded Step with a top_p of 0, which Sampling refuses. The value is set in the encoded fields."""
    fields = msgspec.msgpack.decode(encode_message(STEP))
    fields["rows"][0]["sampling"]["top_p"] = 0.0
    return msgspec.msgpack.encode(fields)


@st.composite
def damaged(sample: st.DrawFn, intact: st.SearchStrategy[bytes]) -> bytes:
    """Generate bytes from ``intact``, change up to three of them and cut them off at any length."""
    data = bytearray(sample(intact))
    for _ in range(sample(st.integers(0, 3))):
        if data:
            data[sample(st.integers(0, len(data) - 1))] = sample(st.integers(0, 255))
    return bytes(data[: sample(st.integers(0, len(data)))])


def assert_only_raises(error_type: type[MlxK2Error], read: Callable[[bytes], object], data: bytes) -> None:
    """Read ``data``. An error of another type fails the test."""
    with contextlib.suppress(error_type):
        read(data)


@pytest.mark.parametrize("decode", DECODERS, ids=lambda decode: decode.__qualname__)
@example(data=step_with_top_p_0())
@example(data=b"[" * 100_000)
@example(data=b"\x91" * 100_000)  # MessagePack: lists in lists
@example(data=b"\x81\xa1a" * 100_000)  # MessagePack: objects in objects
@given(
    data=st.binary(max_size=200) | JSON_VALUES.map(msgspec.msgpack.encode) | damaged(st.sampled_from(ENCODED_VALUES))
)
@settings(max_examples=at_least(300))
def test_any_payload_is_decoded_or_raises_a_protocol_error(decode: Callable[[bytes], object], data: bytes) -> None:
    assert_only_raises(ProtocolError, decode, data)


def test_a_step_with_a_sampling_value_out_of_range_is_a_protocol_error_that_names_it() -> None:
    with pytest.raises(ProtocolError, match=r"not a message to a stage: top-p 0\.0 is out of range"):
        decode_to_stage(step_with_top_p_0())


@pytest.mark.parametrize("began_unix_s", [1e300, -1.0, math.nan, math.inf])
def test_a_command_that_began_outside_the_range_of_datetime_is_a_protocol_error(began_unix_s: float) -> None:
    command = Command(host="mac-1", pid=1, name="mlx-k2 chat", began_unix_s=began_unix_s)
    hello = Hello(
        mlx_k2_version="1",
        mlx_version="1",
        python_version="3",
        system="macOS",
        memory_bytes=1,
        working_set_bytes=None,
        running_stages=(RunningStage(command, held_bytes=10**10),),
    )
    with pytest.raises(ProtocolError, match=r"not a message from a stage: .*began_unix_s"):
        decode_from_stage(encode_message(hello))


@given(JSON_VALUES)
def test_json_of_any_shape_is_decoded_or_raises_a_protocol_error(value: object) -> None:
    for decode in DECODERS:
        assert_only_raises(ProtocolError, decode, json.dumps(value).encode())


FRAMES = st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=30)).map(lambda frame: encode_frame(*frame)))


@given(st.binary(max_size=200) | damaged(FRAMES.map(b"".join)))
def test_any_stream_is_read_as_frames_or_raises_a_protocol_error(data: bytes) -> None:
    stream = io.BytesIO(data)

    def read_all(_: bytes) -> None:
        while read_frame(stream) is not None:
            pass

    assert_only_raises(ProtocolError, read_all, data)


@given(st.binary(max_size=100), st.binary(max_size=40))
def test_any_bytes_before_the_opening_mark_are_skipped(shell_output: bytes, rest: bytes) -> None:
    stream = io.BytesIO(shell_output + MARK + rest)
    # With an earlier start of a mark, also one that ends inside the mark, the bytes are another version's mark.
    if MARK_START not in shell_output + MARK_START[:-1]:
        assert skip_to_mark(stream) == shell_output
        assert stream.read() == rest


HOST_ENTRIES = st.fixed_dictionaries(
    {
        "ssh": st.text(max_size=10) | JSON_VALUES,
        "ips": st.lists(st.text(max_size=16) | st.just("10.0.0.1")) | JSON_VALUES,
    },
    optional={
        "rdma": JSON_VALUES,
        "python": JSON_VALUES,
        "model": JSON_VALUES,
        "envs": JSON_VALUES,
        "memory": JSON_VALUES,
    },
)
HOSTFILES = (
    JSON_VALUES
    | st.lists(HOST_ENTRIES, max_size=3)
    | st.fixed_dictionaries({"hosts": st.lists(HOST_ENTRIES), "backend": JSON_VALUES})
)
DEEP_LISTS = b"[" * 100_000
DEEP_OBJECTS = b'{"a":' * 100_000


@example(DEEP_LISTS)
@example(DEEP_OBJECTS)
@given(st.binary(max_size=200) | damaged(HOSTFILES.map(lambda value: json.dumps(value).encode())))
@settings(max_examples=at_least(200))
def test_any_hostfile_bytes_are_read_or_raise_a_hostfile_error(data: bytes) -> None:
    assert_only_raises(HostfileError, lambda data: parse_hostfile(data, "hosts.json"), data)


NUMBERS = st.integers(-10, 100) | st.integers()
TENSOR_ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["BF16", "I32"]), "shape": st.lists(NUMBERS), "data_offsets": st.tuples(NUMBERS, NUMBERS)}
)
HEADERS = st.dictionaries(st.text(max_size=5), TENSOR_ENTRIES | JSON_VALUES, max_size=3) | JSON_VALUES


def on_disk(read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Return a reader of bytes that writes them to a temporary file and calls ``read`` with its path."""

    def read_bytes(data: bytes) -> object:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return read(Path(file.name))

    return read_bytes


@given(st.binary(max_size=100), damaged(HEADERS.map(lambda value: json.dumps(value).encode())), st.booleans())
@settings(max_examples=at_least(300))
def test_any_safetensors_file_is_read_or_is_a_checkpoint_error(data: bytes, header: bytes, has_header: bool) -> None:
    file = len(header).to_bytes(8, "little") + header + data if has_header else data
    assert_only_raises(CheckpointError, on_disk(read_header), file)


def resume(path: Path) -> None:
    """Read the results in a file, of a run with one prompt."""
    with ResultFile(path) as results:
        results.resume({"digest": 1})


READERS: dict[str, tuple[type[MlxK2Error], Callable[[bytes], object]]] = {
    "config.json": (ConfigError, lambda data: ModelConfig.from_json(data, "config.json")),
    "the index": (CheckpointError, lambda data: CheckpointIndex.from_json(data, "index.json")),
    "generation_config.json": (RequestError, GenerationConfig.from_json),
    "tokenizer_config.json": (
        TokenizerError,
        lambda data: load_tokenizer(FILES | {"tokenizer_config.json": data}, VOCAB_SIZE),
    ),
    "tiktoken.model": (TokenizerError, lambda data: load_tokenizer(FILES | {"tiktoken.model": data}, VOCAB_SIZE)),
    "a chat template": (TokenizerError, lambda data: load_chat_template({"chat_template.jinja": data})),
    "the template in the config": (TokenizerError, lambda data: load_chat_template({"tokenizer_config.json": data})),
    "a saved chat": (RequestError, on_disk(lambda path: load_chat(path, "digest"))),
    "prompts": (RequestError, on_disk(lambda path: read_prompt_lines(str(path)))),
    "results": (RequestError, on_disk(resume)),
    "an MCP file": (ToolsError, on_disk(lambda path: read_mcp_file(path, {}, lambda _: None))),
    "the arguments of a call": (RequestError, lambda data: read_call("functions.f:0", data.decode(errors="replace"))),
    "command buffer limits": (RequestError, on_disk(load_limits)),
    "cached kernel checks": (RequestError, on_disk(check_cache.load)),
}
FIELDS = st.sampled_from(
    (
        *("model_type", "text_config", "quantization_config", "rope_scaling", "eos_token_id", "weight_map"),
        *("added_tokens_decoder", "chat_template", "model", "digest", "messages", "prompt", "id", "mcpServers"),
        *("command", "url", "operations", "megabytes", "checks", "tuning"),
    )
)
OBJECTS = st.dictionaries(
    FIELDS, JSON_VALUES | st.dictionaries(FIELDS | st.text(max_size=8), JSON_VALUES, max_size=3), max_size=5
)


@pytest.mark.parametrize(("error_type", "read"), READERS.values(), ids=READERS.keys())
@given(data=st.binary(max_size=200) | damaged((OBJECTS | JSON_VALUES).map(lambda value: json.dumps(value).encode())))
@example(data=DEEP_LISTS)
@example(data=DEEP_OBJECTS)
@example(data=b'{"chat_template": "' + b"{{" + b"(" * 3000 + b'"}')
@example(data=b"\xef\xbb\xbf{}")
@example(data=b'{"a": "\\ud800"}')
def test_any_bytes_are_read_or_raise_the_error_of_their_reader(
    error_type: type[MlxK2Error], read: Callable[[bytes], object], data: bytes
) -> None:
    assert_only_raises(error_type, read, data)
