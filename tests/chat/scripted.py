"""Reply sources with scripted replies: without stages, or sampled by stages that may sample no other token."""

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Event, Finished, Handle, Token
from mlx_k2.scheduling.request import FinishReason, Priority, Request
from mlx_k2.scheduling.token_policy import Accepted, TokenPolicy
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.token_mask import TokenMask


def encode_reply(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of ``text``. The name of a control token becomes that control token."""
    control_token = "|".join(map(re.escape, tokenizer.special_ids))
    ids: list[int] = []
    for part in re.split(f"({control_token})", text):
        ids += [tokenizer.special_ids[part]] if part in tokenizer.special_ids else tokenizer.encode_text(part)
    return ids


class ScriptedSource:
    """A reply source without stages. It answers each request with the next of ``replies``.

    Before each token it calls ``on_token`` with the index of the token in its reply. It ignores background requests,
    which prefill the next prompt.
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
        ids = encode_reply(self._tokenizer, next(self._replies))
        return _ScriptedHandle(request, policy or TokenPolicy(), ids, self._on_token)


class _ScriptedHandle(Handle):
    """A handle that creates each token, and passes it to the token policy, when the caller reads the events."""

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
        for index, token_id in enumerate(self._ids):
            self._on_token(index)
            if self._was_cancelled:
                yield Finished(_summary(self.request, index, FinishReason.CANCELLED))
                return
            accepted = self._policy.accept(token_id)
            yield Token(token_id, accepted.text, accepted.parts)
        reason = FinishReason.STOP if self._ids[-1] in self.request.stop_ids else FinishReason.LENGTH
        yield Finished(_summary(self.request, len(self._ids), reason), self._policy.finish().parts)


class ScriptedStages:
    """A reply source whose stages sample the next of ``replies`` (token ids): masks exclude every other token."""

    def __init__(self, engine: Engine, replies: Iterable[Sequence[int]]) -> None:
        self._engine = engine
        self._replies = iter(replies)

    def submit(self, request: Request, policy: TokenPolicy | None = None) -> Handle:
        return self._engine.submit(request, _OneReplyPolicy(policy or TokenPolicy(), next(self._replies)))


class _OneReplyPolicy(TokenPolicy):
    """A token policy whose masks allow only the token ids of one reply."""

    def __init__(self, policy: TokenPolicy, ids: Sequence[int]) -> None:
        self._policy = policy
        self._ids = ids
        self._num_accepted = 0

    def accept(self, token_id: int) -> Accepted:
        self._num_accepted += 1
        return self._policy.accept(token_id)

    def token_mask(self, draft_ids: Sequence[int]) -> TokenMask | None:
        position = self._num_accepted + len(draft_ids)
        return TokenMask.only(self._ids[position : position + 1]) if position < len(self._ids) else None

    def may_draft(self, draft_ids: Sequence[int], token_id: int) -> bool:
        mask = self.token_mask(draft_ids)
        return mask is None or mask.allows(token_id)

    def finish(self) -> Accepted:
        return self._policy.finish()


def _summary(request: Request, num_tokens: int, reason: FinishReason) -> AnswerSummary:
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
