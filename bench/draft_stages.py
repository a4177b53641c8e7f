"""Gain of a draft head on two real stages, over no drafts and over the rate that the formula of docs/drafts.md gives.

python -m bench.draft_stages [--save] [--pairs N] [--only WORDS]

Checkpoint and head are random. One stream runs. The head runs after each token, but its drafts are replaced, so that a
chosen fraction h of them is right. The computed rate is 1 / (h C + (1 - h)(s0 + s1 + 2c)) with
C = max(s1 + d, s0 + c), for stages of s0 and s1 s per step, a head of d s and a hop of c s, all timed in the same run.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from bench.checkpoints import bench_checkpoint, bench_head
from bench.claims import Claim, measure, read_options
from bench.deployments import local_deployment
from bench.draft_pipeline import seven_of_ten
from bench.measure import prompt_ids
from mlx_k2.coordinator.draft_times import DraftTimer, DraftTimes
from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Token
from mlx_k2.coordinator.pipeline import Pipeline
from mlx_k2.deployment.deploy import Deployment
from mlx_k2.deployment.listener import StageReport
from mlx_k2.protocol.messages import Drafted
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import StepPolicy

PROMPT = tuple(prompt_ids(16))
NUM_TOKENS = 110
NUM_SKIPPED = 10
"""Tokens before the measured ones."""
NUM_SKIPPED_AUTO = 64
"""The same for DraftMode.AUTO, which needs some tokens to notice that drafts are wrong."""
ACCEPTANCE_RATE = 0.7  # of `seven_of_ten`
MIN_STEP_S = 0.02
"""Shortest step of a stage for which the rates are compared: the checkpoint "slow" must suit the machine."""


class OraclePipeline(Pipeline):
    """A pipeline that replaces the head's drafts by right ones where ``is_right(position)``, else by wrong ones."""

    def use_text(self, token_ids: list[int], is_right: Callable[[int], bool]) -> None:
        """Set the known text, prompt and answer of the next request, and the positions of right drafts."""
        self._token_ids, self._is_right = token_ids, is_right

    def _receive_drafts(self, rank: int, microbatch: Microbatch, drafted: Drafted) -> None:
        first = microbatch.rows[0].row.end + 1  # the token at row.end is the sampled one
        drafts = tuple(self._draft(first + index) for index in range(len(drafted.token_ids)))
        super()._receive_drafts(rank, microbatch, msgspec.structs.replace(drafted, token_ids=drafts))

    def _draft(self, position: int) -> int:
        right_id = self._token_ids[position] if position < len(self._token_ids) else 0
        return right_id if self._is_right(position) else right_id ^ 1


class TimedStream:
    """One stream on two stages. ``answer`` and ``times`` are the token ids and the times of the last run."""

    def __init__(self, deployment: Deployment, stack: contextlib.ExitStack, mode: DraftMode) -> None:
        policy = StepPolicy(deployment.costs)
        limits = SchedulerLimits(num_slots=1, context_tokens=512, chunk_tokens=64, num_stages=2)
        scheduler = Scheduler(limits, policy, draft_mode=mode)
        self._pipeline = OraclePipeline(
            deployment.group, scheduler, policy, deployment.model.config.vocab_size, on_report=self._add_report
        )
        self._engine = stack.enter_context(Engine(self._pipeline, scheduler))
        self._timer = DraftTimer(2)
        self.answer: list[int] = []
        self.times: DraftTimes | None = None

    def _add_report(self, report: StageReport) -> None:
        self._timer.add(report)

    def rate(self, answer: list[int], is_right: Callable[[int], bool], num_skipped: int = NUM_SKIPPED) -> float:
        """Run the stream; return its tokens per second after the first ``num_skipped``.

        ``answer`` is the known answer, or empty in the first run, which finds it.
        """
        self._pipeline.use_text([*PROMPT, *answer], is_right)
        self._timer = DraftTimer(2)
        use = self._pipeline.use[1]  # of the last stage, which runs the head
        runs_before, seconds_before = use.draft_runs, use.draft_s
        request = Request(PROMPT, NUM_TOKENS, Sampling(seed=0, temperature=1.0), frozenset())
        tokens = [event for event in self._engine.submit(request).events() if isinstance(event, Token)]
        self.times = self._timer.times((use.draft_s - seconds_before) / max(1, use.draft_runs - runs_before))
        self.answer = [token.token_id for token in tokens]
        assert not answer or self.answer == answer, "drafts changed the answer"
        return (len(tokens) - 1 - num_skipped) / (tokens[-1].arrived_at - tokens[num_skipped].arrived_at)


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    options = read_options(__doc__)
    folder = bench_checkpoint("slow")
    with contextlib.ExitStack() as stack:
        plain, drafting, auto = (
            start_stream(stack, folder, mode) for mode in (DraftMode.OFF, DraftMode.MODEL, DraftMode.AUTO)
        )
        plain.rate([], seven_of_ten)
        answer = plain.answer

        def computed_rate() -> float:
            times = drafting.times
            assert times is not None, "needs a run before it with right and with wrong drafts"
            assert min(times.stages_s) >= MIN_STEP_S, f"steps of {times.stages_s} s: use a larger checkpoint"
            print(
                f"s0 and s1 {times.stages_s[0]:.4f} and {times.stages_s[1]:.4f} s, head {times.head_s:.4f} s "
                f"(d/s {times.head_s / times.stages_s[1]:.3f}), hop {times.hop_s:.4f} s",
                flush=True,
            )
            return 1 / (ACCEPTANCE_RATE * times.cycle_s + (1 - ACCEPTANCE_RATE) * times.wrong_s)

        drafting_rate, plain_rate = (partial(stream.rate, answer, seven_of_ten) for stream in (drafting, plain))
        auto_rate, plain_late_rate = (
            partial(stream.rate, answer, lambda _: False, NUM_SKIPPED_AUTO) for stream in (auto, plain)
        )
        for claim in (  # the last value is the required ratio
            Claim("7 of 10 drafts right, over none", drafting_rate, plain_rate, 1.25),
            Claim("7 of 10 drafts right, over the computed rate", drafting_rate, computed_rate, 0.93),
            Claim(
                f"auto, all drafts wrong, after {NUM_SKIPPED_AUTO} tokens, over none", auto_rate, plain_late_rate, 0.95
            ),
        ):
            measure("draft_stages", claim, options)


def start_stream(stack: contextlib.ExitStack, folder: Path, mode: DraftMode) -> TimedStream:
    """Start two stages, with a draft head if ``mode`` uses one, that run until ``stack`` closes."""
    head = bench_head("slow") if mode.uses_head else None
    return TimedStream(stack.enter_context(local_deployment(folder, 2, head=head)), stack, mode)


if __name__ == "__main__":
    main()
