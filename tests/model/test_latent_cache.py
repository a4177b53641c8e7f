"""Tests of the latent cache: rows are kept or replaced; rows of earlier sequences and rejected drafts are unread."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_k2.model.batch import Batch, Span
from mlx_k2.model.latent_cache import SMALLEST_CAPACITY, LatentCache
from tests.model.chain import Chain

ROW_DIM = 8
PROMPT = [(31 * i + 5) % 509 for i in range(45)]


def make_cache(num_layers: int = 1, num_slots: int = 1, context_tokens: int = 1024) -> LatentCache:
    return LatentCache(num_layers, num_slots, context_tokens, ROW_DIM, mx.float32)


def cache_rows(first_value: int, count: int) -> mx.array:
    """Return rows that hold one number each: ``first_value``, ``first_value`` + 1 and so on."""
    return mx.broadcast_to(mx.arange(first_value, first_value + count, dtype=mx.float32)[:, None], (count, ROW_DIM))


def write(cache: LatentCache, position: int, values: mx.array, *, slot: int = 0, layer: int = 0) -> list[float]:
    """Write rows from ``position`` on. Return the first value of each row that attention reads then."""
    span = Span(slot, position, count=values.shape[0], is_prompt=True)
    readable = cache.write(layer, span, values)
    assert readable.shape == (span.end, ROW_DIM)
    return [float(value) for value in np.asarray(readable)[:, 0]]


def test_write_returns_all_cache_rows_up_to_the_end_of_the_span() -> None:
    cache = make_cache()
    assert write(cache, 0, cache_rows(0, 3)) == [0, 1, 2]
    assert write(cache, 3, cache_rows(3, 2)) == [0, 1, 2, 3, 4]


def test_rows_after_a_span_at_an_earlier_position_are_not_returned() -> None:
    cache = make_cache()
    write(cache, 0, cache_rows(0, 6))
    assert write(cache, 2, cache_rows(90, 1)) == [0, 1, 90]
    assert write(cache, 3, cache_rows(91, 1)) == [0, 1, 90, 91]


def test_a_slot_copied_from_another_slot_is_independent_of_it() -> None:
    cache = make_cache(num_layers=2, num_slots=2)
    for layer in (0, 1):
        write(cache, 0, cache_rows(10 * layer, 4), layer=layer)
    cache.copy(source=0, target=1, num_rows=3)
    write(cache, 1, cache_rows(90, 1))
    assert write(cache, 3, cache_rows(7, 1), slot=1) == [0, 1, 2, 7]
    assert write(cache, 3, cache_rows(7, 1), slot=1, layer=1) == [10, 11, 12, 7]


def test_slots_and_layers_are_independent() -> None:
    cache = make_cache(num_layers=2, num_slots=2)
    write(cache, 0, cache_rows(0, 2))
    write(cache, 0, cache_rows(50, 2), slot=1)
    write(cache, 0, cache_rows(70, 2), layer=1)
    assert write(cache, 2, cache_rows(2, 1)) == [0, 1, 2]


def test_a_slot_grows_with_its_sequence_up_to_the_context_length() -> None:
    context = 3 * SMALLEST_CAPACITY
    cache = make_cache(num_slots=2, context_tokens=context)
    assert cache.arrays == []
    for end in (1, SMALLEST_CAPACITY, SMALLEST_CAPACITY + 1, 2 * SMALLEST_CAPACITY + 1, context):
        values = write(cache, end - 1, cache_rows(end - 1, 1))
        assert values[-1] == end - 1
        capacity = cache.arrays[0].shape[0]
        assert end <= capacity <= max(SMALLEST_CAPACITY, min(2 * end, context))
    assert values[0] == 0
    assert values[SMALLEST_CAPACITY - 1] == SMALLEST_CAPACITY - 1


def test_a_step_writes_its_rows_without_copying_the_cache() -> None:
    cache = make_cache(context_tokens=1 << 20)
    num_rows = 1 << 19
    write(cache, 0, mx.zeros((num_rows, ROW_DIM)))
    cache_bytes = cache.arrays[0].nbytes
    for position in range(num_rows - 4, num_rows):
        mx.reset_peak_memory()
        bytes_before = mx.get_active_memory()
        cache.write(0, Span(slot=0, position=position, count=1, is_prompt=False), cache_rows(0, 1))
        mx.eval(cache.arrays)
        assert mx.get_peak_memory() - bytes_before < cache_bytes / 100


def fill_slot(chain: Chain, slot: int, value: float) -> None:
    """Fill the slot's first array with rows of ``value``, which no computation would write."""
    (cache,) = chain.caches
    rows = mx.full((SMALLEST_CAPACITY, chain.config.cache_row_dim), value)
    for layer in range(chain.config.num_hidden_layers):
        mx.eval(cache.write(layer, Span(slot, 0, SMALLEST_CAPACITY, is_prompt=True), rows))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_rows_of_a_slots_earlier_sequence_do_not_change_the_logits(chain: Chain, value: float) -> None:
    expected = chain.prefill(PROMPT, slot=0), chain.decode([7, 8, 9], len(PROMPT), slot=0, chunk_tokens=1)
    fill_slot(chain, 1, value)
    actual = chain.prefill(PROMPT, slot=1), chain.decode([7, 8, 9], len(PROMPT), slot=1, chunk_tokens=1)
    assert all(mx.array_equal(*pair) for pair in zip(expected, actual, strict=True))


def test_a_rejected_draft_token_does_not_change_later_logits(chain: Chain) -> None:
    for slot in (0, 1):
        chain.prefill(PROMPT, slot)
    chain.decode([400, 401, 402, 403], len(PROMPT), slot=1)  # the rejected drafts
    token_ids = [7, 8, 9, 10, 11, 12]
    expected = chain.decode(token_ids, len(PROMPT), slot=0, chunk_tokens=1)
    assert mx.array_equal(chain.decode(token_ids, len(PROMPT), slot=1, chunk_tokens=1), expected)


def test_a_batch_refuses_two_spans_of_one_slot_and_prompt_spans_before_generated_ones() -> None:
    generated = Span(slot=0, position=4, count=1, is_prompt=False)
    prompt = Span(slot=1, position=0, count=4, is_prompt=True)
    assert Batch([generated, prompt]).num_generated == 1
    with pytest.raises(AssertionError, match="before prompt"):
        Batch([prompt, generated])
    with pytest.raises(AssertionError, match="one slot"):
        Batch([generated, Span(slot=0, position=5, count=1, is_prompt=False)])
