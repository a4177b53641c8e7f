"""Coordinator: gets plans from the scheduler, sends each to every stage, and yields tokens as they are sampled.

Knows token ids and stages, but no text and no arrays.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from mlx_k2.coordinator.report_check import find_problem
from mlx_k2.deployment.deploy import Deployment
from mlx_k2.deployment.stage_report import StageReport
from mlx_k2.errors import ClusterError, ProtocolError, StageSilent
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.health_monitor import HealthMonitor
from mlx_k2.protocol.messages import Step, StepDone
from mlx_k2.sampling import SampledToken
from mlx_k2.scheduling.cost_model import StepLoad
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.sequence import Sequence
from mlx_k2.scheduling.step_policy import AdaptiveStepPolicy

LIMIT_MARGIN_S = 10.0
"""Added to a guard's step limit, so that the coordinator times out first: its error describes the cause better."""


@dataclass(frozen=True)
class StepTimeout:
    """Step timeout: ``step_s`` + ``times_expected`` x predicted step time. Each report of a stage starts it again."""

    step_s: float = 60.0
    times_expected: float = 20.0


_STEP_TIMEOUT = StepTimeout()


RestartStages = Callable[[ClusterError], StageGroup]
"""Function that ends the failed stages and starts new ones, or raises the error that prevents it."""


@dataclass(frozen=True)
class TokenEvent:
    """A sampled token of a sequence. ``token`` None: the sequence ended by its timeout without another token."""

    sequence: Sequence
    token: SampledToken | None


@dataclass
class StageUse:
    """Totals of one stage so far: steps, tokens, seconds computing, receiving and sending, and peak memory."""

    steps_done: int = 0
    num_tokens: int = 0
    busy_s: float = 0.0
    receive_s: float = 0.0
    send_s: float = 0.0
    peak_bytes: int = 0


@dataclass
class _Sent:
    """A plan in flight, its send time, and the number of stages that have finished it."""

    microbatch: Microbatch
    sent_at: float
    num_reports: int = 0


class Coordinator:
    """Loop that runs requests over a group of ready stages."""

    def __init__(
        self,
        group: StageGroup,
        scheduler: Scheduler,
        policy: AdaptiveStepPolicy,
        step_timeout: StepTimeout = _STEP_TIMEOUT,
        on_report: Callable[[StageReport], None] | None = None,
        restart: RestartStages | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._group = group
        self._scheduler = scheduler
        self._policy = policy
        self._step_timeout = step_timeout
        self._on_report = on_report
        self._restart = restart
        self._fault: ClusterError | None = None
        self._monitor = HealthMonitor(group)
        self._sent: dict[int, _Sent] = {}
        self._unobserved: list[tuple[int, StepLoad, float]] = []
        self._ends_at: dict[Sequence, float] = {}
        self._received_at = time.monotonic()
        self.use = tuple(StageUse() for _ in range(group.size))

    def run(self, *requests: Request, stopped: Callable[[], bool] = lambda: False) -> Generator[TokenEvent, None, None]:
        """Run ``requests``, and those submitted before, to their end; yield tokens in the order of their arrival.

        After a fault, the run continues on the stages that ``restart`` starts, if given: every running sequence is
        computed again from its tokens, and no token is yielded twice. Closing the generator early cancels all
        sequences that still run. So does ``stopped`` when it returns True; it is called after each finished step of a
        stage.

        Raises:
            StageFault: a stage reported an error or ended.
            ProtocolError: a stage reported what it cannot have computed.
            StageSilent: a step exceeded its timeout, or a stage is stopped; names the stage, its host and step.
        """
        for request in requests:
            self._scheduler.submit(request)
        try:
            while (self._scheduler.has_work or self._sent) and not stopped():
                yield from self._step()
                yield from self._stop_timed_out()
        finally:
            self._scheduler.cancel_all()

    def _step(self) -> list[TokenEvent]:
        """Send the plans that can go, wait until a stage has finished a step, and return the tokens of that step."""
        self._observe_steps()
        if self._fault is not None:
            self._resume()
        try:
            self._send_plans()
            events = self._receive()
        except ClusterError as error:
            if self._restart is None:
                raise
            self._fault = error
            self._sent.clear()
            self._scheduler.reset()
            return []
        self._send_plans()  # before the caller processes the tokens, which would delay the plans
        return events

    def _resume(self) -> None:
        """Start new stages in place of the failed ones."""
        assert self._restart is not None and self._fault is not None
        self._group = self._restart(self._fault)
        self._monitor = HealthMonitor(self._group)
        self._received_at = time.monotonic()
        self._fault = None

    def _stop_timed_out(self) -> list[TokenEvent]:
        """Stop the sequences whose timeout has passed. Requests that wait for their slots start with the next step."""
        now = time.monotonic()
        timed_out = [sequence for sequence, ends_at in self._ends_at.items() if sequence.finish_reason or now > ends_at]
        events = []
        for sequence in timed_out:
            del self._ends_at[sequence]
            if sequence.finish_reason is None:
                self._scheduler.stop(sequence, FinishReason.TIMEOUT)
                events.append(TokenEvent(sequence, None))
        return events

    def _send_plans(self) -> None:
        while (microbatch := self._scheduler.next_microbatch()) is not None:
            now = time.monotonic()
            self._sent[microbatch.number] = _Sent(microbatch, now)
            for sequence in (planned.sequence for planned in microbatch.rows):
                if sequence.request.timeout_s is not None:
                    self._ends_at.setdefault(sequence, now + sequence.request.timeout_s)
            limit_s = self._allowed_s(microbatch) + LIMIT_MARGIN_S
            self._group.send_all(Step(microbatch.number, tuple(planned.row for planned in microbatch.rows), limit_s))

    def _receive(self) -> list[TokenEvent]:
        """Wait until a stage has finished a step, and return the tokens of that step."""
        received = self._monitor.receive(self._deadline())
        if received is None:
            raise StageSilent(self._describe_silence())
        rank, message = received.rank, received.message
        is_last = rank == self._group.size - 1
        problem = find_problem(message, self._next_of(rank), is_last=is_last, vocab_size=self._vocab_size)
        if problem is not None or not isinstance(message, StepDone):
            raise ProtocolError(f"stage {rank} on {self._group.host(rank)} {problem}")
        self._record(rank, message)
        if rank < self._group.size - 1:
            return []
        recipients = self._scheduler.complete(message.number, [token.token_id for token in message.tokens])
        return [
            TokenEvent(sequence, token)
            for sequence, token in zip(recipients, message.tokens, strict=True)
            if sequence is not None
        ]

    def _next_of(self, rank: int) -> Microbatch | None:
        """Return the step that the stage must report next; None if it has reported all that were sent."""
        due = (sent.microbatch for number, sent in self._sent.items() if number >= self.use[rank].steps_done)
        return next(due, None)

    def _record(self, rank: int, done: StepDone) -> None:
        """Add a finished step to the totals of its stage."""
        self._received_at = time.monotonic()
        sent = self._sent[done.number]
        sent.num_reports += 1
        if sent.num_reports == self._group.size:
            del self._sent[done.number]
        use = self.use[rank]
        use.steps_done = done.number + 1
        use.num_tokens += sent.microbatch.num_tokens
        use.busy_s += done.busy_s
        use.receive_s += done.receive_s
        use.send_s += done.send_s
        use.peak_bytes = done.peak_bytes
        if done.busy_s > 0:
            self._unobserved.append((rank, sent.microbatch.load, done.busy_s))
        if self._on_report is not None:
            self._on_report(StageReport(rank, sent.microbatch, done, self._received_at))

    def _observe_steps(self) -> None:
        """Pass the finished steps to the step policy. Tokens do not wait for it."""
        for rank, load, busy_s in self._unobserved:
            self._policy.observe(rank, load, busy_s)
        self._unobserved.clear()

    def _deadline(self) -> float:
        """Return the deadline (monotonic) for the next message of any stage.

        It counts from the last message, if that is later than the oldest plan: earlier steps may have delayed the plan.
        """
        oldest = next(iter(self._sent.values()))
        return max(oldest.sent_at, self._received_at) + self._allowed_s(oldest.microbatch)

    def _allowed_s(self, microbatch: Microbatch) -> float:
        return self._step_timeout.step_s + self._step_timeout.times_expected * self._policy.through_s(microbatch.load)

    def _describe_silence(self) -> str:
        number, oldest = next(iter(self._sent.items()))
        waited_s = time.monotonic() - oldest.sent_at
        behind = next(rank for rank, use in enumerate(self.use) if use.steps_done <= number)
        return (
            f"{self._monitor.describe(behind)} has not finished step {number} ({oldest.microbatch.num_tokens} tokens) "
            f"after {waited_s:.0f} s; the stages: {', '.join(self._monitor.describe_all())}"
        )


def coordinate(
    deployment: Deployment,
    *,
    drafts: bool,
    prompts_first: bool = False,
    step_timeout: StepTimeout | None = None,
    on_report: Callable[[StageReport], None] | None = None,
    restart: RestartStages | None = None,
) -> Coordinator:
    """Return a coordinator for ready stages. ``drafts`` lets a lone sequence's idle stages run draft tokens.

    ``prompts_first`` runs all prefill before decode: more tokens per second in total.

    After a fault the coordinator continues on the stages that ``restart`` starts.
    """
    shape = deployment.shape
    limits = SchedulerLimits(
        shape.num_slots, shape.context_tokens, shape.chunk_tokens, deployment.group.size, prompts_first
    )
    policy = AdaptiveStepPolicy(deployment.costs)
    scheduler = Scheduler(limits, policy, drafts=drafts)
    vocab_size = deployment.model.config.vocab_size
    timeout = step_timeout or StepTimeout()
    return Coordinator(deployment.group, scheduler, policy, timeout, on_report, restart, vocab_size)
