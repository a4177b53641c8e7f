"""Status stream: the server's status as server-sent events, while a client listens. Knows no content of the status."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import msgspec

from mlx_k2.server.sse import KEEPALIVE_S

INTERVAL_S = 0.5


async def status_events(
    status: Callable[[], dict[str, object]], is_ending: Callable[[], bool], last_id: int
) -> AsyncIterator[bytes]:
    """Yield an event for each change of ``status()``, at most one in INTERVAL_S, until ``is_ending()``.

    Each event has an id, counted on from ``last_id``, the one that a client has seen last.
    """
    before: dict[str, object] = {}
    sent_at = 0.0
    while not is_ending():
        present = status()
        seen = {name: value for name, value in present.items() if name != "uptime_s"}
        if seen != before:
            before = seen
            last_id += 1
            yield b"id: %d\nevent: status\ndata: %s\n\n" % (last_id, msgspec.json.encode(present))
            sent_at = time.monotonic()
        elif time.monotonic() - sent_at >= KEEPALIVE_S:
            yield b": keep-alive\n\n"
            sent_at = time.monotonic()
        await asyncio.sleep(INTERVAL_S)
