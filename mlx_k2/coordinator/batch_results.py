"""Complete answers to many requests that run at once. Knows no files and no terminal."""

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Event, Finished, Handle, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.errors import ClusterError, EngineBusy, RequestFailed
from mlx_k2.text.reply_parts import Part, Reply, whole_reply

_BUSY_S = 0.1


@dataclass(frozen=True)
class BatchResult:
    """The answer to the request with the number ``key``: the reply and its summary, or why the request failed.

    ``tokens`` are those of the reply if log-probabilities were requested, else nothing.
    """

    key: int
    reply: Reply
    summary: AnswerSummary | None
    error: str | None = None
    tokens: tuple[Token, ...] = ()


@dataclass
class _Answer:
    """The events of one answer, and its parts so far."""

    key: int
    events: Iterator[Event]
    keeps_tokens: bool
    parts: list[Part] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)


def answer_all(engine: Engine, asked: Iterable[tuple[int, Submission]]) -> Generator[BatchResult, None, None]:
    """Run all requests of ``asked``; yield each answer when it is finished. Closing the generator cancels the rest.

    At most twice as many requests as slots are in the engine at a time; ``asked`` is read when there is room for more.
    While others fill the engine's queue, requests wait here.

    Raises:
        ClusterError: the stages failed and are not restarted.
    """
    ready: SimpleQueue[Handle] = SimpleQueue()  # has a handle once for each of its events
    rest = iter(asked)
    held: list[tuple[int, Submission]] = []
    running: dict[Handle, _Answer] = {}
    failure: ClusterError | None = None

    def submit(most: int) -> None:
        """Submit ``most`` further requests and those that wait here: what fits, and one at least if none runs."""
        held.extend(islice(rest, most))
        size = len(held)
        while size:
            batch = held[:size]
            try:
                handles = engine.submit_all([Submission(one.request, one.policy, ready.put) for _, one in batch])
            except EngineBusy:
                if size == 1 and running:
                    return
                if size == 1:
                    time.sleep(_BUSY_S)
                size = max(1, size // 2)
                continue
            del held[:size]
            running.update(
                (handle, _Answer(key, handle.events(), one.request.sampling.num_logprobs is not None))
                for handle, (key, one) in zip(handles, batch, strict=True)
            )
            size = len(held)

    try:
        submit(2 * engine.num_slots)
        while running:
            handle = ready.get()
            try:
                result = _result(running[handle])
            except ClusterError as error:  # other answers may be complete
                failure = error
                del running[handle]
                continue
            if result is not None:
                del running[handle]
                yield result
                if failure is None:
                    submit(1)
        if failure is not None:
            raise failure
    finally:
        for handle in running:
            handle.cancel()


def _result(answer: _Answer) -> BatchResult | None:
    """Add the next event of an answer, which is there; return the result if it was the last one."""
    try:
        event = next(answer.events)
    except RequestFailed as failure:
        return BatchResult(answer.key, whole_reply(answer.parts), None, str(failure))
    if isinstance(event, Token | Finished):
        answer.parts += event.parts
    if isinstance(event, Token) and answer.keeps_tokens:
        answer.tokens.append(event)
    if not isinstance(event, Finished):
        return None
    return BatchResult(answer.key, whole_reply(answer.parts), event.summary, tokens=tuple(answer.tokens))
