"""A draft head in the pipeline, with stages that sleep: always right, always wrong, and right 7 times out of 10.

python -m bench.draft_pipeline [--save] [--pairs N] [--only WORDS]

Scheduler, its step policy and the messages are the real ones; each of two stages sleeps for 20 ms, the head for d. The
rates are those of one stream. A right draft takes a cycle C = max(s1 + d, s0 + c), a wrong one s0 + s1 + 2c
(docs/drafts.md). c, the time of a hop or of the way back through the coordinator, is measured in the same run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.claims import Claim, measure, read_options
from mlx_k2.protocol.messages import Drafted, StepDone, decode_from_stage
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.cost_model import StageCost
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import StepPolicy
from mlx_k2.testing.sleeping_stages import SIZES, SPEED, STEP_S, SleepingStages

TOKENS = 150
SKIPPED = 10
HEAD_S = 0.002


@dataclass(frozen=True)
class LoneStream:
    """A stream on two sleeping stages."""

    mode: DraftMode
    head_s: float = 0.0
    is_right: Callable[[int], bool] = lambda _: True

    def __call__(self) -> float:
        """Return the tokens per second after the first ones."""
        stages = SleepingStages(2, self.head_s, self.is_right)
        policy = StepPolicy([StageCost(SIZES, SPEED)] * 2)
        scheduler = Scheduler(SchedulerLimits(1, TOKENS + 8, 8, 2), policy, draft_mode=self.mode)
        scheduler.submit(Request((0,), TOKENS, Sampling(seed=0), frozenset()))
        arrivals: list[float] = []
        sent: dict[int, Microbatch] = {}
        while scheduler.has_work:
            while (microbatch := scheduler.next_microbatch()) is not None:
                sent[microbatch.number] = microbatch
                stages.send(microbatch)
            message = decode_from_stage(stages.done.get(timeout=10))
            now = time.perf_counter()
            if isinstance(message, Drafted):
                scheduler.propose(sent[message.number], message.token_ids)
                continue
            assert isinstance(message, StepDone)
            appended = scheduler.complete(message.number, message.tokens, is_skipped=message.is_skipped, now=now)
            arrivals += [now for added in appended for _ in added.tokens]
        stages.stop()
        return (len(arrivals) - 1 - SKIPPED) / (arrivals[-1] - arrivals[SKIPPED])


def seven_of_ten(position: int) -> bool:
    """Return whether the draft for a position is right: for 7 of 10 of them, spread evenly."""
    return position * 7 % 10 < 7


NONE = LoneStream(DraftMode.OFF)


def expected(acceptance: float, head_s: float) -> float:
    """Return the computed rate, with the hop that a stream without drafts has in this moment."""
    hop_s = (1 / NONE() - 2 * STEP_S) / 2
    cycle_s = max(STEP_S + head_s, STEP_S + hop_s)
    return 1 / (acceptance * cycle_s + (1 - acceptance) * (2 * STEP_S + 2 * hop_s))


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    options = read_options(__doc__)
    right, wrong = (LoneStream(DraftMode.MODEL, 0.0, is_right) for is_right in (lambda _: True, lambda _: False))
    late = LoneStream(DraftMode.MODEL, HEAD_S)
    mixed = LoneStream(DraftMode.MODEL, HEAD_S, seven_of_ten)
    for claim in (
        Claim("always right, over none", right, NONE, 1.9),
        Claim("always right, head of 2 ms, over the computed rate", late, lambda: expected(1.0, HEAD_S), 0.95),
        Claim("always wrong, over none", wrong, NONE, 0.97),
        Claim("7 of 10 right, head of 2 ms, over the computed rate", mixed, lambda: expected(0.7, HEAD_S), 0.93),
    ):
        measure("draft_pipeline", claim, options)


if __name__ == "__main__":
    main()
