"""A stage's message loop: it answers the coordinator's messages one at a time and reports every error as a Fault."""

import os
import queue
import time
import traceback
from contextlib import nullcontext
from functools import partial
from typing import IO, NamedTuple, NoReturn

import mlx.core as mx
import msgspec

from mlx_k2.errors import MlxK2Error, ProtocolError
from mlx_k2.protocol.framing import Frame, FrameReader, FrameWriter, Kind
from mlx_k2.protocol.guard_messages import Phase, PhaseUpdate
from mlx_k2.protocol.messages import (
    ClockRead,
    Connect,
    Connected,
    DownloadProgress,
    DownloadShard,
    FetchFiles,
    FromStage,
    HopsMeasured,
    LayerLoaded,
    Load,
    Loaded,
    MeasureHops,
    ModelFiles,
    Prepare,
    Prepared,
    Probe,
    ReadClock,
    RingLinks,
    ShardDownloaded,
    Step,
    Stop,
    ToStage,
    decode_to_stage,
    encode_message,
)
from mlx_k2.stage.faults import fault_of
from mlx_k2.stage.hop_probe import measure_hops
from mlx_k2.stage.host import hello, on_gpu
from mlx_k2.stage.host_probe import probe
from mlx_k2.stage.loading import load_stage
from mlx_k2.stage.ports import HeldPorts
from mlx_k2.stage.registry import register
from mlx_k2.stage.ring_watch import tcp_connections, watched_ring
from mlx_k2.stage.step_runner import StepRunner
from mlx_k2.stage.transport import Transport, join_group, prove_hops
from mlx_k2.weights.checkpoint import ModelDescription, describe_model, locate_tensors
from mlx_k2.weights.draft_head import stage_specs
from mlx_k2.weights.model_files import fetch_shard, locate_shard, read_draft, read_model_files
from mlx_k2.weights.model_source import is_repo, model_folder

ANSWER_TIMEOUT_S = 120.0
"""Time limit for reading small files or the clock, connecting to the neighbours, and measuring hops."""
PROGRESS_TIMEOUT_S = 900.0
"""Time limit between two reports of progress while files are fetched, loaded or probed: a slow disk reads a layer of
10 GB in this time."""
FLUSH_TIMEOUT_S = 5.0
"""Time limit for writing all frames, at the end and before MLX connects."""
_PHASES: dict[type, tuple[Phase, float]] = {
    FetchFiles: (Phase.READING, ANSWER_TIMEOUT_S),
    DownloadShard: (Phase.DOWNLOADING, PROGRESS_TIMEOUT_S),
    Prepare: (Phase.READING, ANSWER_TIMEOUT_S),
    ReadClock: (Phase.PROBING, ANSWER_TIMEOUT_S),
    Probe: (Phase.PROBING, PROGRESS_TIMEOUT_S),
    MeasureHops: (Phase.MEASURING, ANSWER_TIMEOUT_S),
    Connect: (Phase.CONNECTING, ANSWER_TIMEOUT_S),
    Load: (Phase.LOADING, PROGRESS_TIMEOUT_S),
}
"""Phase and time limit in s of the answer to each message. The phases of a Step are reported by its StepRunner."""


def serve(inward_fd: int, outward_fd: int, warnings: tuple[str, ...] = ()) -> NoReturn:
    """Answer messages until a Stop message, the end of the input or an error; then end this process.

    ``warnings`` are lines for the user about this process's settings. They are sent with the warnings about kernels.
    The process ends with os._exit: a thread may be blocked in mlx.distributed, which nothing can interrupt.
    """
    if not on_gpu():
        mx.disable_compile()  # on a CPU MLX compiles with g++, which may be missing, into shared files
    writer = FrameWriter(os.fdopen(outward_fd, "wb"), "the guard")
    service = StageService(writer, warnings)
    FrameReader(os.fdopen(inward_fd, "rb"), "the guard", service.on_frame, service.on_input_end)
    exit_code = service.run()
    writer.close(FLUSH_TIMEOUT_S)
    os._exit(exit_code)


class _Prepared(NamedTuple):
    """A Prepare message, and the model and ring ports that it requests."""

    message: Prepare
    description: ModelDescription
    ports: HeldPorts


class StageService:
    """The state of a stage from Prepare over Connect to Load, and its answers to messages."""

    def __init__(self, writer: FrameWriter, warnings: tuple[str, ...] = ()) -> None:
        self._writer = writer
        self._warnings = warnings
        self._inbox: queue.SimpleQueue[ToStage | ProtocolError] = queue.SimpleQueue()
        self._prepared: _Prepared | None = None
        self._group: mx.distributed.Group | None = None
        self._transport = Transport()
        self._runner: StepRunner | None = None
        self._registration: IO[bytes] | None = None  # this stage's file in the registry, locked while it is open

    # ---- on the thread that reads messages

    def on_frame(self, frame: Frame) -> None:
        """Queue a message for `run`. Record a step's drafts at once, before the steps in front of it have run."""
        if frame.kind is not Kind.MESSAGE:
            raise ProtocolError(f"the guard sent a {frame.kind.name} frame")
        message = decode_to_stage(frame.payload)
        if isinstance(message, Step) and self._runner is not None:
            self._runner.expect(message)
        self._inbox.put(message)

    def on_input_end(self, error: ProtocolError | None) -> None:
        """End the process if the guard closed the input. Queue the ``error`` of a broken frame, which `run` reports."""
        if error is None:
            os._exit(0)
        self._inbox.put(error)

    # ---- on the thread that computes

    def run(self) -> int:
        """Answer messages until Stop or an error. Return the process's exit code."""
        try:
            self._send(hello())
            while not isinstance(message := self._inbox.get(), Stop):
                if isinstance(message, ProtocolError):
                    raise message
                if not isinstance(message, Step):
                    phase, limit_s = _PHASES[type(message)]
                    self._report_phase(phase, limit_s=limit_s)
                self._send(self._answer(message))
                if self._runner is not None and (drafted := self._runner.draft()) is not None:
                    self._send(drafted)
                self._report_phase(Phase.IDLE, message.number if isinstance(message, Step) else None)
        except Exception as error:  # noqa: BLE001  # every error must be reported to the coordinator
            if not isinstance(error, MlxK2Error | MemoryError):
                traceback.print_exc()
            self._send(fault_of(error))
            return 1
        return 0

    def _send(self, message: FromStage) -> None:
        self._writer.put(Kind.MESSAGE, encode_message(message))

    def _report_phase(self, phase: Phase, step: int | None = None, limit_s: float | None = None) -> None:
        self._writer.put(Kind.STAGE_STATUS, PhaseUpdate(phase, step, limit_s).to_json())

    def _answer(self, message: ToStage) -> FromStage:
        match message:
            case Step():
                assert self._runner is not None, "a step before Load"
                return self._runner.run(
                    message, lambda phase: self._report_phase(phase, message.number, message.limit_s)
                )
            case FetchFiles():
                return ModelFiles(*read_model_files(message.model))
            case DownloadShard():
                return self._answer_download(message)
            case ReadClock():
                return ClockRead(time.time())
            case Probe():
                return probe(message, partial(self._report_progress, phase=Phase.PROBING))
            case MeasureHops():
                assert self._group is not None, "MeasureHops before Connect"
                return HopsMeasured(measure_hops(self._group))
            case Prepare():
                return self._answer_prepare(message)
            case Connect():
                return self._answer_connect(message)
            case Load():
                return self._answer_load(message)
            case Stop():
                raise AssertionError("Stop has no answer")

    def _answer_download(self, message: DownloadShard) -> ShardDownloaded:
        description = describe_model(read_model_files(message.model).files, message.model.path_or_repo)
        draft = None if message.draft_head is None else read_draft(message.draft_head, description.config).draft
        if draft is not None and message.draft_head is not None:
            locate_shard(message.draft_head.source, draft.index, draft.specs(), self._report_progress)
        specs = stage_specs(description.config, message.first_layer, message.end_layer, draft)
        if not is_repo(message.model):  # a folder of this host: its files must be there
            folder = model_folder(message.model)
            locate_tensors(folder, description.index, specs)
            return ShardDownloaded(str(folder), ())
        fetched = fetch_shard(message.model, description.index, specs, self._report_progress)
        return ShardDownloaded(str(fetched.folder), fetched.fetched_names)

    def _report_progress(self, done_bytes: int, total_bytes: int, phase: Phase = Phase.DOWNLOADING) -> None:
        self._report_phase(phase, limit_s=PROGRESS_TIMEOUT_S)
        self._send(DownloadProgress(done_bytes, total_bytes))

    def _answer_prepare(self, message: Prepare) -> Prepared:
        description = describe_model(read_model_files(message.model).files, message.model.path_or_repo)
        head, draft_digest = message.draft_head, None
        if head is not None and not is_repo(head.source):
            draft_digest = read_draft(head, description.config).draft.digest
        ports = HeldPorts(message.listen)
        self._prepared = _Prepared(message, description, ports)
        return Prepared(ports.addresses, description.digest, draft_digest)

    def _answer_connect(self, message: Connect) -> Connected:
        assert self._prepared is not None, "Connect before Prepare"
        if message.links is None:
            return Connected()
        self._prepared.ports.release()
        self._writer.flush(FLUSH_TIMEOUT_S)  # so that the guard gets the phase: MLX holds the GIL while it connects
        rank, links, old_connections = self._prepared.message.rank, message.links, tcp_connections()
        # MLX's ring accepts any TCP peer: the watch ends this process if an unknown one connects
        with watched_ring(rank, links) if isinstance(links, RingLinks) else nullcontext():
            self._group = join_group(rank, links)
            new_connections = tcp_connections() - old_connections if isinstance(links, RingLinks) else set()
            self._transport = Transport(self._group)
            prove_hops(self._transport, message.to_next, message.from_previous)
        return Connected(tuple(sorted(new_connections)))

    def _answer_load(self, message: Load) -> Loaded:
        assert self._prepared is not None, "Load before Prepare"
        if message.registration is not None:
            self._registration = register(message.registration)
        prepared, progress = self._prepared, (self._report_layer, self._report_progress)
        self._runner, loaded = load_stage(prepared.description, prepared.message, message, self._transport, *progress)
        return msgspec.structs.replace(loaded, warnings=(*self._warnings, *loaded.warnings))

    def _report_layer(self, loaded: LayerLoaded) -> None:
        self._report_phase(Phase.LOADING, limit_s=PROGRESS_TIMEOUT_S)
        self._send(loaded)
