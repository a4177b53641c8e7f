"""The format of Anthropic's Messages API: the events of a stream, and the body of a complete answer. Knows no HTTP.

Both are made from the same content blocks. Only the last block may be open. The index of the first block is 0.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from mlx_k2.coordinator.handle import Event, Finished
from mlx_k2.coordinator.reply_policy import ReplyPolicy
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.server.api_errors import ApiError, messages_error
from mlx_k2.server.chat_reply import CallArgumentsDelta, CallStartDelta, ChatReply, Delta, PartialCall
from mlx_k2.server.messages_request import MessagesRequest
from mlx_k2.server.sse import event_bytes
from mlx_k2.text.reply_parts import Content, Reasoning
from mlx_k2.text.tool_call import read_call

_TEXT_FIELDS = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}
_DELTA_TYPES = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}


class MessagesFormat:
    """The answer to a request in the format of the Messages API.

    A call is sent when it is complete: as a ``tool_use`` block if its arguments are a JSON object, else as text, since
    clients raise an error for a block that is not JSON. The arguments of a tool with ``eager_input_streaming`` are sent
    as they are sampled if the answer's grammar ensures that they are JSON. Only a token limit cuts them off then.
    """

    def __init__(self, request_id: str, model: str, request: MessagesRequest, reply: ChatReply) -> None:
        self._request_id = request_id
        self._model = model
        self._request = request
        self._reply = reply
        self._blocks: list[dict[str, Any]] = []
        """The content blocks so far; ``tool_use`` blocks have their arguments in ``partial_json``."""
        self._is_open = False
        self._pending_call: PartialCall | None = None
        """A call that is sent when it is complete. No block is open meanwhile."""
        self._omits_thinking = request.thinking is not None and request.thinking.display == "omitted"
        tools = (request.tools or ()) if request.stream and reply.generation.constrains_calls else ()
        self._streamed_tools = {tool.name for tool in tools if tool.eager_input_streaming}

    def begin(self) -> bytes:
        """Return the start of the message, and a ping. Cached tokens count as 0: their number is known at the end."""
        num_prompt = len(self._reply.generation.submissions[0].request.prompt_ids)
        usage = _usage(num_prompt, num_cached=0, num_generated=0)
        message = self._message([], reason=None, stop_string=None, usage=usage)
        return event_bytes({"type": "message_start", "message": message}, "message_start") + self.keepalive()

    def events(self, events: Sequence[tuple[int, Event]]) -> bytes:
        """Return the API's events for these events of the engine; after the last one, the end of the stream too."""
        return b"".join(event_bytes(data, data["type"]) for _, event in events for data in self._data(event))

    def keepalive(self) -> bytes:
        """Return a ping."""
        return event_bytes({"type": "ping"}, "ping")

    def error(self, error: ApiError) -> bytes:
        """Return an error event, which ends the stream."""
        return event_bytes(messages_error(error, self._request_id)[1], "error")

    def body(self) -> dict[str, Any]:
        """Return the body of the complete answer."""
        return self._message([_complete_block(block) for block in self._blocks], *self._stop, self._final_usage)

    def _data(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the API's events for one event of the engine, and add its text to the blocks."""
        deltas = self._reply.add(event)
        if self._request.max_tokens:  # with 0 the client wants no answer
            for delta in deltas:
                yield from self._block_data(delta)
        if not isinstance(event, Finished):
            return
        yield from self._close()
        reason, stop_string = self._stop
        stop_fields = {"stop_reason": reason, "stop_sequence": stop_string}
        yield {"type": "message_delta", "delta": stop_fields, "usage": self._final_usage}
        yield {"type": "message_stop"}

    def _block_data(self, delta: Delta) -> Iterator[dict[str, Any]]:
        match delta:
            case Reasoning(text):
                yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
                if not self._omits_thinking:
                    yield from self._add(text)
            case CallStartDelta(index, call_id, name):
                yield from self._close()
                if name in self._streamed_tools:
                    yield from self._open(_call_block(call_id, name))
                else:
                    self._pending_call = self._reply.calls[index]
            case CallArgumentsDelta(_, text) if self._pending_call is None:
                yield from self._add(text)
            case Content(text):
                yield from self._open({"type": "text", "text": ""})
                yield from self._add(text)

    def _open(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Start ``block``, unless the open block has the same type."""
        if self._is_open and self._blocks[-1]["type"] == block["type"]:
            return
        yield from self._close()
        self._is_open = True
        yield {"type": "content_block_start", "index": len(self._blocks), "content_block": block}
        self._blocks.append({**block, "partial_json": ""} if block["type"] == "tool_use" else dict(block))

    def _add(self, text: str) -> Iterator[dict[str, Any]]:
        """Add text to the open block."""
        block = self._blocks[-1]
        field = _TEXT_FIELDS[block["type"]]
        block[field] += text
        yield self._delta({"type": _DELTA_TYPES[block["type"]], field: text})

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the open block. A pending call is complete now: first send it as a block, and then end that block."""
        if (call := self._pending_call) is not None:
            self._pending_call = None
            arguments = call.arguments.removeprefix("\ufeff")  # read_call accepts this byte order mark, clients do not
            is_json_object = bool(arguments.strip()) and read_call(call.id, arguments).values is not None
            yield from self._open(_call_block(call.id, call.name) if is_json_object else {"type": "text", "text": ""})
            yield from self._add(arguments if is_json_object else call.id + arguments)
        if not self._is_open:
            return
        self._is_open = False
        if self._blocks[-1]["type"] == "thinking":
            self._blocks[-1]["signature"] = self._reply.turn_handle
            yield self._delta({"type": "signature_delta", "signature": self._reply.turn_handle})
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    @property
    def _stop(self) -> tuple[str, str | None]:
        """The ``stop_reason``, and the stop string that ended the answer; None for another reason."""
        policy, summary = self._reply.generation.submissions[0].policy, self._reply.summary
        stop_string = policy.stop_string if isinstance(policy, ReplyPolicy) else None
        if stop_string is not None:
            return "stop_sequence", stop_string
        match self._reply.finish_reason:
            case "tool_calls" if any(block["type"] == "tool_use" for block in self._blocks):
                return "tool_use", None
            case "length":
                is_context_full = (
                    summary is not None
                    and summary.finish_reason is FinishReason.LENGTH
                    and summary.generated_tokens < self._request.max_tokens
                )
                return "model_context_window_exceeded" if is_context_full else "max_tokens", None
        return "end_turn", None

    @property
    def _final_usage(self) -> dict[str, Any]:
        summary = self._reply.summary
        assert summary is not None, "the reply is complete"
        num_generated = summary.generated_tokens if self._request.max_tokens else 0
        details = {"thinking_tokens": self._reply.num_reasoning_tokens}
        return _usage(summary.prompt_tokens, summary.cached_tokens, num_generated) | {"output_tokens_details": details}

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop_string: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": f"msg_{self._request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop_string,
            "stop_details": None,
            "usage": usage,
        }


def _call_block(call_id: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": {}}


def _complete_block(block: dict[str, Any]) -> dict[str, Any]:
    """Return a block with the arguments of a call as ``input``."""
    block = dict(block)
    arguments = block.pop("partial_json", None)
    return block if arguments is None else {**block, "input": msgspec.Raw(arguments.encode())}


def _usage(num_prompt: int, num_cached: int, num_generated: int) -> dict[str, Any]:
    return {
        "input_tokens": num_prompt - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": num_generated,
    }
