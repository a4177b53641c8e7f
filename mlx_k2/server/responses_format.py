"""The format of a response in OpenAI's newer API: its events, or its whole body. Knows no HTTP."""

import time
from collections.abc import Callable, Iterator, Sequence

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

    ``fields`` are those of the response before it has begun. ``keep`` gets the body of the complete response.
    """

    def __init__(self, fields: Fields, reply: ChatReply, keepalive: str, keep: Callable[[bytes], None]) -> None:
        self._fields = fields
        self._reply = reply
        self._has_keepalive = keepalive != "off"
        self._keep = keep
        self._wants_logprobs = reply.generation.submissions[0].request.sampling.num_logprobs is not None
        self._output = OutputItems(fields["id"].partition("_")[2], reply.handle)
        self._num_events = 0
        self._whole: msgspec.Raw | None = None

    def begin(self) -> bytes:
        """Return the first events. Clients refuse a stream that does not begin with response.created."""
        return self._sent([self._lifecycle("response.created"), self._lifecycle("response.in_progress")])

    def keepalive(self) -> bytes:
        """Return response.in_progress again: clients count events as signs of life, and comments not."""
        return self._sent([self._lifecycle("response.in_progress")]) if self._has_keepalive else b""

    def error(self, error: ApiError) -> bytes:
        """Return response.failed and the end of the stream."""
        self._output.close("incomplete")
        return self._sent([_failure(self._fields | {"output": self._output.items}, error)]) + DONE

    def events(self, events: Sequence[tuple[int, Event]]) -> bytes:
        """Return the events of the API for these, and the end of the stream."""
        sent = self._sent(self._changes(events))
        if self._reply.summary is None:
            return sent
        self._whole = self._complete()
        return sent + self._sent([{"type": f"response.{self._status}", "response": self._whole}]) + DONE

    def body(self) -> msgspec.Raw:
        """Return the whole response, after its last event."""
        assert self._whole is not None, "the response is complete"
        return self._whole

    def _complete(self) -> msgspec.Raw:
        is_complete = self._status == "completed"
        ended = {
            "status": self._status,
            "completed_at": int(time.time()) if is_complete else None,
            "incomplete_details": None if is_complete else {"reason": "max_output_tokens"},
            "output": self._output.items,
            "usage": _usage(self._reply),
        }
        body = msgspec.json.encode(self._fields | ended)
        self._keep(body)
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
        """Return the log-probabilities of the content since the last call."""
        return logprobs_of(self._reply, self._reply.next_content_tokens()) if self._wants_logprobs else []

    def _lifecycle(self, kind: str) -> Fields:
        return {"type": kind, "response": self._fields}

    def _sent(self, changes: Sequence[Fields] | Iterator[Fields]) -> bytes:
        sent = b""
        for change in changes:
            sent += event_bytes(change | {"sequence_number": self._num_events}, change["type"])
            self._num_events += 1
        return sent


def response_fields(head: Fields, asked: ResponsesRequest, sampling: Sampling | None) -> Fields:
    """Return the fields of a response that has not begun; ``head`` has its id, creation time and model."""
    text = asked.text
    sampling = Sampling(seed=0) if sampling is None else sampling
    return {
        "id": head["id"],
        "object": "response",
        "created_at": head["created"],
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": None,
        "model": head["model"],
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "reasoning": {"effort": None if asked.reasoning is None else asked.reasoning.effort, "summary": None},
        "service_tier": "flex" if asked.service_tier == "flex" else "default",
        "store": asked.is_stored,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "text": {
            "format": {"type": "text"} if text is None or text.format is None else text.format,
            "verbosity": "medium" if text is None or text.verbosity is None else text.verbosity,
        },
        "tool_choice": "auto" if asked.tool_choice is None else asked.tool_choice,
        "tools": [_ABSENT_TOOL_FIELDS | tool for tool in asked.function_tools],
        "top_logprobs": asked.top_logprobs or 0,
        "truncation": "disabled",
        "usage": None,
        "metadata": asked.metadata or {},
        "prompt_cache_key": asked.prompt_cache_key,
        "safety_identifier": asked.safety_identifier,
        "user": asked.user,
    }


def failed_stream(fields: Fields, error: ApiError) -> bytes:
    """Return the whole stream of a response that failed before it began."""
    events = [{"type": "response.created", "response": fields}, _failure(fields, error)]
    return b"".join(event_bytes(one | {"sequence_number": at}, one["type"]) for at, one in enumerate(events)) + DONE


def _failure(fields: Fields, error: ApiError) -> Fields:
    code = error.code if error.code == CONTEXT_OVERFLOW else "server_error"
    failed = {"status": "failed", "error": {"code": code, "message": error.message}}
    return {"type": "response.failed", "response": fields | failed}


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
