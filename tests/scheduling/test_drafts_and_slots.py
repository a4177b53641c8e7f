"""Tests of n-gram drafts, and of the choice of a slot for a prompt with a cached prefix."""

import math
from array import array
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import NgramDrafter
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import SchedulerLimits
from mlx_k2.scheduling.sequence import INDEX_TOKENS, Sequence, SharedPrefix
from mlx_k2.scheduling.slots import SlotChoice, SlotPool, common_prefix
from tests.scheduling.fake_stages import Run, request, requests

LIMITS = SchedulerLimits(num_slots=1, context_tokens=2000, chunk_tokens=16, num_stages=2)

ids = st.lists(st.integers(0, 3), max_size=40)


def after_longest_match(token_ids: list[int]) -> int | None:
    """Return the draft token that the drafter should return, found by a search through the whole text."""
    for length in (4, 3, 2):
        for end in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[end - length : end] == token_ids[-length:]:
                return token_ids[end]
    return None


@given(ids, st.integers(1, 7))
def test_a_draft_token_follows_the_longest_most_recent_ngram_match(token_ids: list[int], step: int) -> None:
    drafter = NgramDrafter()
    for end in range(step, len(token_ids), step):  # the text grows by ``step`` tokens at a time
        drafter.index(token_ids[:end], 100)
    drafter.index(token_ids, 100)
    assert drafter.draft(token_ids, []) == after_longest_match(token_ids)


def test_drafting_continues_from_earlier_draft_tokens() -> None:
    drafter = NgramDrafter()
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    drafter.index(text, 100)
    drafts: list[int] = []
    for _ in range(6):
        draft = drafter.draft(text, drafts)
        assert draft is not None
        drafts.append(draft)
    assert drafts == [3, 4, 5, 6, 1, 2]


def test_drafts_of_one_repetitive_sequence_keep_one_plan_per_stage_in_flight() -> None:
    run = Run(replace(LIMITS, num_stages=3), drafts=True, vocabulary=1)
    run.scheduler.submit(request(4, 60))
    run.finish()
    (sequence,) = run.sequences
    assert run.max_in_flight == 3
    assert sum(count.num_accepted for count in sequence.drafts.counts) > 45
    assert sum(count.num_drafted - count.num_accepted for count in sequence.drafts.counts) <= 3


@given(ids, ids)
def test_common_prefix_ends_at_the_first_difference(left: list[int], right: list[int]) -> None:
    length = common_prefix(array("I", left), array("I", right))
    assert left[:length] == right[:length]
    assert length in (len(left), len(right)) or left[length] != right[length]


def acquire(pool: SlotPool, slot: int, *token_ids: int) -> Sequence:
    """Acquire ``slot`` for a sequence that has computed its whole prompt, and return it."""
    sequence = Sequence(Request((*token_ids, 0), 5, Sampling(seed=0), frozenset()), 100_000)
    pool.acquire(SlotChoice(slot, SharedPrefix()), sequence)
    sequence.num_planned = len(token_ids)
    return sequence


def pool_with(*cached_ids: tuple[int, ...]) -> SlotPool:
    """Return a pool of free slots that hold these tokens. The first slot is the least recently used."""
    pool = SlotPool(len(cached_ids))
    for slot, token_ids in enumerate(cached_ids):
        acquire(pool, slot, *token_ids)
    for slot in range(len(cached_ids)):
        pool.release(slot)
    return pool


def test_the_least_recently_used_slot_is_reused_first() -> None:
    choice = pool_with((1, 2), (3, 4), (5, 6)).choose(array("I", (7, 8)))
    assert (choice.slot, choice.shared) == (0, SharedPrefix(0, None))


def test_a_continued_conversation_reuses_its_own_slot() -> None:
    choice = pool_with((1, 2), (3, 4, 5, 6), (7, 8)).choose(array("I", (3, 4, 5, 6, 9)))
    assert (choice.slot, choice.shared) == (1, SharedPrefix(4, None))


def test_an_edited_conversation_reuses_the_cache_before_the_edit() -> None:
    choice = pool_with((1, 2), (3, 4, 5, 6)).choose(array("I", (3, 4, 5, 9, 9)))
    assert (choice.slot, choice.shared) == (1, SharedPrefix(3, None))


def test_a_short_cached_prefix_is_copied_and_the_source_slot_is_kept() -> None:
    choice = pool_with((1, 2), (3, 4, 5, 6, 7)).choose(array("I", (3, 4, 9)))
    assert (choice.slot, choice.shared) == (0, SharedPrefix(2, copy_from=1))


def test_a_cached_prefix_of_a_running_sequence_is_copied() -> None:
    pool = pool_with((1, 2), (3, 4))
    acquire(pool, 1, 5, 6, 7)
    choice = pool.choose(array("I", (5, 6, 7, 8)))
    assert (choice.slot, choice.shared) == (0, SharedPrefix(3, copy_from=1))


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    assert pool_with((1, 2, 3)).choose(array("I", (1, 2, 3))).shared.num_tokens == 2


def test_a_prompt_waits_for_a_long_prefix_that_another_sequence_is_computing() -> None:
    run = Run(replace(LIMITS, num_slots=2, chunk_tokens=200), vocabulary=1)
    for last_id in (7, 8):
        run.scheduler.submit(Request((*range(60), last_id), 3, Sampling(seed=0), frozenset()))
    run.finish()
    first, second = run.sequences
    assert [len(microbatch) for microbatch in run.sent[:2]] == [1, 1]
    assert second.shared == SharedPrefix(60, first.slot)


@given(requests, st.booleans(), st.integers(1, 4))
def test_a_freed_slot_keeps_all_but_the_last_position_with_and_without_drafts(
    first_request: Request, drafts: bool, vocabulary: int
) -> None:
    run = Run(LIMITS, drafts=drafts, vocabulary=vocabulary)
    run.play([first_request], [])
    (sequence,) = run.sequences
    run.scheduler.submit(Request((*sequence.token_ids, 0), 1, Sampling(seed=0), frozenset()))
    run.finish()
    assert run.sequences[1].num_cached == len(sequence.token_ids) - 1


def test_a_conversation_that_continues_in_its_slot_keeps_the_index_for_drafts() -> None:
    run = Run(LIMITS, drafts=True, vocabulary=1)
    run.scheduler.submit(request(60, 5))
    run.finish()
    (first,) = run.sequences
    while first.drafter.index(first.token_ids, 16):
        pass
    run.scheduler.submit(Request((*first.token_ids, 3, 4), 5, Sampling(seed=0), frozenset()))
    run.finish()
    second = run.sequences[1]
    assert second.drafter is first.drafter
    num_known = len(first.token_ids) - 1
    assert not second.drafter.index(second.token_ids[:num_known], 0), "the shared prefix is indexed again"


def test_a_lone_prompt_is_indexed_for_drafts_in_small_parts_while_it_is_computed() -> None:
    run = Run(LIMITS, drafts=True, vocabulary=1)
    run.scheduler.submit(request(1000, 5))
    run.send()
    num_calls = 1
    while run.scheduler.index_drafts():
        num_calls += 1
    assert num_calls == math.ceil(999 / INDEX_TOKENS)  # the last of the 1000 tokens waits for one that follows it
