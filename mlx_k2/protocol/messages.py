"""Every message between the coordinator and a stage, and their msgpack encoding. Knows neither pipes nor arrays.

Order: the stage sends Hello. Then the coordinator may send FetchFiles, DownloadShard, ReadClock and Probe. To run the
model it sends Prepare, Connect and Load, each after the answer to the one before, and then Steps, in the same order to
all stages. MeasureHops may follow Connect.
"""

from typing import TypeAlias, TypeVar

import msgspec

from mlx_k2.cluster.host_facts import HopSpeed, HostFacts, RunningStage
from mlx_k2.cluster.memory import CPU_BLOCK_BYTES
from mlx_k2.errors import ProtocolError, RequestError
from mlx_k2.protocol.framing import MAX_PAYLOAD_BYTES
from mlx_k2.sampling import SampledToken
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.weights.model_source import DraftHead, ModelSource

# ---- coordinator to stage


class FetchFiles(msgspec.Struct, frozen=True, tag=True):
    """Request for the small files of a model or a draft head: config, index, tokenizer, chat template.

    Answered by ModelFiles.
    """

    model: ModelSource


class DownloadShard(msgspec.Struct, frozen=True, tag=True):
    """Request to fetch the files of layers ``first_layer`` up to, not including, ``end_layer`` from the Hub.

    If ``model`` is a folder, its files are checked, and none of them is fetched. ``draft_head`` is set if the stage
    with these layers reads some of the head's tensors: then the head's files are fetched, too. Answered by any number
    of DownloadProgress, then ShardDownloaded.
    """

    model: ModelSource
    first_layer: int
    end_layer: int
    draft_head: DraftHead | None = None


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Request to use rank ``rank``, read the model's config and index, and hold a port on each listen address.

    A listen address is ``ip`` (the stage picks a free port) or ``ip:port``. If ``draft_head`` is in a folder, the
    head's config and the names and shapes of its tensors are checked, too; Load checks a head from the Hub. Answered by
    Prepared.
    """

    rank: int
    num_stages: int
    model: ModelSource
    listen: tuple[str, ...]
    draft_head: DraftHead | None = None


class RingLinks(msgspec.Struct, frozen=True, tag=True):
    """Links for MLX's ring backend: for each rank the ``ip:port`` addresses that it listens on."""

    addresses: tuple[tuple[str, ...], ...]


class JacclLinks(msgspec.Struct, frozen=True, tag=True):
    """Links for MLX's jaccl backend."""

    devices: tuple[tuple[str | tuple[str, ...] | None, ...], ...]
    """``devices[i][j]`` is the RDMA device, or the devices, from rank i to rank j; None if there is none."""
    coordinator: str
    """The ``ip:port`` of rank 0, to which the other ranks connect first."""
    ring: bool
    """Whether the devices form a ring, not a full mesh."""


class ReadClock(msgspec.Struct, frozen=True, tag=True):
    """Request for the host's time. Answered at once by ClockRead."""


class Probe(msgspec.Struct, frozen=True, tag=True):
    """Request to probe the host and the files of some layers of the model.

    ``layers`` are the first layer and the end, which is not included; None: probe no files. ``deep``: compute checksums
    of the files. Answered by any number of DownloadProgress, then HostFacts.
    """

    model: ModelSource
    layers: tuple[int, int] | None
    deep: bool


class MeasureHops(msgspec.Struct, frozen=True, tag=True):
    """Request to measure the hop to the next stage, sent to all connected stages. Answered by HopsMeasured."""


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Request to join the data plane, then to check each hop: send ``to_next``, expect ``from_previous``.

    Each is None if there is no such neighbour. Answered by Connected.
    """

    links: RingLinks | JacclLinks | None
    """None if there is only one stage."""
    to_next: bytes | None
    from_previous: bytes | None


class Load(msgspec.Struct, frozen=True, tag=True):
    """Request to load layers ``first_layer`` up to, not including, ``end_layer``.

    Answered by any number of DownloadProgress and LayerLoaded, then Loaded. ``dtype`` is MLX's name of the compute
    dtype. ``needed_bytes`` is the memory of shard, cache and working space together; a Mac keeps that much wired.
    ``block_bytes`` limits a block of attention on a GPU.
    Attention, shared experts, dense layers and the head are quantized to ``dense_bits`` bits per weight; None: they are
    not quantized. Stages that start on the host later report ``registration`` in their Hello. With ``draft_head``, each
    layer whose output the head reads gets a slice of the head's projection ``fc``, and the last stage gets the head. A
    stage that reads none of the head's tensors got no ``draft_head`` in Prepare, and reads no file of it.
    ``check_weights``: search all tensors for NaN and infinity, not only those whose NaN may not reach a step's output.
    """

    first_layer: int
    end_layer: int
    dtype: str
    num_slots: int
    context_tokens: int
    needed_bytes: int
    block_bytes: int = CPU_BLOCK_BYTES
    dense_bits: int | None = None
    registration: RunningStage | None = None
    draft_head: DraftHead | None = None
    check_weights: bool = False


class Step(msgspec.Struct, frozen=True, tag=True):
    """One step plan: complete, and the same for every stage, except that only the last one gets masks and biases.

    Answered by StepDone. The guard ends a stage that receives, computes or sends for longer than ``limit_s`` (None: no
    limit).
    """

    number: int
    rows: tuple[Row, ...]
    limit_s: float | None = None


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Request to end the process in an orderly way. It has no answer."""


# ---- stage to coordinator


class Hello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The versions and memory of a stage's host; a stage's first message.

    ``working_set_bytes`` is the memory that macOS lets the GPU hold; None without a Metal GPU. ``running_stages`` are
    the stages that the same user already runs there, of any command.
    """

    mlx_k2_version: str
    mlx_version: str
    python_version: str
    system: str
    memory_bytes: int
    working_set_bytes: int | None
    running_stages: tuple[RunningStage, ...] = ()


class ModelFiles(msgspec.Struct, frozen=True, tag=True):
    """The small files of a model or a draft head by name, and its source with the revision that was read."""

    files: dict[str, bytes]
    source: ModelSource


class DownloadProgress(msgspec.Struct, frozen=True, tag=True):
    """Progress of fetching files from the Hub (DownloadShard, Load) or of computing checksums (Probe)."""

    done_bytes: int
    total_bytes: int


class ShardDownloaded(msgspec.Struct, frozen=True, tag=True):
    """Answer to DownloadShard: the shard's files are in ``folder``. ``fetched`` names those that were not there."""

    folder: str
    fetched: tuple[str, ...]


class ClockRead(msgspec.Struct, frozen=True, tag=True):
    """The time of the host's own clock, in seconds since 1970."""

    unix_s: float


class HopsMeasured(msgspec.Struct, frozen=True, tag=True):
    """Speed of the hop to the next stage; None from the last stage."""

    to_next: HopSpeed | None


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """Answer to Prepare: the addresses whose ports the stage holds, and digests of files for comparison."""

    addresses: tuple[str, ...]
    """Each as ``ip:port``, in the order of ``Prepare.listen``."""
    model_digest: str
    """The digest of the model's config and index."""
    draft_digest: str | None = None
    """The digest of the draft head's config and of parts of its weights; None without a head, and for one from the Hub,
    whose revision is pinned."""


class Connected(msgspec.Struct, frozen=True, tag=True):
    """Answer to Connect: every hop of this stage carried the expected bytes.

    ``connections`` are the TCP connections of its ring, each as its own ``ip:port`` and that of the other end.
    """

    connections: tuple[tuple[str, str], ...] = ()


class LayerLoaded(msgspec.Struct, frozen=True, tag=True):
    """Progress of Load: the embedding, one layer, the head or a part of the draft head is in memory.

    ``held_bytes`` is its size in memory. ``tensor_names`` are the model's tensors that it was made of; empty for a part
    of the draft head.
    """

    tensor_names: tuple[str, ...]
    held_bytes: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """Answer to Load: the whole shard is in memory. The cache is allocated later, as sequences grow.

    ``held_bytes`` is the shard's size. ``peak_bytes`` is the peak memory of the process so far. ``warnings`` are lines
    for the user about what is slower on that host than it could be. ``checksums`` has, by file name, the SHA-256 that
    the Hub or a manifest on the host gives for each file that the stage read (None if neither does), and for the other
    files of the manifest.
    """

    held_bytes: int
    peak_bytes: int
    warnings: tuple[str, ...] = ()
    checksums: dict[str, str | None] = {}


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """Answer to Step. The last stage adds a sampled token for each row with ``needs_logits``, in the rows' order.

    ``busy_s``: time of computing. ``receive_s``: time in which the stage did nothing but wait for the hidden states of
    the previous stage. ``send_s``: time until the system had accepted the hidden states to send. ``peak_bytes``:
    peak memory of MLX so far. ``is_skipped``: the step was not computed and has no tokens, because it carries a draft
    that is known to be wrong.
    """

    number: int
    busy_s: float
    receive_s: float = 0.0
    send_s: float = 0.0
    tokens: tuple[SampledToken, ...] = ()
    peak_bytes: int = 0
    is_skipped: bool = False


class Drafted(msgspec.Struct, frozen=True, tag=True):
    """The draft head's tokens after step ``number``, in which one row has a ``draft`` request.

    The last stage sends this after the step's StepDone, unless the step was skipped. ``token_ids`` are drafts for the
    positions after the sampled token, at most as many as requested. If a plan that the stage has received carries a
    draft for one of these positions, the draft is the same. ``busy_s``: time of computing them.
    """

    number: int
    token_ids: tuple[int, ...]
    busy_s: float


class Fault(msgspec.Struct, frozen=True, tag=True):
    """An error after which the stage ends. ``kind`` is the error's class name."""

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
    | HostFacts
    | Prepared
    | Connected
    | HopsMeasured
    | LayerLoaded
    | Loaded
    | StepDone
    | Drafted
    | Fault
)

Message = TypeVar("Message")

_encoder = msgspec.msgpack.Encoder()
_to_stage: msgspec.msgpack.Decoder[ToStage] = msgspec.msgpack.Decoder(ToStage)
_from_stage: msgspec.msgpack.Decoder[FromStage] = msgspec.msgpack.Decoder(FromStage)


def encode_message(message: ToStage | FromStage) -> bytes:
    """Encode ``message`` as the payload of a MESSAGE frame."""
    payload = _encoder.encode(message)
    assert len(payload) <= MAX_PAYLOAD_BYTES, f"a {type(message).__name__} of {len(payload)} bytes"
    return payload


def decode_to_stage(payload: bytes) -> ToStage:
    """Decode a message that the coordinator sent.

    Raises:
        ProtocolError: the bytes are not a message to a stage.
    """
    return _decoded(_to_stage, payload, "to")


def decode_from_stage(payload: bytes) -> FromStage:
    """Decode a message that a stage sent.

    Raises:
        ProtocolError: the bytes are not a message from a stage.
    """
    return _decoded(_from_stage, payload, "from")


def _decoded(decoder: msgspec.msgpack.Decoder[Message], payload: bytes, direction: str) -> Message:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, ValueError, RecursionError, RequestError) as error:  # RequestError: from Sampling
        raise ProtocolError(f"not a message {direction} a stage: {error}") from None
