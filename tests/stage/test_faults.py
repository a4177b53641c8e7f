"""Tests of the faults that a stage sends to the coordinator: one kind and message for each error."""

import pytest

from mlx_k2.errors import CheckpointError
from mlx_k2.stage.faults import fault_of
from tests.advice import follows_advice


@follows_advice(
    "a: end other programs there, or give --split, a smaller --context or --dense-bits",
    "a: turn the display off, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the hostfile's envs (a)",
)
@pytest.mark.parametrize(
    ("error", "kind", "message_start"),
    [
        (CheckpointError("x.safetensors is truncated"), "CheckpointError", "x.safetensors is truncated"),
        (RuntimeError("[ring] connection to a peer was lost"), "NeighbourLost", "RuntimeError: [ring] connection"),
        (ValueError("a shape"), "ValueError", "ValueError: a shape"),
        (MemoryError(), "StageFault", "out of memory: this process had "),
        (RuntimeError("[malloc] Unable to allocate 7 bytes."), "StageFault", "out of memory"),
        (RuntimeError("std::bad_alloc"), "StageFault", "out of memory"),
        (RuntimeError("Resource temporarily unavailable"), "StageFault", "out of memory"),
        (
            RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPU...)"),
            "StageFault",
            "macOS stopped the GPU's work because it took too long: turn the display off",
        ),
        (
            RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPU...)"),
            "StageFault",
            "macOS stopped the GPU's work because it took too long: turn the display off",
        ),
    ],
)
def test_each_error_has_a_kind_and_a_message(error: Exception, kind: str, message_start: str) -> None:
    fault = fault_of(error)
    assert fault.kind == kind
    assert fault.message.startswith(message_start)
