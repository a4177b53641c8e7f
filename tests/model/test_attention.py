"""Tests of attention: absorbed and naive agree, blocks and the fused path change nothing, memory is bounded."""

from typing import NamedTuple

import mlx.core as mx
import pytest

from mlx_k2.model import attention
from mlx_k2.model.attention import attend_absorbed, attend_fused, attend_naive, attend_unfused
from mlx_k2.model.layer_weights import AttentionWeights, DirectQuery
from mlx_k2.model.linear import multiply, multiply_transposed
from tests.model.chain import largest_difference

HEADS, NOPE, ROPE, LATENT, VALUE = 4, 32, 16, 64, 32


class Case(NamedTuple):
    """One span's queries, as input of absorbed and naive attention, and the cache rows up to the span's end."""

    queries: mx.array  # (heads, count, qk_nope + qk_rope)
    rows: mx.array  # (keys, latent + qk_rope)
    position: int
    weights: AttentionWeights

    @property
    def absorbed_queries(self) -> mx.array:
        """The same queries, projected into the latent space."""
        carried = multiply(self.queries[..., :NOPE], self.weights.key_up)
        return mx.concatenate([carried, self.queries[..., NOPE:]], axis=-1)

    def naive(self, *, fused: bool = False) -> mx.array:
        return attend_naive(self.queries, self.rows, self.position, self.weights, fused=fused)

    def absorbed(self) -> mx.array:
        latents = attend_absorbed(self.absorbed_queries, self.rows, self.position, LATENT)
        return multiply(latents, self.weights.value_up)


def make_case(count: int, position: int, heads: int = HEADS) -> Case:
    keys = mx.random.split(mx.random.key(count), 4)
    unused = mx.zeros((1, 1))
    weights = AttentionWeights(
        query=DirectQuery(unused),
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
        rows = []
        for index in range(case.queries.shape[1]):
            end = case.position + index + 1
            rows.append(mx.softmax(keys[:end] @ case.queries[head, index]) @ values[:end])
        outputs.append(mx.stack(rows))
    return mx.stack(outputs)


@pytest.mark.parametrize(("count", "position"), [(1, 0), (1, 40), (7, 0), (5, 33), (64, 64)])
def test_naive_and_absorbed_attention_equal_the_definition(count: int, position: int) -> None:
    case = make_case(count, position)
    defined = one_query_at_a_time(case)
    assert relative_difference(case.naive(), defined) < 1e-5
    assert relative_difference(case.absorbed(), defined) < 1e-5


@pytest.mark.parametrize("block_bytes", [1, 40_000, 200_000])
def test_the_block_size_changes_no_bit_of_the_attention(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    case = make_case(48, 100)
    naive, absorbed = case.naive(), case.absorbed()
    monkeypatch.setattr(attention, "BLOCK_BYTES", block_bytes)
    assert mx.array_equal(case.naive(), naive)
    assert mx.array_equal(case.absorbed(), absorbed)


@pytest.mark.parametrize(("count", "position"), [(1, 40), (16, 0), (48, 100)])
def test_fused_attention_equals_unfused_attention(count: int, position: int) -> None:
    case = make_case(count, position)
    keys = mx.random.normal((HEADS, position + count, NOPE + ROPE), key=mx.random.key(1))
    values = mx.random.normal((HEADS, position + count, VALUE), key=mx.random.key(2))
    fused = attend_fused(case.queries, keys, values, force=False)
    assert fused.shape == (HEADS, count, VALUE)
    assert (
        relative_difference(fused, attend_unfused(case.queries, keys.swapaxes(-1, -2), values, position, count)) < 1e-5
    )


def test_attention_is_fused_only_when_allowed_and_scores_exceed_the_block_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case(48, 100)
    without = case.naive()
    calls = []

    def count_and_attend(queries: mx.array, keys: mx.array, values: mx.array, *, force: bool) -> mx.array:
        assert force
        calls.append(queries.shape[0])
        return attend_fused(queries, keys, values, force=False)

    monkeypatch.setattr(attention, "attend_fused", count_and_attend)
    case.naive(fused=True)
    assert calls == []
    monkeypatch.setattr(attention, "BLOCK_BYTES", 200_000)
    assert relative_difference(case.naive(fused=True), without) < 1e-5
    assert sum(calls) == HEADS
    assert len(calls) > 1


def peak_beyond_inputs(case: Case, attend: str) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    mx.eval(case.naive() if attend == "naive" else case.absorbed())
    return mx.get_peak_memory() - held


@pytest.mark.slow
@pytest.mark.parametrize(("attend", "count", "heads"), [("naive", 256, 4), ("absorbed", 64, 16)])
def test_attention_over_32k_positions_stays_within_its_memory_budget(
    monkeypatch: pytest.MonkeyPatch, attend: str, count: int, heads: int
) -> None:
    budget = 32 * 2**20
    monkeypatch.setattr(attention, "BLOCK_BYTES", budget // 2)
    case = make_case(count, 32768 - count, heads)
    outputs = heads * count * (LATENT + VALUE) * 4 * 2  # the blocks and their concatenation
    all_scores = heads * count * 32768 * 4
    copied_latents = 2 * 32768 * LATENT * 4  # MLX's product on a CPU copies a slice of a wider matrix
    assert all_scores > 3 * budget
    assert peak_beyond_inputs(case, attend) < budget + copied_latents + outputs + 2**20
