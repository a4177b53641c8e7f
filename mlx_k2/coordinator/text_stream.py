"""Answers as streams of tokens and text, over ready stages. Knows no chat messages and no terminal."""

import threading
import time
from collections.abc import Callable, Generator
from collections.abc import Sequence as Tokens
from contextlib import closing
from dataclasses import dataclass, replace
from types import TracebackType

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.pipeline import Coordinator, TokenEvent
from mlx_k2.errors import ClusterError, SetupError
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.sequence import Sequence
from mlx_k2.text.tokenizer import Detokenizer, Tokenizer

_CLOSE_S = 2.0


@dataclass(frozen=True)
class Delta:
    """One token of an answer, and the text that it completes. A stop token has no text."""

    token_id: int
    text: str
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def _nothing() -> tuple[int, ...]:
    return ()


class StageReplies:
    """Answers of one coordinator, one at a time. Context manager: on exit a running prefill is cancelled."""

    def __init__(self, coordinator: Coordinator, tokenizer: Tokenizer) -> None:
        self._coordinator = coordinator
        self._tokenizer = tokenizer
        self._prefill: _Prefill | None = None

    def __enter__(self) -> "StageReplies":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._prefill is not None:
            self._prefill.stop()
            self._prefill.join(_CLOSE_S)  # a step that takes longer ends when the stages end

    def stream(
        self,
        request: Request,
        forced_tokens: Callable[[], Tokens[int]] = _nothing,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Generator[Delta | AnswerSummary, None, None]:
        """Run ``request`` to its end: yield a Delta for each token when it is sampled, then one AnswerSummary.

        ``forced_tokens`` is called before each token, at most twice. The tokens that it returns are appended to the
        answer as if they had been sampled, and sampling continues after them. Closing the generator early cancels the
        request. So does ``stopped`` when it returns True; it is called after each step. The summary's finish reason is
        then CANCELLED.

        Raises:
            ClusterError: a stage failed, now or during the prefill; the tokens so far were yielded.
        """
        self.cancel_prefill()
        detokenizer = Detokenizer(self._tokenizer)
        answer = _AnswerState(request)
        while answer.finish_reason is None and not stopped():
            for token_id in forced_tokens():
                answer.append_forced(token_id)
                yield Delta(token_id, detokenizer.add(token_id), None, ())
            with closing(self._coordinator.run(answer.rest, stopped=stopped)) as events:
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

    def prefill_next_prompt(self, prompt_ids: Callable[[], Tokens[int]]) -> None:
        """Prefill ``prompt_ids`` on a separate thread until the next request or ``cancel_prefill``."""
        self.cancel_prefill()
        self._prefill = _Prefill(self._coordinator, prompt_ids)
        self._prefill.start()

    def cancel_prefill(self) -> None:
        """Stop the prefill and wait for its thread. Positions computed so far stay cached.

        Raises:
            ClusterError: a stage failed during the prefill.
        """
        prefill, self._prefill = self._prefill, None
        if prefill is not None:
            prefill.stop()
            prefill.join()
            if prefill.fault is not None:
                raise prefill.fault


class _Prefill(threading.Thread):
    """Thread that computes one prompt. The token that is sampled after it is discarded."""

    def __init__(self, coordinator: Coordinator, prompt_ids: Callable[[], Tokens[int]]) -> None:
        super().__init__(name="prefill", daemon=True)
        self._coordinator = coordinator
        self._prompt_ids = prompt_ids
        self._stopped = False
        self.fault: ClusterError | None = None

    def run(self) -> None:
        """Run until the prompt is cached, or until ``stop`` is called."""
        try:
            token_ids = tuple(self._prompt_ids())
        except SetupError:  # the error is raised again when the user's next request renders the same messages
            return
        if not token_ids:  # nothing comes before the user's words in this template
            return
        request = Request(token_ids, 1, Sampling(seed=0, temperature=0), frozenset())
        try:
            for _ in self._coordinator.run(request, stopped=lambda: self._stopped):
                pass
        except ClusterError as fault:
            self.fault = fault

    def stop(self) -> None:
        """Stop the prefill when a stage has finished its next step. Does not wait."""
        self._stopped = True


class _AnswerState:
    """State of one answer: sampled by one sequence, and by one more sequence after each group of forced tokens."""

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
        """The request for the rest of the answer: all tokens so far as prompt, and reduced token and time limits."""
        timeout_s = self._request.timeout_s
        if timeout_s is not None and self._sequences:
            timeout_s = max(0.0, timeout_s - (time.perf_counter() - self._began))
        max_tokens = self._request.max_tokens - len(self._arrivals)
        return replace(self._request, prompt_ids=tuple(self._token_ids), max_tokens=max_tokens, timeout_s=timeout_s)

    def append_forced(self, token_id: int) -> None:
        """Append a token that was not sampled."""
        self._token_ids.append(token_id)

    def on_event(self, event: TokenEvent) -> SampledToken | None:
        """Record an event; return its sampled token, None if it has none."""
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
        """Return the summary. An answer that has not ended counts as cancelled."""
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
