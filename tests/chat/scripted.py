"""Reply sources with scripted replies: without stages, or over stages that compute every token of the replies."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.pipeline import Coordinator
from mlx_k2.coordinator.text_stream import Delta, StageReplies
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.text.tokenizer import Detokenizer, Tokenizer

ForcedTokens = Callable[[], Sequence[int]]


def sampled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return ``text`` as token ids, with each control token's name as that control token."""
    ids: list[int] = []
    while text:
        starts = {text.find(name): name for name in tokenizer.special_ids if name in text}
        at = min(starts, default=len(text))
        ids += tokenizer.encode_text(text[:at])
        if at < len(text):
            ids.append(tokenizer.special_ids[starts[at]])
        text = text[at + len(starts.get(at, "")) :]
    return ids


class Script:
    """A reply source without stages that gives its replies in order. It calls ``on_token`` before each token."""

    def __init__(self, tokenizer: Tokenizer, *replies: str, on_token: Callable[[int], None] | None = None) -> None:
        self._tokenizer = tokenizer
        self._replies: Iterator[str] = iter(replies)
        self._on_token = on_token
        self.requests: list[Request] = []

    def stream(
        self, request: Request, forced_tokens: ForcedTokens, stopped: Callable[[], bool]
    ) -> Generator[Delta | AnswerSummary, None, None]:
        self.requests.append(request)
        detokenizer = Detokenizer(self._tokenizer)
        ids = sampled(self._tokenizer, next(self._replies))
        for number, token_id in enumerate(ids):
            if self._on_token is not None:
                self._on_token(number)
            if stopped():
                yield summary_of(request, number, FinishReason.CANCELLED)
                return
            yield Delta(token_id, detokenizer.add(token_id), None, ())
        ended = bool(ids) and ids[-1] in request.stop_ids
        yield summary_of(request, len(ids), FinishReason.STOP if ended else FinishReason.LENGTH)

    def prefill_next_prompt(self, prompt_ids: Callable[[], Sequence[int]]) -> None:
        """Do nothing: no stages exist."""

    def cancel_prefill(self) -> None:
        """Do nothing: no stages exist."""


class ScriptOnStages:
    """A reply source whose stages compute each scripted reply after its prompt, as if they had sampled it."""

    def __init__(self, coordinator: Coordinator, tokenizer: Tokenizer, replies: Iterable[Sequence[int]]) -> None:
        self._coordinator = coordinator
        self._tokenizer = tokenizer
        self._replies = iter(replies)
        self.summaries: list[AnswerSummary] = []

    def stream(
        self, request: Request, forced_tokens: ForcedTokens, stopped: Callable[[], bool]
    ) -> Generator[Delta | AnswerSummary, None, None]:
        reply = next(self._replies)
        given = [reply]
        asked = replace(request, max_tokens=1)
        replies = StageReplies(self._coordinator, self._tokenizer)
        deltas = replies.stream(asked, forced_tokens=lambda: given.pop() if given else ())
        yield from (next(deltas) for _ in reply)
        _, summary = deltas
        assert isinstance(summary, AnswerSummary)
        self.summaries.append(replace(summary, generated_tokens=len(reply), finish_reason=FinishReason.STOP))
        yield self.summaries[-1]

    def prefill_next_prompt(self, prompt_ids: Callable[[], Sequence[int]]) -> None:
        """Fail: no test calls this."""
        raise AssertionError

    def cancel_prefill(self) -> None:
        """Do nothing: no next prompt is prefilled."""


def summary_of(request: Request, num_tokens: int, reason: FinishReason) -> AnswerSummary:
    return AnswerSummary(
        prompt_tokens=len(request.prompt_ids),
        cached_tokens=0,
        generated_tokens=num_tokens,
        finish_reason=reason,
        seed=request.sampling.seed,
        time_to_first_token_s=None,
        prefill_tokens_per_s=None,
        decode_tokens_per_s=None,
        num_drafted=0,
        num_accepted=0,
    )
