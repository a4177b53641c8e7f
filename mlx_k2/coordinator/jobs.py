"""Submissions, and the jobs that the engine thread makes progress with. Knows no stages."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from mlx_k2.coordinator.answer_summary import AnswerTimer
from mlx_k2.coordinator.handle import Finished, Handle
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.sequence import Sequence
from mlx_k2.scheduling.token_policy import TokenPolicy


@dataclass(frozen=True)
class Submission:
    """A request, its token policy, and a callback for each new event of its handle, which must not block."""

    request: Request
    policy: TokenPolicy | None = None
    notify: Callable[[Handle], None] | None = None


@dataclass(eq=False)
class Job:
    """A submitted request. ``sequence`` is None until the engine thread has accepted it."""

    submission: Submission
    handle: Handle
    timer: AnswerTimer
    sequence: Sequence | None = None
    is_queued: bool = True
    """True until its first step, or its end."""
    ends_at: float = math.inf
    """The time limit of the request, in monotonic seconds; inf before its first step and without a limit."""

    def finished(self, reason: FinishReason) -> Finished:
        """Return the end of the request for ``reason``."""
        sequence = self.sequence or Sequence(self.submission.request, context_tokens=0)
        parts = sequence.finish().parts if reason is FinishReason.TIMEOUT else ()
        counts = (sequence.num_cached or 0, sequence.drafts.counts)
        return Finished(self.timer.summary(self.submission.request, reason, *counts), parts)
