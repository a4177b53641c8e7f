"""Response store: complete responses, and the conversations that they end, in memory. Knows no format."""

import threading
from collections import Counter, OrderedDict
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
        self._responses: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        """By owner and id, those used longest ago first."""
        self._num_bytes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def keep(self, owner: str, response_id: str, response: StoredResponse) -> None:
        """Store a response."""
        with self._lock:
            self._responses[owner, response_id] = response
            self._num_bytes[owner] += response.num_bytes
            while self._num_bytes.total() > self._max_bytes:
                largest = max(self._num_bytes, key=self._num_bytes.__getitem__)
                self._remove(next(key for key in self._responses if key[0] == largest))

    def find(self, owner: str, response_id: str) -> StoredResponse | None:
        """Return a response of this owner; None if there is none."""
        with self._lock:
            found = self._responses.get((owner, response_id))
            if found is not None:
                self._responses.move_to_end((owner, response_id))
            return found

    def delete(self, owner: str, response_id: str) -> bool:
        """Forget a response of this owner; return whether there was one."""
        with self._lock:
            return self._remove((owner, response_id))

    def _remove(self, key: tuple[str, str]) -> bool:
        removed = self._responses.pop(key, None)
        self._num_bytes[key[0]] -= 0 if removed is None else removed.num_bytes
        return removed is not None
