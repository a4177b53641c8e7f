"""Tests of experts in plain MLX: they equal float64, the router equals mlx-lm's, and other tokens change no output."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.deepseek_v3 import group_expert_select

from mlx_k2.kernels import reference
from mlx_k2.kernels.experts import route, routed_experts
from mlx_k2.kernels.reference import RouterRule
from mlx_k2.kernels.stack import make_affine
from tests.metal_cpu import float64
from tests.metal_cpu.float64 import random_case

SCALES = ("gate_scale", "up_scale", "down_scale")

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (16, 4), (96, 4), (96, 8)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_routed_experts_equal_float64(experts: int, top_k: int, tokens: int) -> None:
    case = random_case(experts=experts, tokens=tokens, top_k=top_k, hidden=96, intermediate=64, dtype=mx.float32)
    expected = float64.down(case, mx.array(float64.gate_up(case)))
    assert float64.relative_error(routed_experts(*case), expected) <= 1e-6


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("experts", [16, 96])
def test_stored_biases_give_bit_identical_results_to_computed_ones(experts: int, tokens: int) -> None:
    case = random_case(experts=experts, tokens=tokens, top_k=4, hidden=96, intermediate=64, dtype=mx.float32)
    stack = case.stack._replace(**{name: getattr(case.stack, name).astype(mx.bfloat16) for name in SCALES})
    with_stored_biases = routed_experts(*case[:3], make_affine(stack, mx.float32))
    assert mx.array_equal(with_stored_biases, routed_experts(*case[:3], stack)).item()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(7, 3), (128, 8)])
def test_a_tokens_expert_output_is_bit_identical_in_any_batch(experts: int, top_k: int, compiled: bool) -> None:
    tokens = 80  # the slices of 1 to 80 tokens cover all three methods: copied experts, the whole stack, sorted pairs
    case = random_case(experts=experts, tokens=tokens, top_k=top_k, hidden=160, intermediate=96, dtype=mx.float32)
    compute = mx.compile(routed_experts) if compiled else routed_experts
    expected = compute(*case)
    for count in (1, 2, 3, 4, 7, 8, 9, 16, 21, 22, 33, 64, 79):  # pairs are sorted from 22 x 3 and from 8 x 8 on
        for start in {0, 1, tokens - count}:
            some = slice(start, start + count)
            outputs = compute(case.x[some], case.expert_ids[some], case.expert_weights[some], case.stack)
            assert mx.array_equal(outputs, expected[some]).item(), (count, start)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("experts", [15, 64])
def test_a_tokens_route_is_bit_identical_in_any_batch(experts: int, compiled: bool) -> None:
    rng = np.random.default_rng(3)
    weight = mx.array(rng.standard_normal((experts, 96), dtype=np.float32))
    bias = mx.array(rng.standard_normal(experts, dtype=np.float32))
    hidden = mx.array(rng.standard_normal((70, 96), dtype=np.float32))

    def choose(hidden: mx.array) -> tuple[mx.array, mx.array]:
        return route(hidden, weight, bias, RouterRule(4, normalize=True, scaling_factor=2.827))

    compute = mx.compile(choose) if compiled else choose
    ids, weights = compute(hidden)
    for count in (1, 2, 5, 16, 33, 64):
        for start in {0, 3, 70 - count}:
            some = slice(start, start + count)
            ids_of_some, weights_of_some = compute(hidden[some])
            assert mx.array_equal(ids_of_some, ids[some]).item()
            assert mx.array_equal(weights_of_some, weights[some]).item()


@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (4, 2), (8, 3), (4, 4)])
@pytest.mark.parametrize("normalize", [False, True])
def test_route_equals_mlx_lm(num_groups: int, top_groups: int, normalize: bool) -> None:
    rng = np.random.default_rng(num_groups)
    hidden = mx.array(rng.standard_normal((33, 64), dtype=np.float32))
    weight = mx.array(rng.standard_normal((32, 64), dtype=np.float32) * 0.1)
    bias = mx.array(rng.random(32, dtype=np.float32))
    rule = RouterRule(6, normalize, scaling_factor=2.5, num_groups=num_groups, top_groups=top_groups)
    ids, weights = route(hidden, weight, bias, rule)
    expected_ids, expected_weights = group_expert_select(
        hidden @ weight.T, bias, 6, num_groups, top_groups, 2.5, normalize
    )
    order, expected_order = mx.argsort(ids, axis=1), mx.argsort(expected_ids, axis=1)  # mlx-lm's ids are not sorted
    in_order = mx.take_along_axis
    assert mx.array_equal(in_order(ids, order, 1), in_order(expected_ids, expected_order, 1))
    assert mx.allclose(in_order(weights, order, 1), in_order(expected_weights, expected_order, 1), rtol=1e-6, atol=0)
    assert ids.dtype == mx.uint32
    assert weights.dtype == mx.float32


def test_experts_are_ordered_by_score_with_ties_by_id() -> None:
    logits = mx.array([[0.0, 2.0, 2.0, -1.0, 2.0, 5.0]])
    ids, _ = reference.select_experts(logits, mx.zeros(6), RouterRule(4, normalize=True, scaling_factor=1.0))
    assert ids.tolist() == [[5, 1, 2, 4]]


def test_the_correction_bias_affects_selection_but_not_weights() -> None:
    ids, weights = reference.select_experts(
        mx.array([[0.0, 3.0, -3.0]]),
        mx.array([0.0, 0.0, 10.0]),
        RouterRule(1, normalize=True, scaling_factor=1.0),
    )
    assert ids.tolist() == [[2]]
    assert weights.item() == pytest.approx(1 / (1 + np.exp(3.0)), rel=1e-6)


def test_routed_experts_can_be_traced_without_evaluation() -> None:
    case = random_case(experts=8, tokens=2, top_k=2, hidden=32, intermediate=32, dtype=mx.float32)

    def layer(x: mx.array) -> mx.array:
        return routed_experts(x, *case[1:])

    traced = mx.compile(layer)(case.x)  # an eval or a host copy inside would raise while tracing
    assert mx.allclose(traced, layer(case.x), rtol=1e-6).item()
