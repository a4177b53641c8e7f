"""Stores of what clients need for their next request: turns, and complete responses. Knows no format of an API.

Most clients send a conversation back as text, leave out the reasoning, some write arguments otherwise, and no client
knows tokens. With the stored reasoning and tokens of a turn, the prompt is what the model wrote, and the cache has it.
A turn is found by its handle, which some APIs let a client send back, or by the whole conversation up to it; a response
by its id; and both only for the owner of the key that asked for it.
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
"""The bound of each store. What was used longest ago is forgotten."""
TURN_BYTES = 1024
"""The memory of a turn besides its text and token ids, its keys included, and of each of its calls."""
HANDLE_FIELD = "turn_handle"
"""The field of a chat message that holds the handle of an answer. Adapters of other APIs set it."""


@dataclass(frozen=True)
class StoredTurn:
    """An answer as the model wrote it, and all tokens that were sampled for it."""

    message: Message
    token_ids: "array[int]"

    @property
    def num_bytes(self) -> int:
        """The memory that it uses, about."""
        texts = [self.message.content, self.message.reasoning_content or ""]
        texts += [str(call.function.arguments) for call in self.message.tool_calls]
        return sum(map(sys.getsizeof, [*texts, self.token_ids])) + TURN_BYTES * (1 + len(self.message.tool_calls))

    def restored(self, message: Message) -> Message:
        """Return the answer ``message`` of a client with the reasoning that was sampled.

        If it is the same answer, it also gets back its space around the text and the JSON text of its arguments.
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
    """A conversation with its stored turns, by the number of the answer in it, and its digest."""

    messages: list[Message]
    turns: dict[int, StoredTurn]
    digest: bytes


class TurnStore:
    """Stored turns, at most ``max_bytes``. Safe to use on any thread.

    A turn has a handle from ``new_handle``, which is Anthropic's ``signature``, and ``encrypted_content`` of the
    Responses API. A handle is random, says nothing about its turn, and may be sent before the turn is complete. One
    that is unknown, forgotten or another owner's finds nothing, and is no error.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[bytes, tuple[StoredTurn, bytes]] = OrderedDict()
        """Turns, each with the digest of the conversation that it ends. By owner and handle, the oldest use first."""
        self._latest: dict[bytes, bytes] = {}
        """The key of the turn that was stored last for a conversation."""
        self._lock = threading.Lock()

    def keep(self, owner: str, handle: str, before: bytes, turn: StoredTurn) -> None:
        """Store an answer to the conversation with the digest ``before``."""
        key = _key(owner, handle)
        conversation = digest_after(before, turn.message)
        with self._lock:
            self._forget(key)
            self._entries[key] = (turn, conversation)
            self._latest[conversation] = key
            self._num_bytes += turn.num_bytes
            while self._num_bytes > self._max_bytes:
                self._forget(next(iter(self._entries)))

    def restore(self, owner: str, messages: Sequence[Message], handles: Sequence[object] = ()) -> RestoredTurns:
        """Return ``messages`` with the reasoning that their client left out, and what is stored of their answers.

        ``handles`` has the handle of each message, of any type as a client sent it; it may be shorter. A turn that a
        handle finds is used also where the conversation before it has changed. An answer whose reasoning the client
        has changed is left alone.
        """
        digest = _key(owner, "")
        restored: list[Message] = []
        found: dict[int, StoredTurn] = {}
        num_answers = 0
        for number, message in enumerate(messages):
            digest = digest_after(digest, message)
            if message.role == "assistant":
                handle = handles[number] if number < len(handles) else None
                turn = self._find(_key(owner, handle) if isinstance(handle, str) else None, digest)
                if turn is not None and message.reasoning_content in (None, "", turn.message.reasoning_content):
                    found[num_answers] = turn
                    message = turn.restored(message)  # noqa: PLW2901
                num_answers += 1
            restored.append(message)
        return RestoredTurns(restored, found, digest)

    def _find(self, key: bytes | None, conversation: bytes) -> StoredTurn | None:
        """Return the turn with this key, or else the one that ends this conversation."""
        with self._lock:
            found = key if key in self._entries else self._latest.get(conversation)
            if found is None:
                return None
            self._entries.move_to_end(found)
            return self._entries[found][0]

    def _forget(self, key: bytes) -> None:
        if key not in self._entries:
            return
        turn, conversation = self._entries.pop(key)
        self._num_bytes -= turn.num_bytes
        if self._latest.get(conversation) == key:
            del self._latest[conversation]


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


def new_handle() -> str:
    """Return a handle for a turn: 32 random characters of the URL-safe base64 alphabet."""
    return secrets.token_urlsafe(24)


def digest_after(before: bytes, message: Message) -> bytes:
    """Return the digest of a conversation that ``message`` ends, after one with the digest ``before``.

    Reasoning, ids and space around the text do not count, nor how the arguments of a call are written as JSON: clients
    change them.
    """
    calls = [(call.function.name, _canonical(call.function.arguments)) for call in message.tool_calls]
    fields = (message.role, message.content.strip(), calls)
    return hashlib.sha256(before + json.dumps(fields, sort_keys=True).encode()).digest()


def _key(owner: str, handle: str) -> bytes:
    """Return the key of an owner's turn; with the handle "", the digest of an owner's empty conversation."""
    return hashlib.sha256(json.dumps([owner, handle]).encode()).digest()


def _canonical(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        return parse_json(arguments or "{}")
    except JsonError:
        return arguments
