"""Reply sources with scripted replies: without stages, or sampled by stages that may sample no other token."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Event, Finished, Handle, Token
from mlx_k2.scheduling.request import FinishReason, Priority, Request
from mlx_k2.scheduling.token_policy import Accepted, AnyToken, TokenPolicy
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.token_mask import TokenMask


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
    """A reply source without stages that gives its replies in order. It calls ``on_token`` before each token.

    A background request, which prefills the next prompt, is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, *replies: str, on_token: Callable[[int], None] | None = None) -> None:
        self._tokenizer = tokenizer
        self._replies: Iterator[str] = iter(replies)
        self._on_token = on_token or (lambda _: None)
        self.requests: list[Request] = []

    def submit(self, request: Request, policy: TokenPolicy | None = None) -> Handle:
        if request.priority is Priority.BACKGROUND:
            return Handle(request, lambda _: None)
        self.requests.append(request)
        ids = sampled(self._tokenizer, next(self._replies))
        return _ScriptedHandle(request, policy or AnyToken(), ids, self._on_token)


class _ScriptedHandle(Handle):
    """A handle whose tokens come when they are read. Its policy sees each of them."""

    def __init__(
        self, request: Request, policy: TokenPolicy, ids: Sequence[int], on_token: Callable[[int], None]
    ) -> None:
        super().__init__(request, self._on_cancel)
        self._policy = policy
        self._ids = ids
        self._on_token = on_token
        self._was_cancelled = False

    def _on_cancel(self, handle: Handle) -> None:
        self._was_cancelled = True

    def events(self) -> Generator[Event, None, None]:
        for number, token_id in enumerate(self._ids):
            self._on_token(number)
            if self._was_cancelled:
                yield Finished(summary_of(self.request, number, FinishReason.CANCELLED))
                return
            accepted = self._policy.accept(token_id)
            yield Token(token_id, accepted.text, accepted.parts)
        ended = bool(self._ids) and self._ids[-1] in self.request.stop_ids
        reason = FinishReason.STOP if ended else FinishReason.LENGTH
        yield Finished(summary_of(self.request, len(self._ids), reason), self._policy.finish().parts)


class ScriptOnStages:
    """A reply source whose stages sample each scripted reply: masks exclude every other token."""

    def __init__(self, engine: Engine, replies: Iterable[Sequence[int]]) -> None:
        self._engine = engine
        self._replies = iter(replies)

    def submit(self, request: Request, policy: TokenPolicy | None = None) -> Handle:
        return self._engine.submit(request, _OnlyTokens(policy or AnyToken(), next(self._replies)))


class _OnlyTokens:
    """A policy that allows one reply only."""

    def __init__(self, policy: TokenPolicy, ids: Sequence[int]) -> None:
        self._policy = policy
        self._ids = ids
        self._num_accepted = 0

    def accept(self, token_id: int) -> Accepted:
        self._num_accepted += 1
        return self._policy.accept(token_id)

    def forced(self) -> Sequence[int]:
        return ()

    def token_mask(self, draft_ids: Sequence[int]) -> TokenMask | None:
        position = self._num_accepted + len(draft_ids)
        return TokenMask.only(self._ids[position : position + 1]) if position < len(self._ids) else None

    def may_draft(self, draft_ids: Sequence[int], token_id: int) -> bool:
        mask = self.token_mask(draft_ids)
        return mask is None or mask.allows(token_id)

    def finish(self) -> Accepted:
        return self._policy.finish()


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
    )
