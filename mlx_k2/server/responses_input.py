"""The input items of a response as chat messages. Knows no model and stores nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_k2.server.api_errors import bad_request_error
from mlx_k2.server.request_fields import check_field
from mlx_k2.server.turn_store import HANDLE_FIELD

_TEXTS = dict.fromkeys(("input_text", "output_text", "text", "reasoning_text", "summary_text"), "text")
_TEXTS["refusal"] = "refusal"
"""The field with the text of a content part, by the part's type."""


@dataclass
class InputReader:
    """A reader of items, in the order of the conversation.

    Adjacent items of the model, which are its reasoning, text and calls, are one turn of the model and so one message.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    """The types of items that were left out."""

    def read(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Add all items. The texts of a turn are joined once, at the end: a turn may have very many.

        Raises:
            ApiError: 400; names the item that cannot be used.
        """
        for at, item in enumerate(items):
            self._add(item, f"input[{at}]")
        for message in self.messages:
            if message["role"] == "assistant":
                message |= {
                    name: "".join(message[name]) for name in ("content", "reasoning_content") if name in message
                }

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
                self.skipped.add(str(kind))

    def _add_reasoning(self, item: Mapping[str, Any], where: str) -> None:
        """Add reasoning: its handle, and its text, or its summary if there is no text.

        All reasoning of a turn has one handle, so that another one begins another turn.
        """
        handle = item.get("encrypted_content")
        if handle is not None and self.messages and self.messages[-1].get(HANDLE_FIELD) not in (None, handle):
            self.messages.append({"role": "assistant", "content": []})
        turn = self._turn()
        if handle is not None:
            turn[HANDLE_FIELD] = handle
        text = _text(item.get("content"), f"{where}.content") or _text(item.get("summary"), f"{where}.summary")
        if text:
            turn.setdefault("reasoning_content", []).append(text)

    def _turn(self) -> dict[str, Any]:
        """Return the model's turn that the next item belongs to."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": []})
        return self.messages[-1]


def _text(content: object, where: str, *, is_lenient: bool = False) -> str:
    """Return the text of an item's content: a text, or parts. ``is_lenient``: a line replaces a part that is no text.

    A tool's image must not end the conversation; a user's is refused.
    """
    if content is None or isinstance(content, str):
        return content or ""
    check_field(isinstance(content, list), where, f"{where} must be text or a list of parts")
    assert isinstance(content, list)
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get(_TEXTS[kind]) if isinstance(kind, str) and kind in _TEXTS else None
        if not isinstance(text, str) and is_lenient:
            text = f"[{kind} left out: this model reads text only]"
        elif not isinstance(text, str):
            named = f"{where}[{at}]"
            raise bad_request_error(
                f"{named} is {str(kind)!r}, and this model reads text only", named, "unsupported_content"
            )
        texts.append(text)
    return "".join(texts)
