"""Gain of a draft head on two stages that sleep: always right, always wrong, and right for 7 of 10 positions.

python -m bench.draft_pipeline [--save] [--pairs N] [--only WORDS]

The scheduler, its step policy and the messages are the program's own. The stages sleep for s0 = s1 = 20 ms a step, the
draft head for d. One stream runs. A token after a right draft takes the cycle C = max(s1 + d, s0 + c), a token after a
wrong one s0 + s1 + 2c (docs/drafts.md). c is the time of a hop, or of the way back through the coordinator; it is
measured in the same run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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

NUM_TOKENS = 150
NUM_SKIPPED = 10
"""Tokens before the measured ones."""
HEAD_S = 0.002


@dataclass(frozen=True)
class SleepingStream:
    """One stream on two sleeping stages. ``is_right`` returns whether the draft for a position is right."""

    mode: DraftMode
    head_s: float = 0.0
    is_right: Callable[[int], bool] = lambda _: True

    def __call__(self) -> float:
        """Run the stream; return its tokens per second after the first NUM_SKIPPED."""
        stages = SleepingStages(2, self.head_s, self.is_right)
        policy = StepPolicy([StageCost(SIZES, SPEED)] * 2)
        limits = SchedulerLimits(num_slots=1, context_tokens=NUM_TOKENS + 8, chunk_tokens=8, num_stages=2)
        scheduler = Scheduler(limits, policy, draft_mode=self.mode)
        scheduler.submit(Request((0,), NUM_TOKENS, Sampling(seed=0), frozenset()))
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
        return (len(arrivals) - 1 - NUM_SKIPPED) / (arrivals[-1] - arrivals[NUM_SKIPPED])


def seven_of_ten(position: int) -> bool:
    """Return True for 7 of each 10 positions, evenly spread."""
    return position * 7 % 10 < 7


NO_DRAFTS = SleepingStream(DraftMode.OFF)


def computed_rate(acceptance_rate: float, head_s: float) -> float:
    """Return the tokens per second by the formula, with the hop time of a stream without drafts that runs now."""
    hop_s = (1 / NO_DRAFTS() - 2 * STEP_S) / 2
    cycle_s = STEP_S + max(head_s, hop_s)
    return 1 / (acceptance_rate * cycle_s + (1 - acceptance_rate) * (2 * STEP_S + 2 * hop_s))


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    options = read_options(__doc__)
    right = SleepingStream(DraftMode.MODEL)
    wrong = SleepingStream(DraftMode.MODEL, is_right=lambda _: False)
    right_slow_head = SleepingStream(DraftMode.MODEL, HEAD_S)
    mixed = SleepingStream(DraftMode.MODEL, HEAD_S, seven_of_ten)
    computed_right, computed_mixed = partial(computed_rate, 1.0, HEAD_S), partial(computed_rate, 0.7, HEAD_S)
    for claim in (  # the last value is the required ratio
        Claim("always right, over none", right, NO_DRAFTS, 1.9),
        Claim("always right, head of 2 ms, over the computed rate", right_slow_head, computed_right, 0.95),
        Claim("always wrong, over none", wrong, NO_DRAFTS, 0.97),
        Claim("7 of 10 right, head of 2 ms, over the computed rate", mixed, computed_mixed, 0.93),
    ):
        measure("draft_pipeline", claim, options)


if __name__ == "__main__":
    main()
