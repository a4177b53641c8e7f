"""Single decisions of the scheduler, and what it is for."""

import itertools

from mlx_k2.engine.request import FinishReason
from mlx_k2.engine.scheduler import SchedulerLimits
from tests.engine.made_up_stages import STOP_ID, Run, request

LIMITS = SchedulerLimits(num_slots=2, context_tokens=64, chunk_tokens=8, max_in_flight=3)


def run_of(*asked: tuple[int, int], token_id: int = 1) -> Run:
    """A run with these (prompt, max_tokens) requests submitted."""
    run = Run(LIMITS, itertools.repeat(token_id))
    for num_prompt, max_tokens in asked:
        run.scheduler.submit(request(num_prompt, max_tokens))
    return run


def test_a_prompts_chunks_follow_each_other_without_waiting() -> None:
    run = run_of((20, 5))
    assert [run.send() for _ in range(4)] == [True, True, True, False]
    assert [len(sent.token_ids) for sent in run.rows] == [8, 8, 4]
    assert [sent.row.draws_token for sent in run.rows] == [False, False, True]


def test_a_long_prompt_does_not_delay_running_sequences() -> None:
    run = run_of((4, 50))
    run.send()
    run.complete()
    run.scheduler.submit(request(40))
    for _ in range(5):
        run.send()
        assert [sent.row.is_prompt for sent in run.sent[-1]] == [False, True]
        run.complete()


def test_a_sequence_waits_for_its_token_before_the_next_is_asked_for() -> None:
    run = run_of((4, 50))
    assert run.send()
    assert not run.send()
    run.complete()
    assert run.send()
    assert not run.send()


def test_a_slot_is_given_on_as_soon_as_its_sequence_is_done() -> None:
    run = run_of((2, 1), (2, 50), (2, 50))
    run.send()  # the first prompt
    run.send()  # the second
    run.complete()
    run.send()
    assert [(sent.slot, sent.row.sequence.request.max_tokens) for sent in run.sent[-1]] == [(0, 50)]


def test_a_stop_token_ends_a_sequence_and_counts_as_generated() -> None:
    run = run_of((4, 50), token_id=STOP_ID)
    run.finish()
    (sequence,) = run.sequences
    assert (sequence.finish_reason, list(sequence.generated_ids)) == (FinishReason.STOP, [STOP_ID])


def test_a_sequence_ends_where_the_context_does() -> None:
    run = run_of((60, 50))
    run.finish()
    (sequence,) = run.sequences
    assert (sequence.finish_reason, len(sequence.generated_ids)) == (FinishReason.LENGTH, 4)


def test_cancelling_before_anything_was_sent_leaves_no_work() -> None:
    run = run_of((4, 5), (4, 5), (4, 5))
    run.scheduler.cancel_all()
    assert not run.scheduler.has_work
    assert not run.send()


def test_a_repetition_penalty_looks_at_the_last_64_tokens() -> None:
    run = run_of((3, 50))
    run.finish()
    (sequence,) = run.sequences
    assert sequence.recent_ids == (100, 101, 102, *[1] * 50)
    run = Run(SchedulerLimits(1, 200, 128, 1), iter(range(200, 400)))
    run.scheduler.submit(request(100, 3))
    run.finish()
    assert run.sequences[0].recent_ids == (*range(139, 200), 200, 201, 202)
