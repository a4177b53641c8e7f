"""Tests of the bytes that a decoded token reads and of its dispatches, counted from shapes and graphs."""

import json

import mlx.core as mx
import pytest

from bench.bytes_per_token import bytes_held_and_read, mlx_lm_dispatches, our_dispatches, table
from bench.graph_dispatches import KERNEL, count_dispatches, kernel_in_graph
from mlx_k2.config import ModelConfig
from mlx_k2.kernels import variants
from mlx_k2.kernels.self_check import LayerShape, random_expert_ids, random_stack
from mlx_k2.kernels.stack import CODES_PER_WORD, ExpertStack
from mlx_k2.kernels.tuning import DEFAULT
from mlx_k2.kernels.variants import Experts
from mlx_k2.weights.known_layout import thinking_config_fields

pytestmark = pytest.mark.timeout(60)

SHAPE = LayerShape(64, 32, 8, mx.bfloat16)


def k2_thinking() -> ModelConfig:
    return ModelConfig.from_json(json.dumps(thinking_config_fields()).encode(), "test")


def test_routed_experts_use_4_5_bits_per_weight() -> None:
    stack = random_stack(SHAPE, 4)
    weights = sum(stack[i].size * CODES_PER_WORD for i in (0, 2, 4))
    assert sum(array.nbytes for array in stack) * 8 == 4.5 * weights


@pytest.mark.parametrize(("compute", "tokens"), [(variants.decode_experts, 1), (variants.batch_experts, 8)])
def test_routed_experts_launch_two_kernels(compute: Experts, tokens: int) -> None:
    stack, ids = random_stack(SHAPE, 16), random_expert_ids(tokens, 16, SHAPE.top_k)
    x, weights = mx.zeros((tokens, 64), mx.bfloat16), mx.zeros((tokens, SHAPE.top_k))
    mx.eval(stack, ids, x, weights)

    def layer(x: mx.array) -> mx.array:
        return compute(x, ids, weights, ExpertStack(*stack), DEFAULT, kernel_in_graph)

    assert count_dispatches(layer, x) == {KERNEL: 2}


def test_a_moe_block_launches_at_most_ten_kernels_at_decode() -> None:
    assert our_dispatches(k2_thinking()) <= 10 < 18 <= mlx_lm_dispatches(k2_thinking())


@pytest.mark.parametrize(
    ("dense_bits", "stored_biases", "held", "read"),
    [(None, False, 594.21, 32.99), (None, True, 657.62, 34.31), (8, False, 584.47, 23.25), (4, False, 579.28, 18.06)],
)
def test_held_and_read_bytes_follow_from_the_shapes(
    dense_bits: int | None, stored_biases: bool, held: float, read: float
) -> None:
    counted = bytes_held_and_read(k2_thinking(), dense_bits, stored_biases=stored_biases)
    assert [round(num_bytes / 1e9, 2) for num_bytes in counted] == [held, read]


@pytest.mark.slow
def test_the_table_has_mlx_k2_and_mlx_lm_as_shipped_and_with_8_dense_bits() -> None:
    assert [(row.program, row.dense_bits) for row in table()] == [
        ("mlx-k2", None),
        ("mlx-lm", None),
        ("mlx-k2", 8),
        ("mlx-lm", 8),
    ]
