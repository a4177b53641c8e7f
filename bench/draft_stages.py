"""A draft head on two real stages: the rate of one stream against none, and against the formula of docs/drafts.md.

python -m bench.draft_stages [--save] [--pairs N] [--only WORDS]

The checkpoint and the head are random. The head really runs after each token; its result is replaced, so that 7 of 10
drafts are right, or none. Stages, head and hop are timed in the same run: the computed rate is
1 / (h C + (1 - h)(s0 + s1 + 2c)) with C = max(s1 + d, s0 + c).
"""

import contextlib
from collections.abc import Callable

import msgspec

from bench.checkpoints import bench_checkpoint, bench_head
from bench.claims import Claim, measure, read_options
from bench.deployments import local_deployment
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
TOKENS = 110
SKIPPED = 10
AUTO_SKIPPED = 64
ACCEPTANCE = 0.7
LEAST_STEP_S = 0.02


def seven_of_ten(position: int) -> bool:
    """Return whether the draft for a position is right: for 7 of 10 of them, spread evenly."""
    return position * 7 % 10 < 7


class OraclePipeline(Pipeline):
    """A pipeline that replaces the head's drafts by tokens of a known answer, right where ``is_right(position)``."""

    def use_answer(self, token_ids: list[int], is_right: Callable[[int], bool]) -> None:
        """Set prompt and answer, which the next request has."""
        self._token_ids, self._is_right = token_ids, is_right

    def _receive_drafts(self, rank: int, microbatch: Microbatch, drafted: Drafted) -> None:
        first = microbatch.rows[0].row.end + 1
        replaced = tuple(self._draft(first + index) for index in range(len(drafted.token_ids)))
        super()._receive_drafts(rank, microbatch, msgspec.structs.replace(drafted, token_ids=replaced))

    def _draft(self, position: int) -> int:
        right = self._token_ids[position] if position < len(self._token_ids) else 0
        return right if self._is_right(position) else right ^ 1


class LoneStream:
    """One stream on two stages. ``times`` are those of the last run."""

    def __init__(self, deployment: Deployment, stack: contextlib.ExitStack, mode: DraftMode) -> None:
        policy = StepPolicy(deployment.costs)
        limits = SchedulerLimits(1, 512, 64, 2)
        scheduler = Scheduler(limits, policy, draft_mode=mode)
        self._pipeline = OraclePipeline(
            deployment.group, scheduler, policy, deployment.model.config.vocab_size, on_report=self._add
        )
        self._engine = stack.enter_context(Engine(self._pipeline, scheduler))
        self._timer = DraftTimer(2)
        self.answer: list[int] = []
        self.times: DraftTimes | None = None

    def _add(self, report: StageReport) -> None:
        self._timer.add(report)

    def rate(self, answer: list[int], is_right: Callable[[int], bool], skipped: int = SKIPPED) -> float:
        """Run the stream; return its tokens per second after the first ``skipped`` ones."""
        self._pipeline.use_answer([*PROMPT, *answer], is_right)
        self._timer = DraftTimer(2)
        before = vars(self._pipeline.use[1]).copy()
        request = Request(PROMPT, TOKENS, Sampling(seed=0, temperature=1.0), frozenset())
        tokens = [event for event in self._engine.submit(request).events() if isinstance(event, Token)]
        use = self._pipeline.use[1]
        runs = use.draft_runs - before["draft_runs"]
        self.times = self._timer.times((use.draft_s - before["draft_s"]) / max(1, runs))
        self.answer = [token.token_id for token in tokens]
        assert not answer or self.answer == answer, "the answer differs with drafts"
        return (len(tokens) - 1 - skipped) / (tokens[-1].arrived_at - tokens[skipped].arrived_at)


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    options = read_options(__doc__)
    folder = bench_checkpoint("slow")
    with contextlib.ExitStack() as stack:
        plain, drafting, auto = (
            LoneStream(
                stack.enter_context(local_deployment(folder, 2, head=bench_head("slow") if mode.uses_head else None)),
                stack,
                mode,
            )
            for mode in (DraftMode.OFF, DraftMode.MODEL, DraftMode.AUTO)
        )
        plain.rate([], seven_of_ten)
        answer = plain.answer

        def computed() -> float:
            times = drafting.times
            assert times is not None, "a run with right and wrong drafts came before"
            assert min(times.stages_s) >= LEAST_STEP_S, f"steps of {times.stages_s} s: use a larger checkpoint"
            print(
                f"s0 and s1 {times.stages_s[0]:.4f} and {times.stages_s[1]:.4f} s, head {times.head_s:.4f} s "
                f"(d/s {times.head_s / times.stages_s[1]:.3f}), hop {times.hop_s:.4f} s",
                flush=True,
            )
            return 1 / (ACCEPTANCE * times.cycle_s + (1 - ACCEPTANCE) * times.wrong_s)

        for claim in (
            Claim("7 of 10 drafts right, over none", _run(drafting, answer), _run(plain, answer), 1.25),
            Claim("7 of 10 drafts right, over the computed rate", _run(drafting, answer), computed, 0.93),
            Claim(
                "auto with wrong drafts after 64 tokens, over none",
                lambda: auto.rate(answer, lambda _: False, AUTO_SKIPPED),
                lambda: plain.rate(answer, lambda _: False, AUTO_SKIPPED),
                0.95,
            ),
        ):
            measure("draft_stages", claim, options)


def _run(stream: LoneStream, answer: list[int]) -> Callable[[], float]:
    return lambda: stream.rate(answer, seven_of_ten)


if __name__ == "__main__":
    main()
