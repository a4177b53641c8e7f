"""Tests of replies as chat completions: the official client accumulates the body, however the events are grouped."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from mlx_k2.coordinator.handle import Event, Finished
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.server.chat_completions import ChatFormat
from mlx_k2.server.chat_reply import ChatReply, declared_name
from mlx_k2.server.chat_request import ChatRequest
from mlx_k2.server.language_model import Generation, next_call_number
from mlx_k2.server.request_fields import StreamOptions
from mlx_k2.server.server_state import ServerOptions
from tests.server.reply_events import (
    GROUP_SIZES,
    OPEN_CALL,
    REPLY_PARTS,
    STOP_STRINGS,
    engine_events,
    new_generation,
    stream_in_groups,
)
from tests.text.replies import call, section


def create_body(generation: Generation, events: Sequence[Event]) -> dict[str, Any]:
    reply = ChatReply(generation)
    for event in events:
        reply.add(event)
    return new_format(reply).body()


def new_format(reply: ChatReply) -> ChatFormat:
    request = ChatRequest(messages=[], logprobs=True, stream_options=StreamOptions(include_usage=True))
    head = {"id": "chatcmpl-1", "created": 1, "model": "m"}
    return ChatFormat(head, [reply], request, ServerOptions(keepalive="chunk"))


def accumulate_stream(generation: Generation, events: list[Event], group_sizes: Sequence[int]) -> dict[str, Any]:
    """Return the body that the official client joins from the stream, when the events are read in groups."""
    stream = stream_in_groups(new_format(ChatReply(generation)), events, group_sizes)
    *lines, done = [line for line in stream.decode().split("\n\n") if line]
    assert done == "data: [DONE]"
    state = ChatCompletionStreamState()
    for line in lines:
        state.handle_chunk(ChatCompletionChunk.model_validate(json.loads(line.removeprefix("data: "))))
    snapshot = state.current_completion_snapshot.to_dict()
    usage = json.loads(lines[-1].removeprefix("data: "))["usage"]
    return {**snapshot, "usage": usage}


def comparable_fields(body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a body that the accumulator has as well."""
    (choice,) = body["choices"]
    message = choice["message"]
    calls = [
        (call["id"], call["type"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or ()
    ]
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    return {
        "role": message["role"],
        "content": message.get("content") or "",
        "reasoning": message.get("reasoning_content") or "",
        "calls": calls,
        "finish_reason": choice["finish_reason"],
        "logprobs": [entry["token"] for entry in logprobs],
        "usage": body["usage"],
    }


@given(st.lists(REPLY_PARTS, max_size=6), GROUP_SIZES, st.booleans(), STOP_STRINGS)
def test_the_client_accumulates_the_body_for_any_groups_of_events(
    parts: list[str], group_sizes: list[int], in_reasoning: bool, stop_strings: tuple[str, ...]
) -> None:
    text = "".join(parts)
    for_body, for_stream = (new_generation(stop_strings, first_call=3, in_reasoning=in_reasoning) for _ in range(2))
    body = create_body(for_body, engine_events(for_body, text))
    accumulated = accumulate_stream(for_stream, engine_events(for_stream, text), group_sizes)
    assert comparable_fields(accumulated) == comparable_fields(body)


def body_fields(text: str, **options: Any) -> dict[str, Any]:
    """Return the fields of the body for a reply. It ends by itself after a section of calls, else with LENGTH."""
    generation = new_generation(**options)
    reason = FinishReason.STOP if text.endswith("<|tool_calls_section_end|>") else FinishReason.LENGTH
    return comparable_fields(create_body(generation, engine_events(generation, text, reason)))


def test_the_numbers_of_calls_continue_after_the_conversations_calls() -> None:
    fields = body_fields(section(call("functions.f:0", "{}"), call("functions.f:1", "{}")), first_call=4)
    assert [call_id for call_id, *_ in fields["calls"]] == ["functions.f:4", "functions.f:5"]
    assert fields["finish_reason"] == "tool_calls"


def test_a_call_without_arguments_has_an_empty_object() -> None:
    assert body_fields(section(call("functions.f:0", "")))["calls"] == [("functions.f:0", "function", "f", "{}")]


def test_arguments_stay_the_text_that_the_model_wrote() -> None:
    arguments = '{"zip": "5777", "x": 1.0,  "y": [ ]}'
    assert body_fields(section(call("functions.f:0", arguments)))["calls"][0][3] == arguments


@pytest.mark.parametrize("header", ["functionsf", "functionsf5", "functions.f:0", "f:7", "f"])
def test_a_name_without_its_separators_is_found_among_the_declared_tools(header: str) -> None:
    assert body_fields(section(call(header, "{}")))["calls"][0][2] == "f"


@pytest.mark.parametrize(
    ("written_name", "name"),
    [
        ("write_file_v2", "write_file_v2"),
        ("functionswrite_file3", "write_file"),
        ("functions_write_file:3", "write_file"),
        ("write_file2", "write_file2"),
        ("functions.write_file2:1", "write_file2"),
        ("rewrite_file", "rewrite_file"),
        ("functionsexec5", "functionsexec5"),
    ],
)
def test_a_prefix_or_number_is_dropped_only_if_a_declared_name_remains(written_name: str, name: str) -> None:
    assert declared_name(written_name, ("write_file", "write_file2", "read")) == name


def test_a_cancelled_reply_with_an_open_call_ends_with_length() -> None:
    generation = new_generation()
    *events, end = engine_events(generation, OPEN_CALL, FinishReason.CANCELLED)
    assert isinstance(end, Finished)
    body = create_body(generation, [*events, Finished(end.summary)])  # a cancelled request's last event has no parts
    assert body["choices"][0]["finish_reason"] == "length"


def test_a_section_without_a_readable_call_is_content() -> None:
    fields = body_fields(section(call("00003", '{"a": 1}')))
    assert fields["calls"] == []
    assert fields["content"] == '00003{"a": 1}'
    assert fields["finish_reason"] == "stop"


def test_a_call_that_max_tokens_cuts_ends_with_length() -> None:
    fields = body_fields(OPEN_CALL)
    assert fields["calls"] == [("functions.f:0", "function", "f", "{")]
    assert fields["finish_reason"] == "length"


def test_arguments_are_streamed_as_they_are_sampled() -> None:
    generation = new_generation()
    events = engine_events(generation, section(call("functions.f:0", '{"path": "a", "text": "one two"}')))
    reply = ChatReply(generation)
    num_deltas = [len(reply.add(event)) for event in events]
    assert sum(num_deltas) > 8
    assert max(num_deltas) <= 2, "an event has more than the beginning of a call and some arguments"


@pytest.mark.parametrize(
    ("ids", "number"),
    [([], 0), (["functions.f:0"], 1), (["call_a", "call_b"], 2), (["functions.f:80"], 81), (["functions.f:0", "x"], 2)],
)
def test_a_new_calls_number_is_above_all_that_occur(ids: list[str], number: int) -> None:
    calls = [{"id": call_id, "function": {"name": "f", "arguments": "{}"}} for call_id in ids]
    assert next_call_number([{"role": "assistant", "tool_calls": calls}]) == number
