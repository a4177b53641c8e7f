"""Tests of replies as responses: events, indexes and bodies for any text of the model and any cut of the stream."""

import json
from collections.abc import Sequence
from typing import Any

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
from tests.server.responses_events import Fields, check_events, events_of, fields_of, text_of
from tests.server.test_chat_reply import PIECES, generation_of, stream_of, token_ids
from tests.server.test_chat_reply import events_of as engine_events_of
from tests.text.replies import call, section

COMMON_FIELDS = {"id": "resp_1", "created": 1, "model": "m"}
BROKEN = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"


def format_of(reply: ChatReply, kept: list[bytes] | None = None) -> ResponseFormat:
    sampling = reply.generation.submissions[0].request.sampling
    fields = response_fields(COMMON_FIELDS, ResponsesRequest(input="a"), sampling)
    return ResponseFormat(fields, reply, "comment", ([] if kept is None else kept).append)


def body_of(generation: Generation, events: Sequence[Event]) -> Fields:
    kept: list[bytes] = []
    formatter = format_of(ChatReply(generation), kept)
    formatter.events([(0, event) for event in events])
    body = bytes(formatter.body())
    assert kept == [body]
    fields: Fields = json.loads(body)
    return fields


def stream_response(generation: Generation, events: Sequence[Event], cuts: Sequence[int] = ()) -> Fields:
    """Return the response of a stream whose events are read in groups of ``cuts``, with a keep-alive before each."""
    return check_events(events_of(stream_of(format_of(ChatReply(generation)), events, cuts)))


def body_for_text(text: str, reason: FinishReason = FinishReason.STOP, **options: Any) -> Fields:
    """Return the body of a reply, which its stream has as well."""
    bodies = []
    for make in (body_of, stream_response):
        generation = generation_of(**options)
        bodies.append(make(generation, engine_events_of(generation, token_ids(text), reason)))
    assert fields_of(bodies[0]) == fields_of(bodies[1])
    return bodies[0]


@given(
    st.lists(PIECES, max_size=6),
    st.lists(st.integers(1, 7), max_size=8),
    st.booleans(),
    st.sampled_from([(), ("stop",), ("world", "here")]),
    st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
)
def test_indexes_are_right_and_the_stream_is_the_body_for_any_text_and_any_cut(
    pieces: list[str], cuts: list[int], in_reasoning: bool, stop_strings: tuple[str, ...], reason: FinishReason
) -> None:
    ids = token_ids("".join(pieces))
    whole, cut = (generation_of(stop_strings, 3, in_reasoning) for _ in range(2))
    body = body_of(whole, engine_events_of(whole, ids, reason))
    assert fields_of(stream_response(cut, engine_events_of(cut, ids, reason), cuts)) == fields_of(body)


@given(st.lists(PIECES, max_size=5))
def test_the_items_hold_what_the_reply_of_a_chat_holds(pieces: list[str]) -> None:
    ids = token_ids("".join(pieces))
    generation = generation_of()
    reply = ChatReply(generation)
    for event in engine_events_of(generation, ids):
        reply.add(event)
    again = generation_of()
    output = body_of(again, engine_events_of(again, ids))["output"]
    texts = {
        kind: "".join(text_of(item) for item in output if item["type"] == kind) for kind in ("reasoning", "message")
    }
    assert texts == {"reasoning": reply.reasoning, "message": reply.content}
    calls = [(item["call_id"], item["name"], item["arguments"]) for item in output if item["type"] == "function_call"]
    assert calls == [(reply_call.id, reply_call.name, reply_call.arguments) for reply_call in reply.calls]


def test_each_kind_of_item_follows_the_order_of_the_model() -> None:
    text = f"<think>Why?</think>So.{section(call('functions.f:0', '{}'), call('functions.g-h.i:1', ''))}"
    body = body_for_text(text)
    assert fields_of(body)["output"] == [
        ("reasoning", "completed", None, None, "Why?"),
        ("message", "completed", None, None, "So."),
        ("function_call", "completed", "functions.f:0", "f", "{}"),
        ("function_call", "completed", "functions.g-h.i:1", "g-h.i", "{}"),
    ]


def test_all_items_with_reasoning_have_the_handle_of_the_turn() -> None:
    generation = generation_of()
    reply = ChatReply(generation)
    formatter = format_of(reply)
    formatter.events([(0, event) for event in engine_events_of(generation, token_ids("<think>a</think>b"))])
    (reasoning, _) = json.loads(bytes(formatter.body()))["output"]
    assert reasoning["encrypted_content"] == reply.turn_handle


def test_arguments_that_are_no_json_are_passed_on_as_written() -> None:
    body = body_for_text("<think></think>" + section(call("functions.f:0", '{"a": ')))
    assert fields_of(body)["output"] == [("function_call", "completed", "functions.f:0", "f", '{"a": ')]


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.STOP])
def test_a_call_that_is_cut_is_an_incomplete_item_of_an_incomplete_response(reason: FinishReason) -> None:
    generation = generation_of()
    *events, end = engine_events_of(generation, token_ids(BROKEN), reason)
    assert isinstance(end, Finished)
    body = stream_response(generation, [*events, Finished(end.summary)])
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert fields_of(body)["output"] == [("function_call", "incomplete", "functions.f:0", "f", "{")]
    assert body["completed_at"] is None


def test_a_failure_ends_the_stream_with_an_event_and_finishes_no_call() -> None:
    generation = generation_of()
    formatter = format_of(ChatReply(generation))
    *events, _ = engine_events_of(generation, token_ids(f"<think>Why?{BROKEN}"))
    sent = events_of(
        formatter.begin() + formatter.events([(0, event) for event in events]) + formatter.error(unavailable_error("x"))
    )
    failed = check_events(sent)
    assert failed["error"] == {"code": "server_error", "message": "x"}
    assert [event["item"]["type"] for event in sent if event["type"] == "response.output_item.done"] == ["reasoning"]
    assert failed["output"][-1]["status"] == "incomplete"


def test_a_response_that_cannot_begin_fails_in_its_stream() -> None:
    fields = response_fields(COMMON_FIELDS, ResponsesRequest(input="a", stream=True), None)
    created, failed = events_of(failed_stream(fields, unavailable_error("x")))
    assert (created["type"], failed["type"]) == ("response.created", "response.failed")
    assert (created["sequence_number"], failed["sequence_number"]) == (0, 1)


def test_an_empty_reply_has_no_items_and_is_complete() -> None:
    body = body_for_text("")
    assert (body["status"], body["output"]) == ("completed", [])
