"""The formats of chat completions and of text completions. Knows no HTTP."""

import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from mlx_k2.coordinator.handle import Event, Finished, PrefillProgress, Token
from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.chat_reply import CallArgumentsDelta, CallStartDelta, ChatReply, Delta
from mlx_k2.server.chat_request import ChatRequest, CompletionRequest
from mlx_k2.server.request_fields import GenerationFields
from mlx_k2.server.server_state import ServerOptions
from mlx_k2.server.sse import event_bytes
from mlx_k2.text.reply_parts import Content, Reasoning
from mlx_k2.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"

RequestT = TypeVar("RequestT", bound=GenerationFields)


class CompletionFormat(Generic[RequestT]):
    """The chunks of one streamed completion, or its whole body.

    ``base_fields`` are in every chunk and in the body. ``replies`` has the reply of each choice, to which this class
    adds the events.
    """

    chunk_kind: str
    """The value of the field "object" of a chunk. In a body the suffix ".chunk" is removed."""

    def __init__(
        self, base_fields: dict[str, Any], replies: Sequence[ChatReply], request: RequestT, options: ServerOptions
    ) -> None:
        self._base_fields = base_fields | {"object": self.chunk_kind}
        self._replies = replies
        self._request = request
        self._options = options
        self._started_at = time.monotonic()

    def begin(self) -> bytes:
        """Return b"": nothing comes before the first event."""
        return b""

    def keepalive(self) -> bytes:
        """Return a comment, a chunk without text, or b"", as the option --keepalive selects."""
        match self._options.keepalive:
            case "comment":
                return b": keep-alive\n\n"
            case "chunk":
                return self._empty_chunk()
        return b""

    def error(self, error: ApiError) -> bytes:
        """Return an error event and the end of the stream."""
        return event_bytes(error.body) + DONE

    def events(self, events: Sequence[tuple[int, Event]]) -> bytes:
        """Return the chunks for these events, each with the number of its choice; after the last event also the end."""
        chunks = b"".join(self._chunks(index, event) for index, event in events)
        if events and all(reply.summary is not None for reply in self._replies):
            if self._request.stream_options is not None and self._request.stream_options.include_usage:
                chunks += event_bytes(self._base_fields | {"choices": [], "usage": usage(self._replies)})
            chunks += DONE
        return chunks

    def body(self) -> dict[str, Any]:
        """Return the whole body, after all events were added."""
        choices = [self._complete_choice(index, reply) for index, reply in enumerate(self._replies)]
        kind = self.chunk_kind.removesuffix(".chunk")
        return self._base_fields | {"object": kind, "choices": choices, "usage": usage(self._replies)}

    def _chunks(self, index: int, event: Event) -> bytes:
        raise NotImplementedError

    def _empty_chunk(self) -> bytes:
        raise NotImplementedError

    def _complete_choice(self, index: int, reply: ChatReply) -> dict[str, Any]:
        raise NotImplementedError


class ChatFormat(CompletionFormat[ChatRequest]):
    """The format of a chat completion."""

    chunk_kind = "chat.completion.chunk"

    def begin(self) -> bytes:
        """Return the first chunks. Only they have the role: clients join repeated text."""
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(_choice(index, delta)) for index in range(len(self._replies)))

    def _chunks(self, index: int, event: Event) -> bytes:
        if isinstance(event, PrefillProgress):
            return self._progress(event) if self._request.return_progress and index == 0 else b""
        reply = self._replies[index]
        chunks = b"".join(self._delta_chunk(index, delta) for delta in reply.add(event))
        if isinstance(event, Finished):
            chunks += self._chunk(_choice(index, {}, reply.finish_reason))
        return chunks

    def _empty_chunk(self) -> bytes:
        return self._chunk(_choice(0, {}))

    def _delta_chunk(self, index: int, delta: Delta) -> bytes:
        choice = _choice(index, self._delta(delta))
        if isinstance(delta, Content) and self._request.logprobs:
            choice["logprobs"] = self._logprobs(index, self._replies[index].next_content_tokens())
        return self._chunk(choice)

    def _delta(self, delta: Delta) -> dict[str, Any]:
        match delta:
            case Reasoning(text):
                return self._reasoning(text)
            case Content(text):
                return {"content": text}
            case CallStartDelta(index, call_id, name):
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
            case CallArgumentsDelta(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _progress(self, progress: PrefillProgress) -> bytes:
        time_ms = round(1000 * (time.monotonic() - self._started_at))
        fields = {"total": progress.total, "processed": progress.done, "time_ms": time_ms}
        return event_bytes(self._base_fields | {"choices": [_choice(0, {})], "prompt_progress": fields})

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return event_bytes(self._base_fields | {"choices": [choice]})

    def _complete_choice(self, index: int, reply: ChatReply) -> dict[str, Any]:
        message = reply.message.json_value() | (self._reasoning(reply.reasoning) if reply.reasoning else {})
        choice = {"index": index, "message": message, "finish_reason": reply.finish_reason}
        return choice | ({"logprobs": self._logprobs(index, reply.content_tokens)} if self._request.logprobs else {})

    def _reasoning(self, text: str) -> dict[str, str]:
        return {"reasoning_content": text} | ({"reasoning": text} if self._options.mirrors_reasoning else {})

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"content": logprobs_of(self._replies[index], tokens)}


class TextFormat(CompletionFormat[CompletionRequest]):
    """The format of a text completion. Its reply has content only."""

    chunk_kind = "text_completion"

    def _chunks(self, index: int, event: Event) -> bytes:
        if isinstance(event, PrefillProgress) and self._request.return_progress and index == 0:
            progress = {"total": event.total, "processed": event.done}
            return event_bytes(self._base_fields | {"choices": [], "prompt_progress": progress})
        reply = self._replies[index]
        text = "".join(delta.text for delta in reply.add(event) if isinstance(delta, Content))
        token_ids = [event.token_id] if isinstance(event, Token) and self._request.return_token_ids else []
        chunks = self._chunk(index, text, None, token_ids) if text or token_ids else b""
        if isinstance(event, Finished):
            chunks += self._chunk(index, "", reply.finish_reason)
        return chunks

    def _empty_chunk(self) -> bytes:
        return self._chunk(0, "", None)

    def _complete_choice(self, index: int, reply: ChatReply) -> dict[str, Any]:
        token_ids = reply.token_ids if self._request.return_token_ids else ()
        return _text_choice(index, reply.content, reply.finish_reason, token_ids)

    def _chunk(self, index: int, text: str, finish_reason: str | None, token_ids: Sequence[int] = ()) -> bytes:
        return event_bytes(self._base_fields | {"choices": [_text_choice(index, text, finish_reason, token_ids)]})


def usage(replies: Sequence[ChatReply]) -> dict[str, Any]:
    """Return the token counts of complete replies to one prompt, which counts once.

    Its cached tokens are the least number of any reply: the others find in the cache what the first one computed.
    Moonshot's clients read ``cached_tokens`` at the top level.
    """
    summaries = [reply.summary for reply in replies if reply.summary is not None]
    num_prompt, num_cached = summaries[0].prompt_tokens, min(summary.cached_tokens for summary in summaries)
    num_generated = sum(summary.generated_tokens for summary in summaries)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "cached_tokens": num_cached,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {"reasoning_tokens": sum(reply.num_reasoning_tokens for reply in replies)},
    }


def logprobs_of(reply: ChatReply, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Return OpenAI's fields of the log-probabilities of tokens of a reply."""
    return [_token_logprobs(reply.generation.tokenizer, token) for token in tokens]


def _choice(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish_reason}


def _text_choice(index: int, text: str, finish_reason: str | None, token_ids: Sequence[int] = ()) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return choice | ({"token_ids": token_ids} if token_ids else {})


def _token_logprobs(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    top = [_logprob(tokenizer, token_id, logprob) for token_id, logprob in token.top]
    return _logprob(tokenizer, token.token_id, token.logprob) | {"top_logprobs": top}


def _logprob(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}
