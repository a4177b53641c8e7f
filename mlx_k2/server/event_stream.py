"""Event stream: the events of one answer in the engine, for a reader on an event loop. Knows no HTTP."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Event, Finished, Handle
from mlx_k2.errors import Cancelled, MlxK2Error
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.server.language_model import Generation


class EventStream:
    """The events of one answer, which has a request for each choice. It belongs to the event loop that opened it.

    ``on_event`` is called with each event that is read and the number of its choice, ``on_close`` when the reader needs
    no more.
    """

    def __init__(self, on_event: Callable[[int, Event], None], on_close: Callable[[], None]) -> None:
        self._on_event = on_event
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._has_events = asyncio.Event()
        self._handles: list[Handle] = []
        self._num_running = 0
        self._failure: MlxK2Error | None = None
        self._may_be_cancelled = False
        self.is_abandoned = False
        """Whether the client has closed the connection."""

    async def submit(self, engine: Engine, generation: Generation) -> None:
        """Submit the requests, on a worker thread: the check of a long prompt takes milliseconds.

        Raises:
            RequestError, EngineBusy, ClusterError: as ``Engine.submit_all``.
        """
        submissions = [replace(one, notify=self._notify) for one in generation.submissions]
        self._handles = await asyncio.to_thread(engine.submit_all, submissions)
        self._num_running = len(self._handles)
        if self._may_be_cancelled:  # meanwhile
            self.cancel()

    @property
    def has_ended(self) -> bool:
        """Whether the end of each request was read, and there is no error to read."""
        return self._num_running == 0 and self._failure is None

    def cancel(self) -> None:
        """Cancel the requests that have not ended; the stream then ends soon."""
        self._may_be_cancelled = True
        for handle in self._handles:
            handle.cancel()

    def close(self) -> None:
        """Cancel the requests that have not ended. Nothing is read afterwards."""
        self.cancel()
        self._on_close()

    def abandon(self) -> None:
        """Cancel the requests, because their client has closed the connection."""
        self.is_abandoned = True
        self.cancel()

    async def read(self, timeout_s: float | None) -> list[tuple[int, Event]]:
        """Wait for events and return all that are there, each with its choice's number; [] if ``timeout_s`` has passed.

        Raises:
            RequestFailed, ClusterError: a request ended with an error.
            Cancelled: the program ends.
        """
        if self._failure is not None:
            raise self._failure
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_events.wait()
        self._has_events.clear()
        events: list[tuple[int, Event]] = []
        try:
            for index, handle in enumerate(self._handles):
                for event in handle.ready_events():
                    if isinstance(event, Finished):
                        self._num_running -= 1
                        if event.reason is FinishReason.CANCELLED and not self._may_be_cancelled:
                            raise Cancelled("the engine has ended")
                    self._on_event(index, event)
                    events.append((index, event))
        except MlxK2Error as error:
            if not events:
                raise
            self._failure = error
        return events

    def _notify(self, _: Handle) -> None:
        """Wake the reader. Called on the engine thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._has_events.set)
