"""Tests of replies as responses: the stream equals the body for any reply, however the events are grouped."""

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.coordinator.handle import Event, Finished
from mlx_k2.scheduling.request import FinishReason
from mlx_k2.server.api_errors import unavailable_error
from mlx_k2.server.chat_reply import ChatReply
from mlx_k2.server.language_model import Generation
from mlx_k2.server.responses_format import ResponseFormat, failed_stream, response_fields
from mlx_k2.server.responses_request import ResponsesRequest
from tests.server.reply_events import (
    GROUP_SIZES,
    OPEN_CALL,
    REPLY_PARTS,
    STOP_STRINGS,
    add_events,
    engine_events,
    new_generation,
    stream_in_groups,
)
from tests.server.responses_events import Fields, check_events, comparable_fields, item_text, parse_events
from tests.text.replies import call, section

HEAD = {"id": "resp_1", "created": 1, "model": "m"}


def new_format(reply: ChatReply, store: Callable[[bytes], None] = lambda _: None) -> ResponseFormat:
    sampling = reply.generation.submissions[0].request.sampling
    fields = response_fields(HEAD, ResponsesRequest(input="a"), sampling)
    return ResponseFormat(fields, reply, keepalive="comment", keep_response=store)


def create_body(generation: Generation, events: Sequence[Event]) -> Fields:
    """Return the body, which is also what the response store gets."""
    stored: list[bytes] = []
    reply_format = new_format(ChatReply(generation), stored.append)
    add_events(reply_format, events)
    body = bytes(reply_format.body())
    assert stored == [body]
    fields: Fields = json.loads(body)
    return fields


def stream_response(generation: Generation, events: Sequence[Event], group_sizes: Sequence[int] = ()) -> Fields:
    """Return the last response of the stream, when the events are read in groups."""
    return check_events(parse_events(stream_in_groups(new_format(ChatReply(generation)), events, group_sizes)))


def body_and_stream(text: str) -> Fields:
    """Return the fields that the body of a reply has in common with its stream."""
    bodies = []
    for receive in (create_body, stream_response):
        generation = new_generation()
        bodies.append(comparable_fields(receive(generation, engine_events(generation, text, FinishReason.STOP))))
    assert bodies[0] == bodies[1]
    return bodies[0]


@given(
    st.lists(REPLY_PARTS, max_size=6),
    GROUP_SIZES,
    st.booleans(),
    STOP_STRINGS,
    st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
)
def test_indexes_are_right_and_the_stream_is_the_body_for_any_groups_of_events(
    parts: list[str], group_sizes: list[int], in_reasoning: bool, stop_strings: tuple[str, ...], reason: FinishReason
) -> None:
    text = "".join(parts)
    for_body, for_stream = (new_generation(stop_strings, first_call=3, in_reasoning=in_reasoning) for _ in range(2))
    body = create_body(for_body, engine_events(for_body, text, reason))
    response = stream_response(for_stream, engine_events(for_stream, text, reason), group_sizes)
    assert comparable_fields(response) == comparable_fields(body)


@given(st.lists(REPLY_PARTS, max_size=5))
def test_the_items_equal_the_parts_of_a_chat_reply(parts: list[str]) -> None:
    text = "".join(parts)
    for_reply, for_body = new_generation(), new_generation()
    reply = ChatReply(for_reply)
    for event in engine_events(for_reply, text):
        reply.add(event)
    output = create_body(for_body, engine_events(for_body, text))["output"]
    assert "".join(item_text(item) for item in output if item["type"] == "reasoning") == reply.reasoning
    assert "".join(item_text(item) for item in output if item["type"] == "message") == reply.content
    calls = [(item["call_id"], item["name"], item["arguments"]) for item in output if item["type"] == "function_call"]
    assert calls == [(call.id, call.name, call.arguments) for call in reply.calls]


def test_the_items_have_the_order_of_the_model() -> None:
    text = f"<think>Why?</think>So.{section(call('functions.f:0', '{}'), call('functions.g-h.i:1', ''))}"
    assert body_and_stream(text)["output"] == [
        ("reasoning", "completed", None, None, "Why?"),
        ("message", "completed", None, None, "So."),
        ("function_call", "completed", "functions.f:0", "f", "{}"),
        ("function_call", "completed", "functions.g-h.i:1", "g-h.i", "{}"),
    ]


def test_an_item_with_reasoning_has_the_handle_of_the_turn() -> None:
    generation = new_generation()
    reply = ChatReply(generation)
    reply_format = new_format(reply)
    add_events(reply_format, engine_events(generation, "<think>a</think>b"))
    reasoning, _ = json.loads(bytes(reply_format.body()))["output"]
    assert reasoning["encrypted_content"] == reply.turn_handle


def test_arguments_that_are_no_json_are_passed_on_as_written() -> None:
    body = body_and_stream("<think></think>" + section(call("functions.f:0", '{"a": ')))
    assert body["output"] == [("function_call", "completed", "functions.f:0", "f", '{"a": ')]


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.STOP])
def test_a_call_that_is_cut_is_an_incomplete_item_of_an_incomplete_response(reason: FinishReason) -> None:
    generation = new_generation()
    *events, end = engine_events(generation, OPEN_CALL, reason)
    assert isinstance(end, Finished)
    response = stream_response(generation, [*events, Finished(end.summary)])  # without parts, as the engine sends it
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert comparable_fields(response)["output"] == [("function_call", "incomplete", "functions.f:0", "f", "{")]
    assert response["completed_at"] is None


def test_a_failure_ends_the_stream_with_an_event_and_finishes_no_call() -> None:
    generation = new_generation()
    reply_format = new_format(ChatReply(generation))
    *events, _ = engine_events(generation, f"<think>Why?{OPEN_CALL}")
    sent_events = parse_events(
        reply_format.begin() + add_events(reply_format, events) + reply_format.error(unavailable_error("x"))
    )
    response = check_events(sent_events)
    assert response["error"] == {"code": "server_error", "message": "x"}
    done_types = [event["item"]["type"] for event in sent_events if event["type"] == "response.output_item.done"]
    assert done_types == ["reasoning"]
    assert response["output"][-1]["status"] == "incomplete"


def test_a_response_that_cannot_begin_fails_in_its_stream() -> None:
    fields = response_fields(HEAD, ResponsesRequest(input="a", stream=True), None)
    created, failed = parse_events(failed_stream(fields, unavailable_error("x")))
    assert (created["type"], failed["type"]) == ("response.created", "response.failed")
    assert (created["sequence_number"], failed["sequence_number"]) == (0, 1)


def test_an_empty_reply_has_no_items_and_is_complete() -> None:
    body = body_and_stream("")
    assert (body["status"], body["output"]) == ("completed", [])
