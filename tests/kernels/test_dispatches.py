"""Tests of dispatches: arguments that a kernel cannot handle are refused, because kernels check nothing."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_k2.kernels import decode, prefill, router
from mlx_k2.kernels.dispatch import Dispatch, cuda_body, metal_texts, read_metal, run
from mlx_k2.kernels.reference import RouterRule
from tests.metal_cpu.float64 import Case, random_case

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def case() -> Case:
    return random_case(experts=4, tokens=3, top_k=2, hidden=64, intermediate=32)


def gate_up(case: Case) -> Dispatch:
    return decode.gate_up(case.x, case.expert_ids, case.stack, rows_per_simdgroup=4, simdgroups=2)


def with_array(case: Case, name: str, change: Callable[[mx.array], mx.array]) -> Case:
    """Return the case with one array of its stack changed."""
    return case._replace(stack=case.stack._replace(**{name: change(getattr(case.stack, name))}))


WRONG_CASES: dict[str, Callable[[Case], Case]] = {
    "x of another width": lambda case: case._replace(x=case.x[:, :32]),
    "x of more tokens than ids": lambda case: case._replace(x=mx.concatenate([case.x, case.x])),
    "x with a batch dimension": lambda case: case._replace(x=case.x[None]),
    "ids of another type": lambda case: case._replace(expert_ids=case.expert_ids.astype(mx.int32)),
    "packed weights of another type": lambda case: with_array(case, "gate_packed", lambda a: a.astype(mx.int32)),
    "scales of another type": lambda case: with_array(case, "up_scale", lambda a: a.astype(mx.float32)),
    "scales of another group size": lambda case: with_array(case, "gate_scale", lambda a: a[:, :, :1]),
    "experts missing in up": lambda case: with_array(case, "up_packed", lambda a: a[:2]),
}


@pytest.mark.parametrize("name", WRONG_CASES)
def test_gate_up_refuses_wrong_shapes_and_dtypes(name: str, case: Case) -> None:
    gate_up(case)
    with pytest.raises(AssertionError):
        gate_up(WRONG_CASES[name](case))


def test_gate_up_refuses_threadgroup_rows_that_do_not_divide_the_outputs(case: Case) -> None:
    with pytest.raises(AssertionError, match="32 rows in threadgroups of 4 x 16"):
        decode.gate_up(case.x, case.expert_ids, case.stack, rows_per_simdgroup=16, simdgroups=4)


def test_down_refuses_hidden_rows_of_another_token_count(case: Case) -> None:
    hidden = mx.zeros((2, 2, 32), mx.bfloat16)  # of 2 tokens; the case has 3
    with pytest.raises(AssertionError, match="hidden is"):
        decode.down(hidden, case.expert_ids, case.expert_weights, case.stack, rows_per_simdgroup=4)


def test_the_batch_kernel_accepts_at_most_16_tokens() -> None:
    assert [decode.capacity(tokens) for tokens in (1, 2, 3, 4, 5, 8, 9, 16)] == [2, 2, 4, 4, 8, 8, 16, 16]
    with pytest.raises(AssertionError, match="17 tokens"):
        decode.capacity(17)


def test_the_router_refuses_more_experts_than_there_are() -> None:
    with pytest.raises(AssertionError, match="9 of 8 experts"):
        router.select(mx.zeros((1, 8)), mx.zeros(8), RouterRule(9, normalize=True, scaling_factor=1.0))


@pytest.mark.parametrize("num_experts", [1, 5, 40])
def test_pairs_are_sorted_by_expert_and_then_by_token(num_experts: int) -> None:
    case = random_case(experts=num_experts, tokens=37, top_k=1, hidden=32, intermediate=32)
    order, offsets = (np.array(array) for array in prefill.sort_pairs(case.expert_ids, num_experts))
    ids = np.array(case.expert_ids)[:, 0]
    np.testing.assert_array_equal(order, np.argsort(ids, kind="stable"))
    np.testing.assert_array_equal(offsets, [(ids < expert).sum() for expert in range(num_experts + 1)])


def test_max_tiles_is_an_upper_bound_of_the_tiles_used() -> None:
    for pairs_by_expert in ([1] * 40, [33, 33, 33], [64, 0, 31, 1], [0, 0, 5]):
        num_tiles = sum(-(-num_pairs // prefill.TILE) for num_pairs in pairs_by_expert)
        assert num_tiles <= prefill.max_tiles(sum(pairs_by_expert), len(pairs_by_expert))


def test_cuda_body_removes_address_spaces_but_keeps_shared_arrays() -> None:
    body = cuda_body("const device uint4* p = (const device uint4*)w; threadgroup float parts[8]; thread float* q;")
    assert body == "const uint4* p = (const uint4*)w; threadgroup float parts[8]; float* q;"


def test_the_package_has_all_12_kernel_files() -> None:
    assert len(metal_texts()) == 12
    assert read_metal("int4.metal") in metal_texts()


def test_a_kernel_run_without_a_gpu_raises(case: Case) -> None:
    if mx.default_device().type == mx.DeviceType.gpu:
        return
    with pytest.raises(RuntimeError):
        mx.eval(run(gate_up(case)))
