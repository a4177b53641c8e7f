"""Checks of the events of a response, and the fields of responses that tests compare."""

import json
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.forced_replies import TOOLS

Fields = dict[str, Any]
FUNCTIONS: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
ENDS = ("response.completed", "response.incomplete", "response.failed")
_TEXT_OF = {"reasoning": "reasoning_text", "message": "output_text", "function_call": "function_call_arguments"}
_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def without_chunks(body: bytes) -> bytes:
    """Return the decoded body of an answer in HTTP's chunked encoding."""
    decoded = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        decoded, body = decoded + body[:length], body[length + 2 :]
    return decoded


def events_of(stream: bytes) -> list[Fields]:
    """Return the events of a stream; check that each is named by its type, and that [DONE] ends the stream."""
    *frames, done, rest = stream.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    events = []
    for frame in frames:
        name, _, data = frame.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def check_events(events: list[Fields]) -> Fields:
    """Check order, indexes, ids and deltas of all events of a stream; return the response of the last event."""
    for event in events:
        _EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event["type"] in ENDS for event in events] == [False] * (len(events) - 1) + [True]
    items: list[Fields] = []
    open_item: Fields | None = None
    text = ""
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "in_progress":
            assert event["response"]["id"] == events[0]["response"]["id"]
            continue
        if kind == "output_item.added":
            assert open_item is None
            open_item, text = event["item"], ""
            assert open_item["status"] == "in_progress"
            assert event["output_index"] == len(items)
            continue
        assert open_item is not None, f"{kind} belongs to no item"
        assert event["output_index"] == len(items)
        if kind == "output_item.done":
            assert all(
                event["item"].get(name) == open_item.get(name) for name in ("type", "id", "role", "call_id", "name")
            )
            items.append(event["item"])
            assert text_of(event["item"]) == text
            open_item = None
            continue
        assert event["item_id"] == open_item["id"]
        assert event.get("content_index", 0) == 0
        if kind == f"{_TEXT_OF[open_item['type']]}.delta":
            assert event["delta"]
            text += event["delta"]
        elif kind == f"{_TEXT_OF[open_item['type']]}.done":
            assert event["arguments" if open_item["type"] == "function_call" else "text"] == text
        else:
            assert kind in ("content_part.added", "content_part.done")
            assert open_item["type"] == "message"
    response: Fields = events[-1]["response"]
    if response["status"] != "failed":
        assert open_item is None
        assert response["output"] == items
    Response.model_validate(response)
    assert len({item["id"] for item in response["output"]}) == len(response["output"])
    return response


def text_of(item: Fields) -> str:
    """Return the text of an item: its reasoning, its answer, or its arguments."""
    return (
        str(item["arguments"]) if item["type"] == "function_call" else "".join(part["text"] for part in item["content"])
    )


def fields_of(response: Fields) -> Fields:
    """Return the fields that are the same in a stream and in a body."""
    usage = response["usage"]
    return {
        "status": response["status"],
        "incomplete_details": response["incomplete_details"],
        "output": [
            (item["type"], item["status"], item.get("call_id"), item.get("name"), text_of(item))
            for item in response["output"]
        ],
        "usage": (usage["input_tokens"], usage["output_tokens"], usage["output_tokens_details"]["reasoning_tokens"]),
    }
