"""Tests of attention: both forms equal the definition, blocks and the fused kernel too, and memory is bounded."""

import json
from typing import NamedTuple

import mlx.core as mx
import pytest

from mlx_k2.cluster.memory import GPU_MIN_HEADS, added_block_bytes, attention_block_bytes
from mlx_k2.config import ModelConfig
from mlx_k2.model import attention
from mlx_k2.model.attention import (
    ON_CPU,
    AttentionLimits,
    NaiveBlocks,
    attend_absorbed,
    attend_fused,
    attend_naive,
    attend_unfused,
    naive_blocks,
    rebuilt_bytes_per_head,
)
from mlx_k2.model.layer_weights import AttentionWeights
from mlx_k2.model.linear import multiply, multiply_transposed
from mlx_k2.weights.known_layout import thinking_config_fields
from tests.model.chain import largest_difference

HEADS, NOPE, ROPE, LATENT, VALUE = 4, 32, 16, 64, 32


@pytest.fixture(scope="module")
def k2_config() -> ModelConfig:
    return ModelConfig.from_json(json.dumps(thinking_config_fields()).encode(), "Kimi K2 Thinking")


class Case(NamedTuple):
    """One span's queries, as input of absorbed and naive attention, and the cache rows up to the span's end."""

    queries: mx.array  # (heads, count, qk_nope + qk_rope)
    rows: mx.array  # (keys, latent + qk_rope)
    position: int
    weights: AttentionWeights

    @property
    def absorbed_queries(self) -> mx.array:
        """The same queries, projected into the latent space."""
        in_latent_space = multiply(self.queries[..., :NOPE], self.weights.key_up)
        return mx.concatenate([in_latent_space, self.queries[..., NOPE:]], axis=-1)

    def naive(self, limits: AttentionLimits = ON_CPU) -> mx.array:
        return attend_naive(self.queries, self.rows, self.position, self.weights, limits)

    def absorbed(self, limits: AttentionLimits = ON_CPU) -> mx.array:
        latents = attend_absorbed(self.absorbed_queries, self.rows, self.position, LATENT, limits)
        return multiply(latents, self.weights.value_up)


def make_case(count: int, position: int, heads: int = HEADS) -> Case:
    keys = mx.random.split(mx.random.key(count), 4)
    unused = mx.zeros((1, 1))
    weights = AttentionWeights(
        query=unused,
        latent_down=unused,
        latent_norm=mx.ones(LATENT),
        key_up=mx.random.normal((heads, NOPE, LATENT), key=keys[0]) / LATENT**0.5,
        value_up=mx.random.normal((heads, LATENT, VALUE), key=keys[1]) / LATENT**0.5,
        output=unused,
    )
    queries = mx.random.normal((heads, count, NOPE + ROPE), key=keys[2]) / 4
    rows = mx.random.normal((position + count, LATENT + ROPE), key=keys[3])
    case = Case(queries, rows, position, weights)
    mx.eval(case)
    return case


def relative_difference(left: mx.array, right: mx.array) -> float:
    return largest_difference(left, right) / largest_difference(right, mx.zeros_like(right))


def one_query_at_a_time(case: Case) -> mx.array:
    """Compute attention by its definition: no blocks, no mask, each query over the keys up to its own."""
    latents, rotated = case.rows[:, :LATENT], case.rows[:, LATENT:]
    outputs = []
    for head in range(case.queries.shape[0]):
        keys = mx.concatenate([multiply_transposed(latents, case.weights.key_up)[head], rotated], axis=-1)
        values = multiply(latents, case.weights.value_up)[head]
        head_outputs = []
        for index in range(case.queries.shape[1]):
            end = case.position + index + 1
            head_outputs.append(mx.softmax(keys[:end] @ case.queries[head, index]) @ values[:end])
        outputs.append(mx.stack(head_outputs))
    return mx.stack(outputs)


@pytest.mark.parametrize(("count", "position"), [(1, 0), (1, 40), (7, 0), (5, 33), (64, 64)])
def test_naive_and_absorbed_attention_equal_the_definition(count: int, position: int) -> None:
    case = make_case(count, position)
    expected = one_query_at_a_time(case)
    assert relative_difference(case.naive(), expected) < 1e-5
    assert relative_difference(case.absorbed(), expected) < 1e-5


@pytest.mark.parametrize("min_heads", [1, 3])
@pytest.mark.parametrize("block_bytes", [1, 40_000, 200_000])
def test_the_block_size_changes_no_bit_of_the_attention(block_bytes: int, min_heads: int) -> None:
    case = make_case(count=48, position=100)
    limits = AttentionLimits(block_bytes, min_heads)
    assert mx.array_equal(case.naive(limits), case.naive())
    assert mx.array_equal(case.absorbed(limits), case.absorbed())


@pytest.mark.parametrize(("count", "position"), [(1, 40), (16, 0), (48, 100)])
def test_fused_attention_equals_unfused_attention(count: int, position: int) -> None:
    case = make_case(count, position)
    keys = mx.random.normal((HEADS, position + count, NOPE + ROPE), key=mx.random.key(1))
    values = mx.random.normal((HEADS, position + count, VALUE), key=mx.random.key(2))
    fused = attend_fused(case.queries, keys, values, force=False)
    assert fused.shape == (HEADS, count, VALUE)
    assert relative_difference(fused, attend_unfused(case.queries, keys, values, position, count)) < 1e-5


@pytest.mark.parametrize(
    ("position", "block_bytes"), [(0, 2**27), (100, 100_000)], ids=["large first chunk", "few queries per block"]
)
def test_the_fused_kernel_is_used_only_if_allowed_and_for_a_large_first_chunk_or_blocks_of_few_queries(
    monkeypatch: pytest.MonkeyPatch, position: int, block_bytes: int
) -> None:
    case = make_case(count=48, position=position)
    unfused = case.naive()
    fused_heads = []

    def count_and_attend(queries: mx.array, keys: mx.array, values: mx.array, *, force: bool) -> mx.array:
        assert force
        fused_heads.append(queries.shape[0])
        return attend_fused(queries, keys, values, force=False)

    monkeypatch.setattr(attention, "attend_fused", count_and_attend)
    monkeypatch.setattr(attention, "FUSED_FROM_BYTES", 10_000)  # less than the scores of 48 queries
    case.naive(AttentionLimits(block_bytes, fused=False))
    make_case(count=48, position=100).naive(AttentionLimits(fused=True))  # not the first chunk, and one block
    assert fused_heads == []
    assert relative_difference(case.naive(AttentionLimits(block_bytes, fused=True)), unfused) < 1e-5
    assert sum(fused_heads) == HEADS


@pytest.mark.parametrize("context_tokens", [32768, 131072, 262144])
@pytest.mark.parametrize("spare_gb", [0, 1, 100])
def test_blocks_of_k2_on_a_gpu_fit_what_was_planned_and_have_at_least_8_heads(
    k2_config: ModelConfig, context_tokens: int, spare_gb: int
) -> None:
    min_bytes = attention_block_bytes(k2_config, context_tokens, compute_bytes=2, on_gpu=True)
    planned_bytes = min_bytes + added_block_bytes(min_bytes, spare_gb * 10**9)
    limits = AttentionLimits(planned_bytes, GPU_MIN_HEADS, fused=True)
    heads, head_dim = k2_config.num_attention_heads, k2_config.qk_head_dim
    for count in (1, 16, 100, 1024, 4096):
        for position in range(0, context_tokens - count + 1, 1024):
            blocks = naive_blocks(heads, count, head_dim, position, item_bytes=2, limits=limits)
            num_keys, block_heads = position + count, min(heads, blocks.heads)
            rebuilt_bytes = block_heads * rebuilt_bytes_per_head(num_keys, head_dim, item_bytes=2)
            num_scores = 0 if blocks.fused else block_heads * min(count, blocks.queries) * num_keys
            assert block_heads >= 8
            assert rebuilt_bytes + num_scores * 4 <= planned_bytes  # 2 bytes as an operation's input, 2 as its output
            assert not blocks.fused or position == 0


def peak_beyond_inputs(case: Case, attend: str, limits: AttentionLimits) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    input_bytes = mx.get_active_memory()
    mx.eval(case.naive(limits) if attend == "naive" else case.absorbed(limits))
    return mx.get_peak_memory() - input_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("attend", "count", "heads"), [("naive", 256, 4), ("absorbed", 64, 16)])
def test_attention_over_32k_positions_stays_within_its_memory_budget(attend: str, count: int, heads: int) -> None:
    budget, num_keys = 32 * 2**20, 32768
    limits = AttentionLimits(budget // 2)  # two blocks are in memory at a time
    case = make_case(count, num_keys - count, heads)
    output_bytes = heads * count * (LATENT + VALUE) * 4 * 2  # the blocks and their concatenation
    all_scores_bytes = heads * count * num_keys * 4
    copied_latents_bytes = 2 * num_keys * LATENT * 4  # MLX's product on a CPU copies a slice of a wider matrix
    assert all_scores_bytes > 3 * budget, "the scores would fit without blocks"
    assert peak_beyond_inputs(case, attend, limits) < budget + copied_latents_bytes + output_bytes + 2**20


@pytest.mark.slow
def test_attention_over_128k_positions_in_blocks_of_8_heads_stays_within_two_blocks() -> None:
    count, heads, keys = 32, 24, 131072
    rebuilt_bytes = 8 * rebuilt_bytes_per_head(keys, NOPE + ROPE, item_bytes=4)
    limits = AttentionLimits(rebuilt_bytes * 4 // 3, min_heads=8)  # a quarter is left to the scores: of 24 queries
    blocks = naive_blocks(heads, count, NOPE + ROPE, keys - count, item_bytes=4, limits=limits)
    assert blocks == NaiveBlocks(heads=8, queries=24, fused=False)
    case = make_case(count, keys - count, heads)
    copied_latents_bytes = 2 * 2 * 8 * keys * LATENT * 4  # on a CPU MLX copies the latents for each head of two blocks
    bound = 2 * limits.block_bytes + copied_latents_bytes
    unblocked_bytes = heads * (rebuilt_bytes_per_head(keys, NOPE + ROPE, 4) + 2 * keys * LATENT * 4 + count * keys * 4)
    assert unblocked_bytes > bound, "all heads would fit without blocks"
    assert peak_beyond_inputs(case, "naive", limits) < bound
