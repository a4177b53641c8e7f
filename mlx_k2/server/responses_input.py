"""Conversion of the input items of a response to chat messages. Knows no model and stores nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_k2.server.api_errors import bad_request_error
from mlx_k2.server.request_fields import check_field
from mlx_k2.server.turn_store import TURN_HANDLE_FIELD

_TEXT_FIELDS = dict.fromkeys(("input_text", "output_text", "text", "reasoning_text", "summary_text"), "text")
_TEXT_FIELDS["refusal"] = "refusal"
"""The name of the field that has a content part's text, by the part's type."""


@dataclass
class InputReader:
    """A reader of items, in the order of the conversation.

    Adjacent items that the model wrote (reasoning, text, calls) are one turn, and become one message.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    skipped_types: set[str] = field(default_factory=set)
    """The types of items that were left out."""

    def read(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Add all items. Call this once.

        Raises:
            ApiError: 400; names the item that cannot be used.
        """
        for index, item in enumerate(items):
            self._add(item, f"input[{index}]")
        for message in self.messages:  # joined once, at the end: a turn can have thousands of texts
            for name in ("content", "reasoning_content"):
                if isinstance(message.get(name), list):
                    message[name] = "".join(message[name])

    def _add(self, item: Mapping[str, Any], where: str) -> None:
        kind = item.get("type") or "message"
        match kind:
            case "message" if item.get("role") == "assistant":
                self._turn()["content"].append(_text(item.get("content"), f"{where}.content"))
            case "message":
                self.messages.append(
                    {"role": item.get("role"), "content": _text(item.get("content"), f"{where}.content")}
                )
            case "reasoning":
                self._add_reasoning(item, where)
            case "function_call":
                name, call_id = item.get("name"), item.get("call_id")
                check_field(isinstance(name, str) and bool(name), f"{where}.name", f"{where} names no function")
                check_field(isinstance(call_id, str) and bool(call_id), f"{where}.call_id", f"{where} has no call_id")
                function = {"name": name, "arguments": item.get("arguments", "{}")}
                self._turn().setdefault("tool_calls", []).append({"id": call_id, "function": function})
            case "function_call_output":
                output = _text(item.get("output"), f"{where}.output", is_lenient=True)
                self.messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
            case "item_reference":
                raise bad_request_error(f"{where} is a reference: send the item itself", where)
            case _:
                self.skipped_types.add(str(kind))

    def _add_reasoning(self, item: Mapping[str, Any], where: str) -> None:
        """Add the text of a reasoning item, or its summary if it has no text, and its turn handle.

        All reasoning of a turn has the same handle. An item with a different one belongs to a new turn.
        """
        turn_handle = item.get("encrypted_content")
        previous = self.messages[-1].get(TURN_HANDLE_FIELD) if self.messages else None
        if previous is not None and turn_handle not in (None, previous):
            self.messages.append({"role": "assistant", "content": []})
        turn = self._turn()
        if turn_handle is not None:
            turn[TURN_HANDLE_FIELD] = turn_handle
        text = _text(item.get("content"), f"{where}.content") or _text(item.get("summary"), f"{where}.summary")
        if text:
            turn.setdefault("reasoning_content", []).append(text)

    def _turn(self) -> dict[str, Any]:
        """Return the message of the model's current turn; begin a turn if another role wrote the last message."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": []})
        return self.messages[-1]


def _text(content: object, where: str, *, is_lenient: bool = False) -> str:
    """Return the text of an item's ``content``, which is text, a list of parts or None.

    A part without text is refused, or if ``is_lenient`` replaced by a line: a tool's image must not end a conversation.
    """
    if content is None or isinstance(content, str):
        return content or ""
    check_field(isinstance(content, list), where, f"{where} must be text or a list of parts")
    assert isinstance(content, list)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get(_TEXT_FIELDS[kind]) if isinstance(kind, str) and kind in _TEXT_FIELDS else None
        if not isinstance(text, str) and is_lenient:
            text = f"[{kind} left out: this model reads text only]"
        elif not isinstance(text, str):
            part_name = f"{where}[{index}]"
            message = f"{part_name} is {str(kind)!r}, and this model reads text only"
            raise bad_request_error(message, part_name, "unsupported_content")
        texts.append(text)
    return "".join(texts)
