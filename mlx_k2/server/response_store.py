"""Response store: complete responses, and the conversations that they end, in memory. Knows no format."""

import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import msgspec

MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class StoredResponse:
    """A response as JSON texts: its body, the messages that it answers, and its answer as a message."""

    body: bytes
    messages: bytes
    answer: bytes

    @property
    def num_bytes(self) -> int:
        """The memory of all three."""
        return len(self.body) + len(self.messages) + len(self.answer)

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages, with the answer as the last one."""
        messages: list[dict[str, Any]] = msgspec.json.decode(self.messages)
        return [*messages, msgspec.json.decode(self.answer)]


class ResponseStore:
    """The responses of each owner, at most ``max_bytes`` in all. Safe to use on any thread.

    When it is full, the owner with the most bytes loses the response that was used longest ago.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._responses: defaultdict[str, OrderedDict[str, StoredResponse]] = defaultdict(OrderedDict)
        self._num_bytes: defaultdict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def keep(self, owner: str, response_id: str, response: StoredResponse) -> None:
        """Store a response."""
        with self._lock:
            self._responses[owner][response_id] = response
            self._num_bytes[owner] += response.num_bytes
            while sum(self._num_bytes.values()) > self._max_bytes:
                largest = max(self._num_bytes, key=self._num_bytes.__getitem__)
                self._remove(largest, next(iter(self._responses[largest])))

    def find(self, owner: str, response_id: str) -> StoredResponse | None:
        """Return a response of this owner; None if there is none."""
        with self._lock:
            found = self._responses[owner].get(response_id) if owner in self._responses else None
            if found is not None:
                self._responses[owner].move_to_end(response_id)
            return found

    def delete(self, owner: str, response_id: str) -> bool:
        """Forget a response of this owner; return whether there was one."""
        with self._lock:
            return owner in self._responses and self._remove(owner, response_id)

    def _remove(self, owner: str, response_id: str) -> bool:
        removed = self._responses[owner].pop(response_id, None)
        self._num_bytes[owner] -= 0 if removed is None else removed.num_bytes
        if not self._responses[owner]:
            del self._responses[owner], self._num_bytes[owner]
        return removed is not None
