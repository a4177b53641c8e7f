"""Tests of the format of Messages: for any cut of the model's text the official client accumulates the body."""

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
from tests.server.test_chat_reply import PIECES, events_of, generation_of, stream_of, token_ids
from tests.text.replies import call, section

DELTA_TYPES = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
ARGUMENTS = st.text(st.sampled_from('{}[]":,\\ \ufeff01eNa☃'), max_size=12)
MORE_CALLS = st.builds(
    lambda arguments: section(call("functions.f:0", arguments)), ARGUMENTS | st.just('{"a": 1e999, "a": "\\ud800"}')
)


def format_of(generation: Generation, display: str) -> MessagesFormat:
    thinking = MessagesThinking(type="enabled", display=display)
    request = MessagesRequest(
        messages=[MessageEntry(role="user", content="a")], max_tokens=1000, stream=True, thinking=thinking
    )
    return MessagesFormat("1", "m", request, ChatReply(generation, turn_handle="handle"))


def body_of(generation: Generation, events: Sequence[Event], display: str) -> dict[str, Any]:
    messages_format = format_of(generation, display)
    messages_format.events([(0, event) for event in events])
    body: dict[str, Any] = json.loads(bytes(json_response(messages_format.body()).body))
    return body


def sent_events(
    generation: Generation, events: Sequence[Event], cuts: Sequence[int], display: str
) -> list[dict[str, Any]]:
    """Return the events of the stream, when the engine's are read in groups of ``cuts``."""
    stream = stream_of(format_of(generation, display), events, cuts)
    api_events = []
    for text in stream.decode().split("\n\n")[:-1]:
        name, data = text.split("\n")
        api_events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {api_events[-1]['type']}"
    return api_events


def accumulate(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    snapshot, buffers = None, dict[int, bytes]()
    for event in events:
        if event["type"] != "ping":
            snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)  # type: ignore[arg-type]
    assert snapshot is not None
    return snapshot.to_dict()


def check_order(events: Sequence[dict[str, Any]]) -> None:
    """Blocks are counted from 0, one is open at a time, each delta is one of its block, and a call is a JSON object."""
    names = [event["type"] for event in events if event["type"] != "ping"]
    assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
    open_block: dict[str, Any] | None = None
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
    generation = generation_of()
    events = events_of(generation, token_ids(section(call("functions.f:0", arguments), call("functions.f:1", "{}"))))
    text, whole_call = body_of(generation, events, "summarized")["content"]
    assert text == {"type": "text", "text": f"functions.f:0{arguments}"}
    assert (whole_call["type"], whole_call["input"]) == ("tool_use", {})


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.TIMEOUT, FinishReason.CANCELLED])
@pytest.mark.parametrize("arguments", ["", " ", "\n\t", '{"a": '])
def test_a_call_that_is_cut_is_text_and_only_its_length_fills_the_context(arguments: str, reason: FinishReason) -> None:
    generation = generation_of()
    section_text = section(call("functions.f:0", arguments + "|"))
    body = body_of(generation, events_of(generation, token_ids(section_text.partition("|<|")[0]), reason), "summarized")
    assert body["content"] == [{"type": "text", "text": f"functions.f:0{arguments}"}]
    assert (body["stop_reason"] == "model_context_window_exceeded") is (reason is FinishReason.LENGTH)


@pytest.mark.parametrize("constrains_calls", [True, False])
def test_an_eager_tool_is_streamed_only_if_a_grammar_makes_its_arguments_json(constrains_calls: bool) -> None:
    generation = replace(generation_of(), constrains_calls=constrains_calls)
    tools = [MessagesTool(name="f", eager_input_streaming=True)]
    entries = [MessageEntry(role="user", content="a")]
    request = MessagesRequest(messages=entries, max_tokens=1000, stream=True, tools=tools)
    messages_format = MessagesFormat("1", "m", request, ChatReply(generation))
    broken = events_of(generation, token_ids(section(call("functions.f:0", '{"a": x'))))
    assert (b'"tool_use"' in messages_format.events([(0, event) for event in broken])) is constrains_calls


def test_a_byte_order_mark_before_arguments_is_left_out() -> None:
    generation = generation_of()
    events = events_of(generation, token_ids(section(call("functions.f:0", '\ufeff{"a": 1}'))))
    (block,) = body_of(generation, events, "summarized")["content"]
    assert block["input"] == {"a": 1}


@given(
    st.lists(PIECES | MORE_CALLS, max_size=6),
    st.lists(st.integers(1, 7), max_size=8),
    st.booleans(),
    st.sampled_from([(), ("stop",), ("world", "here")]),
    st.sampled_from(["summarized", "omitted"]),
)
def test_the_client_accumulates_the_body_from_any_cut_of_the_stream(
    pieces: list[str], cuts: list[int], in_reasoning: bool, stop_strings: tuple[str, ...], display: str
) -> None:
    ids = token_ids("".join(pieces))
    section_text, cut = (generation_of(stop_strings, 3, in_reasoning) for _ in range(2))
    stream = sent_events(cut, events_of(cut, ids), cuts, display)
    check_order(stream)
    assert accumulate(stream) == body_of(section_text, events_of(section_text, ids), display)
