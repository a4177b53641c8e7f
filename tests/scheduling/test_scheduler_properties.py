"""Properties of the scheduler for any requests and any order in which plans are sent and completed."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.scheduler import SchedulerLimits
from tests.scheduling.fake_stages import STOP_ID, FixedStepPolicy, Run, actions, limits, policies, requests


@st.composite
def finished_runs(sample: st.DrawFn) -> Run:
    """Generate a finished run."""
    run = Run(sample(limits), sample(policies), vocabulary=sample(st.integers(1, STOP_ID + 1)))
    run.play(sample(st.lists(requests, min_size=1, max_size=6)), sample(actions))
    return run


@given(finished_runs())
def test_a_slot_belongs_to_one_sequence_until_that_sequence_finishes(run: Run) -> None:
    for slot in range(run.limits.num_slots):
        owners = [id(sent.sequence) for sent in run.rows if sent.row.slot == slot]
        owners_in_turn = [owner for owner, _ in itertools.groupby(owners)]
        assert len(owners_in_turn) == len(set(owners_in_turn))
    for microbatch in run.sent:
        assert len({sent.row.slot for sent in microbatch}) == len(microbatch)


@given(finished_runs())
def test_every_position_outside_the_reused_prefix_is_planned_once_and_in_order(run: Run) -> None:
    for sequence in run.sequences:
        rows = [sent.row for sent in run.rows_of(sequence)]
        planned = [position for row in rows for position in range(row.position, row.end)]
        num_shared = sequence.shared.num_tokens
        assert num_shared < sequence.num_prompt
        # no token follows the last one, so its position is not computed
        assert planned == list(range(num_shared, len(sequence.token_ids) - 1))
        assert sum(len(row.token_ids) for row in rows if row.is_prompt) == sequence.num_prompt - num_shared


@given(finished_runs())
def test_the_prompt_tokens_of_a_microbatch_are_at_most_chunk_tokens(run: Run) -> None:
    for microbatch in run.sent:
        prompt_lengths = [len(sent.row.token_ids) for sent in microbatch if sent.row.is_prompt]
        assert sum(prompt_lengths) <= run.limits.chunk_tokens
        assert all(length > 0 for length in prompt_lengths)


@given(finished_runs())
def test_a_row_has_only_known_tokens_and_needs_logits_only_after_the_last(run: Run) -> None:
    for sent in run.rows:
        row = sent.row
        assert row.token_ids == sent.known_ids[row.position : row.end]
        assert row.needs_logits == (row.end == len(sent.known_ids))


@given(finished_runs())
def test_prompts_are_scheduled_in_the_order_of_submission(run: Run) -> None:
    assert [id(sequence.request) for sequence in run.sequences] == [id(request) for request in run.submitted]
    prompt_owners = [id(sent.sequence) for sent in run.rows if sent.row.is_prompt]
    # no prompt is interrupted by another
    assert len([owner for owner, _ in itertools.groupby(prompt_owners)]) == len(run.submitted)


@given(finished_runs())
def test_in_flight_steps_stay_within_the_limit_and_generated_tokens_precede_prompt_tokens(run: Run) -> None:
    assert run.max_in_flight <= run.limits.max_in_flight
    for microbatch in run.sent:
        are_prompts = [sent.row.is_prompt for sent in microbatch]
        assert are_prompts == sorted(are_prompts)
        assert all(len(sent.row.token_ids) == 1 for sent in microbatch if not sent.row.is_prompt)


@given(finished_runs(), limits, policies, st.booleans())
def test_a_sequences_tokens_do_not_depend_on_other_sequences_chunks_or_drafts(
    run: Run, bounds: SchedulerLimits, policy: FixedStepPolicy, drafts: bool
) -> None:
    bounds = replace(bounds, context_tokens=run.limits.context_tokens)
    for request in run.submitted:
        lone_run = Run(bounds, policy, drafts, run.vocabulary)
        lone_run.play([request], [])
        (expected,) = lone_run.sequences
        (sequence,) = [sequence for sequence in run.sequences if sequence.request is request]
        assert (sequence.token_ids, sequence.finish_reason) == (expected.token_ids, expected.finish_reason)


@given(st.lists(requests, min_size=1, max_size=4), limits, policies, actions, st.integers(1, 4))
def test_drafts_do_not_change_the_generated_tokens(
    to_submit: Sequence[Request],
    bounds: SchedulerLimits,
    policy: FixedStepPolicy,
    order: Sequence[str],
    vocabulary: int,
) -> None:
    answers = []
    for drafts in (False, True):
        run = Run(bounds, policy, drafts, vocabulary)
        run.play(to_submit, order)
        assert run.max_in_flight <= bounds.max_in_flight
        answers.append({id(sequence.request): sequence.token_ids for sequence in run.sequences})
    assert answers[0] == answers[1]


@given(finished_runs())
def test_every_finish_reason_agrees_with_the_sequences_tokens(run: Run) -> None:
    assert len(run.sequences) == len(run.submitted)
    for sequence in run.sequences:
        generated = sequence.token_ids[sequence.num_prompt :]
        is_context_full = len(sequence.token_ids) == run.limits.context_tokens
        assert STOP_ID not in generated[:-1]
        assert len(sequence.token_ids) <= run.limits.context_tokens
        assert len(generated) <= sequence.request.max_tokens
        if generated[-1] == STOP_ID:
            assert sequence.finish_reason is FinishReason.STOP
        else:
            assert sequence.finish_reason is FinishReason.LENGTH
            assert is_context_full or len(generated) == sequence.request.max_tokens


@given(limits, st.lists(requests, min_size=1, max_size=6), actions, st.lists(requests, max_size=3))
def test_cancelled_sequences_get_no_token_or_plan_and_later_requests_run(
    bounds: SchedulerLimits, to_cancel: Sequence[Request], before: Sequence[str], later: Sequence[Request]
) -> None:
    run = Run(replace(bounds, num_slots=2), vocabulary=1)
    for request in to_cancel:
        run.scheduler.submit(request)
    for action in before:
        if action == "send":
            run.send()
        elif action == "complete":
            run.complete()
    cancelled = [sequence for sequence in run.sequences if sequence.finish_reason is None]
    lengths = [len(sequence.token_ids) for sequence in cancelled]
    num_sent = len(run.sent)
    run.cancel_all()
    for request in later:
        run.scheduler.submit(request)
    run.finish()
    assert all(sequence.finish_reason is FinishReason.CANCELLED for sequence in cancelled)
    assert [len(sequence.token_ids) for sequence in cancelled] == lengths
    planned_after_cancel = {id(sent.sequence.request) for microbatch in run.sent[num_sent:] for sent in microbatch}
    assert planned_after_cancel == {id(request) for request in later}
