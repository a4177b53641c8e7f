"""Tests of the kernels of routed experts: results close to float64 for any size, values and schedule; no faults."""

import functools
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_k2.kernels import decode
from mlx_k2.kernels.stack import ExpertStack
from mlx_k2.kernels.tuning import DEFAULT
from tests.metal_cpu import float64
from tests.metal_cpu.execute import execute, to_numpy
from tests.metal_cpu.float64 import Case, random_case, relative_error
from tests.metal_cpu.layers import Recorder, Variant, assert_within_tolerance, measure
from tests.metal_cpu.program import BACKWARD, SHUFFLED, Mode, Schedule

pytestmark = pytest.mark.timeout(100)

# Tests that share a shape share the compiled kernels.
common_case = functools.partial(random_case, experts=5, top_k=3, hidden=96, intermediate=64)
every_variant = pytest.mark.parametrize("variant", list(Variant))


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 16])
def test_the_batch_kernels_are_correct_for_every_token_count(tokens: int) -> None:
    case = random_case(experts=6, tokens=tokens, top_k=4, hidden=192, intermediate=64, seed=tokens)
    assert_within_tolerance(case, measure(case, Variant.BATCH))


@every_variant
@pytest.mark.parametrize(
    "top_k",
    [pytest.param(4, marks=pytest.mark.slow), 7, pytest.param(8, marks=pytest.mark.slow)],
    ids=lambda top_k: f"{top_k} ids",
)
def test_kernels_are_correct_with_inputs_in_constant_and_in_device_memory(variant: Variant, top_k: int) -> None:
    """MLX passes an input of fewer than 8 elements in constant memory."""
    case = random_case(experts=9, tokens=1, top_k=top_k, hidden=64, intermediate=64, seed=top_k)
    assert_within_tolerance(case, measure(case, variant))


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 32), (1056, 160)])
def test_kernels_are_correct_for_sizes_of_one_and_of_many_groups(
    variant: Variant, hidden: int, intermediate: int
) -> None:
    case = random_case(experts=5, tokens=3, top_k=3, hidden=hidden, intermediate=intermediate, seed=hidden)
    assert_within_tolerance(case, measure(case, variant))


@every_variant
def test_kernels_are_correct_in_float32(variant: Variant) -> None:
    case = random_case(experts=6, tokens=3, top_k=4, hidden=416, intermediate=96, dtype=mx.float32)
    assert_within_tolerance(case, measure(case, variant))


def constant_codes(word: int) -> float64.Codes:
    """Return the function that packs codes into equal words."""

    def codes(_: np.random.Generator, *shape: int) -> npt.NDArray[np.uint32]:
        experts, outputs, inputs = shape
        return np.full((experts, outputs, inputs // 8), word, np.uint32)

    return codes


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("word", [0x00000000, 0xFFFFFFFF], ids=["all -8", "all +7"])
def test_kernels_are_correct_for_extreme_codes(variant: Variant, word: int) -> None:
    case = common_case(tokens=3, codes=constant_codes(word))
    assert_within_tolerance(case, measure(case, variant))


def extreme_scales(rng: np.random.Generator, experts: int, outputs: int, groups: int) -> npt.NDArray[np.float32]:
    """Return scales of both signs from 1e-9 to 1e3."""
    signs = rng.choice(np.array([-1, 1], np.float32), (experts, outputs, groups))
    return (signs * 10 ** rng.uniform(-9, 3, (experts, outputs, groups))).astype(np.float32)


@every_variant
def test_kernels_are_correct_for_extreme_scales(variant: Variant) -> None:
    case = common_case(tokens=3, scales=extreme_scales)
    assert_within_tolerance(case, measure(case, variant))


@every_variant
def test_kernels_are_correct_when_all_tokens_choose_the_same_experts(variant: Variant) -> None:
    case = common_case(tokens=4)
    case = case._replace(expert_ids=mx.broadcast_to(case.expert_ids[:1], case.expert_ids.shape))
    assert_within_tolerance(case, measure(case, variant))


@every_variant
def test_kernels_are_correct_when_a_token_chooses_an_expert_twice(variant: Variant) -> None:
    case = common_case(tokens=3)
    case = case._replace(expert_ids=mx.array([[4, 2, 4], [2, 2, 2], [0, 4, 1]], mx.uint32))
    assert_within_tolerance(case, measure(case, variant))


@pytest.mark.parametrize("experts", [3, 40])
def test_prefill_is_correct_with_uneven_token_counts_per_expert(experts: int) -> None:
    case = random_case(experts=experts, tokens=45, top_k=2, hidden=64, intermediate=64)
    ids = np.array(case.expert_ids)
    ids[:, 0] = np.where(np.arange(45) < 33, 1, ids[:, 0])  # expert 1 has more pairs than a tile of 32
    case = case._replace(expert_ids=mx.array(ids))
    assert_within_tolerance(case, measure(case, Variant.PREFILL))


@pytest.mark.slow
@pytest.mark.parametrize("variant", [Variant.DECODE, Variant.BATCH])
@pytest.mark.parametrize(("rows", "simdgroups"), [(1, 1), (2, 4), (8, 4)])
def test_kernels_are_correct_with_any_tuning(variant: Variant, rows: int, simdgroups: int) -> None:
    tuning = DEFAULT._replace(
        gate_up_rows=rows,
        down_rows=rows,
        batch_rows=min(rows, 4),  # timing tries no more
        gate_up_simdgroups=simdgroups,
        batch_simdgroups=simdgroups,
    )
    case = common_case(tokens=3)
    assert_within_tolerance(case, measure(case, variant, tuning=tuning))


@every_variant
@pytest.mark.parametrize("schedule", [BACKWARD, SHUFFLED])
def test_results_do_not_depend_on_the_schedule(variant: Variant, schedule: Schedule) -> None:
    case = common_case(tokens=3)
    assert measure(case, variant, schedule=schedule) == measure(case, variant)


@pytest.mark.slow
@every_variant
def test_no_access_is_out_of_bounds_or_misaligned(variant: Variant) -> None:
    case = random_case(experts=4, tokens=3, top_k=2, hidden=96, intermediate=32)
    assert_within_tolerance(case, measure(case, variant, mode=Mode.ADDRESSES))


@pytest.mark.slow
@every_variant
def test_no_kernel_has_a_data_race(variant: Variant) -> None:
    case = random_case(experts=3, tokens=2, top_k=2, hidden=64, intermediate=32)
    assert_within_tolerance(case, measure(case, variant, mode=Mode.RACES))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "tokens"), [(Variant.DECODE, 1), (Variant.BATCH, 2)])
def test_kernels_are_correct_at_the_size_of_k2(variant: Variant, tokens: int) -> None:
    case = random_case(experts=9, tokens=tokens, top_k=8, hidden=7168, intermediate=2048)
    compared_outputs = slice(1900, 1964)  # float64 takes too long for all outputs
    assert_within_tolerance(case, measure(case, variant, tuning=DEFAULT, rows=compared_outputs))


@pytest.mark.slow
def test_gate_up_is_correct_for_a_stack_above_4_gb(tmp_path: Path) -> None:
    """Gate and up have 2.8 GB each, in sparse files with data for the 8 chosen experts only."""
    experts, outputs, inputs = 384, 2048, 7168
    chosen = np.array([[383, 0, 382, 200, 7, 291, 293, 100]], np.uint32)
    small = random_case(experts=8, tokens=1, top_k=8, hidden=inputs, intermediate=outputs)
    small = small._replace(expert_ids=mx.arange(8, dtype=mx.uint32)[None])
    files = {}
    for name in ("gate_packed", "gate_scale", "up_packed", "up_scale"):
        values = to_numpy(getattr(small.stack, name))
        file = np.memmap(tmp_path / name, values.dtype, "w+", shape=(experts, *values.shape[1:]))
        file[chosen[0]] = values
        file.flush()
        files[name] = tmp_path / name
    packed = mx.zeros((experts, outputs, inputs // 8), mx.uint32)  # never evaluated: gives only shape and type
    scale = mx.zeros((experts, outputs, inputs // 32), mx.bfloat16)
    stack = ExpertStack(packed, scale, packed, scale, small.stack.down_packed, small.stack.down_scale)
    dispatch = decode.gate_up(small.x, mx.array(chosen), stack, rows_per_simdgroup=4, simdgroups=2)
    (hidden,) = execute(dispatch, files=files).outputs
    rows = slice(2040, 2048)  # the last ones, which have the highest addresses
    assert relative_error(hidden[:, :, rows], float64.gate_up(small, rows)) <= float64.TOLERANCE[mx.bfloat16]


def needed_bytes(case: Case, *names: str) -> int:
    """Return the bytes of the arrays ``names`` of the stack that belong to chosen experts."""
    num_distinct = np.unique(np.array(case.expert_ids)).size
    arrays = [getattr(case.stack, name) for name in names]
    return sum(num_distinct * array.nbytes // array.shape[0] for array in arrays)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "tokens"), [(Variant.DECODE, 1), (Variant.BATCH, 1), (Variant.BATCH, 8)])
def test_each_weight_is_loaded_from_memory_once(variant: Variant, tokens: int) -> None:
    case = random_case(experts=12, tokens=tokens, top_k=8, hidden=1024, intermediate=128)
    recorder = Recorder(Mode.BYTES)
    variant.compute(case.x, case.expert_ids, case.expert_weights, case.stack, DEFAULT, recorder)
    for kernel, names in (
        (f"{variant.value}_gate_up", ("gate_packed", "gate_scale", "up_packed", "up_scale")),
        (f"{variant.value}_down", ("down_packed", "down_scale")),
    ):
        loaded = recorder.executed[kernel].bytes_loaded(*names)
        needed = needed_bytes(case, *names)
        assert needed <= loaded <= 1.02 * needed, kernel  # a compiler may load a few scales again
