"""Handle: one request in the engine, as its caller sees it. Knows no stages.

The engine thread puts events into the handle, one reader gets them, and any thread may cancel.
"""

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeAlias

from msgspec.structs import replace

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.deployment.restarting import Restart
from mlx_k2.errors import MlxK2Error
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.text.reply_parts import Part


@dataclass(frozen=True)
class Queued:
    """The request waits for a slot. ``position`` requests start before it."""

    position: int


@dataclass(frozen=True)
class PrefillProgress:
    """The first ``done`` of ``total`` prompt tokens are computed or were cached."""

    done: int
    total: int


@dataclass(frozen=True)
class Restarting:
    """All stages start again after a fault; the request continues afterwards. ``phase`` is what they do now."""

    restart: Restart
    phase: str


@dataclass(frozen=True)
class Token:
    """One token of the answer, and the text and reply parts that it completes. A stop token has no text.

    ``logprob`` and ``top`` (token ids with their log-probabilities) are set if log-probabilities were requested. A
    forced token was not sampled. ``arrived_at`` is the time of arrival (time.perf_counter).
    """

    token_id: int
    text: str
    parts: tuple[Part, ...] = ()
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    is_forced: bool = False
    arrived_at: float = 0.0


@dataclass(frozen=True)
class Finished:
    """The end of the answer. ``parts`` are reply parts that were held back and are not in the last Token."""

    summary: AnswerSummary
    parts: tuple[Part, ...] = ()

    @property
    def reason(self) -> FinishReason:
        """The reason why the answer ended."""
        return self.summary.finish_reason


Progress: TypeAlias = Queued | PrefillProgress | Restarting
Event: TypeAlias = Progress | Token | Finished


class _NewProgress:
    """An entry of the queue in place of the handle's latest progress, which may be replaced until it is read."""


_NEW_PROGRESS = _NewProgress()


class Handle:
    """One submitted request. It ends exactly once: with Finished, or with an error that ``events`` raises.

    Its queue is bounded by the request: it holds an event per token, one end, and only the latest progress. The engine
    therefore never waits for a reader. ``on_cancel`` and ``notify`` are called with the handle: at ``cancel``, and
    after each new event.
    """

    def __init__(
        self, request: Request, on_cancel: Callable[["Handle"], None], notify: Callable[["Handle"], None] | None = None
    ) -> None:
        self.request = request
        self._on_cancel = on_cancel
        self._notify = notify
        self._queue: SimpleQueue[Token | Finished | MlxK2Error | _NewProgress] = SimpleQueue()
        self._progress: Progress | None = None
        self._is_progress_queued = False
        self._may_end = [True]  # a list for its pop(), which is atomic also for a signal handler on this thread
        self._is_cancelled = False
        self._num_tokens_read = 0

    @property
    def has_ended(self) -> bool:
        """True if the end is in the queue or was read."""
        return not self._may_end

    def events(self) -> Generator[Event, None, None]:
        """Yield the events as they arrive, Finished last. Only one thread may iterate, and only once.

        Raises:
            RequestFailed: this request was ended by an error; others continue.
            MlxK2Error: the stages failed and are not restarted, mostly ClusterError; the tokens so far were yielded.
        """
        event: Event | None = None
        while not isinstance(event, Finished):
            event = self._read()
            if event is not None:
                yield event

    def ready_events(self) -> Generator[Event, None, None]:
        """Yield the events that are in the queue now, without waiting. For a reader that ``notify`` wakes.

        Raises the errors of ``events``. A reader uses either ``events`` or this method, on one thread, until the end.
        """
        while not self._queue.empty():
            event = self._read()
            if event is not None:
                yield event

    def cancel(self) -> None:
        """End the request with FinishReason.CANCELLED. Safe in a signal handler and from any thread.

        After this call ``events`` yields no token, not even one that is in the queue already.
        """
        self._is_cancelled = True
        self._on_cancel(self)

    # ---- for the engine

    def put_progress(self, progress: Progress) -> None:
        """Set the latest progress; an earlier one that was not read is dropped."""
        self._progress = progress
        if not self._is_progress_queued:
            self._is_progress_queued = True
            self._queue.put(_NEW_PROGRESS)
            self._notify_reader()

    def put_token(self, token: Token) -> None:
        """Add a token. It is dropped if the handle has ended."""
        if self._may_end:
            self._queue.put(token)
            self._notify_reader()

    def end(self, event: Finished | MlxK2Error) -> bool:
        """Add the end, unless there is one already; return whether it was added."""
        try:
            self._may_end.pop()
        except IndexError:
            return False
        self._queue.put(event)
        self._notify_reader()
        return True

    def _read(self) -> Event | None:
        """Wait for the next entry of the queue; return its event, or None if ``cancel`` drops the event."""
        entry = self._queue.get()
        if isinstance(entry, MlxK2Error):
            raise entry
        if isinstance(entry, Finished):
            return self._as_cancelled(entry.summary) if self._is_cancelled else entry
        if isinstance(entry, _NewProgress):
            self._is_progress_queued = False
        if self._is_cancelled:
            return None
        if isinstance(entry, _NewProgress):
            return self._progress
        self._num_tokens_read += 1
        return entry

    def _as_cancelled(self, summary: AnswerSummary) -> Finished:
        return Finished(replace(summary, finish_reason=FinishReason.CANCELLED, generated_tokens=self._num_tokens_read))

    def _notify_reader(self) -> None:
        if self._notify is not None:
            try:
                self._notify(self)
            except Exception:  # an error of one reader must not end the requests of others
                logging.getLogger(__name__).exception("a callback for events failed")
