"""The format of OpenAI's Responses API: the events of a response, or its body. Knows no HTTP."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from mlx_k2.coordinator.handle import Event, Finished
from mlx_k2.sampling import Sampling
from mlx_k2.server.api_errors import CONTEXT_OVERFLOW, ApiError
from mlx_k2.server.chat_completions import DONE, logprobs_of
from mlx_k2.server.chat_reply import ChatReply
from mlx_k2.server.responses_output import Fields, OutputItems
from mlx_k2.server.responses_request import ResponsesRequest
from mlx_k2.server.sse import event_bytes
from mlx_k2.text.reply_parts import Content

_ABSENT_TOOL_FIELDS = {"description": None, "parameters": None, "strict": None}


class ResponseFormat:
    """The format of one response.

    ``fields`` is the result of ``response_fields``. ``keep_response`` is called with the complete response as JSON.
    """

    def __init__(
        self, fields: Fields, reply: ChatReply, keepalive: str, keep_response: Callable[[bytes], None]
    ) -> None:
        self._fields = fields
        self._reply = reply
        self._has_keepalive = keepalive != "off"
        self._keep_response = keep_response
        self._wants_logprobs = reply.generation.submissions[0].request.sampling.num_logprobs is not None
        self._output = OutputItems(fields["id"].partition("_")[2], reply.turn_handle)
        self._num_events = 0
        self._complete_body: msgspec.Raw | None = None

    def begin(self) -> bytes:
        """Return the first events. Clients refuse a stream that does not begin with response.created."""
        return self._encoded([self._lifecycle("response.created"), self._lifecycle("response.in_progress")])

    def keepalive(self) -> bytes:
        """Return response.in_progress again: clients end a connection on which only comments arrive."""
        return self._encoded([self._lifecycle("response.in_progress")]) if self._has_keepalive else b""

    def error(self, error: ApiError) -> bytes:
        """Return response.failed and the end of the stream."""
        self._output.close("incomplete")  # its events are not sent: response.failed has all items
        return self._encoded([_failure(self._fields | {"output": self._output.items}, error)]) + DONE

    def events(self, events: Sequence[tuple[int, Event]]) -> bytes:
        """Return the API's events for these events of the engine; after the last one, the end of the stream too."""
        data = self._encoded(self._changes(events))
        if self._reply.summary is None:
            return data
        self._complete_body = self._complete()
        return data + self._encoded([{"type": f"response.{self._status}", "response": self._complete_body}]) + DONE

    def body(self) -> msgspec.Raw:
        """Return the complete response, after its last event."""
        assert self._complete_body is not None, "the response is complete"
        return self._complete_body

    def _complete(self) -> msgspec.Raw:
        """Return the body of the response, and pass it to ``keep_response``."""
        is_complete = self._status == "completed"
        final_fields = {
            "status": self._status,
            "completed_at": int(time.time()) if is_complete else None,
            "incomplete_details": None if is_complete else {"reason": "max_output_tokens"},
            "output": self._output.items,
            "usage": _usage(self._reply),
        }
        body = msgspec.json.encode(self._fields | final_fields)
        self._keep_response(body)
        return msgspec.Raw(body)

    @property
    def _status(self) -> str:
        return "incomplete" if self._reply.finish_reason == "length" else "completed"

    def _changes(self, events: Sequence[tuple[int, Event]]) -> Iterator[Fields]:
        for _, event in events:
            for delta in self._reply.add(event):
                yield from self._output.add(delta, self._logprobs() if isinstance(delta, Content) else ())
            if isinstance(event, Finished):
                yield from self._output.close(self._status)

    def _logprobs(self) -> list[Fields]:
        """Return the log-probabilities of the content since the last call; [] if the client wants none."""
        return logprobs_of(self._reply, self._reply.next_content_tokens()) if self._wants_logprobs else []

    def _lifecycle(self, kind: str) -> Fields:
        return {"type": kind, "response": self._fields}

    def _encoded(self, events: Iterable[Fields]) -> bytes:
        """Return the API's events as server-sent events, with their sequence numbers."""
        data = b""
        for event in events:
            data += event_bytes(event | {"sequence_number": self._num_events}, event["type"])
            self._num_events += 1
        return data


def response_fields(base_fields: Fields, request: ResponsesRequest, sampling: Sampling | None) -> Fields:
    """Return the fields of a response in progress. ``base_fields`` has id, created and model.

    ``sampling`` is None for a request that fails before its parameters are resolved: the fields are the defaults then.
    """
    text = request.text
    sampling = Sampling(seed=0) if sampling is None else sampling
    return {
        "id": base_fields["id"],
        "object": "response",
        "created_at": base_fields["created"],
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "model": base_fields["model"],
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": None if request.reasoning is None else request.reasoning.effort, "summary": None},
        "service_tier": "flex" if request.service_tier == "flex" else "default",
        "store": request.is_stored,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "text": {
            "format": {"type": "text"} if text is None or text.format is None else text.format,
            "verbosity": "medium" if text is None or text.verbosity is None else text.verbosity,
        },
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": [_ABSENT_TOOL_FIELDS | tool for tool in request.function_tools],
        "top_logprobs": request.top_logprobs or 0,
        "truncation": "disabled",
        "usage": None,
        "metadata": request.metadata or {},
        "prompt_cache_key": request.prompt_cache_key,
        "safety_identifier": request.safety_identifier,
        "user": request.user,
    }


def failed_stream(fields: Fields, error: ApiError) -> bytes:
    """Return the complete stream of a response that fails before its first token."""
    events = [{"type": "response.created", "response": fields}, _failure(fields, error)]
    numbered = [event | {"sequence_number": number} for number, event in enumerate(events)]
    return b"".join(event_bytes(event, event["type"]) for event in numbered) + DONE


def _failure(fields: Fields, error: ApiError) -> Fields:
    """Return the event response.failed."""
    code = error.code if error.code == CONTEXT_OVERFLOW else "server_error"
    failure_fields = {"status": "failed", "error": {"code": code, "message": error.message}}
    return {"type": "response.failed", "response": fields | failure_fields}


def _usage(reply: ChatReply) -> Fields:
    assert reply.summary is not None, "the reply is complete"
    num_prompt, num_generated = reply.summary.prompt_tokens, reply.summary.generated_tokens
    num_cached = reply.summary.cached_tokens
    return {
        "input_tokens": num_prompt,
        "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": num_prompt - num_cached},
        "output_tokens": num_generated,
        "output_tokens_details": {"reasoning_tokens": reply.num_reasoning_tokens},
        "total_tokens": num_prompt + num_generated,
    }
