"""Where text and tokens meet: a prompt becomes a request, drawn tokens become text. Knows no terminal."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

from mlx_k2.coordinator import Coordinator, Patience, Renew, StageReport
from mlx_k2.deployment import Deployment
from mlx_k2.engine.pace import MeasuredPace
from mlx_k2.engine.request import FinishReason, Request
from mlx_k2.engine.scheduler import Scheduler, SchedulerLimits
from mlx_k2.engine.sequence import Sequence
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
    generated_tokens: int
    finish_reason: FinishReason
    seed: int
    time_to_first_token_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    num_guesses: int
    num_hits: int


def coordinate(
    deployment: Deployment,
    *,
    guesses: bool,
    prompts_first: bool = False,
    patience: Patience | None = None,
    on_report: Callable[[StageReport], None] | None = None,
    renew: Renew | None = None,
) -> Coordinator:
    """A coordinator for stages that are ready; ``guesses`` lets a lone sequence's idle stages run guesses.

    ``prompts_first`` lets those who decode wait for prompts: more tokens a second in all.

    After a fault it goes on over the stages that ``renew`` starts.
    """
    shape = deployment.shape
    limits = SchedulerLimits(
        shape.num_slots, shape.context_tokens, shape.chunk_tokens, deployment.group.size, prompts_first
    )
    pace = MeasuredPace(deployment.costs)
    scheduler = Scheduler(limits, pace, guesses=guesses)
    return Coordinator(deployment.group, scheduler, pace, patience or Patience(), on_report, renew)


def stream_answer(
    coordinator: Coordinator, tokenizer: Tokenizer, request: Request
) -> Generator[Delta | AnswerSummary, None, None]:
    """Run ``request`` to its end: a Delta for each token as it is drawn, then one AnswerSummary.

    Closing the generator early cancels the request.

    Raises:
        ClusterError: a stage failed; the tokens so far were yielded.
    """
    detokenizer = Detokenizer(tokenizer)
    began = time.perf_counter()
    arrivals: list[float] = []
    with closing(coordinator.run(request)) as events:
        for event in events:
            token, finished = event.token, event.sequence.finish_reason
            if token is not None:
                arrivals.append(time.perf_counter())
                text = "" if token.token_id in request.stop_ids else detokenizer.add(token.token_id)
                if finished is not None:
                    text += detokenizer.finish()
                yield Delta(token.token_id, text, token.logprob, token.top)
            if finished is not None:
                yield _summary(event.sequence, finished, began, arrivals)


def _summary(sequence: Sequence, reason: FinishReason, began: float, arrivals: list[float]) -> AnswerSummary:
    request = sequence.request
    first_s = arrivals[0] - began if arrivals else None
    decode_s = arrivals[-1] - arrivals[0] if arrivals else 0.0
    return AnswerSummary(
        prompt_tokens=len(request.prompt_ids),
        generated_tokens=len(arrivals),
        finish_reason=reason,
        seed=request.sampling.seed,
        time_to_first_token_s=first_s,
        prefill_tokens_per_s=len(request.prompt_ids) / first_s if first_s else None,
        decode_tokens_per_s=(len(arrivals) - 1) / decode_s if decode_s > 0 else None,
        num_guesses=sequence.num_guesses,
        num_hits=sequence.num_hits,
    )
