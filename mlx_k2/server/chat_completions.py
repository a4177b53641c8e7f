"""The format of chat completions: chunks of a stream, and the whole body. Knows no HTTP."""

import time
from dataclasses import dataclass
from typing import Any

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import Event, Finished, PrefillProgress, Token
from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.chat_reply import CallArguments, CallBegun, ChatReply, Delta
from mlx_k2.server.sse import event_bytes
from mlx_k2.text.reply_parts import Content, Reasoning
from mlx_k2.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class ChatFormat:
    """What all chunks of one chat completion share, and the options of their format."""

    id: str
    created: int
    model: str
    tokenizer: Tokenizer
    mirrors_reasoning: bool = False
    """Whether reasoning is also sent as ``reasoning``."""
    wants_logprobs: bool = False

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields of every chunk, or of the body."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        """Return the log-probabilities of tokens."""
        return {"content": [self._token_logprobs(token) for token in tokens]}

    def reasoning(self, text: str) -> dict[str, str]:
        """Return the fields for reasoning."""
        return {"reasoning_content": text} | ({"reasoning": text} if self.mirrors_reasoning else {})

    def _token_logprobs(self, token: Token) -> dict[str, Any]:
        top = [self._one(token_id, logprob) for token_id, logprob in token.top]
        return self._one(token.token_id, token.logprob) | {"top_logprobs": top}

    def _one(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


class ChatFrames:
    """The chunks of one streamed chat completion."""

    def __init__(
        self,
        chat_format: ChatFormat,
        reply: ChatReply,
        *,
        include_usage: bool,
        return_progress: bool,
        keepalive: str,
    ) -> None:
        self._format = chat_format
        self._reply = reply
        self._include_usage = include_usage
        self._return_progress = return_progress
        self._keepalive = keepalive
        self._head = chat_format.head("chat.completion.chunk")
        self._began = time.monotonic()
        self._num_logprobs = 0

    def begin(self) -> bytes:
        """Return the first chunk. Only it has the role: clients join repeated text."""
        return self._chunk({"role": "assistant", "content": ""})

    def keepalive(self) -> bytes:
        """Return a comment, a chunk without text, or nothing."""
        match self._keepalive:
            case "comment":
                return b": keep-alive\n\n"
            case "chunk":
                return self._chunk({})
        return b""

    def error(self, error: ApiError) -> bytes:
        """Return an error event and the end of the stream."""
        return event_bytes(error.body) + DONE

    def events(self, events: list[Event]) -> bytes:
        """Return the chunks for these events."""
        frames = b"".join(map(self._frames, events))
        if events and isinstance(events[-1], Finished):
            frames += self._end(events[-1].summary)
        return frames

    def _frames(self, event: Event) -> bytes:
        if isinstance(event, PrefillProgress):
            return self._progress(event) if self._return_progress else b""
        deltas = [self._delta(delta) for delta in self._reply.add(event)]
        return b"".join(self._chunk(delta, has_content="content" in delta) for delta in deltas)

    def _delta(self, delta: Delta) -> dict[str, Any]:
        match delta:
            case Reasoning(text):
                return self._format.reasoning(text)
            case Content(text):
                return {"content": text}
            case CallBegun(index, call_id, name):
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _progress(self, progress: PrefillProgress) -> bytes:
        fields = {
            "total": progress.total,
            "processed": progress.done,
            "time_ms": round(1000 * (time.monotonic() - self._began)),
        }
        return event_bytes(self._head | {"choices": [_choice({}, None)], "prompt_progress": fields})

    def _end(self, summary: AnswerSummary) -> bytes:
        reason = self._reply.finish_reason(summary.finish_reason)
        frames = event_bytes(self._head | {"choices": [_choice({}, reason)]})
        if self._include_usage:
            frames += event_bytes(self._head | {"choices": [], "usage": usage(self._reply, summary)})
        return frames + DONE

    def _chunk(self, delta: dict[str, Any], *, has_content: bool = False) -> bytes:
        choice = _choice(delta, None)
        if has_content and self._format.wants_logprobs:
            tokens = self._reply.content_tokens[self._num_logprobs :]
            self._num_logprobs += len(tokens)
            choice["logprobs"] = self._format.logprobs(tokens)
        return event_bytes(self._head | {"choices": [choice]})


def chat_body(chat_format: ChatFormat, reply: ChatReply, summary: AnswerSummary) -> dict[str, Any]:
    """Return the body of a chat completion that is not streamed."""
    message = reply.message
    if reply.reasoning:
        message |= chat_format.reasoning(reply.reasoning)
    choice: dict[str, Any] = {
        "index": 0,
        "message": message,
        "finish_reason": reply.finish_reason(summary.finish_reason),
    }
    if chat_format.wants_logprobs:
        choice["logprobs"] = chat_format.logprobs(reply.content_tokens)
    return chat_format.head("chat.completion") | {"choices": [choice], "usage": usage(reply, summary)}


def usage(reply: ChatReply, summary: AnswerSummary) -> dict[str, Any]:
    """Return the token counts. ``cached_tokens`` also stands at the top, where Moonshot's clients read it."""
    return {
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.generated_tokens,
        "total_tokens": summary.prompt_tokens + summary.generated_tokens,
        "cached_tokens": summary.cached_tokens,
        "prompt_tokens_details": {"cached_tokens": summary.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reply.num_reasoning_tokens},
    }


def _choice(delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": reason}
