"""Submissions, and the jobs that the engine makes of them. Knows no stages."""

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
    """A submitted request in the engine. ``sequence`` is None until the engine thread has submitted it."""

    submission: Submission
    handle: Handle
    timer: AnswerTimer
    sequence: Sequence | None = None
    is_queued: bool = True
    """True until the request's first step is sent."""
    ends_at: float = math.inf
    """The time limit of the request, in monotonic seconds; inf before its first step and without a limit."""

    def finish(self, reason: FinishReason) -> Finished:
        """Return the request's last event. At a timeout it has the parts that the policy held back.

        After STOP and LENGTH the last token has them, and after CANCELLED the caller gets no more parts.
        """
        request, sequence = self.submission.request, self.sequence
        if sequence is None:
            return Finished(self.timer.summary(request, reason, num_cached=0))
        parts = sequence.finish().parts if reason is FinishReason.TIMEOUT else ()
        return Finished(self.timer.summary(request, reason, sequence.num_cached or 0, sequence.drafts.counts), parts)
