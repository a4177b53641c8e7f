"""Tests of the scheduler's plans: chunks of prompts, decode rounds, slots, and the ends of sequences."""

from dataclasses import replace

from mlx_k2.scheduling.request import FinishReason
from mlx_k2.scheduling.scheduler import SchedulerLimits
from tests.scheduling.fake_stages import STOP_ID, FixedStepPolicy, SchedulerRun, request

LIMITS = SchedulerLimits(num_slots=2, context_tokens=64, chunk_tokens=8, num_stages=2)
POLICY = FixedStepPolicy(num_microbatches=2, lone_chunk_tokens=8, beside_chunk_tokens=6)


def run_of(*requests: tuple[int, int], limits: SchedulerLimits = LIMITS, vocab_size: int = 1) -> SchedulerRun:
    """Return a run with requests of (prompt tokens, ``max_tokens``) submitted. No two prompts share a prefix.

    By default every sampled token is 0.
    """
    run = SchedulerRun(limits, POLICY, vocab_size=vocab_size)
    for index, (num_prompt, max_tokens) in enumerate(requests):
        run.scheduler.submit(request(num_prompt, max_tokens, first_id=100 + 1000 * index))
    return run


def test_chunks_of_a_prompt_are_sent_without_waiting_for_results() -> None:
    run = run_of((20, 5))
    assert [run.send() for _ in range(4)] == [True, True, True, False]
    assert [len(sent.row.token_ids) for sent in run.rows] == [8, 8, 4]
    assert [sent.row.needs_logits for sent in run.rows] == [False, False, True]


def test_a_decode_row_is_sent_in_each_microbatch_with_a_chunk_of_a_long_prompt() -> None:
    run = run_of((4, 50))
    run.send()
    run.complete()
    run.scheduler.submit(request(40, first_id=1100))
    for _ in range(5):
        assert run.send()
        assert [sent.row.is_prompt for sent in run.microbatches[-1]] == [False, True]
        assert len(run.microbatches[-1][1].row.token_ids) == POLICY.beside_chunk_tokens
        run.complete()


def test_a_chunk_is_also_sent_while_the_decode_row_is_in_flight() -> None:
    run = run_of((4, 50))
    run.send()
    run.complete()
    run.scheduler.submit(request(40, first_id=1100))
    assert [run.send() for _ in range(3)] == [True, True, False]
    decode_and_chunk, chunk = run.microbatches[1:]
    assert [sent.row.is_prompt for sent in decode_and_chunk] == [False, True]
    assert [sent.row.is_prompt for sent in chunk] == [True]


def test_with_prompts_first_all_prefill_runs_before_decode() -> None:
    run = run_of((4, 50), (30, 50), limits=replace(LIMITS, prompts_first=True))
    run.finish()
    is_prompt = [sent.row.is_prompt for sent in run.rows]
    assert is_prompt == sorted(is_prompt, reverse=True)


def test_short_prompts_are_combined_in_one_microbatch() -> None:
    run = run_of((3, 5), (4, 5))
    run.send()
    assert [len(sent.row.token_ids) for sent in run.microbatches[0]] == [3, 4]


def test_four_decoding_sequences_run_as_two_microbatches_of_the_same_two_sequences() -> None:
    run = run_of((1, 50), (1, 50), (1, 50), (1, 50), limits=replace(LIMITS, num_slots=4))
    run.send()
    run.complete()
    assert [run.send() for _ in range(3)] == [True, True, False]
    assert [len(microbatch) for microbatch in run.microbatches[1:]] == [2, 2]
    first_slots = {sent.row.slot for sent in run.microbatches[1]}
    run.complete()
    run.send()
    assert {sent.row.slot for sent in run.microbatches[3]} == first_slots


def test_a_sequence_has_only_one_decode_step_in_flight() -> None:
    run = run_of((4, 50))
    assert run.send()
    assert not run.send()
    run.complete()
    assert run.send()
    assert not run.send()


def test_a_slot_is_reused_as_soon_as_its_sequence_finishes() -> None:
    run = run_of((2, 1), (2, 50), (2, 40))
    run.send()  # the first two prompts
    run.complete()
    run.send()
    assert [(sent.row.slot, sent.sequence.request.max_tokens) for sent in run.microbatches[-1]] == [(1, 50), (0, 40)]


def test_a_stop_token_ends_a_sequence_and_counts_as_generated() -> None:
    run = run_of((4, 50), vocab_size=STOP_ID + 1)
    run.finish()
    (sequence,) = run.sequences
    assert sequence.finish_reason is FinishReason.STOP
    assert sequence.token_ids[-1] == STOP_ID


def test_a_sequence_ends_at_the_context_length() -> None:
    run = run_of((LIMITS.context_tokens - 4, 50))
    run.finish()
    (sequence,) = run.sequences
    assert (sequence.finish_reason, len(sequence.token_ids) - sequence.num_prompt) == (FinishReason.LENGTH, 4)


def test_after_the_cancellation_of_all_requests_before_the_first_step_the_scheduler_has_no_work() -> None:
    run = run_of((4, 5), (4, 5), (4, 5))
    run.cancel_all()
    assert not run.scheduler.has_work
    assert not run.send()


def test_the_recent_ids_of_a_row_are_the_last_64_tokens() -> None:
    run = run_of((3, 50))
    run.finish()
    assert run.rows[-1].row.recent_ids == (*range(100, 103), *[0] * 49)  # the prompt and the answer so far
    run = run_of((100, 3), limits=replace(LIMITS, context_tokens=200, chunk_tokens=128))
    run.finish()
    assert run.rows[-1].row.recent_ids == (*range(138, 200), 0, 0)
