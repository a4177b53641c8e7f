"""Tests of single promises of the engine, over stages that execute plans on token ids."""

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


def ended(*handles: Handle) -> bool:
    return all(handle.has_ended for handle in handles)


def test_requests_join_while_others_run_and_each_gets_the_tokens_that_it_gets_alone() -> None:
    with token_engine() as stages:
        first = stages.engine.submit(request(1, 2, 3, max_tokens=30))
        stages.run(lambda: stages.engine.use[1].steps_done >= 5)
        second = stages.engine.submit(request(4, 5, max_tokens=20))
        stages.run(lambda: ended(first, second))
        for handle in (first, second):
            assert rest_of(handle)[0] == answer_alone(handle.request)


def test_progress_is_replaced_and_not_queued_while_nobody_reads() -> None:
    with token_engine(num_slots=1, chunk_tokens=4) as stages:
        first, second = (stages.engine.submit(request(*range(start, start + 60), max_tokens=3)) for start in (0, 100))
        stages.run(lambda: ended(first, second))
        events = list(second.events())
        assert [type(event) for event in events] == [PrefillProgress, Token, Token, Token, Finished]
        assert events[0] == PrefillProgress(56, 60)


def test_a_waiting_request_reports_its_position_and_then_the_progress_of_its_prompt() -> None:
    with token_engine(num_slots=1, chunk_tokens=4) as stages:
        handles = [stages.engine.submit(request(*range(start, start + 20), max_tokens=1)) for start in (0, 50, 100)]
        events = [handle.events() for handle in handles]
        assert next(events[2]) == Queued(1)
        stages.run(lambda: ended(handles[0]))
        assert next(events[2]) == Queued(0)
        stages.run(lambda: ended(*handles))
        progress = next(events[2])
        assert progress == PrefillProgress(16, 20)


@follows_advice(
    "2 requests wait already, of at most 2: try again in about 1 s",
)
def test_a_full_queue_refuses_at_once_with_the_expected_wait_and_later_accepts_again() -> None:
    with token_engine(num_slots=1, max_queued=2) as stages:
        running = stages.engine.submit(request(1, 2))
        stages.run(lambda: stages.engine.use[1].steps_done >= 1)
        waiting = [stages.engine.submit(request(number)) for number in (3, 4)]
        with pytest.raises(
            EngineBusy, match=r"2 requests wait already, of at most 2: try again in about \d+ s"
        ) as busy:
            stages.engine.submit(request(5))
        assert busy.value.wait_s >= 1
        stages.run(lambda: ended(running, *waiting))
        last = stages.engine.submit(request(5))
        stages.run(lambda: ended(last))


def test_all_requests_of_a_submission_are_refused_or_none() -> None:
    with token_engine(max_queued=2) as stages:
        with pytest.raises(EngineBusy):
            stages.engine.submit_all([Submission(request(number)) for number in range(3)])
        pair = stages.engine.submit_all([Submission(request(number)) for number in range(2)])
        stages.run(lambda: ended(*pair))


def test_without_restarts_a_fault_ends_every_request_and_later_ones_are_refused_with_it() -> None:
    with token_engine(num_slots=1, can_restart=False) as stages:
        running, waiting = stages.engine.submit(request(1, 2, max_tokens=50)), stages.engine.submit(request(3))
        stages.run(lambda: stages.engine.use[1].steps_done >= 4)
        stages.stages.fail(1)
        events = running.events()
        with pytest.raises(StageFault, match="stage 1 on host 1 ended with signal 9"):
            for event in events:
                assert not isinstance(event, Finished)
        with pytest.raises(StageFault):
            rest_of(waiting)
        with pytest.raises(StageFault):
            stages.engine.submit(request(4))


def test_a_fault_is_detected_while_no_request_runs() -> None:
    with token_engine() as stages:
        stages.fail(0)
        stages.end_restart()
        handle = stages.engine.submit(request(1, 2))
        stages.run(lambda: ended(handle))
        assert rest_of(handle)[0] == answer_alone(handle.request)
    assert len(stages.restarts) == 1


def test_requests_resume_with_the_same_tokens_after_a_restart_and_report_it() -> None:
    with token_engine(draft_mode=DraftMode.NGRAM) as stages:
        handles = [stages.engine.submit(request(number, 2, 3, max_tokens=40)) for number in range(3)]
        stages.run(lambda: stages.engine.use[1].steps_done >= 9)
        stages.fail(1)
        restarting = next(event for event in handles[2].events() if isinstance(event, Restarting))
        assert restarting.restart == stages.restarts[0]
        stages.end_restart()
        stages.run(lambda: ended(*handles))
        for handle in handles:
            assert rest_of(handle)[0] == answer_alone(handle.request)


def test_a_request_is_cancelled_at_once_during_a_restart_and_others_resume_after_it() -> None:
    with token_engine() as stages:
        cancelled, other = (stages.engine.submit(request(number, max_tokens=30)) for number in (1, 2))
        stages.run(lambda: stages.engine.use[1].steps_done >= 5)
        stages.fail(0)
        cancelled.cancel()
        token_ids, end = rest_of(cancelled)
        assert (token_ids, end.reason) == ([], FinishReason.CANCELLED)
        late = stages.engine.submit(request(3))
        stages.end_restart()
        stages.run(lambda: ended(other, late))
        for handle in (other, late):
            assert rest_of(handle)[0] == answer_alone(handle.request)


def test_closing_the_engine_ends_a_restart_and_cancels_all_requests() -> None:
    with token_engine() as stages:
        handle = stages.engine.submit(request(1, max_tokens=30))
        stages.fail(0)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert rest_of(handle)[1].reason is FinishReason.CANCELLED
    with pytest.raises(Cancelled):
        stages.engine.submit(request(2))


def test_requests_in_a_step_that_kills_a_stage_twice_are_ended_and_others_finish() -> None:
    with token_engine(num_slots=6) as stages:
        handles = [stages.engine.submit(request(number, 5, 6, max_tokens=30)) for number in range(6)]
        stages.run(lambda: stages.engine.use[1].steps_done >= 12)
        for _ in range(2):
            in_step = run_to_a_step_with(stages, handles[0], position=8)
            stages.fail(1)
            stages.end_restart()
        poisoned = [handle for handle in handles if handle.has_ended]
        assert {handle.request for handle in poisoned} <= set(in_step)
        others = [handle for handle in handles if handle not in poisoned]
        stages.run(lambda: ended(*others))
        assert handles[0] in poisoned and others
        for handle in poisoned:
            with pytest.raises(RequestFailed, match="request ended: it was running when stage 1 failed twice"):
                rest_of(handle)
        for handle in others:
            assert rest_of(handle)[0] == answer_alone(handle.request)


def run_to_a_step_with(stages: TokenEngine, handle: Handle, position: int) -> list[Request]:
    """Run until stage 1 is about to execute this position of ``handle``; return all requests of the step."""
    found: list[Request] = []

    def is_next() -> bool:
        step = stages.stages.next_step(1)
        owners = {sequence.slot: sequence.request for sequence in stages.scheduler.running}
        rows = [] if step is None else [row for row in step.rows if row.slot in owners]
        if any(owners[row.slot] is handle.request and row.position <= position < row.end for row in rows):
            found.extend(owners[row.slot] for row in rows)
        return bool(found)

    stages.run(is_next)
    return found


def test_no_plan_exceeds_the_chunk_when_eight_slots_replay_their_answers_after_a_restart() -> None:
    with token_engine(num_slots=8, chunk_tokens=128, num_stages=1, context_tokens=400) as stages:
        handles = [stages.engine.submit(request(number, max_tokens=350)) for number in range(8)]
        stages.run(lambda: sum(len(sequence.token_ids) for sequence in stages.scheduler.running) > 8 * 300)
        stages.fail(0)
        num_before = len(stages.plans)
        stages.end_restart()
        stages.run(lambda: ended(*handles))
        sizes = [sum(len(row.token_ids) for row in plan.rows) for plan in stages.plans[num_before:]]
        assert max(sizes) == 128
        for handle in handles:
            assert rest_of(handle)[0] == answer_alone(handle.request)


def test_a_conversation_of_8000_tokens_stays_cached_through_fifty_short_requests_over_three_slots() -> None:
    conversation = tuple(range(8000))
    with token_engine(num_slots=3, chunk_tokens=512, context_tokens=10_000) as stages:
        first = stages.engine.submit(request(*conversation, max_tokens=5))
        stages.run(lambda: ended(first))
        for number in range(50):
            short = stages.engine.submit(request(9000 + number, *range(100), max_tokens=5))
            stages.run(lambda: ended(short))  # noqa: B023 - it runs now
        again = stages.engine.submit(request(*conversation, *answer_alone(first.request), 1, max_tokens=5))
        stages.run(lambda: ended(again))
        _, end = rest_of(again)
        assert end.summary.prompt_tokens - end.summary.cached_tokens < 10


def test_a_conversation_stays_cached_through_many_brief_requests_two_at_a_time() -> None:
    """With ages, as for interactive requests, the conversation is lost after 300 / 45 of them."""
    conversation = range(300)
    with token_engine(num_slots=2, chunk_tokens=64, context_tokens=1000) as stages:
        first = stages.engine.submit(request(*conversation, max_tokens=5))
        stages.run(lambda: ended(first))
        for number in range(0, 40, 2):
            briefs = [
                stages.engine.submit(request(9000 + one, *range(40), max_tokens=5, priority=Priority.BRIEF))
                for one in (number, number + 1)
            ]
            stages.run(lambda: all(map(ended, briefs)))  # noqa: B023 - it runs now
        again = stages.engine.submit(request(*conversation, *answer_alone(first.request), 1, max_tokens=5))
        stages.run(lambda: ended(again))
        _, end = rest_of(again)
        assert end.summary.prompt_tokens - end.summary.cached_tokens < 10


def test_brief_requests_run_side_by_side_where_no_conversation_is_lost() -> None:
    with token_engine(num_slots=2) as stages:
        briefs = [stages.engine.submit(request(number, 1, max_tokens=9, priority=Priority.BRIEF)) for number in (5, 6)]
        stages.run(lambda: all(map(ended, briefs)))
        assert max(len(step.rows) for step in stages.plans) == 2


def test_a_brief_request_starts_after_the_interactive_ones_that_wait() -> None:
    with token_engine(num_slots=1) as stages:
        running = stages.engine.submit(request(1, 2, max_tokens=3))
        stages.run(lambda: bool(stages.plans))
        brief = stages.engine.submit(request(3, 4, max_tokens=2, priority=Priority.BRIEF))
        waiting = stages.engine.submit(request(5, 6, max_tokens=2))
        stages.run(lambda: ended(waiting))
        assert running.has_ended
        assert not brief.has_ended
        stages.run(lambda: ended(brief))
        assert rest_of(brief)[0] == answer_alone(brief.request)


def test_a_background_request_gives_its_slot_to_an_interactive_one_and_finishes_afterwards() -> None:
    with token_engine(num_slots=1, chunk_tokens=4) as stages:
        background = stages.engine.submit(request(*range(40), max_tokens=20, priority=Priority.BACKGROUND))
        stages.run(lambda: stages.engine.use[1].steps_done >= 15)
        interactive = stages.engine.submit(request(50, 51, max_tokens=5))
        stages.run(lambda: ended(interactive))
        assert not background.has_ended
        stages.run(lambda: ended(background))
        for handle in (interactive, background):
            assert rest_of(handle)[0] == answer_alone(handle.request)


def test_a_reader_is_notified_of_every_event() -> None:
    notified: list[Handle] = []
    with token_engine() as stages:
        handle = stages.engine.submit(request(1, 2, max_tokens=4), notify=notified.append)
        stages.run(lambda: ended(handle))
        assert len(notified) == len(list(handle.events()))


def test_events_are_read_without_waiting_and_are_those_of_the_other_reader() -> None:
    asked = request(1, 2, 3)
    with token_engine() as tokens:
        handle = tokens.engine.submit(asked)
        read: list[object] = []
        while not (read and isinstance(read[-1], Finished)):
            tokens.run(lambda: bool(tokens.stages.next_step(0)) or handle.has_ended)
            read += handle.ready_events()
            tokens.stages.execute(0)
        assert [event.token_id for event in read if isinstance(event, Token)] == answer_alone(asked)
        assert list(handle.ready_events()) == []


def test_a_reader_that_does_not_wait_gets_the_error_of_its_request() -> None:
    with token_engine(can_restart=False) as tokens:
        handle = tokens.engine.submit(request(1, 2, 3))
        assert tokens.stages.wait_until_waiting(20)
        tokens.stages.fail(0)
        while not handle.has_ended:
            threading.Event().wait(0.001)
        with pytest.raises(StageFault):
            list(handle.ready_events())


def test_a_defect_in_the_engine_ends_its_requests_with_an_error() -> None:
    with token_engine() as stages:
        handle = stages.engine.submit(request(1, 2, max_tokens=50))
        stages.scheduler.next_microbatch = None  # type: ignore[assignment, method-assign]
        with pytest.raises(Exception, match="the engine failed: TypeError"):
            while True:
                stages.stages.execute(0)
                stages.stages.execute(1)
                if handle.has_ended:
                    rest_of(handle)
                threading.Event().wait(0.001)


def test_a_request_whose_last_token_comes_as_the_engine_closes_still_ends() -> None:
    with token_engine() as stages:
        handle = stages.engine.submit(request(1, 2, max_tokens=1))
        complete = stages.scheduler.complete

        def close_first(number: int, tokens: Sequence[SampledToken], **more: Any) -> list[AppendedTokens]:
            closing = threading.Thread(target=stages.engine.__exit__, args=(None, None, None))
            closing.start()
            while stages.engine._loop._commands.empty():
                threading.Event().wait(0.001)
            return complete(number, tokens, **more)

        stages.scheduler.complete = close_first  # type: ignore[method-assign]
        while not handle.has_ended:
            for rank in range(2):
                stages.stages.execute(rank)
            threading.Event().wait(0.001)
        assert rest_of(handle)[0] == answer_alone(handle.request)


def test_progress_of_a_prompt_comes_before_its_first_token_and_never_after() -> None:
    with token_engine(chunk_tokens=4) as stages:
        handle = stages.engine.submit(request(*range(11), max_tokens=3))
        kinds: list[type] = []
        reader = threading.Thread(target=lambda: kinds.extend(type(event) for event in handle.events()))
        reader.start()
        stages.run(lambda: ended(handle))
        reader.join(20)
        assert kinds[-4:] == [Token, Token, Token, Finished]
        assert PrefillProgress in kinds and set(kinds[:-4]) <= {Queued, PrefillProgress}


def test_a_failing_callback_ends_neither_the_engine_nor_other_requests() -> None:
    def fail(handle: Handle) -> None:
        raise RuntimeError("the reader's loop is closed")

    with token_engine() as stages:
        broken = stages.engine.submit(request(1, 2), notify=fail)
        other = stages.engine.submit(request(3, 4))
        stages.run(lambda: ended(broken, other))
        for handle in (broken, other):
            assert rest_of(handle)[0] == answer_alone(handle.request)


@pytest.mark.parametrize("prompt_ids", [(), (5,) * 200, (5, 100_000)])
def test_a_request_that_can_never_run_is_refused_at_its_submission(prompt_ids: tuple[int, ...]) -> None:
    with token_engine() as stages, pytest.raises(RequestError):
        stages.engine.submit(request(*prompt_ids))


def test_two_stages_that_fail_once_each_end_no_request() -> None:
    with token_engine() as stages:
        handle = stages.engine.submit(request(1, 2, max_tokens=20))
        stages.run(lambda: stages.engine.use[1].steps_done >= 8)
        for rank in (0, 1):
            run_to_a_step_with(stages, handle, position=6) if rank else None
            stages.fail(rank)
            stages.end_restart()
        stages.run(lambda: ended(handle))
        assert rest_of(handle)[0] == answer_alone(handle.request)


def test_a_request_submitted_during_a_restart_reports_it() -> None:
    with token_engine() as stages:
        stages.fail(0)
        handle = stages.engine.submit(request(1, 2))
        assert next(handle.events()) == Restarting(stages.restarts[0], WAITING)
        stages.end_restart()
        stages.run(lambda: ended(handle))


def test_the_switch_interval_is_the_usual_one_again_after_the_last_engine_in_any_order() -> None:
    usual = sys.getswitchinterval()
    interval = _ShortInterval()
    interval.begin()
    interval.begin()
    interval.end()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S, abs=2e-6)  # Python keeps microseconds
    interval.end()
    assert sys.getswitchinterval() == pytest.approx(usual, abs=2e-6)
