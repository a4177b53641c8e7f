"""Tests of replies as messages: the official client accumulates the body, however the events are grouped."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.coordinator.handle import Event
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.server.chat_reply import ChatReply
from mlx_k2.server.language_model import Generation
from mlx_k2.server.messages_format import MessagesFormat
from mlx_k2.server.messages_request import MessageEntry, MessagesRequest, MessagesThinking, MessagesTool
from mlx_k2.server.sse import json_response
from tests.server.reply_events import (
    GROUP_SIZES,
    REPLY_PARTS,
    STOP_STRINGS,
    add_events,
    engine_events,
    new_generation,
    stream_in_groups,
)
from tests.text.replies import call, section

Fields = dict[str, Any]
DELTA_TYPES = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
"""The type of a block's deltas, by the block's type."""
ARGUMENTS = st.text(st.sampled_from('{}[]":,\\ \ufeff01eNa☃'), max_size=12) | st.just('{"a": 1e999, "a": "\\ud800"}')
"""Texts of JSON's characters, and an object with an infinite number, a key twice and half of a character."""
CALLS = ARGUMENTS.map(lambda arguments: section(call("functions.f:0", arguments)))


def new_format(generation: Generation, display: str) -> MessagesFormat:
    thinking = MessagesThinking(type="enabled", display=display)
    turns = [MessageEntry(role="user", content="a")]
    request = MessagesRequest(messages=turns, max_tokens=1000, stream=True, thinking=thinking)
    return MessagesFormat("1", "m", request, ChatReply(generation, turn_handle="handle"))


def create_body(generation: Generation, events: Sequence[Event], display: str = "summarized") -> Fields:
    reply_format = new_format(generation, display)
    add_events(reply_format, events)
    body: Fields = json.loads(bytes(json_response(reply_format.body()).body))
    return body


def parse_events(stream: bytes) -> list[Fields]:
    """Return the events of a stream, whose names are their types."""
    events = []
    for text in stream.decode().split("\n\n")[:-1]:
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def accumulate_events(events: Sequence[Fields]) -> Fields:
    """Return the message that the official client joins from the events of a stream."""
    snapshot, buffers = None, dict[int, bytes]()
    for event in events:
        if event["type"] != "ping":
            snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)  # type: ignore[arg-type]
    assert snapshot is not None
    return snapshot.to_dict()


def check_blocks(events: Sequence[Fields]) -> None:
    """Check that blocks are numbered from 0, one is open at a time, its deltas have its type; arguments are objects."""
    names = [event["type"] for event in events if event["type"] != "ping"]
    assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
    open_block: Fields | None = None
    num_blocks, arguments = 0, ""
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert open_block is None
                assert event["index"] == num_blocks
                open_block, num_blocks, arguments = event["content_block"], num_blocks + 1, ""
            case "content_block_delta":
                assert open_block is not None
                assert event["index"] == num_blocks - 1
                if event["delta"]["type"] == "signature_delta":
                    assert open_block["type"] == "thinking"
                    continue
                assert event["delta"]["type"] == DELTA_TYPES[open_block["type"]]
                arguments += event["delta"].get("partial_json", "")
            case "content_block_stop":
                assert open_block is not None
                assert event["index"] == num_blocks - 1
                if open_block["type"] == "tool_use":
                    assert isinstance(json.loads(arguments), dict)
                open_block = None
    assert open_block is None


@pytest.mark.parametrize(
    "arguments", ['{"a": ', '{"a": 1}}', "[1]", "null", "text", '{"a": 1', '"\\ud800"', "{'a': 1}"]
)
def test_arguments_that_are_no_json_object_are_text(arguments: str) -> None:
    generation = new_generation()
    events = engine_events(generation, section(call("functions.f:0", arguments), call("functions.f:1", "{}")))
    text, tool_use = create_body(generation, events)["content"]
    assert text == {"type": "text", "text": f"functions.f:0{arguments}"}
    assert (tool_use["type"], tool_use["input"]) == ("tool_use", {})


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.TIMEOUT, FinishReason.CANCELLED])
@pytest.mark.parametrize("arguments", ["", " ", "\n\t", '{"a": '])
def test_a_cut_call_is_text_and_length_means_that_the_context_is_full(arguments: str, reason: FinishReason) -> None:
    """The request's max_tokens is not reached, so that only the context can have cut a reply with reason LENGTH."""
    generation = new_generation()
    cut_call = section(call("functions.f:0", arguments)).partition("<|tool_call_end|>")[0]
    body = create_body(generation, engine_events(generation, cut_call, reason))
    assert body["content"] == [{"type": "text", "text": f"functions.f:0{arguments}"}]
    assert (body["stop_reason"] == "model_context_window_exceeded") is (reason is FinishReason.LENGTH)


@pytest.mark.parametrize("constrains_calls", [True, False])
def test_an_eager_tool_is_streamed_only_if_a_grammar_makes_its_arguments_json(constrains_calls: bool) -> None:
    generation = replace(new_generation(), constrains_calls=constrains_calls)
    tools = [MessagesTool(name="f", eager_input_streaming=True)]
    turns = [MessageEntry(role="user", content="a")]
    request = MessagesRequest(messages=turns, max_tokens=1000, stream=True, tools=tools)
    reply_format = MessagesFormat("1", "m", request, ChatReply(generation))
    # the arguments are broken: a block that was streamed has begun before this is seen
    events = engine_events(generation, section(call("functions.f:0", '{"a": x')))
    assert (b'"tool_use"' in add_events(reply_format, events)) is constrains_calls


def test_a_byte_order_mark_before_arguments_is_left_out() -> None:
    generation = new_generation()
    events = engine_events(generation, section(call("functions.f:0", '\ufeff{"a": 1}')))
    (block,) = create_body(generation, events)["content"]
    assert block["input"] == {"a": 1}


@given(
    st.lists(REPLY_PARTS | CALLS, max_size=6),
    GROUP_SIZES,
    st.booleans(),
    STOP_STRINGS,
    st.sampled_from(["summarized", "omitted"]),
)
def test_the_client_accumulates_the_body_for_any_groups_of_events(
    parts: list[str], group_sizes: list[int], in_reasoning: bool, stop_strings: tuple[str, ...], display: str
) -> None:
    text = "".join(parts)
    for_body, for_stream = (new_generation(stop_strings, first_call=3, in_reasoning=in_reasoning) for _ in range(2))
    reply_format = new_format(for_stream, display)
    events = parse_events(stream_in_groups(reply_format, engine_events(for_stream, text), group_sizes))
    check_blocks(events)
    assert accumulate_events(events) == create_body(for_body, engine_events(for_body, text), display)
