"""Pipeline: sends each plan of the scheduler to every stage, and returns the tokens that the last one sampled.

Knows token ids and stages, but no requests, no text and no threads. It belongs to the engine thread.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from mlx_k2.coordinator.report_check import find_draft_problem, find_problem
from mlx_k2.deployment.listener import StageReport
from mlx_k2.errors import ProtocolError, StageSilent
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.health_monitor import HealthMonitor
from mlx_k2.launch.stage_events import Woken
from mlx_k2.protocol.messages import Drafted, Step, StepDone
from mlx_k2.scheduling.cost_model import StepLoad
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.scheduling.scheduler import AppendedTokens, Scheduler
from mlx_k2.scheduling.step_policy import StepPolicy

LIMIT_MARGIN_S = 10.0
"""Added to a guard's step limit, so that the coordinator times out first: its error describes the cause better."""


@dataclass(frozen=True)
class StepTimeout:
    """Step timeout: ``step_s`` + ``times_expected`` x predicted step time. Each report of a stage starts it anew."""

    step_s: float = 60.0
    times_expected: float = 20.0


@dataclass
class StageUse:
    """Totals of one stage so far: tokens, seconds of computing, receiving and sending, and peak memory.

    ``draft_runs`` is how often the draft head made drafts, and ``draft_s`` the seconds that it took in all.
    """

    steps_done: int = 0
    """One more than the number of the last step that the stage finished; steps lost in a fault are included."""
    num_tokens: int = 0
    busy_s: float = 0.0
    receive_s: float = 0.0
    send_s: float = 0.0
    peak_bytes: int = 0
    draft_runs: int = 0
    draft_s: float = 0.0


@dataclass
class _Sent:
    """A plan in flight, its send time, and the stages that have finished it."""

    microbatch: Microbatch
    sent_at: float
    finished_by: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class StepResult:
    """A step that the last stage has finished, and the tokens that it added to sequences."""

    microbatch: Microbatch
    appended: list[AppendedTokens]


class Pipeline:
    """Plans in flight over a group of ready stages."""

    def __init__(
        self,
        group: StageGroup,
        scheduler: Scheduler,
        policy: StepPolicy,
        vocab_size: int,
        step_timeout: StepTimeout | None = None,
        on_report: Callable[[StageReport], None] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self._scheduler = scheduler
        self._policy = policy
        self._step_timeout = step_timeout or StepTimeout()
        self._on_report = on_report
        self._sent: dict[int, _Sent] = {}
        self._awaits_drafts: Microbatch | None = None
        """The step after which the last stage sends drafts next; None if it sends a step's report next."""
        self._unobserved: list[tuple[int, StepLoad, float]] = []
        """Rank, load and computing seconds of steps that the step policy does not know yet."""
        self.use = tuple(StageUse() for _ in range(group.size))
        self.continue_on(group)

    def continue_on(self, group: StageGroup) -> None:
        """Use new stages, whose caches are empty. Step numbers continue."""
        self.group = group
        self._monitor = HealthMonitor(group)
        self._received_at = time.monotonic()

    def send_plans(self) -> list[Microbatch]:
        """Send all plans that can go now; return them. Does not block."""
        sent = []
        while (microbatch := self._scheduler.next_microbatch()) is not None:
            self._sent[microbatch.number] = _Sent(microbatch, time.monotonic())
            limit_s = self._allowed_s(microbatch) + LIMIT_MARGIN_S
            self._send(Step(microbatch.number, tuple(planned.row for planned in microbatch.rows), limit_s))
            sent.append(microbatch)
        return sent

    def receive(self, wake_at: float = math.inf) -> StepResult | None:
        """Wait for the next report of a stage; return the step if the last stage has finished it.

        Return None for all other reports, at ``wake_at`` (monotonic seconds), and when the group was woken. Wait
        without a limit if no plan is in flight; the health of the stages is monitored in this case too.

        Raises:
            StageFault: a stage reported an error or ended.
            ProtocolError: a stage reported what it cannot have computed.
            StageSilent: a step exceeded its timeout, or a stage is stopped; names the stage, its host and step.
        """
        received = self._monitor.receive(self._deadline(), wake_at)
        if received is None:
            raise self._timeout_error()
        if isinstance(received, Woken):
            return None
        rank, message = received.rank, received.message
        is_last = rank == self.group.size - 1
        drafts_step = self._awaits_drafts if is_last else None
        if drafts_step is not None:
            problem = find_draft_problem(message, drafts_step, vocab_size=self.vocab_size)
        else:
            problem = find_problem(message, self.step_of(rank), is_last=is_last, vocab_size=self.vocab_size)
        if problem is not None:
            raise ProtocolError(f"stage {rank} on {self.group.host(rank)} {problem}", rank)
        if drafts_step is not None and isinstance(message, Drafted):
            self._receive_drafts(rank, drafts_step, message)
            return None
        assert isinstance(message, StepDone), "any other message is a problem"
        microbatch = self._record(rank, message)
        if not is_last:
            return None
        if microbatch.rows[0].row.draft is not None and not message.is_skipped:
            self._awaits_drafts = microbatch
        completed = self._scheduler.complete(
            message.number, message.tokens, is_skipped=message.is_skipped, now=self._received_at
        )
        return StepResult(microbatch, completed)

    def observe_steps(self) -> None:
        """Pass the finished steps to the step policy. Called after their tokens are delivered, to delay no token."""
        for rank, load, busy_s in self._unobserved:
            self._policy.observe(rank, load, busy_s)
        self._unobserved.clear()

    def drop_plans(self) -> None:
        """Forget all plans in flight, after a fault."""
        self._sent.clear()
        self._awaits_drafts = None

    def step_of(self, rank: int) -> Microbatch | None:
        """Return the oldest plan in flight that stage ``rank`` has not finished."""
        return next((sent.microbatch for sent in self._sent.values() if rank not in sent.finished_by), None)

    def _send(self, step: Step) -> None:
        """Send a plan to every stage. Only the last one, which samples, gets token masks and logit biases."""
        if not any(row.token_mask or row.logit_bias for row in step.rows):
            self.group.send_all(step)
            return
        rows = tuple(msgspec.structs.replace(row, token_mask=None, logit_bias=None) for row in step.rows)
        plain = msgspec.structs.replace(step, rows=rows)
        for rank in range(self.group.size):
            self.group.send(rank, step if rank == self.group.size - 1 else plain)

    def _receive_drafts(self, rank: int, microbatch: Microbatch, drafted: Drafted) -> None:
        """Pass the draft head's tokens to the scheduler, and its time to the step policy."""
        self._received_at = time.monotonic()
        self._awaits_drafts = None
        self.use[rank].draft_runs += 1
        self.use[rank].draft_s += drafted.busy_s
        self._policy.observe_draft(drafted.busy_s)
        self._scheduler.propose(microbatch, drafted.token_ids)

    def _record(self, rank: int, done: StepDone) -> Microbatch:
        """Add a finished step to the totals of its stage; return the step."""
        self._received_at = time.monotonic()
        sent = self._sent[done.number]
        sent.finished_by.add(rank)
        if len(sent.finished_by) == self.group.size:
            del self._sent[done.number]
        use = self.use[rank]
        use.steps_done = done.number + 1
        use.num_tokens += sent.microbatch.num_tokens
        use.busy_s += done.busy_s
        use.receive_s += done.receive_s
        use.send_s += done.send_s
        use.peak_bytes = done.peak_bytes
        if done.busy_s > 0 and not done.is_skipped:
            self._unobserved.append((rank, sent.microbatch.load, done.busy_s))
        if self._on_report is not None:
            self._on_report(StageReport(rank, sent.microbatch, done, self._received_at))
        return sent.microbatch

    def _deadline(self) -> float:
        """Return the deadline (monotonic) for the next message of any stage.

        It counts from the last message, if this came after the oldest plan was sent: earlier steps may delay the plan.
        """
        oldest = next(iter(self._sent.values()), None)
        if oldest is None:
            return math.inf
        return max(oldest.sent_at, self._received_at) + self._allowed_s(oldest.microbatch)

    def _allowed_s(self, microbatch: Microbatch) -> float:
        """Return the step timeout of a microbatch."""
        return self._step_timeout.step_s + self._step_timeout.times_expected * self._policy.latency_s(microbatch.load)

    def _timeout_error(self) -> StageSilent:
        """Return the error that names the first stage which has not finished the oldest step."""
        number, oldest = next(iter(self._sent.items()))
        waited_s = time.monotonic() - oldest.sent_at
        behind = next(rank for rank in range(self.group.size) if rank not in oldest.finished_by)
        return StageSilent(
            f"{self._monitor.describe(behind)} has not finished step {number} ({oldest.microbatch.num_tokens} tokens) "
            f"after {waited_s:.0f} s; the stages: {', '.join(self._monitor.describe_all())}",
            behind,
        )
