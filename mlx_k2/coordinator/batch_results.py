"""Complete answers to many requests that run at once. Knows no files and no terminal."""

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from mlx_k2.coordinator.pipeline import Coordinator
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.text.reply_parser import Reply, ReplyReader, whole_reply
from mlx_k2.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class BatchResult:
    """The answer to one request. Times are seconds since all requests were submitted."""

    request: Request
    token_ids: tuple[int, ...]
    reply: Reply
    finish_reason: FinishReason
    first_token_s: float | None
    finished_s: float


@dataclass
class _Arrived:
    """An answer's tokens so far, and the time of the first one."""

    first_token_s: float | None
    token_ids: list[int] = field(default_factory=list)


def answer_all(
    coordinator: Coordinator, tokenizer: Tokenizer, requests: Sequence[Request]
) -> Generator[BatchResult, None, None]:
    """Run all ``requests``; yield each answer when it is finished. Closing the generator early cancels the rest.

    Raises:
        ClusterError: a stage failed.
    """
    began = time.perf_counter()
    arrived: dict[int, _Arrived] = {}
    with closing(coordinator.run(*requests)) as events:
        for event in events:
            now_s = time.perf_counter() - began
            request, reason = event.sequence.request, event.sequence.finish_reason
            tokens = arrived.setdefault(id(request), _Arrived(now_s if event.token else None))
            if event.token is not None:
                tokens.token_ids.append(event.token.token_id)
            if reason is not None:
                del arrived[id(request)]
                reply = read_reply(tokenizer, request, tokens.token_ids)
                yield BatchResult(request, tuple(tokens.token_ids), reply, reason, tokens.first_token_s, now_s)


def read_reply(tokenizer: Tokenizer, request: Request, token_ids: Sequence[int]) -> Reply:
    """Return sampled tokens as reasoning, content and tool calls. A stop token at the end adds nothing."""
    reader = ReplyReader(tokenizer, request.prompt_ids, request.stop_ids)
    parts = [part for token_id in token_ids for part in reader.add(token_id)]
    return whole_reply([*parts, *reader.finish()])
