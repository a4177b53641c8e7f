"""Tests of the router's kernels: logits in float32, and the same chosen experts and weights as the reference."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_k2.kernels import reference, router, variants
from mlx_k2.kernels.dispatch import Dispatch
from mlx_k2.kernels.reference import RouterRule
from tests.metal_cpu import float64
from tests.metal_cpu.execute import execute
from tests.metal_cpu.layers import unchanged
from tests.metal_cpu.program import BACKWARD, FORWARD, SHUFFLED, Mode, Schedule

pytestmark = pytest.mark.timeout(60)

HIDDEN = 352
TOLERANCE = 1e-6
"""Largest allowed relative error."""


def route_errors(
    *,
    experts: int = 48,
    top_k: int = 6,
    tokens: int = 3,
    mode: Mode = Mode.FAST,
    schedule: Schedule = FORWARD,
    dtype: mx.Dtype = mx.bfloat16,
    change: Callable[[Dispatch], Dispatch] = unchanged,
) -> float:
    """Return the largest relative error of logits or weights; infinity if the reference chooses other experts."""
    rng = np.random.default_rng(experts)
    hidden = mx.array(rng.standard_normal((tokens, HIDDEN), dtype=np.float32)).astype(dtype)
    weight = mx.array(rng.standard_normal((experts, HIDDEN), dtype=np.float32) * 0.1).astype(dtype)
    weight[5] = weight[3]  # experts 3 and 5 have equal scores
    bias = mx.array(rng.random(experts, dtype=np.float32))
    bias[5] = bias[3] = 2.0
    outputs_of_kernels: list[mx.array] = []

    def perform(dispatch: Dispatch) -> list[mx.array]:
        outputs = execute(change(dispatch), mode=mode, schedule=schedule).outputs
        outputs_of_kernels.extend(outputs)
        return outputs

    rule = RouterRule(top_k, normalize=True, scaling_factor=2.827)
    variants.route(hidden, weight, bias, rule, perform)
    logits, ids, weights = outputs_of_kernels
    exact = float64.to_float64(hidden) @ float64.to_float64(weight).T
    expected_ids, expected_weights = reference.select_experts(logits, bias, rule)
    if not mx.array_equal(ids, expected_ids).item():
        return float("inf")
    weights_error = float64.relative_error(weights, float64.to_float64(expected_weights))
    return max(float64.relative_error(logits, exact), weights_error)


@pytest.mark.parametrize(("experts", "top_k"), [(384, 8), (48, 6), (33, 32), (7, 3), (8, 8)])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_the_router_kernel_selects_and_weights_experts_like_the_reference(
    experts: int, top_k: int, tokens: int
) -> None:
    assert route_errors(experts=experts, top_k=top_k, tokens=tokens) <= TOLERANCE


@pytest.mark.parametrize("schedule", [BACKWARD, SHUFFLED])
def test_the_router_kernel_is_correct_in_every_schedule(schedule: Schedule) -> None:
    assert route_errors(schedule=schedule) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Mode.ADDRESSES, Mode.RACES])
def test_the_router_kernel_has_no_address_fault_and_no_race(mode: Mode) -> None:
    assert route_errors(experts=34, top_k=4, tokens=2, mode=mode) <= TOLERANCE


def test_the_router_kernel_is_correct_in_float32() -> None:
    assert route_errors(dtype=mx.float32) <= TOLERANCE


def select(logits: mx.array, *, top_k: int, normalize: bool = True) -> tuple[mx.array, mx.array]:
    """Run the second kernel, router_select, without biases; return the chosen ids and their weights."""
    dispatch = router.select(logits, mx.zeros(logits.shape[1]), RouterRule(top_k, normalize, 1.0))
    ids, weights = execute(dispatch).outputs
    return ids, weights


def test_of_equal_scores_the_lower_id_is_selected_also_across_lanes() -> None:
    logits = np.full((1, 96), -3.0, np.float32)
    logits[0, [70, 5, 38, 6]] = 1.0  # lane 6 has experts 70, 38 and 6; lane 5 has expert 5
    ids, _ = select(mx.array(logits), top_k=5)
    assert ids.tolist() == [[5, 6, 38, 70, 0]]


def test_saturated_scores_are_ordered_as_by_the_reference() -> None:
    logits = mx.array([[40.0, 90.0, 30.0, -90.0, -200.0, 60.0]])
    ids, weights = select(logits, top_k=5)
    expected_ids, expected_weights = reference.select_experts(logits, mx.zeros(6), RouterRule(5, True, 1.0))
    assert ids.tolist() == expected_ids.tolist()
    np.testing.assert_allclose(np.array(weights), np.array(expected_weights), rtol=TOLERANCE)


def test_weights_are_plain_sigmoids_when_not_normalized() -> None:
    _, weights = select(mx.array([[0.0, 2.0, -1.0]]), top_k=2, normalize=False)
    np.testing.assert_allclose(np.array(weights), [[1 / (1 + np.exp(-2.0)), 0.5]], rtol=TOLERANCE)


def test_expert_ids_are_in_range_when_every_logit_is_nan() -> None:
    ids, _ = select(mx.full((2, 40), float("nan")), top_k=8)
    assert np.array(ids).max() < 40
