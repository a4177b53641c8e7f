"""Complete answers to many requests that run at once. Knows no files and no terminal."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue

from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Event, Finished, Handle, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.reply_policy import ReplyPolicy
from mlx_k2.errors import ClusterError, RequestFailed
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.text.reply_parts import Part, Reply, whole_reply
from mlx_k2.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class BatchResult:
    """The answer to one request. Times are seconds since the first requests were submitted."""

    request: Request
    token_ids: tuple[int, ...]
    reply: Reply
    finish_reason: FinishReason
    first_token_s: float | None
    finished_s: float
    error: str | None = None
    """Why the request failed, while others went on; None if it did not."""


@dataclass
class _Arrived:
    """The events of one answer, and its tokens and parts so far. ``first_token_s`` is None before the first token."""

    events: Iterator[Event]
    token_ids: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    first_token_s: float | None = None


def answer_all(engine: Engine, tokenizer: Tokenizer, requests: Sequence[Request]) -> Generator[BatchResult, None, None]:
    """Run all ``requests``; yield each answer when it is finished. Closing the generator early cancels the rest.

    At most twice as many requests as slots are in the engine at a time.

    Raises:
        ClusterError: the stages failed for good.
    """
    began = time.perf_counter()
    ready: SimpleQueue[Handle] = SimpleQueue()  # has a handle once for each of its events
    submissions = [Submission(request, ReplyPolicy(tokenizer, request), ready.put) for request in requests]
    rest = iter(submissions[2 * engine.num_slots :])
    running = {handle: _Arrived(handle.events()) for handle in engine.submit_all(submissions[: 2 * engine.num_slots])}
    failure: ClusterError | None = None
    try:
        while running:
            handle = ready.get()
            try:
                result = _result(handle, running[handle], began)
            except ClusterError as error:  # other answers may be complete
                failure = error
                del running[handle]
                continue
            if result is not None:
                del running[handle]
                yield result
                for submission in islice(rest, 0 if failure else 1):
                    (following,) = engine.submit_all([submission])
                    running[following] = _Arrived(following.events())
        if failure is not None:
            raise failure
    finally:
        for handle in running:
            handle.cancel()


def _result(handle: Handle, arrived: _Arrived, began: float) -> BatchResult | None:
    """Add the next event of an answer, which is there; return the result if it was the last one."""
    reason, error = FinishReason.ERROR, None
    try:
        match next(arrived.events):
            case Token() as token:
                arrived.token_ids.append(token.token_id)
                arrived.parts += token.parts
                if arrived.first_token_s is None:
                    arrived.first_token_s = token.arrived_at - began
                return None
            case Finished() as finished:
                arrived.parts += finished.parts
                reason = finished.reason
            case _:
                return None
    except RequestFailed as failure:
        error = str(failure)
    finished_s = time.perf_counter() - began
    reply = whole_reply(arrived.parts)
    return BatchResult(
        handle.request, tuple(arrived.token_ids), reply, reason, arrived.first_token_s, finished_s, error
    )
