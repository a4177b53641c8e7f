"""Tests of dense bits: weights are quantized as by mx.quantize, and logits are mlx-lm's with the same weights."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_k2.model.linear import QuantizedMatrix, make_matrix, multiply, multiply_transposed, some_heads
from mlx_k2.weights.inventory import embedding_specs, head_specs, held_bytes, layer_specs
from tests.model.chain import Chain, largest_difference, loaded_bytes
from tests.model.checkpoints import VARIANTS, Checkpoint, read_config
from tests.model.oracle import load_oracle
from tests.model.test_against_mlx_lm import PROMPT, MlxLmResults

pytestmark = pytest.mark.timeout(120)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "dense_bits"), [*((variant, 8) for variant in VARIANTS), ("thinking", 4)])
def test_logits_and_greedy_tokens_equal_mlx_lms_with_the_same_quantized_weights(
    checkpoint: Checkpoint, variant: str, dense_bits: int
) -> None:
    mlx_lm_results = MlxLmResults(load_oracle(checkpoint(variant), dense_bits))
    mlx_lm_results.check(Chain(checkpoint(variant), 2, dense_bits=dense_bits))


def test_logits_with_8_dense_bits_are_closer_to_the_checkpoints_than_with_4(checkpoint: Checkpoint) -> None:
    exact, eight, four = (Chain(checkpoint("thinking"), 1, dense_bits=bits).prefill(PROMPT) for bits in (None, 8, 4))
    error_8, error_4 = (float(np.abs(np.asarray(logits) - np.asarray(exact)).mean()) for logits in (eight, four))
    assert 0 < error_8 < error_4


@pytest.mark.parametrize("chunk_tokens", [1, 7])
def test_a_prompts_logits_are_bit_identical_for_any_chunk_length(chain_of_8_bits: Chain, chunk_tokens: int) -> None:
    unchunked = chain_of_8_bits.prefill(PROMPT)
    assert mx.array_equal(chain_of_8_bits.prefill(PROMPT, slot=1, chunk_tokens=chunk_tokens), unchunked)


@pytest.fixture(scope="module")
def chain_of_8_bits(checkpoint: Checkpoint) -> Chain:
    return Chain(checkpoint("thinking"), 1, dense_bits=8)


@pytest.mark.parametrize("dense_bits", [None, 8, 4])
@pytest.mark.parametrize("variant", ["thinking", "direct query, groups"])
def test_the_loaded_bytes_equal_the_inventory_for_embedding_layers_and_head(
    checkpoint: Checkpoint, variant: str, dense_bits: int | None
) -> None:
    folder = checkpoint(variant)
    config = read_config(folder)
    layers = [layer_specs(config, layer) for layer in range(config.num_hidden_layers)]
    loaded_specs = (embedding_specs(config), *layers, head_specs(config))
    assert loaded_bytes(folder, dense_bits) == [
        held_bytes(specs, compute_bytes=4, dense_bits=dense_bits) for specs in loaded_specs
    ]


@pytest.mark.parametrize(("inputs", "group"), [(128, 64), (96, 32), (80, None)])
def test_make_matrix_uses_groups_of_64_then_32_and_otherwise_does_not_quantize(inputs: int, group: int | None) -> None:
    weight = random_array(48, inputs)
    matrix = make_matrix(weight, 8)
    assert (matrix.group_size if isinstance(matrix, QuantizedMatrix) else None) == group
    x = random_array(3, inputs)
    assert largest_difference(multiply(x, matrix), x @ dequantized(weight, group).T) < 1e-5


@pytest.mark.parametrize("heads", [slice(0, 4), slice(1, 3)])
def test_a_slice_of_heads_multiplies_with_its_own_matrices(heads: slice) -> None:
    weight = random_array(4, 48, 64)
    matrix = some_heads(make_matrix(weight, 8), heads)
    expected = dequantized(weight, 64)[heads]
    x, y = random_array(5, 64), random_array(5, 48)
    assert largest_difference(multiply(x, matrix), x @ expected.swapaxes(-1, -2)) < 1e-5
    assert largest_difference(multiply_transposed(y, matrix), y @ expected) < 1e-5


def random_array(*shape: int) -> mx.array:
    array: mx.array = mx.random.normal(shape, key=mx.random.key(sum(shape))) / shape[-1] ** 0.5
    return array


def dequantized(weight: mx.array, group: int | None) -> mx.array:
    if group is None:
        return weight
    packed, scales, biases = mx.quantize(weight, group_size=group, bits=8)
    return mx.dequantize(packed, scales, biases, group_size=group, bits=8)
