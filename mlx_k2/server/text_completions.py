"""The format of text completions: chunks of a stream, and the whole body. Knows no HTTP."""

from collections.abc import Sequence
from typing import Any

from mlx_k2.coordinator.handle import Event, Finished, PrefillProgress, Token
from mlx_k2.server.chat_completions import CompletionFormat
from mlx_k2.server.chat_reply import ChatReply
from mlx_k2.server.completion_request import CompletionRequest
from mlx_k2.server.sse import event_bytes
from mlx_k2.text.reply_parts import Content


class TextFormat(CompletionFormat[CompletionRequest]):
    """The format of a text completion. Its reply has content only."""

    chunk_kind = "text_completion"

    def _chunks(self, index: int, event: Event) -> bytes:
        if isinstance(event, PrefillProgress) and self._asked.return_progress and index == 0:
            progress = {"total": event.total, "processed": event.done}
            return event_bytes(self._head | {"choices": [], "prompt_progress": progress})
        reply = self._replies[index]
        text = "".join(delta.text for delta in reply.add(event) if isinstance(delta, Content))
        token_ids = [event.token_id] if isinstance(event, Token) and self._asked.return_token_ids else []
        chunks = self._chunk(index, text, None, token_ids) if text or token_ids else b""
        return chunks + self._chunk(index, "", reply.finish_reason) if isinstance(event, Finished) else chunks

    def _empty_chunk(self) -> bytes:
        return self._chunk(0, "", None)

    def _whole_choice(self, index: int, reply: ChatReply) -> dict[str, Any]:
        token_ids = reply.token_ids if self._asked.return_token_ids else ()
        return _choice(index, reply.content, reply.finish_reason, token_ids)

    def _chunk(self, index: int, text: str, reason: str | None, token_ids: Sequence[int] = ()) -> bytes:
        return event_bytes(self._head | {"choices": [_choice(index, text, reason, token_ids)]})


def _choice(index: int, text: str, reason: str | None, token_ids: Sequence[int] = ()) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
    return choice | ({"token_ids": token_ids} if token_ids else {})
