"""Where text and tokens meet: a prompt becomes a request, drawn tokens become text. Knows no terminal."""

import time
from collections.abc import Callable, Generator
from collections.abc import Sequence as Tokens
from contextlib import closing
from dataclasses import dataclass, replace

from mlx_k2.coordinator.pipeline import Coordinator, RestartStages, StepTimeout, TokenEvent
from mlx_k2.deployment.deploy import Deployment
from mlx_k2.deployment.stage_report import StageReport
from mlx_k2.sampling import SampledToken
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.sequence import Sequence
from mlx_k2.scheduling.step_policy import AdaptiveStepPolicy
from mlx_k2.text.detokenizer import Detokenizer
from mlx_k2.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Delta:
    """One more token of an answer, and the text that it completes; a stop token completes none."""

    token_id: int
    text: str
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class AnswerSummary:
    """What an answer took; rates are None where too few tokens were there to measure them."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt: those that were in the cache, and were not computed again."""
    generated_tokens: int
    finish_reason: FinishReason
    seed: int
    time_to_first_token_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    num_drafted: int
    num_accepted: int


def total(summaries: Tokens[AnswerSummary]) -> AnswerSummary:
    """What several answers of one conversation took together; seed and ending are the last one's."""
    prefill_s = sum(
        (one.prompt_tokens - one.cached_tokens) / one.prefill_tokens_per_s
        for one in summaries
        if one.prefill_tokens_per_s
    )
    timed = [one for one in summaries if one.decode_tokens_per_s]
    num_decoded = sum(one.generated_tokens - 1 for one in timed)
    decode_s = sum((one.generated_tokens - 1) / one.decode_tokens_per_s for one in timed if one.decode_tokens_per_s)
    prompt_tokens = sum(one.prompt_tokens for one in summaries)
    cached_tokens = sum(one.cached_tokens for one in summaries)
    return AnswerSummary(
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        generated_tokens=sum(one.generated_tokens for one in summaries),
        finish_reason=summaries[-1].finish_reason,
        seed=summaries[-1].seed,
        time_to_first_token_s=summaries[0].time_to_first_token_s,
        prefill_tokens_per_s=(prompt_tokens - cached_tokens) / prefill_s if prefill_s else None,
        decode_tokens_per_s=num_decoded / decode_s if decode_s else None,
        num_drafted=sum(one.num_drafted for one in summaries),
        num_accepted=sum(one.num_accepted for one in summaries),
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
    """A coordinator for stages that are ready; ``drafts`` lets a lone sequence's idle stages run guesses.

    ``prompts_first`` lets those who decode wait for prompts: more tokens a second in all.

    After a fault it goes on over the stages that ``restart`` starts.
    """
    shape = deployment.shape
    limits = SchedulerLimits(
        shape.num_slots, shape.context_tokens, shape.chunk_tokens, deployment.group.size, prompts_first
    )
    policy = AdaptiveStepPolicy(deployment.costs)
    scheduler = Scheduler(limits, policy, drafts=drafts)
    return Coordinator(deployment.group, scheduler, policy, step_timeout or StepTimeout(), on_report, restart)


def _nothing() -> tuple[int, ...]:
    return ()


def stream_answer(
    coordinator: Coordinator,
    tokenizer: Tokenizer,
    request: Request,
    *,
    forced_tokens: Callable[[], Tokens[int]] = _nothing,
    stopped: Callable[[], bool] = lambda: False,
) -> Generator[Delta | AnswerSummary, None, None]:
    """Run ``request`` to its end: a Delta for each token as it is drawn, then one AnswerSummary.

    ``forced_tokens`` is asked before each token, perhaps twice; the tokens that it gives stand in the answer as if they
    had been drawn, and the answer goes on behind them. Closing the generator early cancels the request. So does
    ``stopped``, asked after each step, and the summary says so.

    Raises:
        ClusterError: a stage failed; the tokens so far were yielded.
    """
    detokenizer = Detokenizer(tokenizer)
    answer = _AnswerState(request)
    while answer.finish_reason is None and not stopped():
        for token_id in forced_tokens():
            answer.append_forced(token_id)
            yield Delta(token_id, detokenizer.add(token_id), None, ())
        with closing(coordinator.run(answer.rest, stopped=stopped)) as events:
            for event in events:
                token = answer.on_event(event)
                if token is not None:
                    text = "" if token.token_id in request.stop_ids else detokenizer.add(token.token_id)
                    if answer.finish_reason is not None:
                        text += detokenizer.finish()
                    yield Delta(token.token_id, text, token.logprob, token.top)
                if answer.finish_reason is None and forced_tokens():
                    break
    yield answer.summary()


class _AnswerState:
    """An answer so far: drawn by one sequence, and by one more after each interjection."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._began = time.perf_counter()
        self._arrivals: list[float] = []
        self._token_ids = list(request.prompt_ids)
        self._sequences: list[Sequence] = []
        self._cached_tokens = 0
        self.finish_reason: FinishReason | None = None

    @property
    def rest(self) -> Request:
        """What is still to be drawn, after all that is there."""
        timeout_s = self._request.timeout_s
        if timeout_s is not None and self._sequences:
            timeout_s = max(0.0, timeout_s - (time.perf_counter() - self._began))
        max_tokens = self._request.max_tokens - len(self._arrivals)
        return replace(self._request, prompt_ids=tuple(self._token_ids), max_tokens=max_tokens, timeout_s=timeout_s)

    def append_forced(self, token_id: int) -> None:
        """Put a token into the answer that was not drawn."""
        self._token_ids.append(token_id)

    def on_event(self, event: TokenEvent) -> SampledToken | None:
        """Take what comes next; the token that was drawn, if one was."""
        if not self._sequences:
            self._cached_tokens = event.sequence.shared.num_tokens
        if event.sequence not in self._sequences:
            self._sequences.append(event.sequence)
        if event.token is not None:
            self._arrivals.append(time.perf_counter())
            self._token_ids.append(event.token.token_id)
        self.finish_reason = event.sequence.finish_reason
        return event.token

    def summary(self) -> AnswerSummary:
        """What it took; of an answer that has not ended, that it was cancelled."""
        prompt_tokens = len(self._request.prompt_ids)
        arrivals = self._arrivals
        first_s = arrivals[0] - self._began if arrivals else None
        decode_s = arrivals[-1] - arrivals[0] if arrivals else 0.0
        return AnswerSummary(
            prompt_tokens=prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=len(arrivals),
            finish_reason=self.finish_reason or FinishReason.CANCELLED,
            seed=self._request.sampling.seed,
            time_to_first_token_s=first_s,
            prefill_tokens_per_s=(prompt_tokens - self._cached_tokens) / first_s if first_s else None,
            decode_tokens_per_s=(len(arrivals) - 1) / decode_s if decode_s > 0 else None,
            num_drafted=sum(sequence.num_drafted for sequence in self._sequences),
            num_accepted=sum(sequence.num_accepted for sequence in self._sequences),
        )
