"""Tests of the engine: tokens, events, the queue, priorities, faults and restarts, over stages without a model."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlx_k2.coordinator.engine import SWITCH_INTERVAL_S, _ShortInterval
from mlx_k2.coordinator.handle import Event, Finished, Handle, PrefillProgress, Queued, Restarting, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.deployment.restarting import WAITING
from mlx_k2.errors import Cancelled, ClusterError, EngineBusy, RequestError, RequestFailed, StageFault
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import FinishReason, Priority, Request
from mlx_k2.scheduling.scheduler import AppendedTokens
from mlx_k2.testing.token_stages import answer_alone
from tests.advice import follows_advice
from tests.coordinator.token_engine import CONTEXT_TOKENS, VOCAB_SIZE, WAIT_S, TokenEngine, request, token_engine
from tests.local_cluster import rest_of


def check_answers(harness: TokenEngine, *handles: Handle) -> None:
    """Run these requests to their ends, and check that each gets the tokens that it gets alone."""
    harness.run_to_end(*handles)
    for handle in handles:
        assert rest_of(handle)[0] == answer_alone(handle.request)


def test_a_request_joins_while_another_runs_and_each_gets_the_tokens_that_it_gets_alone() -> None:
    with token_engine() as harness:
        first = harness.engine.submit(request(1, 2, 3, max_tokens=30))
        harness.run_steps(5)
        second = harness.engine.submit(request(4, 5, max_tokens=20))
        check_answers(harness, first, second)


def test_only_the_latest_progress_is_kept_while_nobody_reads() -> None:
    with token_engine(num_slots=1, chunk_tokens=4) as harness:
        first, second = (harness.engine.submit(request(*range(start, start + 60), max_tokens=3)) for start in (0, 100))
        harness.run_to_end(first, second)
        events = list(second.events())
        assert [type(event) for event in events] == [PrefillProgress, Token, Token, Token, Finished]
        assert events[0] == PrefillProgress(56, 60)  # reported before the last chunk of 4 tokens


def test_a_waiting_request_reports_its_position_and_then_the_progress_of_its_prompt() -> None:
    with token_engine(num_slots=1, chunk_tokens=4) as harness:
        handles = [harness.engine.submit(request(*range(start, start + 20), max_tokens=1)) for start in (0, 50, 100)]
        events = [handle.events() for handle in handles]
        assert next(events[2]) == Queued(1)
        harness.run_to_end(handles[0])
        assert next(events[2]) == Queued(0)
        harness.run_to_end(*handles)
        assert next(events[2]) == PrefillProgress(16, 20)  # reported before the last chunk of 4 tokens


@follows_advice(
    "2 requests wait already, of at most 2: try again in about 1 s",
)
def test_a_full_queue_refuses_at_once_with_the_expected_wait_and_accepts_after_requests_have_ended() -> None:
    with token_engine(num_slots=1, max_queued=2) as harness:
        running = harness.engine.submit(request(1, 2))
        harness.run_steps(1)
        waiting = [harness.engine.submit(request(number)) for number in (3, 4)]
        with pytest.raises(
            EngineBusy, match=r"2 requests wait already, of at most 2: try again in about \d+ s"
        ) as busy:
            harness.engine.submit(request(5))
        assert busy.value.wait_s >= 1
        harness.run_to_end(running, *waiting)
        last = harness.engine.submit(request(5))
        harness.run_to_end(last)


def test_a_submission_that_does_not_fit_into_the_queue_is_refused_as_a_whole() -> None:
    with token_engine(max_queued=2) as harness:
        with pytest.raises(EngineBusy):
            harness.engine.submit_all([Submission(request(number)) for number in range(3)])
        handles = harness.engine.submit_all([Submission(request(number)) for number in range(2)])
        harness.run_to_end(*handles)


def test_without_restarts_the_error_of_a_fault_ends_every_request_and_refuses_later_ones() -> None:
    with token_engine(num_slots=1, can_restart=False) as harness:
        running, waiting = harness.engine.submit(request(1, 2, max_tokens=50)), harness.engine.submit(request(3))
        harness.run_steps(4)
        harness.stages.fail(1)
        for handle in (running, waiting):
            with pytest.raises(StageFault, match="stage 1 on host 1 ended with signal 9"):
                rest_of(handle)
        with pytest.raises(StageFault, match="stage 1 on host 1 ended with signal 9"):
            harness.engine.submit(request(4))


def test_a_fault_is_detected_while_no_request_runs() -> None:
    with token_engine() as harness:
        harness.fail_stage(0)
        harness.end_restart()
        handle = harness.engine.submit(request(1, 2))
        check_answers(harness, handle)
    assert len(harness.restarts) == 1


def test_requests_resume_with_the_same_tokens_after_a_restart_and_report_it() -> None:
    with token_engine(draft_mode=DraftMode.NGRAM) as harness:
        handles = [harness.engine.submit(request(number, 2, 3, max_tokens=40)) for number in range(3)]
        harness.run_steps(9)
        harness.fail_stage(1)
        first_restarting = next(event for event in handles[2].events() if isinstance(event, Restarting))
        assert first_restarting.restart == harness.restarts[0]
        harness.end_restart()
        check_answers(harness, *handles)


def test_a_request_is_cancelled_at_once_during_a_restart_and_others_resume_after_it() -> None:
    with token_engine() as harness:
        cancelled, other = (harness.engine.submit(request(number, max_tokens=30)) for number in (1, 2))
        harness.run_steps(5)
        harness.fail_stage(0)
        cancelled.cancel()
        token_ids, end = rest_of(cancelled)
        assert (token_ids, end.reason) == ([], FinishReason.CANCELLED)
        later = harness.engine.submit(request(3))
        harness.end_restart()
        check_answers(harness, other, later)


def test_closing_the_engine_ends_a_restart_and_cancels_all_requests() -> None:
    with token_engine() as harness:
        handle = harness.engine.submit(request(1, max_tokens=30))
        harness.fail_stage(0)
        closed_at = time.monotonic()
    assert time.monotonic() - closed_at < 2
    assert rest_of(handle)[1].reason is FinishReason.CANCELLED
    with pytest.raises(Cancelled):
        harness.engine.submit(request(2))


def test_requests_in_a_step_that_kills_a_stage_twice_are_ended_and_others_finish() -> None:
    with token_engine(num_slots=6) as harness:
        handles = [harness.engine.submit(request(number, 5, 6, max_tokens=30)) for number in range(6)]
        harness.run_steps(12)
        for _ in range(2):
            requests_in_step = run_to_step_with(harness, handles[0], position=8)
            harness.fail_stage(1)
            harness.end_restart()
        failed = [handle for handle in handles if handle.has_ended]
        assert {handle.request for handle in failed} <= set(requests_in_step)
        others = [handle for handle in handles if handle not in failed]
        assert handles[0] in failed and others
        for handle in failed:
            with pytest.raises(RequestFailed, match="request ended: it was running when stage 1 failed twice"):
                rest_of(handle)
        check_answers(harness, *others)


def run_to_step_with(harness: TokenEngine, handle: Handle, position: int) -> list[Request]:
    """Run until stage 1 is about to execute this position of ``handle``; return all requests of the step."""
    requests: list[Request] = []

    def is_next() -> bool:
        step = harness.stages.next_step(1)
        owners = {sequence.slot: sequence.request for sequence in harness.scheduler.running}
        rows = [] if step is None else [row for row in step.rows if row.slot in owners]
        if any(owners[row.slot] is handle.request and row.position <= position < row.end for row in rows):
            requests.extend(owners[row.slot] for row in rows)
        return bool(requests)

    harness.run_until(is_next)
    return requests


def test_no_plan_exceeds_the_chunk_when_eight_slots_replay_their_answers_after_a_restart() -> None:
    with token_engine(num_slots=8, chunk_tokens=128, num_stages=1, context_tokens=400) as harness:
        handles = [harness.engine.submit(request(number, max_tokens=350)) for number in range(8)]
        harness.run_until(lambda: sum(len(sequence.token_ids) for sequence in harness.scheduler.running) > 8 * 300)
        harness.fail_stage(0)
        num_plans_before = len(harness.plans)
        harness.end_restart()
        check_answers(harness, *handles)
        plan_sizes = [sum(len(row.token_ids) for row in plan.rows) for plan in harness.plans[num_plans_before:]]
        assert max(plan_sizes) == 128


def test_a_conversation_of_8000_tokens_stays_cached_through_fifty_short_requests_over_three_slots() -> None:
    with token_engine(num_slots=3, chunk_tokens=512, context_tokens=10_000) as harness:
        conversation = harness.engine.submit(request(*range(8000), max_tokens=5))
        harness.run_to_end(conversation)
        for number in range(50):
            harness.run_to_end(harness.engine.submit(request(9000 + number, *range(100), max_tokens=5)))
        assert num_computed_to_continue(harness, conversation) < 10


def test_a_conversation_stays_cached_through_40_brief_requests_two_at_a_time() -> None:
    """The conversation has 300 tokens, a brief request 45. About 300 / 45 interactive requests would overwrite it."""
    with token_engine(num_slots=2, chunk_tokens=64, context_tokens=1000) as harness:
        conversation = harness.engine.submit(request(*range(300), max_tokens=5))
        harness.run_to_end(conversation)
        briefs = [request(9000 + number, *range(40), max_tokens=5, priority=Priority.BRIEF) for number in range(40)]
        for first, second in zip(briefs[::2], briefs[1::2], strict=True):
            harness.run_to_end(harness.engine.submit(first), harness.engine.submit(second))
        assert num_computed_to_continue(harness, conversation) < 10


def num_computed_to_continue(harness: TokenEngine, handle: Handle) -> int:
    """Submit the prompt and answer of an ended request as a prompt; return how many of its tokens were not cached."""
    prompt_ids = (*handle.request.prompt_ids, *answer_alone(handle.request), 1)
    continued = harness.engine.submit(request(*prompt_ids, max_tokens=5))
    harness.run_to_end(continued)
    summary = rest_of(continued)[1].summary
    return summary.prompt_tokens - summary.cached_tokens


def test_two_brief_requests_run_in_one_step_where_no_conversation_is_cached() -> None:
    with token_engine(num_slots=2) as harness:
        briefs = [request(number, 1, max_tokens=9, priority=Priority.BRIEF) for number in (5, 6)]
        # Together, so that the engine thread cannot plan the first one alone.
        harness.run_to_end(*harness.engine.submit_all([Submission(brief) for brief in briefs]))
        assert max(len(step.rows) for step in harness.plans) == 2


def test_a_brief_request_starts_after_an_interactive_request_that_was_submitted_later() -> None:
    with token_engine(num_slots=1) as harness:
        running = harness.engine.submit(request(1, 2, max_tokens=3))
        harness.run_until(lambda: bool(harness.plans))
        brief = harness.engine.submit(request(3, 4, max_tokens=2, priority=Priority.BRIEF))
        waiting = harness.engine.submit(request(5, 6, max_tokens=2))
        harness.run_to_end(waiting)
        assert running.has_ended
        assert not brief.has_ended
        check_answers(harness, brief)


def test_a_background_request_gives_its_slot_to_an_interactive_one_and_finishes_afterwards() -> None:
    with token_engine(num_slots=1, chunk_tokens=4) as harness:
        background = harness.engine.submit(request(*range(40), max_tokens=20, priority=Priority.BACKGROUND))
        harness.run_steps(15)
        interactive = harness.engine.submit(request(50, 51, max_tokens=5))
        harness.run_to_end(interactive)
        assert not background.has_ended
        check_answers(harness, interactive, background)


def test_a_reader_is_notified_of_every_event() -> None:
    notified: list[Handle] = []
    with token_engine() as harness:
        handle = harness.engine.submit(request(1, 2, max_tokens=4), notify=notified.append)
        harness.run_to_end(handle)
        assert len(notified) == len(list(handle.events()))


def test_ready_events_yields_all_tokens_and_the_end_without_waiting() -> None:
    with token_engine() as harness:
        handle = harness.engine.submit(request(1, 2, 3))
        events: list[Event] = []
        while not (events and isinstance(events[-1], Finished)):
            harness.run_until(lambda: bool(harness.stages.next_step(0)) or handle.has_ended)
            events += handle.ready_events()
            harness.stages.execute(0)
        assert [event.token_id for event in events if isinstance(event, Token)] == answer_alone(handle.request)
        assert list(handle.ready_events()) == []


def test_ready_events_raises_the_error_of_its_request() -> None:
    with token_engine(can_restart=False) as harness:
        handle = harness.engine.submit(request(1, 2, 3))
        assert harness.stages.wait_until_waiting(WAIT_S)
        harness.stages.fail(0)
        while not handle.has_ended:
            threading.Event().wait(0.001)
        with pytest.raises(StageFault):
            list(handle.ready_events())


def test_a_defect_in_the_engine_ends_its_requests_with_an_error() -> None:
    with token_engine() as harness:
        handle = harness.engine.submit(request(1, 2, max_tokens=50))
        harness.scheduler.next_microbatch = None  # type: ignore[assignment, method-assign]  # a call is a TypeError
        while not handle.has_ended:
            harness.stages.execute(0)
            harness.stages.execute(1)
            threading.Event().wait(0.001)
        with pytest.raises(ClusterError, match="the engine failed: TypeError"):
            rest_of(handle)


def test_a_request_whose_last_token_arrives_while_the_engine_closes_gets_its_answer() -> None:
    with token_engine() as harness:
        handle = harness.engine.submit(request(1, 2, max_tokens=1))
        complete = harness.scheduler.complete

        def complete_after_close(*step: Any, **details: Any) -> list[AppendedTokens]:
            threading.Thread(target=harness.engine.__exit__, args=(None, None, None)).start()
            while harness.engine._loop._commands.empty():  # until the command to close is queued
                threading.Event().wait(0.001)
            return complete(*step, **details)

        harness.scheduler.complete = complete_after_close  # type: ignore[method-assign]
        while not handle.has_ended:
            for rank in range(2):
                harness.stages.execute(rank)
            threading.Event().wait(0.001)
        assert rest_of(handle)[0] == answer_alone(handle.request)


def test_a_concurrent_reader_gets_the_progress_of_a_prompt_before_its_first_token_only() -> None:
    with token_engine(chunk_tokens=4) as harness, ThreadPoolExecutor(1) as pool:
        handle = harness.engine.submit(request(*range(11), max_tokens=3))
        event_types = pool.submit(lambda: [type(event) for event in handle.events()])
        harness.run_to_end(handle)
        *progress, first, second, third, end = event_types.result(WAIT_S)
        assert [first, second, third, end] == [Token, Token, Token, Finished]
        assert PrefillProgress in progress and set(progress) <= {Queued, PrefillProgress}


def test_a_failing_callback_ends_neither_the_engine_nor_other_requests() -> None:
    def fail(handle: Handle) -> None:
        raise RuntimeError("the reader's loop is closed")

    with token_engine() as harness:
        with_callback = harness.engine.submit(request(1, 2), notify=fail)
        other = harness.engine.submit(request(3, 4))
        check_answers(harness, with_callback, other)


@pytest.mark.parametrize("prompt_ids", [(), (5,) * CONTEXT_TOKENS, (5, VOCAB_SIZE)])
def test_a_request_that_can_never_run_is_refused_at_its_submission(prompt_ids: tuple[int, ...]) -> None:
    with token_engine() as harness, pytest.raises(RequestError):
        harness.engine.submit(request(*prompt_ids))


def test_two_stages_that_fail_once_each_end_no_request() -> None:
    with token_engine() as harness:
        handle = harness.engine.submit(request(1, 2, max_tokens=20))
        harness.run_steps(8)
        harness.fail_stage(0)
        harness.end_restart()
        run_to_step_with(harness, handle, position=6)
        harness.fail_stage(1)
        harness.end_restart()
        check_answers(harness, handle)


def test_a_request_that_is_submitted_during_a_restart_reports_the_restart() -> None:
    with token_engine() as harness:
        harness.fail_stage(0)
        handle = harness.engine.submit(request(1, 2))
        assert next(handle.events()) == Restarting(harness.restarts[0], WAITING)
        harness.end_restart()
        harness.run_to_end(handle)


def test_python_has_its_earlier_switch_interval_again_after_the_end_of_two_overlapping_short_intervals() -> None:
    earlier_s = sys.getswitchinterval()
    interval = _ShortInterval()
    interval.begin()
    interval.begin()
    interval.end()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S, abs=2e-6)  # Python rounds to microseconds
    interval.end()
    assert sys.getswitchinterval() == pytest.approx(earlier_s, abs=2e-6)
