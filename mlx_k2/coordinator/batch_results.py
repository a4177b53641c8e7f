"""Complete answers to many requests that run at once. Knows no files and no terminal."""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Event, Finished, Handle, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.errors import ClusterError, EngineBusy, RequestFailed
from mlx_k2.text.reply_parts import Part, Reply, whole_reply

_RETRY_S = 0.1  # time after which the engine is tried again when its queue is full


@dataclass(frozen=True)
class BatchResult:
    """The answer to the request with the number ``key``: the reply and its summary.

    If the request failed, ``error`` is the reason, ``reply`` has the parts so far and ``summary`` is None. ``tokens``
    are the reply's tokens if log-probabilities were requested and the request did not fail, else empty.
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


def answer_all(engine: Engine, requests: Iterable[tuple[int, Submission]]) -> Generator[BatchResult, None, None]:
    """Run all requests, each with its key; yield each answer when it ends. Closing the generator cancels the others.

    At most twice as many requests as slots are in the engine at a time; ``requests`` is read when it has room for more.

    Raises:
        ClusterError: the stages failed and are not restarted.
    """
    batch = _Batch(engine, requests)
    failure: ClusterError | None = None
    try:
        batch.submit(2 * engine.num_slots)
        while batch.running:
            handle = batch.handles_with_event.get()
            try:
                result = _add_event(batch.running[handle])
            except ClusterError as error:  # answers that ended before it are still yielded
                failure = error
                del batch.running[handle]
                continue
            if result is not None:
                del batch.running[handle]
                yield result
                if failure is None:
                    batch.submit(1)
        if failure is not None:
            raise failure
    finally:
        for handle in batch.running:
            handle.cancel()


class _Batch:
    """The requests of a batch: not read yet, waiting for room in the engine's queue, or in the engine."""

    def __init__(self, engine: Engine, requests: Iterable[tuple[int, Submission]]) -> None:
        self._engine = engine
        self._unread = iter(requests)
        self._waiting: list[tuple[int, Submission]] = []
        self.running: dict[Handle, _Answer] = {}
        self.handles_with_event: SimpleQueue[Handle] = SimpleQueue()  # each handle once for each of its events

    def submit(self, num_new: int) -> None:
        """Submit waiting requests and up to ``num_new`` new ones, as many as fit. If none runs, wait until one fits."""
        self._waiting += islice(self._unread, num_new)
        size = len(self._waiting)
        while size:
            try:
                self._submit(self._waiting[:size])
            except EngineBusy:
                if size == 1 and self.running:
                    return
                if size == 1:
                    time.sleep(_RETRY_S)
                size = max(1, size // 2)
            else:
                del self._waiting[:size]
                size = len(self._waiting)

    def _submit(self, requests: Sequence[tuple[int, Submission]]) -> None:
        notify = self.handles_with_event.put
        submissions = [Submission(submission.request, submission.policy, notify) for _, submission in requests]
        for (key, submission), handle in zip(requests, self._engine.submit_all(submissions), strict=True):
            keeps_tokens = submission.request.sampling.num_logprobs is not None
            self.running[handle] = _Answer(key, handle.events(), keeps_tokens)


def _add_event(answer: _Answer) -> BatchResult | None:
    """Add the next event to an answer, for which an event is ready; return the result if it was the last event."""
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
