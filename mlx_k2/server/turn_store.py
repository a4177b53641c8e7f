"""Turn store: the reasoning and the sampled tokens of answers, for clients that send a conversation back as text.

Most clients leave out the reasoning, and no client knows tokens. With both from here, the prompt is what the model
wrote, and the cache has it. A turn is found by the whole conversation up to it, and by the key of its client.
"""

import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from mlx_k2.json_text.parse import JsonError, parse_json
from mlx_k2.text.message import Message

MAX_TOKENS = 4_000_000
"""About 16 MB of token ids; the turns that were used longest ago are forgotten."""
TURN_TOKENS = 256
"""The memory of a turn besides its token ids, as a number of them."""


@dataclass(frozen=True)
class StoredTurn:
    """An answer: its reasoning, and all tokens that were sampled for it."""

    reasoning: str
    token_ids: "array[int]"


@dataclass(frozen=True)
class RestoredTurns:
    """A conversation with its stored turns, by the number of the answer in it, and its digest."""

    messages: list[Message]
    turns: dict[int, StoredTurn]
    digest: bytes


class TurnStore:
    """Stored turns by the digest of the conversation that they end. Safe to use on any thread."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._turns: OrderedDict[bytes, StoredTurn] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, before: bytes, message: Message, turn: StoredTurn) -> None:
        """Store the answer ``message`` to the conversation with the digest ``before``."""
        key = digest_after(before, message)
        with self._lock:
            self._forget(key)
            self._turns[key] = turn
            self._num_tokens += TURN_TOKENS + len(turn.token_ids)
            while self._num_tokens > self._max_tokens:
                self._forget(next(iter(self._turns)))

    def restore(self, owner: str, messages: Sequence[Message]) -> "RestoredTurns":
        """Return ``messages`` with the reasoning that their client left out, and what is stored of their answers.

        An answer whose reasoning the client has changed is left alone.
        """
        digest = hashlib.sha256(b"owner " + owner.encode()).digest()
        restored: list[Message] = []
        found: dict[int, StoredTurn] = {}
        num_answers = 0
        for message in messages:
            digest = digest_after(digest, message)
            turn = self._find(digest) if message.role == "assistant" else None
            if turn is not None and message.reasoning_content in (None, "", turn.reasoning):
                found[num_answers] = turn
                reasoning = turn.reasoning or message.reasoning_content
                message = msgspec.structs.replace(message, reasoning_content=reasoning)  # noqa: PLW2901
            num_answers += message.role == "assistant"
            restored.append(message)
        return RestoredTurns(restored, found, digest)

    def _find(self, key: bytes) -> StoredTurn | None:
        with self._lock:
            if key in self._turns:
                self._turns.move_to_end(key)
            return self._turns.get(key)

    def _forget(self, key: bytes) -> None:
        turn = self._turns.pop(key, None)
        self._num_tokens -= 0 if turn is None else TURN_TOKENS + len(turn.token_ids)


def digest_after(before: bytes, message: Message) -> bytes:
    """Return the digest of a conversation that ``message`` ends, after one with the digest ``before``.

    Reasoning, ids and space around the text do not count, nor how the arguments of a call are written as JSON: clients
    change them.
    """
    calls = [(call.function.name, _canonical(call.function.arguments)) for call in message.tool_calls]
    fields = (message.role, message.content.strip(), calls)
    return hashlib.sha256(before + json.dumps(fields, sort_keys=True).encode()).digest()


def _canonical(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        return parse_json(arguments or "{}")
    except JsonError:
        return arguments
