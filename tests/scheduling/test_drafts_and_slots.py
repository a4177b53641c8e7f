"""Tests of n-gram drafts, and of the choice of a slot for a prompt: a cached prefix is used from any slot."""

import math
from array import array
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import NgramDrafter
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import SchedulerLimits
from mlx_k2.scheduling.sequence import INDEX_TOKENS, Sequence, SharedPrefix
from mlx_k2.scheduling.slots import SlotChoice, SlotPool, common_prefix
from tests.scheduling.fake_stages import WHOLE_CHUNKS, FixedStepPolicy, SchedulerRun, random_requests, request

random_ids = st.lists(st.integers(0, 3), max_size=40)


def one_slot_run(
    *,
    num_stages: int = 2,
    context_tokens: int = 200,
    chunk_tokens: int = 16,
    has_drafts: bool = True,
    vocab_size: int = 1,
) -> SchedulerRun:
    """Return a run in which one sequence runs at a time. By default every sampled token is 0, so drafts are right."""
    limits = SchedulerLimits(1, context_tokens, chunk_tokens, num_stages)
    return SchedulerRun(limits, FixedStepPolicy(1, chunk_tokens, chunk_tokens), has_drafts, vocab_size)


def after_longest_match(token_ids: list[int]) -> int | None:
    """Return the token after the latest earlier occurrence of the last 4 tokens, else of the last 3, else of 2."""
    for length in (4, 3, 2):
        for end in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[end - length : end] == token_ids[-length:]:
                return token_ids[end]
    return None


@given(random_ids, st.integers(1, 7))
def test_a_draft_follows_the_latest_occurrence_of_the_longest_known_ngram(token_ids: list[int], step: int) -> None:
    drafter = NgramDrafter()
    for end in (*range(step, len(token_ids), step), len(token_ids)):  # the text grows
        drafter.index(token_ids[:end], max_tokens=100)
    assert drafter.draft(token_ids, []) == after_longest_match(token_ids)


def test_a_draft_can_follow_earlier_drafts() -> None:
    drafter = NgramDrafter()
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    drafter.index(text, max_tokens=100)
    drafts: list[int] = []
    for expected in (3, 4, 5, 6, 1, 2):
        assert drafter.draft(text, drafts) == expected
        drafts.append(expected)


def test_drafts_of_one_repetitive_sequence_keep_one_plan_per_stage_in_flight() -> None:
    run = one_slot_run(num_stages=3)
    run.scheduler.submit(request(num_prompt=4, max_tokens=60))
    run.finish()
    (sequence,) = run.sequences
    assert run.max_in_flight == 3
    num_accepted = sum(count.num_accepted for count in sequence.drafts.counts)
    assert num_accepted > 45  # of 60 tokens: the first ones follow no repetition yet
    assert sum(count.num_drafted for count in sequence.drafts.counts) - num_accepted <= 3


@given(random_ids, random_ids)
def test_a_common_prefix_ends_at_the_first_difference(left: list[int], right: list[int]) -> None:
    length = common_prefix(array("I", left), array("I", right))
    assert left[:length] == right[:length]
    assert length in (len(left), len(right)) or left[length] != right[length]


def acquire(pool: SlotPool, slot: int, token_ids: tuple[int, ...]) -> None:
    """Acquire ``slot`` for a sequence that has these tokens in its cache."""
    prompt_ids = (*token_ids, 0)  # the last token of a prompt is not shared
    sequence = Sequence(Request(prompt_ids, 5, Sampling(seed=0), frozenset()), context_tokens=100)
    pool.acquire(SlotChoice(slot, SharedPrefix()), sequence)
    sequence.num_planned = len(token_ids)


def pool_with(*caches: tuple[int, ...]) -> SlotPool:
    """Return a pool of free slots with these tokens in their caches. The first slot is the least recently used."""
    pool = SlotPool(len(caches))
    for slot, token_ids in enumerate(caches):
        acquire(pool, slot, token_ids)
        pool.release(slot)
    return pool


def check_choice(pool: SlotPool, prompt_ids: Iterable[int], slot: int, shared: SharedPrefix) -> None:
    """Check the slot and the cached prefix that a pool chooses for a prompt."""
    choice = pool.choose(array("I", prompt_ids))
    assert (choice.slot, choice.shared) == (slot, shared)


def test_without_a_shared_prefix_the_least_recently_used_slot_is_chosen() -> None:
    pool = pool_with((1, 2), (3, 4), (5, 6))
    check_choice(pool, (7, 8), slot=0, shared=SharedPrefix())
    acquire(pool, slot=0, token_ids=(1, 2))
    pool.release(0)
    check_choice(pool, (7, 8), slot=1, shared=SharedPrefix())


def test_a_continued_conversation_reuses_its_own_slot() -> None:
    check_choice(pool_with((1, 2), (3, 4, 5, 6), (7, 8)), (3, 4, 5, 6, 9), slot=1, shared=SharedPrefix(4))


def test_an_edited_conversation_reuses_the_cache_before_the_edit() -> None:
    check_choice(pool_with((1, 2), (3, 4, 5, 6)), (3, 4, 5, 9, 9), slot=1, shared=SharedPrefix(3))


def test_a_short_prefix_is_copied_to_another_slot_and_the_longer_cache_is_kept() -> None:
    check_choice(pool_with((1, 2), (3, 4, 5, 6, 7)), (3, 4, 9), slot=0, shared=SharedPrefix(2, copy_from=1))


def test_a_prefix_in_the_cache_of_a_running_sequence_is_copied() -> None:
    pool = pool_with((1, 2), (3, 4))
    acquire(pool, slot=1, token_ids=(5, 6, 7))
    check_choice(pool, (5, 6, 7, 8), slot=0, shared=SharedPrefix(3, copy_from=1))


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    check_choice(pool_with((1, 2, 3)), (1, 2, 3), slot=0, shared=SharedPrefix(2))


def test_a_prompt_waits_for_a_long_prefix_that_another_sequence_computes() -> None:
    limits = SchedulerLimits(num_slots=2, context_tokens=200, chunk_tokens=200, num_stages=2)
    run = SchedulerRun(limits, WHOLE_CHUNKS, vocab_size=1)
    for last_id in (7, 8):
        run.scheduler.submit(Request((*range(60), last_id), 3, Sampling(seed=0), frozenset()))
    run.finish()
    first, second = run.sequences
    assert [len(microbatch) for microbatch in run.microbatches[:2]] == [1, 1]
    assert second.shared == SharedPrefix(60, copy_from=first.slot)


@given(random_requests, st.booleans(), st.integers(1, 4))
def test_a_freed_slot_keeps_all_but_the_last_position_with_and_without_drafts(
    first_request: Request, has_drafts: bool, vocab_size: int
) -> None:
    run = one_slot_run(context_tokens=45, chunk_tokens=8, has_drafts=has_drafts, vocab_size=vocab_size)
    run.play([first_request], [])
    (first,) = run.sequences
    run.scheduler.submit(Request((*first.token_ids, 0), 1, Sampling(seed=0), frozenset()))
    run.finish()
    assert run.sequences[1].num_cached == len(first.token_ids) - 1


def test_a_conversation_that_continues_in_its_slot_keeps_its_ngram_index() -> None:
    run = one_slot_run()
    run.scheduler.submit(request(num_prompt=60, max_tokens=5))
    run.finish()
    (first,) = run.sequences
    while first.drafter.index(first.token_ids, INDEX_TOKENS):  # the whole conversation
        pass
    run.scheduler.submit(Request((*first.token_ids, 3, 4), 5, Sampling(seed=0), frozenset()))
    run.finish()
    second = run.sequences[1]
    assert second.drafter is first.drafter
    num_shared = len(first.token_ids) - 1
    has_tokens_to_index = second.drafter.index(second.token_ids[:num_shared], max_tokens=0)
    assert not has_tokens_to_index, "the shared prefix would be indexed again"


def test_a_lone_prompt_is_indexed_in_parts_of_index_tokens_while_it_is_computed() -> None:
    num_prompt = 1000
    run = one_slot_run(context_tokens=2000)
    run.scheduler.submit(request(num_prompt, max_tokens=5))
    run.send()
    num_parts = 1  # the part that the last call indexes
    while run.scheduler.index_drafts():
        num_parts += 1
    assert num_parts == math.ceil((num_prompt - 1) / INDEX_TOKENS)  # an n-gram ends before each token but the first
