"""Event stream: the engine's events of one answer, for a reader on an event loop. Knows no HTTP."""

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
    """The events of one answer, with a request of the engine for each choice. For the event loop on which it was made.

    ``read`` calls ``on_event`` with each event and the number of its choice, ``close`` calls ``on_close``.
    """

    def __init__(self, on_event: Callable[[int, Event], None], on_close: Callable[[], None]) -> None:
        self._on_event = on_event
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._has_events = asyncio.Event()
        self._handles: list[Handle] = []
        self._num_running = 0
        self._failure: MlxK2Error | None = None
        self._is_cancelled = False
        self.is_abandoned = False
        """Whether the client has closed the connection."""

    async def submit(self, engine: Engine, generation: Generation) -> None:
        """Submit the requests on a worker thread, since checking a long prompt takes milliseconds.

        Raises:
            RequestError, EngineBusy, ClusterError: ``Engine.submit_all`` refuses them.
        """
        submissions = [replace(submission, notify=self._notify) for submission in generation.submissions]
        self._handles = await asyncio.to_thread(engine.submit_all, submissions)
        self._num_running = len(self._handles)
        if self._is_cancelled:  # while the worker thread ran
            self.cancel()

    @property
    def has_ended(self) -> bool:
        """Whether ``read`` has returned the end of each request, and has no error to raise."""
        return self._num_running == 0 and self._failure is None

    def cancel(self) -> None:
        """Cancel the requests that have not ended. ``read`` returns their ends soon."""
        self._is_cancelled = True
        for handle in self._handles:
            handle.cancel()

    def close(self) -> None:
        """Cancel the requests that have not ended. Do not call ``read`` afterwards."""
        self.cancel()
        self._on_close()

    def abandon(self) -> None:
        """Cancel the requests, because their client has closed the connection."""
        self.is_abandoned = True
        self.cancel()

    async def read(self, timeout_s: float | None) -> list[tuple[int, Event]]:
        """Wait for events; return all that have arrived, each with the number of its choice; [] after ``timeout_s``.

        Raises:
            RequestFailed, ClusterError: a request ended with an error.
            Cancelled: the engine has ended.
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
                        if event.reason is FinishReason.CANCELLED and not self._is_cancelled:
                            raise Cancelled("the engine has ended")
                    self._on_event(index, event)
                    events.append((index, event))
        except MlxK2Error as error:  # first return the events before it; the next call raises it
            if not events:
                raise
            self._failure = error
        return events

    def _notify(self, _: Handle) -> None:
        """Wake the reader. Called on the engine thread."""
        with suppress(RuntimeError):  # the loop is closed, and so is the reader
            self._loop.call_soon_threadsafe(self._has_events.set)
