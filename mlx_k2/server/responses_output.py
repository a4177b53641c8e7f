"""The output items of a response, and the events of their growth. Knows no request and no sequence numbers."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from mlx_k2.server.chat_reply import CallArguments, CallBegun, Delta
from mlx_k2.text.reply_parts import Content, Reasoning

Fields: TypeAlias = dict[str, Any]
"""An item, or an event: its fields as JSON has them."""
_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class OutputItems:
    """The items of one response, of which the last one may be open. Each method returns the events of its change.

    ``handle`` is the turn's handle in the turn store; each item with reasoning has it as ``encrypted_content``.
    """

    def __init__(self, request_id: str, handle: str) -> None:
        self._request_id = request_id
        self._handle = handle
        self._texts: list[str] = []
        self._logprobs: list[Fields] = []
        self._is_open = False
        self.items: list[Fields] = []

    def add(self, delta: Delta, logprobs: Sequence[Fields] = ()) -> list[Fields]:
        """Add what a reply has received. ``logprobs`` are those of content."""
        match delta:
            case Reasoning(text):
                begun = self._begin("reasoning", summary=[])
                return [*begun, self._grown(text, "response.reasoning_text.delta", content_index=0)]
            case Content(text):
                begun = self._begin("message", role="assistant", content=[])
                if begun:
                    begun.append(self._event("response.content_part.added", content_index=0, part=_part("", ())))
                self._logprobs += logprobs
                grown = self._grown(text, "response.output_text.delta", content_index=0, logprobs=list(logprobs))
                return [*begun, grown]
            case CallBegun(_, call_id, name):
                closed = self.close("completed")
                return [*closed, *self._begin("function_call", call_id=call_id, name=name, arguments="")]
            case CallArguments(_, text):
                return [self._grown(text, "response.function_call_arguments.delta")]

    def close(self, status: str) -> list[Fields]:
        """End the open item with this status, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        item, text = self.items[-1], "".join(self._texts)
        item = self.items[-1] = item | {"status": status}
        match item["type"]:
            case "reasoning":
                item |= {"content": [{"type": "reasoning_text", "text": text}], "encrypted_content": self._handle}
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

    def _begin(self, kind: str, **fields: Any) -> list[Fields]:
        """Open an item, unless the open one is of this kind."""
        if self._is_open and self.items[-1]["type"] == kind:
            return []
        closed = self.close("completed")
        item_id = f"{_PREFIXES[kind]}_{self._request_id}_{len(self.items)}"
        self.items.append({"type": kind, "id": item_id, "status": "in_progress", **fields})
        self._texts, self._logprobs, self._is_open = [], [], True
        return [*closed, self._item_event("response.output_item.added")]

    def _grown(self, text: str, event: str, **fields: Any) -> Fields:
        self._texts.append(text)
        return self._event(event, delta=text, **fields)

    def _event(self, kind: str, **fields: Any) -> Fields:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}

    def _item_event(self, kind: str) -> Fields:
        return {"type": kind, "output_index": len(self.items) - 1, "item": self.items[-1]}


def _part(text: str, logprobs: Sequence[Fields]) -> Fields:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
