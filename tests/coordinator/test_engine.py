"""Tests of the engine, one claim each, over stages that execute plans on token ids."""

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from mlx_k2.coordinator.engine import SWITCH_INTERVAL_S, _ShortInterval
from mlx_k2.coordinator.handle import Finished, Handle, PrefillProgress, Queued, Restarting, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.deployment.restarting import WAITING
from mlx_k2.errors import Cancelled, EngineBusy, RequestError, RequestFailed, StageFault
from mlx_k2.sampling import SampledToken
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import FinishReason, Priority, Request
from mlx_k2.scheduling.scheduler import AppendedTokens
from mlx_k2.testing.token_stages import answer_alone
from tests.advice import follows_advice
from tests.coordinator.token_engine import TokenEngine, request, token_engine
from tests.local_cluster import rest_of


def have_ended(*handles: Handle) -> bool:
    """Return whether all requests have ended."""
    return all(handle.has_ended for handle in handles)


def finish_and_check(tested: TokenEngine, *handles: Handle) -> None:
    """Run until all requests have ended. Check that each gets the tokens that it gets when it runs alone."""
    tested.run(lambda: have_ended(*handles))
    for handle in handles:
        assert rest_of(handle)[0] == answer_alone(handle.request)


def test_requests_join_while_others_run_and_each_gets_the_tokens_that_it_gets_alone() -> None:
    with token_engine() as tested:
        first = tested.engine.submit(request(1, 2, 3, max_tokens=30))
        tested.run(lambda: tested.engine.use[1].steps_done >= 5)
        second = tested.engine.submit(request(4, 5, max_tokens=20))
        finish_and_check(tested, first, second)


def test_progress_is_replaced_and_not_queued_while_nobody_reads() -> None:
    with token_engine(num_slots=1, chunk_tokens=4) as tested:
        first, second = (tested.engine.submit(request(*range(start, start + 60), max_tokens=3)) for start in (0, 100))
        tested.run(lambda: have_ended(first, second))
        events = list(second.events())
        assert [type(event) for event in events] == [PrefillProgress, Token, Token, Token, Finished]
        assert events[0] == PrefillProgress(56, 60)


def test_a_waiting_request_reports_its_position_and_then_the_progress_of_its_prompt() -> None:
    with token_engine(num_slots=1, chunk_tokens=4) as tested:
        handles = [tested.engine.submit(request(*range(start, start + 20), max_tokens=1)) for start in (0, 50, 100)]
        events = [handle.events() for handle in handles]
        assert next(events[2]) == Queued(1)
        tested.run(lambda: have_ended(handles[0]))
        assert next(events[2]) == Queued(0)
        tested.run(lambda: have_ended(*handles))
        assert next(events[2]) == PrefillProgress(16, 20)  # of the last chunk but one: the last one samples a token


@follows_advice(
    "2 requests wait already, of at most 2: try again in about 1 s",
)
def test_a_full_queue_refuses_at_once_with_the_expected_wait_and_later_accepts_again() -> None:
    with token_engine(num_slots=1, max_queued=2) as tested:
        running = tested.engine.submit(request(1, 2))
        tested.run(lambda: tested.engine.use[1].steps_done >= 1)
        waiting = [tested.engine.submit(request(number)) for number in (3, 4)]
        with pytest.raises(
            EngineBusy, match=r"2 requests wait already, of at most 2: try again in about \d+ s"
        ) as busy:
            tested.engine.submit(request(5))
        assert busy.value.wait_s >= 1
        tested.run(lambda: have_ended(running, *waiting))
        accepted = tested.engine.submit(request(5))
        tested.run(lambda: have_ended(accepted))


def test_either_all_requests_of_a_submission_are_refused_or_none() -> None:
    with token_engine(max_queued=2) as tested:
        with pytest.raises(EngineBusy):
            tested.engine.submit_all([Submission(request(number)) for number in range(3)])
        pair = tested.engine.submit_all([Submission(request(number)) for number in range(2)])
        tested.run(lambda: have_ended(*pair))


def test_without_restarts_a_fault_ends_every_request_and_later_ones_are_refused_with_it() -> None:
    with token_engine(num_slots=1, can_restart=False) as tested:
        running, waiting = tested.engine.submit(request(1, 2, max_tokens=50)), tested.engine.submit(request(3))
        tested.run(lambda: tested.engine.use[1].steps_done >= 4)
        tested.stages.fail(1)
        events = running.events()
        with pytest.raises(StageFault, match="stage 1 on host 1 ended with signal 9"):
            for event in events:
                assert not isinstance(event, Finished)
        with pytest.raises(StageFault):
            rest_of(waiting)
        with pytest.raises(StageFault):
            tested.engine.submit(request(4))


def test_a_fault_is_detected_while_no_request_runs() -> None:
    with token_engine() as tested:
        tested.fail(0)
        tested.end_restart()
        handle = tested.engine.submit(request(1, 2))
        finish_and_check(tested, handle)
    assert len(tested.restarts) == 1


def test_requests_resume_with_the_same_tokens_after_a_restart_and_report_it() -> None:
    with token_engine(draft_mode=DraftMode.NGRAM) as tested:
        handles = [tested.engine.submit(request(number, 2, 3, max_tokens=40)) for number in range(3)]
        tested.run(lambda: tested.engine.use[1].steps_done >= 9)
        tested.fail(1)
        restarting = next(event for event in handles[2].events() if isinstance(event, Restarting))
        assert restarting.restart == tested.restarts[0]
        tested.end_restart()
        finish_and_check(tested, *handles)


def test_a_request_is_cancelled_at_once_during_a_restart_and_others_resume_after_it() -> None:
    with token_engine() as tested:
        cancelled, other = (tested.engine.submit(request(number, max_tokens=30)) for number in (1, 2))
        tested.run(lambda: tested.engine.use[1].steps_done >= 5)
        tested.fail(0)
        cancelled.cancel()
        token_ids, end = rest_of(cancelled)
        assert (token_ids, end.reason) == ([], FinishReason.CANCELLED)
        late = tested.engine.submit(request(3))
        tested.end_restart()
        finish_and_check(tested, other, late)


def test_closing_the_engine_ends_a_restart_and_cancels_all_requests() -> None:
    with token_engine() as tested:
        handle = tested.engine.submit(request(1, max_tokens=30))
        tested.fail(0)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert rest_of(handle)[1].reason is FinishReason.CANCELLED
    with pytest.raises(Cancelled):
        tested.engine.submit(request(2))


def test_requests_in_a_step_that_kills_a_stage_twice_are_ended_and_others_finish() -> None:
    with token_engine(num_slots=6) as tested:
        handles = [tested.engine.submit(request(number, 5, 6, max_tokens=30)) for number in range(6)]
        tested.run(lambda: tested.engine.use[1].steps_done >= 12)
        for _ in range(2):
            requests_in_step = run_to_a_step_with(tested, handles[0], position=8)
            tested.fail(1)
            tested.end_restart()
        suspects = [handle for handle in handles if handle.has_ended]
        assert {handle.request for handle in suspects} <= set(requests_in_step)
        others = [handle for handle in handles if handle not in suspects]
        assert handles[0] in suspects and others
        for handle in suspects:
            with pytest.raises(RequestFailed, match="request ended: it was running when stage 1 failed twice"):
                rest_of(handle)
        finish_and_check(tested, *others)


def run_to_a_step_with(tested: TokenEngine, handle: Handle, position: int) -> list[Request]:
    """Run until stage 1 is about to execute this position of ``handle``; return all requests of the step."""
    requests_in_step: list[Request] = []

    def is_next() -> bool:
        step = tested.stages.next_step(1)
        owners = {sequence.slot: sequence.request for sequence in tested.scheduler.running}
        rows = [] if step is None else [row for row in step.rows if row.slot in owners]
        if any(owners[row.slot] is handle.request and row.position <= position < row.end for row in rows):
            requests_in_step.extend(owners[row.slot] for row in rows)
        return bool(requests_in_step)

    tested.run(is_next)
    return requests_in_step


def test_no_plan_exceeds_the_chunk_when_eight_slots_replay_their_answers_after_a_restart() -> None:
    with token_engine(num_slots=8, chunk_tokens=128, num_stages=1, context_tokens=400) as tested:
        handles = [tested.engine.submit(request(number, max_tokens=350)) for number in range(8)]
        tested.run(lambda: sum(len(sequence.token_ids) for sequence in tested.scheduler.running) > 8 * 300)
        tested.fail(0)
        num_before = len(tested.plans)
        tested.end_restart()
        tested.run(lambda: have_ended(*handles))
        sizes = [sum(len(row.token_ids) for row in plan.rows) for plan in tested.plans[num_before:]]
        assert max(sizes) == 128
        finish_and_check(tested, *handles)


def test_a_conversation_of_8000_tokens_stays_cached_through_fifty_short_requests_over_three_slots() -> None:
    conversation = tuple(range(8000))
    with token_engine(num_slots=3, chunk_tokens=512, context_tokens=10_000) as tested:
        first = tested.engine.submit(request(*conversation, max_tokens=5))
        tested.run(lambda: have_ended(first))
        for number in range(50):
            short = tested.engine.submit(request(9000 + number, *range(100), max_tokens=5))
            tested.run(lambda: have_ended(short))  # noqa: B023 - the function is called before the next round
        again = tested.engine.submit(request(*conversation, *answer_alone(first.request), 1, max_tokens=5))
        tested.run(lambda: have_ended(again))
        _, end = rest_of(again)
        assert end.summary.prompt_tokens - end.summary.cached_tokens < 10


def test_a_conversation_stays_cached_through_many_brief_requests_two_at_a_time() -> None:
    """If the choice of a slot counted ages, as for interactive requests, 300 / 45 of them would overwrite it."""
    conversation = range(300)
    with token_engine(num_slots=2, chunk_tokens=64, context_tokens=1000) as tested:
        first = tested.engine.submit(request(*conversation, max_tokens=5))
        tested.run(lambda: have_ended(first))
        for number in range(0, 40, 2):
            briefs = [
                tested.engine.submit(request(first_id, *range(40), max_tokens=5, priority=Priority.BRIEF))
                for first_id in (9000 + number, 9001 + number)
            ]
            tested.run(lambda: have_ended(*briefs))  # noqa: B023 - the function is called before the next round
        again = tested.engine.submit(request(*conversation, *answer_alone(first.request), 1, max_tokens=5))
        tested.run(lambda: have_ended(again))
        _, end = rest_of(again)
        assert end.summary.prompt_tokens - end.summary.cached_tokens < 10


def test_brief_requests_run_side_by_side_where_no_conversation_is_lost() -> None:
    with token_engine(num_slots=2) as tested:
        briefs = [tested.engine.submit(request(number, 1, max_tokens=9, priority=Priority.BRIEF)) for number in (5, 6)]
        tested.run(lambda: have_ended(*briefs))
        assert max(len(step.rows) for step in tested.plans) == 2


def test_a_brief_request_starts_after_the_interactive_ones_that_wait() -> None:
    with token_engine(num_slots=1) as tested:
        running = tested.engine.submit(request(1, 2, max_tokens=3))
        tested.run(lambda: bool(tested.plans))
        brief = tested.engine.submit(request(3, 4, max_tokens=2, priority=Priority.BRIEF))
        waiting = tested.engine.submit(request(5, 6, max_tokens=2))
        tested.run(lambda: have_ended(waiting))
        assert running.has_ended
        assert not brief.has_ended
        finish_and_check(tested, brief)


def test_a_background_request_gives_its_slot_to_an_interactive_one_and_finishes_afterwards() -> None:
    with token_engine(num_slots=1, chunk_tokens=4) as tested:
        background = tested.engine.submit(request(*range(40), max_tokens=20, priority=Priority.BACKGROUND))
        tested.run(lambda: tested.engine.use[1].steps_done >= 15)
        interactive = tested.engine.submit(request(50, 51, max_tokens=5))
        tested.run(lambda: have_ended(interactive))
        assert not background.has_ended
        tested.run(lambda: have_ended(background))
        finish_and_check(tested, interactive, background)


def test_a_reader_is_notified_of_every_event() -> None:
    notified: list[Handle] = []
    with token_engine() as tested:
        handle = tested.engine.submit(request(1, 2, max_tokens=4), notify=notified.append)
        tested.run(lambda: have_ended(handle))
        assert len(notified) == len(list(handle.events()))


def test_ready_events_yields_all_tokens_of_the_answer_without_waiting() -> None:
    with token_engine() as tested:
        handle = tested.engine.submit(request(1, 2, 3))
        events: list[object] = []
        while not (events and isinstance(events[-1], Finished)):
            tested.run(lambda: bool(tested.stages.next_step(0)) or handle.has_ended)
            events += handle.ready_events()
            tested.stages.execute(0)
        assert [event.token_id for event in events if isinstance(event, Token)] == answer_alone(handle.request)
        assert list(handle.ready_events()) == []


def test_ready_events_raises_the_error_of_its_request() -> None:
    with token_engine(can_restart=False) as tested:
        handle = tested.engine.submit(request(1, 2, 3))
        assert tested.stages.wait_until_waiting(20)
        tested.stages.fail(0)
        while not handle.has_ended:
            threading.Event().wait(0.001)
        with pytest.raises(StageFault):
            list(handle.ready_events())


def test_a_defect_in_the_engine_ends_its_requests_with_an_error() -> None:
    with token_engine() as tested:
        handle = tested.engine.submit(request(1, 2, max_tokens=50))
        tested.scheduler.next_microbatch = None  # type: ignore[assignment, method-assign]
        with pytest.raises(Exception, match="the engine failed: TypeError"):
            while True:
                tested.stages.execute(0)
                tested.stages.execute(1)
                if handle.has_ended:
                    rest_of(handle)
                threading.Event().wait(0.001)


def test_a_request_whose_last_token_comes_as_the_engine_closes_still_ends() -> None:
    with token_engine() as tested:
        handle = tested.engine.submit(request(1, 2, max_tokens=1))
        complete = tested.scheduler.complete

        def close_first(number: int, tokens: Sequence[SampledToken], **more: Any) -> list[AppendedTokens]:
            closing = threading.Thread(target=tested.engine.__exit__, args=(None, None, None))
            closing.start()
            while tested.engine._loop._commands.empty():
                threading.Event().wait(0.001)
            return complete(number, tokens, **more)

        tested.scheduler.complete = close_first  # type: ignore[method-assign]
        while not handle.has_ended:
            for rank in range(2):
                tested.stages.execute(rank)
            threading.Event().wait(0.001)
        assert rest_of(handle)[0] == answer_alone(handle.request)


def test_progress_of_a_prompt_comes_before_its_first_token_and_never_after() -> None:
    with token_engine(chunk_tokens=4) as tested:
        handle = tested.engine.submit(request(*range(11), max_tokens=3))
        event_types: list[type] = []
        reader = threading.Thread(target=lambda: event_types.extend(type(event) for event in handle.events()))
        reader.start()
        tested.run(lambda: have_ended(handle))
        reader.join(20)
        assert event_types[-4:] == [Token, Token, Token, Finished]
        assert PrefillProgress in event_types and set(event_types[:-4]) <= {Queued, PrefillProgress}


def test_a_failing_callback_ends_neither_the_engine_nor_other_requests() -> None:
    def fail(handle: Handle) -> None:
        raise RuntimeError("the reader's loop is closed")

    with token_engine() as tested:
        with_failing_callback = tested.engine.submit(request(1, 2), notify=fail)
        other = tested.engine.submit(request(3, 4))
        finish_and_check(tested, with_failing_callback, other)


@pytest.mark.parametrize("prompt_ids", [(), (5,) * 200, (5, 100_000)])
def test_a_request_that_can_never_run_is_refused_at_its_submission(prompt_ids: tuple[int, ...]) -> None:
    with token_engine() as tested, pytest.raises(RequestError):
        tested.engine.submit(request(*prompt_ids))


def test_two_stages_that_fail_once_each_end_no_request() -> None:
    with token_engine() as tested:
        handle = tested.engine.submit(request(1, 2, max_tokens=20))
        tested.run(lambda: tested.engine.use[1].steps_done >= 8)
        for rank in (0, 1):
            if rank == 1:
                run_to_a_step_with(tested, handle, position=6)
            tested.fail(rank)
            tested.end_restart()
        finish_and_check(tested, handle)


def test_a_request_submitted_during_a_restart_reports_it() -> None:
    with token_engine() as tested:
        tested.fail(0)
        handle = tested.engine.submit(request(1, 2))
        assert next(handle.events()) == Restarting(tested.restarts[0], WAITING)
        tested.end_restart()
        tested.run(lambda: have_ended(handle))


def test_the_switch_interval_is_the_usual_one_again_after_the_last_engine_in_any_order() -> None:
    usual = sys.getswitchinterval()
    interval = _ShortInterval()
    interval.begin()
    interval.begin()
    interval.end()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S, abs=2e-6)  # Python keeps microseconds
    interval.end()
    assert sys.getswitchinterval() == pytest.approx(usual, abs=2e-6)
