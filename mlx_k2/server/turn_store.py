"""Stores of earlier answers: turns of the model, and responses of the Responses API. Knows no format of an API.

Clients send a conversation back as text. Most leave out the reasoning, some format the arguments of calls differently,
and none knows the sampled tokens. With a stored turn the next prompt has the tokens that were sampled, which the cache
of the stages has, too. A turn is found by its turn handle, which a client of some APIs sends back, or by the
conversation that it ends; a response is found by its id. Only the owner of the same API key finds them.
"""

import hashlib
import json
import secrets
import sys
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from mlx_k2.json_text.parse import JsonError, parse_json
from mlx_k2.text.message import Message

MAX_BYTES = 64 * 1024 * 1024
"""The default limit of each store. At the limit the least recently used entries are removed."""
TURN_BYTES = 1024
"""Estimated memory of a turn without its text and token ids, and the same again for each of its calls."""
TURN_HANDLE_FIELD = "turn_handle"
"""The field of a chat message for the turn handle of an answer. The adapters of other APIs set it."""


@dataclass(frozen=True)
class StoredTurn:
    """An answer as the model wrote it, with all tokens that were sampled for it."""

    message: Message
    token_ids: "array[int]"

    @property
    def num_bytes(self) -> int:
        """Estimated memory."""
        texts = [self.message.content, self.message.reasoning_content or ""]
        texts += [str(call.function.arguments) for call in self.message.tool_calls]
        return sum(map(sys.getsizeof, [*texts, self.token_ids])) + TURN_BYTES * (1 + len(self.message.tool_calls))

    def restored(self, message: Message) -> Message:
        """Return ``message``, a client's copy of this answer, with the sampled reasoning.

        If the copy differs only in space around the text or in the format of arguments, it gets the sampled text and
        arguments, too.
        """
        stored = self.message
        reasoning = stored.reasoning_content or message.reasoning_content
        message = msgspec.structs.replace(message, reasoning_content=reasoning)
        if digest_after(b"", message) != digest_after(b"", stored):
            return message
        calls = tuple(
            msgspec.structs.replace(call, function=sampled.function)
            for call, sampled in zip(message.tool_calls, stored.tool_calls, strict=True)
        )
        return msgspec.structs.replace(message, content=stored.content, tool_calls=calls)


@dataclass(frozen=True)
class RestoredTurns:
    """A conversation with restored reasoning, its digest, and stored turns by the number of the answer, from 0."""

    messages: list[Message]
    turns: dict[int, StoredTurn]
    digest: bytes


class TurnStore:
    """Stored turns, at most ``max_bytes``. Safe to use on any thread.

    A turn handle comes from ``new_turn_handle``. Clients get it as ``signature`` (Messages API) or
    ``encrypted_content`` (Responses API), before the turn is complete. A turn handle that is unknown, removed or
    another owner's finds no turn, and is not an error.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[bytes, tuple[StoredTurn, bytes]] = OrderedDict()
        """Each turn with the digest of the conversation that it ends, by ``_key``; least recently used first."""
        self._latest: dict[bytes, bytes] = {}
        """The key of the turn that was stored last for a conversation, by the conversation's digest."""
        self._lock = threading.Lock()

    def keep(self, owner: str, turn_handle: str, before: bytes, turn: StoredTurn) -> None:
        """Store an answer to the conversation with the digest ``before``."""
        key = _key(owner, turn_handle)
        conversation = digest_after(before, turn.message)
        with self._lock:
            self._remove(key)
            self._entries[key] = (turn, conversation)
            self._latest[conversation] = key
            self._num_bytes += turn.num_bytes
            while self._num_bytes > self._max_bytes:
                self._remove(next(iter(self._entries)))

    def restore(self, owner: str, messages: Sequence[Message], turn_handles: Sequence[object] = ()) -> RestoredTurns:
        """Return ``messages`` with the reasoning that their client left out, and the stored turns of their answers.

        ``turn_handles`` has the values that the client sent for the messages, and may be shorter than ``messages``. A
        turn found by its handle is used even if the conversation before it has changed. An answer to which the client
        gives other reasoning is not restored.
        """
        digest = _key(owner, "")
        restored: list[Message] = []
        turns: dict[int, StoredTurn] = {}
        num_answers = 0
        for number, message in enumerate(messages):
            digest = digest_after(digest, message)
            if message.role == "assistant":
                turn_handle = turn_handles[number] if number < len(turn_handles) else None
                turn = self._find(_key(owner, turn_handle) if isinstance(turn_handle, str) else None, digest)
                if turn is not None and message.reasoning_content in (None, "", turn.message.reasoning_content):
                    turns[num_answers] = turn
                    message = turn.restored(message)  # noqa: PLW2901
                num_answers += 1
            restored.append(message)
        return RestoredTurns(restored, turns, digest)

    def _find(self, key: bytes | None, conversation: bytes) -> StoredTurn | None:
        """Return the turn with this key, else the one that ends the conversation with this digest, else None."""
        with self._lock:
            if key not in self._entries:
                key = self._latest.get(conversation)
            if key is None:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def _remove(self, key: bytes) -> None:
        if key not in self._entries:
            return
        turn, conversation = self._entries.pop(key)
        self._num_bytes -= turn.num_bytes
        if self._latest.get(conversation) == key:
            del self._latest[conversation]


@dataclass(frozen=True)
class StoredResponse:
    """A response as JSON: its body, the messages that it answers (no instructions), and its answer as a message."""

    body: bytes
    messages: bytes
    answer: bytes

    @property
    def num_bytes(self) -> int:
        """Memory of all three texts."""
        return len(self.body) + len(self.messages) + len(self.answer)

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages, and the answer as the last one."""
        messages: list[dict[str, Any]] = msgspec.json.decode(self.messages)
        return [*messages, msgspec.json.decode(self.answer)]


class ResponseStore:
    """The responses of all owners, at most ``max_bytes`` in all. Safe to use on any thread.

    When it is full, the owner with the most bytes loses the least recently used response.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._responses: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        """By owner and id, least recently used first."""
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
        """Return a response; None if this owner has no response with this id."""
        with self._lock:
            response = self._responses.get((owner, response_id))
            if response is not None:
                self._responses.move_to_end((owner, response_id))
            return response

    def delete(self, owner: str, response_id: str) -> bool:
        """Remove a response; return False if this owner has no response with this id."""
        with self._lock:
            return self._remove((owner, response_id))

    def _remove(self, key: tuple[str, str]) -> bool:
        removed = self._responses.pop(key, None)
        if removed is None:
            return False
        self._num_bytes[key[0]] -= removed.num_bytes
        return True


def new_turn_handle() -> str:
    """Return a new turn handle: 32 random characters of the URL-safe base64 alphabet."""
    return secrets.token_urlsafe(24)


def digest_after(before: bytes, message: Message) -> bytes:
    """Return the digest of a conversation: messages with the digest ``before``, then ``message``.

    It does not depend on what clients change: reasoning, ids, space around the text, the JSON format of arguments.
    """
    calls = [(call.function.name, _canonical(call.function.arguments)) for call in message.tool_calls]
    fields = (message.role, message.content.strip(), calls)
    return hashlib.sha256(before + json.dumps(fields, sort_keys=True).encode()).digest()


def _key(owner: str, turn_handle: str) -> bytes:
    """Return the key of an owner's turn; with the turn handle "", the digest of an empty conversation."""
    return hashlib.sha256(json.dumps([owner, turn_handle]).encode()).digest()


def _canonical(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        return parse_json(arguments or "{}")
    except JsonError:
        return arguments
