"""Checks of a stream of the Responses API, and the fields by which two responses are compared."""

import json
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.forced_replies import TOOLS

Fields = dict[str, Any]
RESPONSES_PATH = "/v1/responses"
FUNCTIONS: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
"""The tools of the forced replies as the Responses API declares them."""
LAST_EVENTS = ("response.completed", "response.incomplete", "response.failed")
_TEXT_EVENTS = {"reasoning": "reasoning_text", "message": "output_text", "function_call": "function_call_arguments"}
"""The prefix of an item's text events, by the item's type."""
_EVENT_TYPE: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def parse_events(stream: bytes) -> list[Fields]:
    """Return the events of a stream. Check that each is named as its type, and that [DONE] ends the stream."""
    *frames, last_frame, empty = stream.decode().split("\n\n")
    assert (last_frame, empty) == ("data: [DONE]", "")
    events = []
    for frame in frames:
        name, _, data = frame.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def check_events(events: list[Fields]) -> Fields:
    """Check a whole stream: order, indexes, ids, and that the items equal their deltas. Return the last response."""
    for event in events:
        _EVENT_TYPE.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] in LAST_EVENTS
    items = _ItemChecker()
    for event in events[2:-1]:
        assert event["type"] not in LAST_EVENTS
        if event["type"] == "response.in_progress":  # a keep-alive
            assert event["response"]["id"] == events[0]["response"]["id"]
        else:
            items.add(event)
    response: Fields = events[-1]["response"]
    if response["status"] != "failed":
        assert items.open_item is None
        assert response["output"] == items.done
    Response.model_validate(response)
    assert len({item["id"] for item in response["output"]}) == len(response["output"])
    return response


class _ItemChecker:
    """A checker of the events of output items: one item is open at a time, and its deltas are its text."""

    def __init__(self) -> None:
        self.done: list[Fields] = []
        self.open_item: Fields | None = None
        self.text = ""
        """The deltas of the open item."""

    def add(self, event: Fields) -> None:
        name = event["type"].removeprefix("response.")
        assert event["output_index"] == len(self.done)
        if name == "output_item.added":
            assert self.open_item is None
            self.open_item, self.text = event["item"], ""
            assert event["item"]["status"] == "in_progress"
            return
        assert self.open_item is not None, f"{name} belongs to no item"
        if name == "output_item.done":
            for field in ("type", "id", "role", "call_id", "name"):
                assert event["item"].get(field) == self.open_item.get(field)
            assert item_text(event["item"]) == self.text
            self.done.append(event["item"])
            self.open_item = None
        else:
            self._add_part(event, name, self.open_item)

    def _add_part(self, event: Fields, name: str, item: Fields) -> None:
        assert event["item_id"] == item["id"]
        assert event.get("content_index", 0) == 0
        text_events = _TEXT_EVENTS[item["type"]]
        if name == f"{text_events}.delta":
            assert event["delta"]
            self.text += event["delta"]
        elif name == f"{text_events}.done":
            assert event["arguments" if item["type"] == "function_call" else "text"] == self.text
        else:
            assert name in ("content_part.added", "content_part.done")
            assert item["type"] == "message"


def item_text(item: Fields) -> str:
    """Return the text of an item: its reasoning, its answer, or its arguments."""
    if item["type"] == "function_call":
        return str(item["arguments"])
    return "".join(part["text"] for part in item["content"])


def comparable_fields(response: Fields) -> Fields:
    """Return the fields that a response has in common with the last response of a stream."""
    usage = response["usage"]
    return {
        "status": response["status"],
        "incomplete_details": response["incomplete_details"],
        "output": [
            (item["type"], item["status"], item.get("call_id"), item.get("name"), item_text(item))
            for item in response["output"]
        ],
        "usage": (usage["input_tokens"], usage["output_tokens"], usage["output_tokens_details"]["reasoning_tokens"]),
    }
