"""Tests of the executor: it runs a correct kernel, and reports each kind of mistake that other tests rely on."""

import re
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_k2.kernels.dispatch import Dispatch, KernelText
from tests.metal_cpu.execute import execute
from tests.metal_cpu.program import BACKWARD, FORWARD, SHUFFLED, KernelFault, Mode, Schedule

pytestmark = pytest.mark.timeout(60)

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
REVERSE = f"""
    threadgroup float shared[64];
    uint i = thread_position_in_threadgroup.x;
    shared[i] = a[i];
    {BARRIER}
    out[i] = shared[63 - i];
"""


def run_body(body: str, mode: Mode = Mode.FAST, schedule: Schedule = FORWARD) -> npt.NDArray[np.float32]:
    """Run a kernel body with 64 threads over the input a = 0, 1, ..., 255; return its 64 outputs."""
    dispatch = Dispatch(
        KernelText("planted", inputs=("a",), outputs=("out",), source=body, header=""),
        inputs=(mx.arange(256).astype(mx.float32),),
        template=(),
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=((64,),),
        output_dtypes=(mx.float32,),
    )
    return np.array(execute(dispatch, mode=mode, schedule=schedule).outputs[0])


@pytest.mark.parametrize("mode", [Mode.FAST, Mode.ADDRESSES, pytest.param(Mode.RACES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", [FORWARD, BACKWARD, SHUFFLED])
def test_a_correct_kernel_passes(mode: Mode, schedule: Schedule) -> None:
    np.testing.assert_array_equal(run_body(REVERSE, mode, schedule), np.arange(64)[::-1])


class Mistake(NamedTuple):
    """A wrong kernel body, the mode that finds its mistake, and a pattern of the report."""

    body: str
    mode: Mode
    report: str


MISTAKES = {
    "barrier in a divergent branch": Mistake(
        f"uint i = thread_position_in_grid.x; if (i < 40) {BARRIER} out[i] = a[i];", Mode.FAST, "reached by 40 of 64"
    ),
    "two different barriers": Mistake(
        f"uint i = thread_position_in_grid.x; if (i < 40) {{\n {BARRIER}\n }} else {{\n {BARRIER}\n }}\n"
        " out[i] = a[i];",
        Mode.FAST,
        "different threadgroup barriers",
    ),
    "two different simd operations": Mistake(
        "uint i = thread_position_in_grid.x; float v = a[i];\n"
        "if (i % 2) {\n v = simd_sum(v);\n } else {\n v = simd_max(v);\n }\n out[i] = v;",
        Mode.FAST,
        "divergent simdgroup operation",
    ),
    "a lane returns before a simd operation": Mistake(
        "uint i = thread_position_in_grid.x; if (i == 5) return; out[i] = simd_sum(a[i]);",
        Mode.FAST,
        "reached by 31 of 32",
    ),
    "some threads wait at a barrier and some in a simd operation": Mistake(
        f"uint i = thread_position_in_grid.x; float v = a[i]; if (i == 0) {{ {BARRIER} }} else {{ v = simd_sum(v); }}"
        " out[i] = v;",
        Mode.FAST,
        "deadlock",
    ),
    "too much threadgroup memory": Mistake(
        "threadgroup float b[8200];\n uint i = thread_position_in_threadgroup.x; b[i] = a[i]; out[i] = b[i];",
        Mode.FAST,
        "exceeds the limit",
    ),
    "device read out of bounds": Mistake(
        "uint i = thread_position_in_grid.x; out[i] = a[i + 200];", Mode.ADDRESSES, "heap-buffer-overflow"
    ),
    "device write out of bounds": Mistake(
        "uint i = thread_position_in_grid.x; out[i + 1] = a[i];", Mode.ADDRESSES, "heap-buffer-overflow"
    ),
    "threadgroup memory out of bounds": Mistake(
        "threadgroup float b[64];\n uint i = thread_position_in_threadgroup.x; threadgroup float* q = b;"
        " q[i + 1] = a[i];"
        f" {BARRIER} out[i] = b[i];",
        Mode.ADDRESSES,
        "heap-buffer-overflow",
    ),
    "thread array out of bounds": Mistake(
        "uint i = thread_position_in_grid.x; float r[4]; for (int k = 0; k < 5; k++) r[k] = a[i + k];"
        " out[i] = r[0] + r[3];",
        Mode.ADDRESSES,
        "out of bounds|stack-buffer-overflow",
    ),
    "misaligned vector load": Mistake(
        "uint i = thread_position_in_grid.x; const device float4* p = (const device float4*)(a + 1);"
        " out[i] = p[i % 8].x;",
        Mode.ADDRESSES,
        "misaligned",
    ),
    "missing barrier": Mistake(REVERSE.replace(BARRIER, ""), Mode.RACES, "data race"),
    "barrier that orders no memory": Mistake(
        REVERSE.replace("mem_flags::mem_threadgroup", "mem_flags::mem_none"), Mode.RACES, "data race"
    ),
    "barrier of a simdgroup only": Mistake(
        REVERSE.replace("threadgroup_barrier", "simdgroup_barrier"), Mode.RACES, "data race"
    ),
    "two threads write one element": Mistake(
        "uint i = thread_position_in_grid.x; out[i % 32] = a[i];", Mode.RACES, "data race"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_the_executor_reports_each_kind_of_mistake(name: str) -> None:
    mistake = MISTAKES[name]
    with pytest.raises(KernelFault) as fault:
        run_body(mistake.body, mistake.mode)
    assert re.search(mistake.report, str(fault.value)), str(fault.value)


@pytest.mark.parametrize("mode", [Mode.FAST, pytest.param(Mode.RACES, marks=pytest.mark.slow)])
def test_threadgroup_arrays_of_any_size_do_not_overlap(mode: Mode) -> None:
    body = f"""
        threadgroup float ones[5];
        threadgroup float twos[23];
        threadgroup float threes[64];
        uint i = thread_position_in_threadgroup.x;
        if (i < 5) ones[i] = 1.0f;
        if (i < 23) twos[i] = 2.0f;
        threes[i] = 3.0f;
        {BARRIER}
        out[i] = i < 5 ? ones[i] : i < 28 ? twos[i - 5] : threes[i];
    """
    assert run_body(body, mode).tolist() == [1.0] * 5 + [2.0] * 23 + [3.0] * 36


def test_threadgroup_memory_that_was_never_written_reads_as_nan() -> None:
    outputs = run_body(REVERSE.replace("shared[i] = a[i];", "if (i) shared[i] = a[i];"))
    assert np.isnan(outputs[63])
    assert not np.isnan(outputs[:63]).any()


def test_an_output_that_is_never_written_is_nan() -> None:
    outputs = run_body("uint i = thread_position_in_grid.x; if (i != 9) out[i] = a[i];")
    assert np.isnan(outputs[9])


def test_a_missing_barrier_gives_different_results_in_different_schedules() -> None:
    body = REVERSE.replace(BARRIER, "")
    forward, backward = (run_body(body, schedule=schedule) for schedule in (FORWARD, BACKWARD))
    assert not np.array_equal(forward, backward, equal_nan=True)


def test_bytes_are_counted_by_buffer() -> None:
    body = "uint i = thread_position_in_grid.x; out[i] = a[2 * i] + b[0];"
    dispatch = Dispatch(
        KernelText("counted", inputs=("a", "b"), outputs=("out",), source=body, header=""),
        inputs=(mx.arange(256).astype(mx.float32), mx.array([1.0, 2.0])),
        template=(),
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=((64,),),
        output_dtypes=(mx.float32,),
    )
    executed = execute(dispatch, mode=Mode.BYTES)
    assert executed.bytes_loaded("a") == 64 * 4
    assert executed.bytes_loaded("b") == 64 * 4
    assert executed.report.traffic[2].stored == 64 * 4  # out is the third buffer
