"""Runs of a layer's routed experts in the executor, and their errors compared with float64."""

import enum
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_k2.kernels import prefill
from mlx_k2.kernels.dispatch import Dispatch
from mlx_k2.kernels.tuning import DEFAULT, Tuning
from mlx_k2.kernels.variants import Experts, batch_experts, decode_experts, prefill_experts
from tests.metal_cpu import float64
from tests.metal_cpu.execute import Executed, execute
from tests.metal_cpu.float64 import ALL_ROWS, Case
from tests.metal_cpu.program import FORWARD, Mode, Schedule

FEW_THREADS = DEFAULT._replace(batch_simdgroups=4)
"""Tuning with fewer Metal threads for small cases."""
FEWEST_THREADS = Tuning(gate_up_rows=8, gate_up_simdgroups=2, down_rows=8, batch_rows=4, batch_simdgroups=2)
"""Tuning for Mode.RACES: the thread sanitizer needs most of its time to create threads."""


class Variant(enum.Enum):
    """Kernels of routed experts."""

    DECODE = "decode"
    BATCH = "batch"
    PREFILL = "prefill"

    @property
    def compute(self) -> Experts:
        """Function that computes the layer with these kernels."""
        return {
            Variant.DECODE: decode_experts,
            Variant.BATCH: batch_experts,
            Variant.PREFILL: prefill_experts,
        }[self]


def unchanged(dispatch: Dispatch) -> Dispatch:
    """Return the dispatch itself."""
    return dispatch


class Errors(NamedTuple):
    """Largest errors of the two halves of a layer, each divided by the half's largest output.

    ``down`` is compared with the exact result for the kernel's own output of gate and up.
    """

    gate_up: float
    down: float


class Recorder:
    """Function that runs dispatches, each changed by `change`, and keeps the results by kernel name."""

    def __init__(
        self, mode: Mode = Mode.FAST, schedule: Schedule = FORWARD, change: Callable[[Dispatch], Dispatch] = unchanged
    ) -> None:
        self.mode = mode
        self.schedule = schedule
        self.change = change
        self.executed: dict[str, Executed] = {}

    def __call__(self, dispatch: Dispatch) -> list[mx.array]:
        name = dispatch.text.name
        self.executed[name] = execute(self.change(dispatch), mode=self.mode, schedule=self.schedule)
        return self.executed[name].outputs


def hidden_by_pair(recorder: Recorder, variant: Variant, case: Case) -> mx.array:
    """Return the output of gate and up, (tokens, top_k, intermediate).

    The prefill kernel's output, which is sorted by expert, is brought back into the order of the pairs.
    """
    (hidden,) = recorder.executed[f"{variant.value}_gate_up"].outputs
    if variant is not Variant.PREFILL:
        return hidden
    order = prefill.sort_pairs(case.expert_ids, case.stack.num_experts).order
    return hidden[mx.argsort(order)].reshape(*case.expert_ids.shape, -1)


def measure(
    case: Case,
    variant: Variant,
    *,
    mode: Mode = Mode.FAST,
    schedule: Schedule = FORWARD,
    tuning: Tuning | None = None,
    rows: slice = ALL_ROWS,
    change: Callable[[Dispatch], Dispatch] = unchanged,
) -> Errors:
    """Run a layer and return its errors. ``rows`` limits the outputs that are compared."""
    recorder = Recorder(mode, schedule, change)
    if tuning is None:
        tuning = FEWEST_THREADS if mode is Mode.RACES else FEW_THREADS
    y = variant.compute(case.x, case.expert_ids, case.expert_weights, case.stack, tuning, recorder)
    hidden = hidden_by_pair(recorder, variant, case)
    return Errors(
        float64.relative_error(hidden[:, :, rows], float64.gate_up(case, rows)),
        float64.relative_error(y[:, rows], float64.down(case, hidden, rows)),
    )


def assert_within_tolerance(case: Case, errors: Errors) -> None:
    tolerance = float64.TOLERANCE[case.x.dtype]
    assert np.max(errors) <= tolerance, errors
