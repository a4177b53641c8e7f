"""Serves the coordinator: one message after the other, each answered. The border where every error becomes a Fault."""

import os
import queue
import traceback
from typing import NoReturn

import mlx.core as mx

from mlx_k2.control.ends import FrameReader, FrameWriter
from mlx_k2.control.framing import Frame, Kind
from mlx_k2.control.messages import (
    Connect,
    Connected,
    DownloadShard,
    Fault,
    FetchFiles,
    FromStage,
    LayerLoaded,
    Load,
    Loaded,
    ModelFiles,
    Prepare,
    Prepared,
    Step,
    Stop,
    ToStage,
    decode_to_stage,
    encode_message,
)
from mlx_k2.errors import MlxK2Error, ProtocolError
from mlx_k2.stage.host import hello

CLOSE_S = 5.0
"""How long the last frames may take to leave."""


def serve(inward_fd: int, outward_fd: int) -> NoReturn:
    """Answer messages until told to stop, or the pipe ends, or something fails; then end this process.

    The process ends with os._exit: a thread of it may be blocked in mlx.distributed, which nothing can interrupt.
    """
    writer = FrameWriter(os.fdopen(outward_fd, "wb"), "the guard")
    service = StageService(writer)
    FrameReader(os.fdopen(inward_fd, "rb", buffering=0), "the guard", service.take, service.input_ended)
    exit_code = service.run()
    writer.close(CLOSE_S)
    os._exit(exit_code)
