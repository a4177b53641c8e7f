"""Properties of the scheduler for random requests and any order in which plans are sent and completed."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.scheduler import SchedulerLimits
from tests.scheduling.fake_stages import (
    STOP_ID,
    FixedStepPolicy,
    SchedulerRun,
    random_actions,
    random_limits,
    random_policies,
    random_requests,
)

FinishedRun = tuple[SchedulerRun, Sequence[Request]]


@st.composite
def finished_runs(sample: st.DrawFn) -> FinishedRun:
    """Generate a finished run with its requests in the order of submission."""
    requests = sample(st.lists(random_requests, min_size=1, max_size=6))
    run = SchedulerRun(sample(random_limits), sample(random_policies), vocab_size=sample(st.integers(1, STOP_ID + 1)))
    run.play(requests, sample(random_actions))
    return run, requests


@given(finished_runs())
def test_a_slot_belongs_to_one_sequence_until_that_sequence_finishes(finished: FinishedRun) -> None:
    run, _ = finished
    for slot in range(run.limits.num_slots):
        owners = [id(sent.sequence) for sent in run.rows if sent.row.slot == slot]
        owners_in_turn = [owner for owner, _ in itertools.groupby(owners)]
        assert len(owners_in_turn) == len(set(owners_in_turn))
    for microbatch in run.microbatches:
        assert len({row.row.slot for row in microbatch}) == len(microbatch)


@given(finished_runs())
def test_every_position_outside_the_reused_prefix_is_planned_once_and_in_order(
    finished: FinishedRun,
) -> None:
    run, _ = finished
    for sequence in run.sequences:
        rows = [sent.row for sent in run.rows_of(sequence)]
        planned_positions = [position for row in rows for position in range(row.position, row.end)]
        num_shared = sequence.shared.num_tokens
        last = len(sequence.token_ids) - 1  # no token follows the last one, so it is not computed
        assert num_shared < sequence.num_prompt
        assert planned_positions == list(range(num_shared, last))
        assert sum(len(row.token_ids) for row in rows if row.is_prompt) == sequence.num_prompt - num_shared


@given(finished_runs())
def test_the_prompt_tokens_of_a_microbatch_are_at_most_chunk_tokens(finished: FinishedRun) -> None:
    run, _ = finished
    for microbatch in run.microbatches:
        prompt_lengths = [len(sent.row.token_ids) for sent in microbatch if sent.row.is_prompt]
        assert sum(prompt_lengths) <= run.limits.chunk_tokens
        assert all(length > 0 for length in prompt_lengths)


@given(finished_runs())
def test_a_row_has_only_known_tokens_and_needs_logits_only_after_the_last(
    finished: FinishedRun,
) -> None:
    run, _ = finished
    for sent in run.rows:
        row = sent.row
        assert row.token_ids == sent.known_ids[row.position : row.end]
        assert row.needs_logits == (row.end == len(sent.known_ids))


@given(finished_runs())
def test_prompts_are_scheduled_in_the_order_of_submission(finished: FinishedRun) -> None:
    run, requests = finished
    assert [id(sequence.request) for sequence in run.sequences] == [id(request) for request in requests]
    owners = [id(sent.sequence) for sent in run.rows if sent.row.is_prompt]
    assert len(list(itertools.groupby(owners))) == len(requests)  # no chunk of another prompt between those of one


@given(finished_runs())
def test_in_flight_steps_stay_within_the_limit_and_generated_tokens_precede_prompt_tokens(
    finished: FinishedRun,
) -> None:
    run, _ = finished
    assert run.max_in_flight <= run.limits.max_in_flight
    for microbatch in run.microbatches:
        is_prompt = [sent.row.is_prompt for sent in microbatch]
        assert is_prompt == sorted(is_prompt)
        assert all(len(sent.row.token_ids) == 1 for sent in microbatch if not sent.row.is_prompt)


@given(finished_runs(), random_limits, random_policies, st.booleans())
def test_the_tokens_of_a_sequence_do_not_depend_on_other_sequences_chunks_or_drafts(
    finished: FinishedRun, limits: SchedulerLimits, policy: FixedStepPolicy, has_drafts: bool
) -> None:
    run, requests = finished
    limits = replace(limits, context_tokens=run.limits.context_tokens)
    for request in requests:
        lone_run = SchedulerRun(limits, policy, has_drafts, run.vocab_size)
        lone_run.play([request], [])
        (expected,) = lone_run.sequences
        (sequence,) = [sequence for sequence in run.sequences if sequence.request is request]
        assert (sequence.token_ids, sequence.finish_reason) == (expected.token_ids, expected.finish_reason)


@given(
    st.lists(random_requests, min_size=1, max_size=4), random_limits, random_policies, random_actions, st.integers(1, 4)
)
def test_drafts_do_not_change_the_generated_tokens(
    requests: Sequence[Request],
    limits: SchedulerLimits,
    policy: FixedStepPolicy,
    actions: Sequence[str],
    vocab_size: int,
) -> None:
    answers = []
    for has_drafts in (False, True):
        run = SchedulerRun(limits, policy, has_drafts, vocab_size)
        run.play(requests, actions)
        assert run.max_in_flight <= limits.max_in_flight
        answers.append({id(sequence.request): sequence.token_ids for sequence in run.sequences})
    assert answers[0] == answers[1]


@given(finished_runs())
def test_the_finish_reason_is_stop_after_a_stop_token_and_else_length_at_a_limit(finished: FinishedRun) -> None:
    run, requests = finished
    assert len(run.sequences) == len(requests)
    for sequence in run.sequences:
        answer_ids = sequence.token_ids[sequence.num_prompt :]
        fills_context = len(sequence.token_ids) == run.limits.context_tokens
        assert STOP_ID not in answer_ids[:-1]
        assert len(sequence.token_ids) <= run.limits.context_tokens
        assert len(answer_ids) <= sequence.request.max_tokens
        if answer_ids[-1] == STOP_ID:
            assert sequence.finish_reason is FinishReason.STOP
        else:
            assert sequence.finish_reason is FinishReason.LENGTH
            assert fills_context or len(answer_ids) == sequence.request.max_tokens


@given(
    random_limits,
    st.lists(random_requests, min_size=1, max_size=6),
    random_actions,
    st.lists(random_requests, max_size=3),
)
def test_cancelled_sequences_get_no_token_or_plan_and_later_requests_run(
    limits: SchedulerLimits, requests: Sequence[Request], actions: Sequence[str], later_requests: Sequence[Request]
) -> None:
    run = SchedulerRun(replace(limits, num_slots=2), vocab_size=1)  # some of the requests wait for a slot
    for request in requests:
        run.scheduler.submit(request)
    for action in actions:  # "submit" has no request left
        if action == "send":
            run.send()
        elif action == "complete":
            run.complete()
    cancelled = [sequence for sequence in run.sequences if sequence.finish_reason is None]
    num_tokens_before = [len(sequence.token_ids) for sequence in cancelled]
    num_microbatches_before = len(run.microbatches)
    run.cancel_all()
    for request in later_requests:
        run.scheduler.submit(request)
    run.finish()
    assert all(sequence.finish_reason is FinishReason.CANCELLED for sequence in cancelled)
    assert [len(sequence.token_ids) for sequence in cancelled] == num_tokens_before
    later_rows = itertools.chain(*run.microbatches[num_microbatches_before:])
    assert {id(sent.sequence.request) for sent in later_rows} == {id(request) for request in later_requests}
