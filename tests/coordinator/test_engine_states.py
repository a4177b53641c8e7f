"""State machine test of the engine: submit, cancel, fault, restart, slow readers and priorities, in any order."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Event, Finished, Handle, Token
from mlx_k2.coordinator.pipeline import Pipeline
from mlx_k2.deployment.restarting import WAITING, OnRestart, Restart
from mlx_k2.deployment.stage_report import StageReport
from mlx_k2.errors import Cancelled, ClusterError, EngineBusy, RequestFailed
from mlx_k2.protocol.messages import Step
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.cost_model import StageCost
from mlx_k2.scheduling.request import FinishReason, Priority, Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import AdaptiveStepPolicy
from mlx_k2.testing.sleeping_stages import SIZES, SPEED
from mlx_k2.testing.token_stages import STOP_ID, TokenStages, answer_alone

CONTEXT_TOKENS = 60
CHUNK_TOKENS = 6
MAX_QUEUED = 3
WAIT_S = 20.0

prompts = st.one_of(
    st.lists(st.integers(0, 30), min_size=1, max_size=20),
    st.integers(1, 25).map(lambda length: [7] * length),  # prompts that share a prefix
)
requests = st.builds(
    lambda ids, max_tokens, seed, priority, stops: Request(
        tuple(ids), max_tokens, Sampling(seed=seed), frozenset({STOP_ID} if stops else ()), priority=priority
    ),
    prompts,
    st.integers(1, 12),
    st.integers(0, 3),
    st.sampled_from([Priority.INTERACTIVE, Priority.INTERACTIVE, Priority.BACKGROUND]),
    st.booleans(),
)


@dataclass
class Reader:
    """The reader of one handle, and what it has read."""

    handle: Handle
    submitted_at: int
    """Number of steps that had returned at the submission."""
    token_ids: list[int] = field(default_factory=list)
    ends: list[Finished | RequestFailed] = field(default_factory=list)
    was_cancelled: bool = False

    def __post_init__(self) -> None:
        self._events: Iterator[Event] = self.handle.events()

    def read_all(self) -> None:
        """Read to the end of a handle that has ended."""
        try:
            for event in self._events:
                self._on(event)
        except RequestFailed as failure:
            self.ends.append(failure)

    def read_token(self) -> None:
        """Read up to the next token. There must be one, or the end."""
        try:
            for event in self._events:
                self._on(event)
                if isinstance(event, Token):
                    return
        except RequestFailed as failure:
            self.ends.append(failure)

    def _on(self, event: Event) -> None:
        match event:
            case Token(token_id):
                assert not self.was_cancelled, "a token after cancel"
                self.token_ids.append(token_id)
            case Finished():
                self.ends.append(event)


class HeldRestarts:
    """Restarts that wait until the test lets them go on."""

    def __init__(self, new_stages: "EngineStates") -> None:
        self._machine = new_stages
        self._may_end = threading.Semaphore(0)
        self._is_cancelled = False
        self.num_restarts = 0

    def restart(self, error: ClusterError, on_restart: OnRestart) -> TokenStages:
        self.num_restarts += 1
        on_restart(Restart(str(error), self.num_restarts, 99, 0.0), WAITING)
        self._machine.is_restarting.set()
        assert self._may_end.acquire(timeout=WAIT_S), "the test forgot a restart"
        if self._is_cancelled:
            raise Cancelled("the restart was cancelled")
        self._machine.stages = self._machine.new_stages()
        return self._machine.stages

    def let_one_end(self) -> None:
        self._may_end.release()

    def cancel(self) -> None:
        self._is_cancelled = True
        self._may_end.release()


class EngineStates(RuleBasedStateMachine):
    """An engine over stages that execute plans when the test says so."""

    readers = Bundle("readers")

    @initialize(num_stages=st.integers(1, 3), num_slots=st.integers(1, 5), drafts=st.booleans())
    def start(self, num_stages: int, num_slots: int, drafts: bool) -> None:
        self.num_stages = num_stages
        self.all_readers: list[Reader] = []
        self.background_steps: list[bool] = []
        self.first_tokens: dict[int, int] = {}
        """The number of steps that had returned before a request's first token, by the request's id()."""
        self.is_restarting = threading.Event()
        self.stages = self.new_stages()
        limits = SchedulerLimits(num_slots, CONTEXT_TOKENS, CHUNK_TOKENS, num_stages)
        policy = AdaptiveStepPolicy([StageCost(SIZES, SPEED)] * num_stages)
        self.scheduler = Scheduler(limits, policy, drafts=drafts)
        pipeline = Pipeline(self.stages, self.scheduler, policy, on_report=self.on_report)
        self.restarts = HeldRestarts(self)
        self.engine = Engine(pipeline, self.scheduler, num_slots, restarts=self.restarts, max_queued=MAX_QUEUED)
        self.engine.__enter__()

    def new_stages(self) -> TokenStages:
        return TokenStages(self.num_stages, self.check_plan)

    def check_plan(self, step: Step) -> None:
        """Check a plan as it is sent, on the engine thread: a failure ends the engine, which the rules notice."""
        assert sum(len(row.token_ids) for row in step.rows) <= CHUNK_TOKENS, "over the budget"
        assert len({row.slot for row in step.rows}) == len(step.rows), "two rows in one slot"

    def on_report(self, report: StageReport) -> None:
        if report.rank == self.num_stages - 1:
            requests = [planned.sequence.request for planned in report.microbatch.rows]
            for planned in report.microbatch.rows:
                if planned.row.needs_logits:
                    self.first_tokens.setdefault(id(planned.sequence.request), len(self.background_steps))
            self.background_steps.append(any(request.priority is Priority.BACKGROUND for request in requests))

    def wait_for_engine(self) -> None:
        """Wait until the engine waits for the stages, so that a run can be repeated."""
        if not self.is_restarting.is_set():
            assert self.stages.wait_until_waiting(WAIT_S), "the engine does not wait"

    # ---- rules

    @rule(target=readers, request=requests)
    def submit(self, request: Request) -> Reader:
        self.wait_for_engine()
        handle = self.submit_or_refuse(request)
        if handle is None:
            refused = Handle(request, lambda _: None)
            refused.end(RequestFailed("refused"))
            return Reader(refused, 0)
        reader = Reader(handle, len(self.background_steps))
        self.all_readers.append(reader)
        self.wait_for_engine()
        return reader

    def submit_or_refuse(self, request: Request) -> Handle | None:
        """Submit a request; return None if the queue is full. The engine frees a cancelled request's place soon."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                return self.engine.submit(request)
            except EngineBusy as busy:
                assert busy.wait_s > 0
                if sum(not reader.handle.has_ended for reader in self.all_readers) >= MAX_QUEUED:
                    return None
                assert time.monotonic() < deadline, "refused with a place in the queue"
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
        if rank < self.num_stages and self.stages.execute(rank):
            self.wait_for_engine()

    @rule(times=st.integers(1, 20))
    def execute_on_all_stages(self, times: int) -> None:
        for rank in [*range(self.num_stages)] * times:
            if self.stages.execute(rank):
                self.wait_for_engine()

    @rule(reader=readers)
    def read_some(self, reader: Reader) -> None:
        if reader in self.all_readers and not reader.ends and reader.handle.has_ended:
            reader.read_token()

    @precondition(lambda self: not self.is_restarting.is_set())
    @rule(rank=st.integers(0, 2))
    def fail(self, rank: int) -> None:
        self.wait_for_engine()
        self.stages.fail(min(rank, self.num_stages - 1))
        assert self.is_restarting.wait(WAIT_S)

    @precondition(lambda self: self.is_restarting.is_set())
    @rule()
    def end_restart(self) -> None:
        before = self.stages
        self.restarts.let_one_end()
        while self.stages is before:
            threading.Event().wait(0.001)
        self.is_restarting.clear()
        self.wait_for_engine()

    # ---- what must hold

    @invariant()
    def no_slot_has_two_owners(self) -> None:
        slots = [sequence.slot for sequence in self.scheduler.running]
        assert len(slots) == len(set(slots)) and None not in slots

    @invariant()
    def background_requests_yield(self) -> None:
        for reader in self.all_readers:
            request = reader.handle.request
            if request.priority is Priority.INTERACTIVE and id(request) in self.first_tokens:
                between = self.background_steps[reader.submitted_at : self.first_tokens[id(request)]]
                assert sum(between) <= self.num_stages + 1, "background steps before the first token"

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        if self.is_restarting.is_set():
            self.end_restart()
        while any(not reader.handle.has_ended for reader in self.all_readers):
            self.wait_for_engine()
            executed = [self.stages.execute(rank) for rank in range(self.num_stages)]
            assert any(executed) or not self.scheduler.has_work, "there is work, and no plan"
        self.background_requests_yield()
        for reader in self.all_readers:
            if not reader.ends:
                reader.read_all()
            (end,) = reader.ends
            self.check_answer(reader, end)
        self.engine.__exit__(None, None, None)

    @staticmethod
    def check_answer(reader: Reader, end: Finished | RequestFailed) -> None:
        """Compare a whole answer with that of the request alone. A cancelled one is the beginning of it."""
        expected = answer_alone(reader.handle.request)
        if isinstance(end, RequestFailed):
            assert "was running when stage" in str(end)
        if reader.was_cancelled or isinstance(end, RequestFailed):
            assert reader.token_ids == expected[: len(reader.token_ids)]
        else:
            assert reader.token_ids == expected
            assert end.reason is (
                FinishReason.STOP if expected[-1] in reader.handle.request.stop_ids else FinishReason.LENGTH
            )
            assert end.summary.generated_tokens == len(expected)


EngineStates.TestCase.settings = settings(stateful_step_count=30)
TestEngineStates = pytest.mark.timeout(300)(EngineStates.TestCase)
