"""The format of text completions: chunks of a stream, and the whole body. Knows no HTTP."""

from collections.abc import Sequence
from typing import Any

from mlx_k2.coordinator.handle import Event, Finished, PrefillProgress, Token
from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.chat_completions import DONE, usage
from mlx_k2.server.chat_reply import ChatReply
from mlx_k2.server.completion_request import CompletionRequest
from mlx_k2.server.sse import event_bytes
from mlx_k2.text.reply_parts import Content


class TextFormat:
    """The chunks or the body of one text completion. Its reply has content only."""

    def __init__(self, head: dict[str, Any], reply: ChatReply, asked: CompletionRequest, keepalive: str) -> None:
        self._head = head
        self._reply = reply
        self._asked = asked
        self._keepalive = keepalive

    def begin(self) -> bytes:
        """Return nothing: the first chunk is the first text."""
        return b""

    def keepalive(self) -> bytes:
        """Return a comment, a chunk without text, or nothing."""
        match self._keepalive:
            case "comment":
                return b": keep-alive\n\n"
            case "chunk":
                return self._chunk("", None)
        return b""

    def error(self, error: ApiError) -> bytes:
        """Return an error event and the end of the stream."""
        return event_bytes(error.body) + DONE

    def events(self, events: Sequence[Event]) -> bytes:
        """Return the chunks for these events."""
        frames = b""
        for event in events:
            if isinstance(event, PrefillProgress) and self._asked.return_progress:
                progress = {"total": event.total, "processed": event.done}
                frames += event_bytes(self._head | {"choices": [], "prompt_progress": progress})
            text = "".join(delta.text for delta in self._reply.add(event) if isinstance(delta, Content))
            token_ids = [event.token_id] if isinstance(event, Token) and self._asked.return_token_ids else []
            frames += self._chunk(text, None, token_ids) if text or token_ids else b""
            if isinstance(event, Finished):
                frames += self._chunk("", self._reply.finish_reason(event.reason))
                if self._asked.wants_usage:
                    frames += event_bytes(self._head | {"choices": [], "usage": usage(self._reply, event.summary)})
                frames += DONE
        return frames

    def body(self, finished: Finished) -> dict[str, Any]:
        """Return the body of a completion that is not streamed, after ``finished`` was added."""
        token_ids = self._reply.token_ids if self._asked.return_token_ids else ()
        choice = self._choice(self._reply.content, self._reply.finish_reason(finished.reason), token_ids)
        return self._head | {"choices": [choice], "usage": usage(self._reply, finished.summary)}

    def _chunk(self, text: str, reason: str | None, token_ids: Sequence[int] = ()) -> bytes:
        return event_bytes(self._head | {"choices": [self._choice(text, reason, token_ids)]})

    def _choice(self, text: str, reason: str | None, token_ids: Sequence[int] = ()) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return choice | ({"token_ids": token_ids} if token_ids else {})
