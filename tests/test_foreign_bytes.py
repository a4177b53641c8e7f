"""Tests of untrusted input: any bytes from a pipe, a hostfile or a checkpoint give a value or an MlxK2Error."""

import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

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

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
VALUES = (
    PhaseUpdate(Phase.RECEIVING, 7, 60.0).to_json(),
    StageStatus(PhaseUpdate(Phase.IDLE), 1.5).to_json(),
    GuardSettings(20.0, 10).to_json(),
    StageExit(None, 9, "why").to_json(),
    encode_message(Step(3, (Row(0, 5, (1, 2, 3), True, Sampling(seed=1)),))),
    encode_message(StepDone(3, 0.1)),
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
    fields = msgspec.msgpack.decode(encode_message(Step(3, (Row(0, 5, (1,), True, Sampling(seed=1)),))))
    fields["rows"][0]["sampling"]["top_p"] = 0.0
    return msgspec.msgpack.encode(fields)


@st.composite
def damaged(sample: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Generate bytes from ``whole``, change up to three of them and cut them off at any length."""
    data = bytearray(sample(whole))
    for _ in range(sample(st.integers(0, 3))):
        if data:
            data[sample(st.integers(0, len(data) - 1))] = sample(st.integers(0, 255))
    return bytes(data[: sample(st.integers(0, len(data)))])


def only_raises(kind: type[MlxK2Error], read: Callable[[bytes], object], data: bytes) -> None:
    try:
        read(data)
    except kind:
        return


@pytest.mark.parametrize("decode", DECODERS, ids=lambda decode: decode.__qualname__)
@example(data=step_with_top_p_0())
@example(data=b"[" * 100_000)
@example(data=b"\x91" * 100_000)
@example(data=b"\x81\xa1a" * 100_000)
@given(data=st.binary(max_size=200) | JSON.map(msgspec.msgpack.encode) | damaged(st.sampled_from(VALUES)))
@settings(max_examples=at_least(300))
def test_any_payload_is_decoded_or_raises_a_protocol_error(decode: Callable[[bytes], object], data: bytes) -> None:
    only_raises(ProtocolError, decode, data)


def test_a_step_with_a_sampling_value_out_of_range_is_a_protocol_error_that_names_it() -> None:
    with pytest.raises(ProtocolError, match=r"not a message to a stage: top-p 0\.0 is out of range"):
        decode_to_stage(step_with_top_p_0())


@pytest.mark.parametrize("began_unix_s", [1e300, -1.0, math.nan, math.inf])
def test_a_command_that_began_outside_the_range_of_datetime_is_a_protocol_error(began_unix_s: float) -> None:
    other = RunningStage(Command("mac-1", 1, "mlx-k2 chat", began_unix_s), 10**10)
    hello = Hello(
        mlx_k2_version="1",
        mlx_version="1",
        python_version="3",
        system="macOS",
        memory_bytes=1,
        working_set_bytes=None,
        running_stages=(other,),
    )
    with pytest.raises(ProtocolError, match=r"not a message from a stage: .*began_unix_s"):
        decode_from_stage(encode_message(hello))


@given(JSON)
def test_json_of_any_shape_is_decoded_or_raises_a_protocol_error(value: object) -> None:
    for decode in DECODERS:
        only_raises(ProtocolError, decode, json.dumps(value).encode())


FRAMES = st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=30)).map(lambda frame: encode_frame(*frame)))


@given(st.binary(max_size=200) | damaged(FRAMES.map(b"".join)))
def test_any_stream_is_read_as_frames_or_raises_a_protocol_error(data: bytes) -> None:
    stream = io.BytesIO(data)

    def read_all(_: bytes) -> None:
        while read_frame(stream) is not None:
            pass

    only_raises(ProtocolError, read_all, data)


@given(st.binary(max_size=100), st.binary(max_size=40))
def test_any_bytes_before_the_opening_mark_are_skipped(shell_output: bytes, rest: bytes) -> None:
    stream = io.BytesIO(shell_output + MARK + rest)
    if MARK_START not in shell_output + MARK_START[:-1]:  # else it is a stage of another version
        assert skip_to_mark(stream) == shell_output
        assert stream.read() == rest


ENTRY = st.fixed_dictionaries(
    {"ssh": st.text(max_size=10) | JSON, "ips": st.lists(st.text(max_size=16) | st.just("10.0.0.1")) | JSON},
    optional={"rdma": JSON, "python": JSON, "model": JSON, "envs": JSON, "memory": JSON},
)
HOSTFILES = JSON | st.lists(ENTRY, max_size=3) | st.fixed_dictionaries({"hosts": st.lists(ENTRY), "backend": JSON})


DEEP = (b"[" * 100_000, b'{"a":' * 100_000)


@example(DEEP[0])
@example(DEEP[1])
@given(st.binary(max_size=200) | damaged(HOSTFILES.map(lambda value: json.dumps(value).encode())))
@settings(max_examples=at_least(200))
def test_any_hostfile_bytes_are_read_or_raise_a_hostfile_error(data: bytes) -> None:
    only_raises(HostfileError, lambda data: parse_hostfile(data, "hosts.json"), data)


NUMBERS = st.integers(-10, 100) | st.integers()
TENSOR = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["BF16", "I32"]), "shape": st.lists(NUMBERS), "data_offsets": st.tuples(NUMBERS, NUMBERS)}
)
HEADERS = st.dictionaries(st.text(max_size=5), TENSOR | JSON, max_size=3) | JSON


@given(st.binary(max_size=100), damaged(HEADERS.map(lambda value: json.dumps(value).encode())), st.booleans())
@settings(max_examples=at_least(300))
def test_any_safetensors_header_is_read_or_raises_a_checkpoint_error(data: bytes, header: bytes, framed: bool) -> None:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(len(header).to_bytes(8, "little") + header + data if framed else data)
        file.flush()
        only_raises(CheckpointError, lambda _: read_header(Path(file.name)), data)


def on_disk(read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Return a reader of bytes that writes them to a file for ``read``."""

    def read_file(data: bytes) -> object:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return read(Path(file.name))

    return read_file


def resume(path: Path) -> None:
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
OBJECTS = st.dictionaries(FIELDS, JSON | st.dictionaries(FIELDS | st.text(max_size=8), JSON, max_size=3), max_size=5)


@pytest.mark.parametrize(("kind", "read"), READERS.values(), ids=READERS.keys())
@given(data=st.binary(max_size=200) | damaged((OBJECTS | JSON).map(lambda value: json.dumps(value).encode())))
@example(data=DEEP[0])
@example(data=DEEP[1])
@example(data=b'{"chat_template": "' + b"{{" + b"(" * 3000 + b'"}')
@example(data=b"\xef\xbb\xbf{}")
@example(data=b'{"a": "\\ud800"}')
def test_any_bytes_are_read_or_raise_an_error_of_their_own_kind(
    kind: type[MlxK2Error], read: Callable[[bytes], object], data: bytes
) -> None:
    only_raises(kind, read, data)
