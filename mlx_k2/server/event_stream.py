"""Event stream: the events of one request in the engine, for a reader on an event loop. Knows no HTTP."""

import asyncio
from collections.abc import Callable, Generator
from contextlib import suppress

from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Event, Finished, Handle
from mlx_k2.errors import Cancelled, MlxK2Error
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.server.language_model import Generation


class EventStream:
    """The events of one submitted request. It belongs to the event loop on which it was opened.

    ``on_event`` is called with each event that is read, ``on_close`` when the reader needs no more.
    """

    def __init__(self, on_event: Callable[[Event], None], on_close: Callable[[], None]) -> None:
        self._on_event = on_event
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._has_events = asyncio.Event()
        self._handle: Handle | None = None
        self._failure: MlxK2Error | None = None
        self._may_be_cancelled = False
        self.is_abandoned = False
        """Whether the client has gone."""

    async def submit(self, engine: Engine, generation: Generation) -> None:
        """Submit the request, on a worker thread: the check of a long prompt takes milliseconds.

        Raises:
            RequestError, EngineBusy, ClusterError: as ``Engine.submit``.
        """
        self._handle = await asyncio.to_thread(engine.submit, generation.request, generation.policy, self._notify)
        if self._may_be_cancelled:  # meanwhile
            self._handle.cancel()

    def cancel(self) -> None:
        """Cancel the request if it has not ended; the stream then ends soon."""
        self._may_be_cancelled = True
        if self._handle is not None:
            self._handle.cancel()

    def close(self) -> None:
        """Cancel the request if it has not ended. Nothing is read afterwards."""
        self.cancel()
        self._on_close()

    def abandon(self) -> None:
        """Cancel the request, because its client has gone."""
        self.is_abandoned = True
        self.cancel()

    async def read(self, timeout_s: float | None) -> list[Event]:
        """Wait for events and return all that are there, Finished last; [] if there is none within ``timeout_s``.

        Raises:
            RequestFailed, ClusterError: the request ended with an error.
            Cancelled: the program ends.
        """
        if self._failure is not None:
            raise self._failure
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_events.wait()
        self._has_events.clear()
        events: list[Event] = []
        try:
            for event in self._ready():
                if isinstance(event, Finished) and not self._may_be_cancelled:
                    _check_end(event)
                self._on_event(event)
                events.append(event)
        except MlxK2Error as error:
            if not events:
                raise
            self._failure = error
        return events

    def _ready(self) -> Generator[Event, None, None]:
        assert self._handle is not None, "the request was submitted"
        return self._handle.ready_events()

    def _notify(self, _: Handle) -> None:
        """Wake the reader. Called on the engine thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._has_events.set)


def _check_end(finished: Finished) -> None:
    """Raise Cancelled for an answer that the end of the engine has cut."""
    if finished.reason is FinishReason.CANCELLED:
        raise Cancelled("the engine has ended")
