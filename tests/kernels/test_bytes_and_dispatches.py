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

SHAPE = LayerShape(hidden_size=64, intermediate_size=32, top_k=8, dtype=mx.bfloat16, num_experts=16)


def k2_config() -> ModelConfig:
    return ModelConfig.from_json(json.dumps(thinking_config_fields()).encode(), "Kimi K2 Thinking")


def test_routed_experts_use_4_5_bits_per_weight() -> None:
    stack = random_stack(SHAPE, num_experts=4)
    num_words = stack.gate_packed.size + stack.up_packed.size + stack.down_packed.size
    assert sum(array.nbytes for array in stack) * 8 == 4.5 * num_words * CODES_PER_WORD


@pytest.mark.parametrize(("compute", "tokens"), [(variants.decode_experts, 1), (variants.batch_experts, 8)])
def test_the_decode_and_the_batch_kernel_launch_twice_for_routed_experts(compute: Experts, tokens: int) -> None:
    stack, ids = random_stack(SHAPE, SHAPE.num_experts), random_expert_ids(tokens, SHAPE.num_experts, SHAPE.top_k)
    x, weights = mx.zeros((tokens, SHAPE.hidden_size), mx.bfloat16), mx.zeros((tokens, SHAPE.top_k))
    mx.eval(stack, ids, x, weights)

    def layer(x: mx.array) -> mx.array:
        return compute(x, ids, weights, ExpertStack(*stack), DEFAULT, kernel_in_graph)

    assert count_dispatches(layer, x) == {KERNEL: 2}


def test_a_decoded_token_needs_at_most_10_dispatches_in_our_moe_block_and_at_least_18_in_mlx_lms() -> None:
    assert our_dispatches(k2_config()) <= 10
    assert mlx_lm_dispatches(k2_config()) >= 18


@pytest.mark.parametrize(
    ("dense_bits", "stored_biases", "held_gb", "read_gb"),
    [(None, False, 594.21, 32.99), (None, True, 657.62, 34.31), (8, False, 584.47, 23.25), (4, False, 579.28, 18.06)],
)
def test_k2_holds_and_reads_the_documented_bytes_with_each_choice_of_dense_bits_and_biases(
    dense_bits: int | None, stored_biases: bool, held_gb: float, read_gb: float
) -> None:
    held_and_read = bytes_held_and_read(k2_config(), dense_bits, stored_biases=stored_biases)
    assert [round(num_bytes / 1e9, 2) for num_bytes in held_and_read] == [held_gb, read_gb]


@pytest.mark.slow
def test_the_table_has_mlx_k2_and_mlx_lm_without_and_with_8_dense_bits() -> None:
    assert [(row.program, row.dense_bits) for row in table()] == [
        ("mlx-k2", None),
        ("mlx-lm", None),
        ("mlx-k2", 8),
        ("mlx-lm", 8),
    ]
