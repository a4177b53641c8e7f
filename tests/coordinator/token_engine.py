"""Engine over stages that execute plans on token ids, each when the test calls ``execute``."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlx_k2.coordinator.engine import MAX_QUEUED, Engine
from mlx_k2.coordinator.handle import Handle
from mlx_k2.coordinator.pipeline import Pipeline
from mlx_k2.deployment.listener import StageReport
from mlx_k2.deployment.restarting import WAITING, OnRestart, Restart
from mlx_k2.errors import Cancelled, ClusterError
from mlx_k2.protocol.messages import Step
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.cost_model import StageCost
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import Priority, Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import StepPolicy
from mlx_k2.testing.sleeping_stages import SIZES, SPEED
from mlx_k2.testing.token_stages import TokenStages

WAIT_S = 20.0
"""Deadline of each wait for the engine."""
VOCAB_SIZE = 100_000
CONTEXT_TOKENS = 200


def request(
    *prompt_ids: int, max_tokens: int = 10, seed: int = 0, priority: Priority = Priority.INTERACTIVE
) -> Request:
    """Return a request without stop tokens."""
    return Request(prompt_ids, max_tokens, Sampling(seed=seed), frozenset(), priority=priority)


@dataclass
class TokenEngine:
    """An engine, its present stages, and the source of new stages after a fault (``Restarts``)."""

    limits: SchedulerLimits
    draft_mode: DraftMode = DraftMode.OFF
    can_restart: bool = True
    max_queued: int = MAX_QUEUED
    make_stages: Callable[[int, Callable[[Step], None]], TokenStages] = TokenStages
    plans: list[Step] = field(default_factory=list)
    """All plans that were sent."""
    reports: list[StageReport] = field(default_factory=list)
    """All reports of steps, of every stage."""
    restarts: list[Restart] = field(default_factory=list)
    """All restarts that have begun."""

    def __post_init__(self) -> None:
        self.stages = self.make_stages(self.limits.num_stages, self.plans.append)
        policy = StepPolicy([StageCost(SIZES, SPEED)] * self.limits.num_stages)
        self.scheduler = Scheduler(self.limits, policy, draft_mode=self.draft_mode)
        pipeline = Pipeline(self.stages, self.scheduler, policy, VOCAB_SIZE, on_report=self.reports.append)
        self.may_restart = threading.Event()
        self.is_restarting = threading.Event()
        self._is_cancelled = False
        self.engine = Engine(
            pipeline,
            self.scheduler,
            restarts=self if self.can_restart else None,
            max_queued=self.max_queued,
        )

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Execute plans until ``is_done`` returns true. The engine must send plans until then."""
        while True:
            assert self.stages.wait_until_waiting(WAIT_S), "the engine does not wait for its stages"
            if is_done():
                return
            executed = [self.stages.execute(rank) for rank in range(self.limits.num_stages)]
            if not any(executed):
                threading.Event().wait(0.001)

    def run_steps(self, num_steps: int) -> None:
        """Execute plans until the last stage has executed ``num_steps`` since the engine started."""
        self.run_until(lambda: self.engine.use[-1].steps_done >= num_steps)

    def run_to_end(self, *handles: Handle) -> None:
        """Execute plans until these requests have ended."""
        self.run_until(lambda: all(handle.has_ended for handle in handles))

    def fail_stage(self, rank: int) -> None:
        """End a stage, and wait until the engine has begun to restart."""
        assert self.stages.wait_until_waiting(WAIT_S)
        self.stages.fail(rank)
        assert self.is_restarting.wait(WAIT_S)

    def end_restart(self) -> None:
        """Let the restart end, and wait until the engine uses the new stages."""
        failed_stages = self.stages
        self.is_restarting.clear()
        self.may_restart.set()
        while self.stages is failed_stages:
            threading.Event().wait(0.001)
        assert self.stages.wait_until_waiting(WAIT_S)

    def restart(self, error: ClusterError, on_restart: OnRestart) -> TokenStages:
        """Return new stages after ``end_restart``. The engine calls this on a thread of its own."""
        self.restarts.append(Restart(str(error), number=len(self.restarts) + 1, limit=99, wait_s=0.0))
        on_restart(self.restarts[-1], WAITING)
        self.is_restarting.set()
        assert self.may_restart.wait(WAIT_S), "the test did not call end_restart"
        self.may_restart.clear()
        if self._is_cancelled:
            raise Cancelled("the restart was cancelled")
        self.stages = self.make_stages(self.limits.num_stages, self.plans.append)
        return self.stages

    def cancel(self) -> None:
        """End the present restart with Cancelled. The engine calls this when it closes."""
        self._is_cancelled = True
        self.may_restart.set()


@contextmanager
def token_engine(
    num_slots: int = 2,
    chunk_tokens: int = 8,
    num_stages: int = 2,
    context_tokens: int = CONTEXT_TOKENS,
    *,
    draft_mode: DraftMode = DraftMode.OFF,
    can_restart: bool = True,
    max_queued: int = MAX_QUEUED,
    make_stages: Callable[[int, Callable[[Step], None]], TokenStages] = TokenStages,
) -> Iterator[TokenEngine]:
    """Yield a running engine with its stages."""
    limits = SchedulerLimits(num_slots, context_tokens, chunk_tokens, num_stages)
    harness = TokenEngine(limits, draft_mode, can_restart, max_queued, make_stages)
    with harness.engine:
        yield harness
