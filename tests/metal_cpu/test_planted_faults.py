"""Tests with a fault planted in each .metal file: a wrong result, the executor or a sanitizer shows the fault."""

import functools
import importlib.resources
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_k2.kernels.dispatch import Dispatch, KernelText, read_metal
from tests.metal_cpu import float64
from tests.metal_cpu.float64 import Case, random_case
from tests.metal_cpu.layers import Variant, measure
from tests.metal_cpu.program import KernelFault, Mode
from tests.metal_cpu.test_router_kernels import route_errors

pytestmark = pytest.mark.timeout(60)

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
ROUTER_TOLERANCE = 1e-5
"""Ten times the tolerance of the router's own tests: a fault must differ clearly from rounding."""


class Fault(NamedTuple):
    """A fault: in `file` occurrence `nth` (from 0) of `old` is replaced by `new`, and `kernel` is run in `mode`."""

    file: str
    kernel: str
    old: str
    new: str
    mode: Mode = Mode.FAST
    nth: int = 0


FAULTS = {
    "int4: a mask": Fault("int4.metal", "decode_gate_up", "0x0f00u", "0x0e00u"),
    "int4: a sign": Fault("int4.metal", "decode_down", "-8.0f * sum", "8.0f * sum"),
    "int4: an input used twice": Fault("int4.metal", "decode_gate_up", "scaled + 24", "scaled + 16"),
    "int4: a word used twice": Fault("int4.metal", "batch_gate_up", "w == 1 ? codes.y", "w == 1 ? codes.x"),
    "int4: a weight's offset": Fault("int4.metal", "batch_down", "float offset = -8.0f", "float offset = -7.0f"),
    "decode_gate_up: too few groups": Fault("decode_gate_up.metal", "decode_gate_up", "g < GROUPS", "g < GROUPS - 1"),
    "decode_gate_up: another token's inputs": Fault(
        "decode_gate_up.metal", "decode_gate_up", "pair / TOPK", "pair % TOPK"
    ),
    "decode_gate_up: gate and up exchanged": Fault(
        "decode_gate_up.metal", "decode_gate_up", "swiglu(gate_sum, up_sum)", "swiglu(up_sum, gate_sum)"
    ),
    "decode_gate_up: reads past the end": Fault(
        "decode_gate_up.metal", "decode_gate_up", "g < GROUPS", "g < GROUPS + 1", Mode.ADDRESSES
    ),
    "decode_down: no barrier": Fault("decode_down.metal", "decode_down", BARRIER, "", Mode.RACES),
    "decode_down: one expert too few": Fault("decode_down.metal", "decode_down", "i < TOPK", "i < TOPK - 1"),
    "decode_down: unweighted": Fault("decode_down.metal", "decode_down", "weight * sum", "sum"),
    "decode_down: another expert's rows": Fault("decode_down.metal", "decode_down", "expert * N + row", "expert * N"),
    "batch_gate_up: every pair computes": Fault(
        "batch_gate_up.metal", "batch_gate_up", "earlier > 0", "false", Mode.RACES
    ),
    "batch_gate_up: one token left out": Fault(
        "batch_gate_up.metal", "batch_gate_up", "lane < num_tokens", "lane + 1 < num_tokens"
    ),
    "batch_gate_up: scale of the wrong row": Fault(
        "batch_gate_up.metal", "batch_gate_up", "up_scales[r * GROUPS + g]", "up_scales[g]"
    ),
    "batch_down: no barrier": Fault("batch_down.metal", "batch_down", BARRIER, "", Mode.RACES),
    "batch_down: wrong slot's activations": Fault(
        "batch_down.metal", "batch_down", "uint(t) * TOPK + simd_shuffle(slot, ushort(t))", "uint(t) * TOPK"
    ),
    "batch_down: simd operation in a divergent branch": Fault(
        "batch_down.metal",
        "batch_down",
        "if ((choosers >> t) & 1u) {",
        "if (((choosers >> t) & 1u) && lane < 9) {",
        nth=1,
    ),
    "batch_down: a loop bound": Fault("batch_down.metal", "batch_down", "j < TOPK", "j <= TOPK"),
    "prefill_tile: last row of a tile": Fault(
        "prefill_tile.metal", "prefill_gate_up", "metal::min(TILE, ", "metal::min(TILE - 1, "
    ),
    "prefill_tile: not transposed": Fault(
        "prefill_tile.metal", "prefill_gate_up", "ulong2(0), true", "ulong2(0), false"
    ),
    "prefill_tile: a shift": Fault(
        "prefill_tile.metal", "prefill_down", "codes.y >> (4 * i)", "codes.y >> (4 * i + 1)"
    ),
    "prefill_gate_up: first barrier": Fault("prefill_gate_up.metal", "prefill_gate_up", BARRIER, "", Mode.RACES, nth=0),
    "prefill_gate_up: second barrier": Fault(
        "prefill_gate_up.metal", "prefill_gate_up", BARRIER, "", Mode.RACES, nth=1
    ),
    "prefill_gate_up: third barrier": Fault("prefill_gate_up.metal", "prefill_gate_up", BARRIER, "", Mode.RACES, nth=2),
    "prefill_gate_up: fourth barrier": Fault(
        "prefill_gate_up.metal", "prefill_gate_up", BARRIER, "", Mode.RACES, nth=3
    ),
    "prefill_gate_up: rows beyond the tile": Fault(
        "prefill_gate_up.metal", "prefill_gate_up", "if (i / TILE < tile.pairs)", "if (true)", Mode.RACES
    ),
    "prefill_down: barrier between the halves": Fault(
        "prefill_down.metal", "prefill_down", BARRIER, "", Mode.RACES, nth=2
    ),
    "prefill_down: columns beyond the output": Fault(
        "prefill_down.metal", "prefill_down", " && out_column < N", "", Mode.ADDRESSES
    ),
    "prefill_down: not sorted back": Fault(
        "prefill_down.metal", "prefill_down", "order[tile.first + i / TILE]", "tile.first + i / TILE"
    ),
    "prefill_combine: a loop bound": Fault("prefill_combine.metal", "prefill_combine", "slot < TOPK", "slot < 1"),
    "router_logits: a stride": Fault("router_logits.metal", "router_logits", "k += 32 * 8", "k += 33 * 8"),
    "router_logits: one token's inputs for all": Fault(
        "router_logits.metal", "router_logits", "hidden[t * K + k + i]", "hidden[k + i]"
    ),
    "router_select: the biased score as the weight": Fault(
        "router_select.metal", "router_select", "best_score = score[i]", "best_score = biased[i]"
    ),
    "router_select: ties to the higher id": Fault("router_select.metal", "router_select", "simd_min(", "simd_max("),
    "router_select: an expert chosen again": Fault(
        "router_select.metal", "router_select", "== winner ? -INFINITY", "== winner ? 2.0f"
    ),
    "router_select: not scaled": Fault("router_select.metal", "router_select", " * scaling[0]", ""),
}


def plant(fault: Fault, text: KernelText) -> KernelText:
    """Return the kernel text with the fault in its header or its body."""
    original = read_metal(fault.file)
    parts = original.split(fault.old)
    assert len(parts) > fault.nth + 1, f"{fault.old} is not {fault.nth + 1} times in {fault.file}"
    faulty = fault.old.join(parts[: fault.nth + 1]) + fault.new + fault.old.join(parts[fault.nth + 1 :])
    if text.header == original:
        return text._replace(header=faulty)
    assert text.source == original
    return text._replace(source=faulty)


def change_dispatch(fault: Fault, dispatch: Dispatch) -> Dispatch:
    """Plant the fault if the dispatch calls the fault's kernel."""
    if dispatch.text.name != fault.kernel:
        return dispatch
    return dispatch._replace(text=plant(fault, dispatch.text))


def small_case() -> Case:
    return random_case(experts=3, tokens=2, top_k=2, hidden=64, intermediate=32)


def shared_case() -> Case:
    """Return a case with experts that are the first choice of one token and the last of another, and many groups."""
    case = random_case(experts=4, tokens=5, top_k=3, hidden=1120, intermediate=96)
    return case._replace(expert_ids=mx.array([[1, 3, 0], [0, 1, 2], [2, 3, 1], [3, 2, 1], [1, 0, 2]], mx.uint32))


def full_tile_case() -> Case:
    """Return a case in which expert 1 has a full tile of pairs and three more pairs."""
    case = random_case(experts=4, tokens=35, top_k=2, hidden=96, intermediate=64)
    ids = np.array(case.expert_ids)
    ids[:, 0], ids[:, 1] = 1, np.resize([0, 2, 3], 35)
    return case._replace(expert_ids=mx.array(ids))


def largest_error(fault: Fault) -> float:
    """Return the largest error with the faulty kernel, divided by the tolerance."""
    change = functools.partial(change_dispatch, fault)
    kernel_family = fault.kernel.partition("_")[0]
    if kernel_family == "router":
        return route_errors(mode=fault.mode, change=change) / ROUTER_TOLERANCE
    variant = Variant(kernel_family)
    if fault.mode is Mode.RACES:  # the thread sanitizer is slow
        case = small_case()
    else:
        case = full_tile_case() if variant is Variant.PREFILL else shared_case()
    errors = measure(case, variant, mode=fault.mode, change=change)
    return float(np.max(errors)) / float64.TOLERANCE[mx.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_detected(name: str) -> None:
    try:
        error = largest_error(FAULTS[name])
    except KernelFault:
        return
    assert error > 1, f"the fault is not detected: the largest error is {error} of the tolerance"


def test_every_metal_file_has_planted_faults() -> None:
    files = {entry.name for entry in importlib.resources.files("mlx_k2.kernels").iterdir()}
    assert {fault.file for fault in FAULTS.values()} == {name for name in files if name.endswith(".metal")}
