"""Every message between the coordinator and a stage, and how they become bytes. Knows neither pipes nor arrays.

In order: the stage says Hello; the coordinator may ask it for the model's small files (FetchFiles), then sends
Prepare, Connect and Load, each answered before the next; then Steps, in one order for all stages.
"""

from typing import TypeAlias

import msgspec

from mlx_k2.cluster.host_facts import HopSpeed, HostFacts
from mlx_k2.errors import ProtocolError, RequestError
from mlx_k2.protocol.framing import MAX_PAYLOAD_BYTES
from mlx_k2.sampling import SampledToken
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.weights.model_source import ModelSource

# ---- coordinator to stage


class FetchFiles(msgspec.Struct, frozen=True, tag=True):
    """Send the model's small files: config, index, tokenizer, chat template. Answered by ModelFiles."""

    model: ModelSource


class DownloadShard(msgspec.Struct, frozen=True, tag=True):
    """Fetch these layers' files from the Hub and nothing more. Answered by DownloadProgress..., ShardDownloaded."""

    model: ModelSource
    first_layer: int
    end_layer: int


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Take rank ``rank`` of ``num_stages``, read the model's config and index, hold a port on each listen address.

    A listen address is ``ip`` (the stage picks a free port) or ``ip:port``; ``environment`` is the hostfile's.
    Answered by Prepared.
    """

    rank: int
    num_stages: int
    model: ModelSource
    listen: tuple[str, ...]
    environment: dict[str, str]


class RingLinks(msgspec.Struct, frozen=True, tag=True):
    """MLX's ring backend: for each rank the ``ip:port`` addresses that it listens on."""

    addresses: tuple[tuple[str, ...], ...]


class JacclLinks(msgspec.Struct, frozen=True, tag=True):
    """MLX's jaccl backend: the matrix of RDMA devices between ranks, and rank 0's ``ip:port``."""

    devices: tuple[tuple[str | tuple[str, ...] | None, ...], ...]
    coordinator: str
    ring: bool


class ReadClock(msgspec.Struct, frozen=True, tag=True):
    """Answered at once, by ClockRead."""


class Probe(msgspec.Struct, frozen=True, tag=True):
    """Look at the host, and at the files of ``layers`` (first, end) of the model; None: not at files.

    ``deep`` computes the files' checksums. Answered by DownloadProgress..., Examined.
    """

    model: ModelSource
    layers: tuple[int, int] | None
    deep: bool


class MeasureHops(msgspec.Struct, frozen=True, tag=True):
    """Measure the hop to the next stage; to all stages, once they are connected. Answered by HopsMeasured."""


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Join the data plane, then prove each hop: send ``to_next``, expect ``from_previous``. Answered by Connected."""

    links: RingLinks | JacclLinks | None
    """None: this is the only stage."""
    to_next: bytes | None
    from_previous: bytes | None


class Load(msgspec.Struct, frozen=True, tag=True):
    """Load layers ``first_layer`` up to, not including, ``end_layer``. Answered by LayerLoaded..., Loaded.

    ``needed_bytes`` is what shard, cache and working space take together; a Mac keeps that much wired. With
    ``dense_bits``, attention, shared experts, dense layers and the head are quantized to so many bits a weight.
    """

    first_layer: int
    end_layer: int
    dtype: str
    num_slots: int
    context_tokens: int
    needed_bytes: int
    dense_bits: int | None = None


class Step(msgspec.Struct, frozen=True, tag=True):
    """One step plan: complete, and the same for every stage. Answered by StepDone.

    A stage that receives, computes or sends for longer than ``limit_s`` is ended by its guard.
    """

    number: int
    rows: tuple[Row, ...]
    limit_s: float | None = None


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End, politely."""


# ---- stage to coordinator


class Hello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Who a stage is. ``working_set_bytes`` is how much of the memory a GPU may hold; None without one."""

    mlx_k2_version: str
    mlx_version: str
    mlx_lm_version: str
    python_version: str
    system: str
    memory_bytes: int
    working_set_bytes: int | None


class ModelFiles(msgspec.Struct, frozen=True, tag=True):
    """The model's small files by name."""

    files: dict[str, bytes]


class DownloadProgress(msgspec.Struct, frozen=True, tag=True):
    """How far DownloadShard, or Examine with its checksums, is."""

    done_bytes: int
    total_bytes: int


class ShardDownloaded(msgspec.Struct, frozen=True, tag=True):
    """The files are all there, in ``folder``; these were fetched now, the others were there before."""

    folder: str
    fetched: tuple[str, ...]


class ClockRead(msgspec.Struct, frozen=True, tag=True):
    """Seconds since 1970, by the host's own clock."""

    unix_s: float


class ProbeResult(msgspec.Struct, frozen=True, tag=True):
    """What Examine found."""

    facts: HostFacts


class HopsMeasured(msgspec.Struct, frozen=True, tag=True):
    """How fast the hop to the next stage is; None from the last stage."""

    to_next: HopSpeed | None


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """The ``ip:port`` addresses that the stage holds, and a digest of the model's config and index on its host."""

    addresses: tuple[str, ...]
    model_digest: str


class Connected(msgspec.Struct, frozen=True, tag=True):
    """Every hop of this stage carried the bytes that it should."""


class LayerLoaded(msgspec.Struct, frozen=True, tag=True):
    """One more piece is in memory: the tensors that it was made of, and the bytes it holds."""

    tensor_names: tuple[str, ...]
    held_bytes: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The whole shard is in memory and its cache can be. ``peak_bytes`` is the most that loading took.

    ``warnings`` are lines for the user: what is slower on that host than it could be.
    """

    held_bytes: int
    peak_bytes: int
    cache_bytes_per_token: int
    warnings: tuple[str, ...] = ()


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """A stage finished a step. The last stage adds a token for each row that asked for one, in the rows' order.

    ``busy_s``: computing. ``receive_s``: until the hidden states were there, waiting for the stage before included.
    ``send_s``: until the system had taken them. ``peak_bytes`` is the most memory that MLX has held so far.
    """

    number: int
    busy_s: float
    receive_s: float = 0.0
    send_s: float = 0.0
    tokens: tuple[SampledToken, ...] = ()
    peak_bytes: int = 0


class Fault(msgspec.Struct, frozen=True, tag=True):
    """The stage cannot go on. ``kind`` is the error's class name."""

    kind: str
    message: str


ToStage: TypeAlias = (
    FetchFiles | DownloadShard | ReadClock | Probe | Prepare | Connect | MeasureHops | Load | Step | Stop
)
FromStage: TypeAlias = (
    Hello
    | ModelFiles
    | DownloadProgress
    | ShardDownloaded
    | ClockRead
    | ProbeResult
    | Prepared
    | Connected
    | HopsMeasured
    | LayerLoaded
    | Loaded
    | StepDone
    | Fault
)

_encoder = msgspec.msgpack.Encoder()
_to_stage: msgspec.msgpack.Decoder[ToStage] = msgspec.msgpack.Decoder(ToStage)
_from_stage: msgspec.msgpack.Decoder[FromStage] = msgspec.msgpack.Decoder(FromStage)


def encode_message(message: ToStage | FromStage) -> bytes:
    """The payload of a MESSAGE frame."""
    payload = _encoder.encode(message)
    assert len(payload) <= MAX_PAYLOAD_BYTES, f"a {type(message).__name__} of {len(payload)} bytes"
    return payload


def decode_to_stage(payload: bytes) -> ToStage:
    """What the coordinator sent.

    Raises:
        ProtocolError: the bytes are no such message.
    """
    try:
        return _to_stage.decode(payload)
    except (msgspec.DecodeError, ValueError, RequestError) as error:  # RequestError: a Sampling value is out of range
        raise ProtocolError(f"not a message to a stage: {error}") from None


def decode_from_stage(payload: bytes) -> FromStage:
    """What a stage sent.

    Raises:
        ProtocolError: the bytes are no such message.
    """
    try:
        return _from_stage.decode(payload)
    except (msgspec.DecodeError, ValueError) as error:
        raise ProtocolError(f"not a message from a stage: {error}") from None
