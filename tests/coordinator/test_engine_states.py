"""State machine test of the engine: submit, cancel, fault, restart, slow readers and priorities, in any order."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_k2.coordinator.handle import Event, Finished, Handle, Token
from mlx_k2.deployment.listener import StageReport
from mlx_k2.errors import EngineBusy, RequestFailed
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import FinishReason, Priority, Request
from mlx_k2.scheduling.scheduler import SchedulerLimits
from mlx_k2.testing.token_stages import STOP_ID, answer_alone
from tests.coordinator.token_engine import WAIT_S, TokenEngine

CONTEXT_TOKENS = 60
CHUNK_TOKENS = 6
MAX_QUEUED = 3

prompts = st.one_of(
    st.lists(st.integers(0, 30), min_size=1, max_size=20),
    st.integers(1, 25).map(lambda length: [7] * length),  # prompts that share a prefix
)
requests = st.builds(
    Request,
    prompts.map(tuple),
    max_tokens=st.integers(1, 12),
    sampling=st.builds(Sampling, seed=st.integers(0, 3)),
    stop_ids=st.sampled_from([frozenset({STOP_ID}), frozenset()]),
    priority=st.sampled_from([Priority.INTERACTIVE, Priority.INTERACTIVE, Priority.BACKGROUND]),
)


@dataclass
class Reader:
    """The reader of one handle, with the token ids and the end that it has read."""

    handle: Handle
    num_reports_before: int
    """Number of the last stage's reports before the submission."""
    token_ids: list[int] = field(default_factory=list)
    ends: list[Finished | RequestFailed] = field(default_factory=list)
    """The end of the handle, of which there must be exactly one."""
    was_cancelled: bool = False

    def __post_init__(self) -> None:
        self._events: Iterator[Event] = self.handle.events()

    def read_all(self) -> None:
        """Read to the end of a handle that has ended."""
        try:
            for event in self._events:
                self._record(event)
        except RequestFailed as failure:
            self.ends.append(failure)

    def read_token(self) -> None:
        """Read up to the next token or the end, one of which must be in the queue."""
        try:
            for event in self._events:
                self._record(event)
                if isinstance(event, Token):
                    return
        except RequestFailed as failure:
            self.ends.append(failure)

    def _record(self, event: Event) -> None:
        match event:
            case Token(token_id):
                assert not self.was_cancelled, "a token after cancel"
                self.token_ids.append(token_id)
            case Finished():
                self.ends.append(event)


class EngineStates(RuleBasedStateMachine):
    """State machine of an engine. Its stages execute plans only when a rule calls ``execute``."""

    readers = Bundle("readers")

    @initialize(num_stages=st.integers(1, 3), num_slots=st.integers(1, 5), mode=st.sampled_from(DraftMode))
    def start(self, num_stages: int, num_slots: int, mode: DraftMode) -> None:
        self.num_stages = num_stages
        self.all_readers: list[Reader] = []
        self.harness = TokenEngine(
            SchedulerLimits(num_slots, CONTEXT_TOKENS, CHUNK_TOKENS, num_stages), mode, max_queued=MAX_QUEUED
        )
        self.engine = self.harness.engine
        self.engine.__enter__()

    @property
    def is_restarting(self) -> bool:
        return self.harness.is_restarting.is_set()

    @property
    def last_reports(self) -> list[StageReport]:
        """All reports of steps that the last stage has sent."""
        return [report for report in self.harness.reports if report.rank == self.num_stages - 1]

    def wait_for_engine(self) -> None:
        """Wait until the engine waits for its stages. Then the same rules have the same result in each run."""
        if not self.is_restarting:
            assert self.harness.stages.wait_until_waiting(WAIT_S), "the engine does not wait"

    # ---- rules

    @rule(target=readers, request=requests)
    def submit(self, request: Request) -> Reader:
        self.wait_for_engine()
        handle = self.submit_or_refuse(request)
        if handle is None:  # a rule with this target must return a reader
            ended_handle = Handle(request, lambda _: None)
            ended_handle.end(RequestFailed("refused"))
            return Reader(ended_handle, num_reports_before=0)
        reader = Reader(handle, len(self.last_reports))
        self.all_readers.append(reader)
        self.wait_for_engine()
        return reader

    def submit_or_refuse(self, request: Request) -> Handle | None:
        """Submit a request; return None if the queue is full. A cancelled request stays in it for a moment."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                return self.engine.submit(request)
            except EngineBusy as busy:
                assert busy.wait_s > 0
                if sum(not reader.handle.has_ended for reader in self.all_readers) >= MAX_QUEUED:
                    return None
                assert time.monotonic() < deadline, "the request was refused, and the queue is not full"
                threading.Event().wait(0.001)

    @rule(reader=readers)
    def cancel(self, reader: Reader) -> None:
        reader.handle.cancel()
        reader.was_cancelled = True
        if reader in self.all_readers and not reader.ends:
            reader.read_all()
            (end,) = reader.ends
            assert isinstance(end, Finished | RequestFailed)

    @rule(rank=st.integers(0, 2))
    def execute_on_one_stage(self, rank: int) -> None:
        if rank < self.num_stages and self.harness.stages.execute(rank):
            self.wait_for_engine()

    @rule(num_rounds=st.integers(1, 20))
    def execute_on_all_stages(self, num_rounds: int) -> None:
        for rank in [*range(self.num_stages)] * num_rounds:
            if self.harness.stages.execute(rank):
                self.wait_for_engine()

    @rule(reader=readers)
    def read_one_token(self, reader: Reader) -> None:
        if reader in self.all_readers and not reader.ends and reader.handle.has_ended:
            reader.read_token()

    @precondition(lambda self: not self.is_restarting)
    @rule(rank=st.integers(0, 2))
    def fail(self, rank: int) -> None:
        self.harness.fail_stage(min(rank, self.num_stages - 1))

    @precondition(lambda self: self.is_restarting)
    @rule()
    def end_restart(self) -> None:
        self.harness.end_restart()

    # ---- invariants

    @invariant()
    def no_slot_has_two_owners(self) -> None:
        slots = [sequence.slot for sequence in self.harness.scheduler.running]
        assert len(slots) == len(set(slots)) and None not in slots
        for step in self.harness.plans:
            assert len({row.slot for row in step.rows}) == len(step.rows)

    @invariant()
    def no_microbatch_exceeds_the_chunk(self) -> None:
        assert all(sum(len(row.token_ids) for row in step.rows) <= CHUNK_TOKENS for step in self.harness.plans)

    @invariant()
    def background_requests_yield(self) -> None:
        for reader in self.all_readers:
            if reader.handle.request.priority is Priority.INTERACTIVE:
                assert self.num_background_steps(reader) <= self.num_stages + 1, "more than may be in flight"

    def num_background_steps(self, reader: Reader) -> int:
        """Return the number of background steps between the submission and the first token; 0 without a token."""
        count = 0
        for report in self.last_reports[reader.num_reports_before :]:
            rows = report.microbatch.rows
            if any(planned.row.needs_logits and planned.sequence.request is reader.handle.request for planned in rows):
                return count
            count += any(planned.sequence.request.priority is Priority.BACKGROUND for planned in rows)
        return 0

    def teardown(self) -> None:
        if not hasattr(self, "harness"):  # ``start`` was not called
            return
        if self.is_restarting:
            self.end_restart()
        while any(not reader.handle.has_ended for reader in self.all_readers):
            self.wait_for_engine()
            executed = [self.harness.stages.execute(rank) for rank in range(self.num_stages)]
            assert any(executed) or not self.harness.scheduler.has_work, "a request runs, and no plan was sent"
        self.background_requests_yield()
        for reader in self.all_readers:
            if not reader.ends:
                reader.read_all()
            (end,) = reader.ends
            self.check_answer(reader, end)
        self.engine.__exit__(None, None, None)

    @staticmethod
    def check_answer(reader: Reader, end: Finished | RequestFailed) -> None:
        """Check that an answer equals the answer to the request alone, or its beginning if cancelled or failed."""
        expected = answer_alone(reader.handle.request)
        if isinstance(end, RequestFailed):
            assert "was running when stage" in str(end)
        if reader.was_cancelled or isinstance(end, RequestFailed):
            assert reader.token_ids == expected[: len(reader.token_ids)]
        else:
            assert reader.token_ids == expected
            has_stopped = expected[-1] in reader.handle.request.stop_ids
            assert end.reason is (FinishReason.STOP if has_stopped else FinishReason.LENGTH)
            assert end.summary.generated_tokens == len(expected)


EngineStates.TestCase.settings = settings(stateful_step_count=30)
TestEngineStates = pytest.mark.slow(pytest.mark.timeout(300)(EngineStates.TestCase))
