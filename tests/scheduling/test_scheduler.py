"""Tests of single decisions of the scheduler."""

from dataclasses import replace

from mlx_k2.scheduling.request import FinishReason
from mlx_k2.scheduling.scheduler import SchedulerLimits
from tests.scheduling.fake_stages import STOP_ID, FixedStepPolicy, Run, request

LIMITS = SchedulerLimits(num_slots=2, context_tokens=64, chunk_tokens=8, num_stages=2)
POLICY = FixedStepPolicy(num_microbatches=2, chunk=8, beside=6)


def run_of(*lengths: tuple[int, int], limits: SchedulerLimits = LIMITS, vocabulary: int = 1) -> Run:
    """Return a run with a submitted request for each (num_prompt, max_tokens). No two prompts begin alike."""
    run = Run(limits, POLICY, vocabulary=vocabulary)
    for index, (num_prompt, max_tokens) in enumerate(lengths):
        run.scheduler.submit(request(num_prompt, max_tokens, first=1000 * index))
    return run


def test_chunks_of_a_prompt_are_sent_without_waiting_for_results() -> None:
    run = run_of((20, 5))
    assert [run.send() for _ in range(4)] == [True, True, True, False]
    assert [len(sent.row.token_ids) for sent in run.rows] == [8, 8, 4]
    assert [sent.row.needs_logits for sent in run.rows] == [False, False, True]


def test_while_a_sequence_decodes_each_step_carries_its_token_and_a_short_chunk_of_a_long_prompt() -> None:
    run = run_of((4, 50))
    run.send()
    run.complete()
    run.scheduler.submit(request(40, first=1000))
    for _ in range(5):
        assert run.send()
        assert [sent.row.is_prompt for sent in run.sent[-1]] == [False, True]
        assert len(run.sent[-1][1].row.token_ids) == POLICY.beside
        run.complete()


def test_a_prompt_chunk_is_also_sent_while_the_decoding_sequence_is_in_flight() -> None:
    run = run_of((4, 50))
    run.send()
    run.complete()
    run.scheduler.submit(request(40, first=1000))
    assert [run.send() for _ in range(3)] == [True, True, False]
    assert [[sent.row.is_prompt for sent in microbatch] for microbatch in run.sent[1:]] == [[False, True], [True]]


def test_with_prompts_first_all_prefill_runs_before_decode() -> None:
    run = run_of((4, 50), (30, 50), limits=replace(LIMITS, prompts_first=True))
    run.finish()
    are_prompts = [sent.row.is_prompt for sent in run.rows]
    assert are_prompts == sorted(are_prompts, reverse=True)


def test_short_prompts_are_combined_in_one_microbatch() -> None:
    run = run_of((3, 5), (4, 5))
    run.send()
    assert [len(sent.row.token_ids) for sent in run.sent[0]] == [3, 4]


def test_decoding_sequences_alternate_in_the_number_of_microbatches_of_the_policy() -> None:
    run = run_of((1, 50), (1, 50), (1, 50), (1, 50), limits=replace(LIMITS, num_slots=4))
    run.send()
    run.complete()
    assert [run.send() for _ in range(3)] == [True, True, False]
    assert [len(microbatch) for microbatch in run.sent[1:]] == [2, 2]
    first_slots = {sent.row.slot for sent in run.sent[1]}
    run.complete()
    run.send()
    assert {sent.row.slot for sent in run.sent[3]} == first_slots


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
    assert [(sent.row.slot, sent.sequence.request.max_tokens) for sent in run.sent[-1]] == [(1, 50), (0, 40)]


def test_a_stop_token_ends_a_sequence_and_counts_as_generated() -> None:
    run = run_of((4, 50), vocabulary=STOP_ID + 1)
    run.finish()
    (sequence,) = run.sequences
    assert sequence.finish_reason is FinishReason.STOP
    assert sequence.token_ids[-1] == STOP_ID


def test_a_sequence_ends_at_the_context_length() -> None:
    run = run_of((60, 50))
    run.finish()
    (sequence,) = run.sequences
    assert (sequence.finish_reason, len(sequence.token_ids)) == (FinishReason.LENGTH, LIMITS.context_tokens)


def test_after_cancel_all_before_the_first_step_the_scheduler_has_no_work() -> None:
    run = run_of((4, 5), (4, 5), (4, 5))
    run.cancel_all()
    assert not run.scheduler.has_work
    assert not run.send()


def test_a_rows_recent_ids_are_the_last_64_tokens() -> None:
    run = run_of((3, 50))
    run.finish()
    assert run.rows[-1].row.recent_ids == (100, 101, 102, *[0] * 49)  # the 50th token is sampled after this row
    run = run_of((100, 3), limits=replace(LIMITS, context_tokens=200, chunk_tokens=128))
    run.finish()
    assert run.rows[-1].row.recent_ids == (*range(138, 200), 0, 0)
