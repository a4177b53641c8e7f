"""The output items of a response, and the events that report their changes. Knows no sequence numbers of events."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from mlx_k2.server.chat_reply import CallArgumentsDelta, CallStartDelta, Delta
from mlx_k2.text.reply_parts import Content, Reasoning

Fields: TypeAlias = dict[str, Any]
"""The fields of an item or of an event, as JSON has them."""
_ID_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class OutputItems:
    """The items of one response; only the last one may be open. Each method returns the events that report its change.

    ``turn_handle`` is the reply's handle in the turn store. Each reasoning item has it as ``encrypted_content``.
    """

    def __init__(self, request_id: str, turn_handle: str) -> None:
        self._request_id = request_id
        self._turn_handle = turn_handle
        self._texts: list[str] = []
        self._logprobs: list[Fields] = []
        self._is_open = False
        self.items: list[Fields] = []

    def add(self, delta: Delta, logprobs: Sequence[Fields] = ()) -> list[Fields]:
        """Add a delta of the reply. ``logprobs`` are the log-probabilities of its content."""
        match delta:
            case Reasoning(text):
                opening = self._open("reasoning", summary=[])
                return [*opening, self._append(text, "response.reasoning_text.delta", content_index=0)]
            case Content(text):
                opening = self._open("message", role="assistant", content=[])
                if opening:
                    opening.append(self._event("response.content_part.added", content_index=0, part=_part("", ())))
                self._logprobs += logprobs
                delta_event = self._append(text, "response.output_text.delta", content_index=0, logprobs=list(logprobs))
                return [*opening, delta_event]
            case CallStartDelta(_, call_id, name):
                closing = self.close("completed")
                return [*closing, *self._open("function_call", call_id=call_id, name=name, arguments="")]
            case CallArgumentsDelta(_, text):
                return [self._append(text, "response.function_call_arguments.delta")]

    def close(self, status: str) -> list[Fields]:
        """Close the open item with this status; without an open item do nothing."""
        if not self._is_open:
            return []
        self._is_open = False
        item, text = self.items[-1], "".join(self._texts)
        item = self.items[-1] = item | {"status": status}
        match item["type"]:
            case "reasoning":
                item |= {"content": [{"type": "reasoning_text", "text": text}], "encrypted_content": self._turn_handle}
                events = [self._event("response.reasoning_text.done", content_index=0, text=text)]
            case "message":
                part = _part(text, self._logprobs)
                item["content"] = [part]
                events = [
                    self._event("response.output_text.done", content_index=0, text=text, logprobs=part["logprobs"]),
                    self._event("response.content_part.done", content_index=0, part=part),
                ]
            case _:
                item["arguments"] = text
                events = [self._event("response.function_call_arguments.done", name=item["name"], arguments=text)]
        return [*events, self._item_event("response.output_item.done")]

    def _open(self, kind: str, **fields: Any) -> list[Fields]:
        """Add an open item with these fields, unless the open item is of this kind."""
        if self._is_open and self.items[-1]["type"] == kind:
            return []
        closing = self.close("completed")
        item_id = f"{_ID_PREFIXES[kind]}_{self._request_id}_{len(self.items)}"
        self.items.append({"type": kind, "id": item_id, "status": "in_progress", **fields})
        self._texts, self._logprobs, self._is_open = [], [], True
        return [*closing, self._item_event("response.output_item.added")]

    def _append(self, text: str, event: str, **fields: Any) -> Fields:
        """Add text to the open item; return the event that reports it."""
        self._texts.append(text)
        return self._event(event, delta=text, **fields)

    def _event(self, kind: str, **fields: Any) -> Fields:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}

    def _item_event(self, kind: str) -> Fields:
        return {"type": kind, "output_index": len(self.items) - 1, "item": self.items[-1]}


def _part(text: str, logprobs: Sequence[Fields]) -> Fields:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
