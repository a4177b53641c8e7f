"""The reader of histories: conversations of files and clients, in OpenAI's format and variants of other programs.

Knows neither templates nor tokens. Every history is read here before it is rendered.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mlx_k2.errors import RequestError
from mlx_k2.text.message import CalledFunction, Message, MessageCall
from mlx_k2.text.tokenizer import well_formed
from mlx_k2.text.tool_call import call_id

ROLES = ("system", "user", "assistant", "tool")
_ROLE_ALIASES = {"developer": "system", "function": "tool"}
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
_TEXT_PARTS = ("text", "input_text", "output_text")
_MAX_DEPTH = 100
_DETAIL_FIELDS = ("text", "summary")
"""The fields with text in an entry of ``reasoning_details``."""
_Fields: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class History:
    """Messages in the form that templates expect, and a line about each message that lost information."""

    messages: list[Message]
    left_out: tuple[str, ...]


def read_history(
    messages: Sequence[Mapping[str, object]], template_fields: Collection[str], *, normal_call_ids: bool = False
) -> History:
    """Return ``messages`` in one form; ``template_fields`` are the field names that the template reads.

    Content is text: parts are joined, None becomes ''. Reasoning is in ``reasoning_content``, whatever its field was
    named. Every call and every result has an id; with ``normal_call_ids`` it is the one that Kimi K2 is trained on.
    Other fields are kept if the template reads them and they are not None. Reading the returned messages again changes
    nothing.

    Raises:
        RequestError: there is no message, or a message is malformed; names the message and the problem.
    """
    require(bool(messages), "there is no message to answer")
    all_fields: list[_Fields] = []
    left_out = []
    for number, message in enumerate(messages, start=1):
        require(isinstance(message, Mapping), f"message {number} is not an object")
        require(all(isinstance(name, str) for name in message), f"message {number}: the keys of an object must be text")
        role = message.get("role")
        role = _ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise RequestError(f"message {number} has the role {role!r}: give one of {', '.join(ROLES)}")
        where = f"message {number} ({role})"
        fields = _fields({**message, "role": role}, where)
        unread = [name for name in fields if name not in _MESSAGE_FIELDS and name not in template_fields]
        lost = [name for name in unread if _has_own_information(name, fields)]
        if lost:
            left_out.append(f"{where} has fields that the chat template does not read: {', '.join(lost)}")
        kept_fields = {name: value for name, value in fields.items() if name not in unread}
        all_fields.append(copied_json(kept_fields, where))
    _link_calls(all_fields, normal_call_ids=normal_call_ids)
    return History([_message(fields) for fields in all_fields], tuple(left_out))


def _message(fields: _Fields) -> Message:
    """Return the message with checked ``fields``. This removes _MESSAGE_FIELDS from them; the others are ``other``."""
    known = {name: fields.pop(name) for name in _MESSAGE_FIELDS if name in fields}
    calls = [
        MessageCall(
            id=call["id"],
            type=call["type"] if isinstance(call.get("type"), str) else "function",
            function=CalledFunction(call["function"]["name"], call["function"]["arguments"]),
        )
        for call in known.pop("tool_calls", ())
    ]
    return Message(**known, tool_calls=tuple(calls), other=fields)


def _fields(message: Mapping[str, Any], where: str) -> _Fields:
    """Return the checked fields of a message, without those that are None; content, reasoning and calls in one form."""
    fields = {name: value for name, value in message.items() if value is not None}
    fields["content"] = _content(fields.get("content", ""), where)
    if "reasoning_content" not in fields and (reasoning := _reasoning(fields)) is not None:
        fields["reasoning_content"] = reasoning
    if "function_call" in fields and not fields.get("tool_calls"):
        fields["tool_calls"] = [{"type": "function", "function": fields["function_call"]}]
    for name in ("name", "reasoning_content", "tool_call_id"):
        require(isinstance(fields.get(name, ""), str), f"{where}: {name} must be text")
    calls = fields.get("tool_calls")
    if not calls:
        fields.pop("tool_calls", None)
        return fields
    require(fields["role"] == "assistant", f"{where}: only an assistant calls tools")
    require(isinstance(calls, list | tuple), f"{where}: tool_calls must be a list")
    assert isinstance(calls, list | tuple)
    fields["tool_calls"] = [_call(call, f"{where}: tool call {number}") for number, call in enumerate(calls, start=1)]
    return fields


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    require(isinstance(content, list | tuple), f"{where}: content must be text or a list of text parts")
    assert isinstance(content, list | tuple)
    return "".join(part if isinstance(part, str) else _part_text(part, where) for part in content)


def _part_text(part: object, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and "image" in kind:
        raise RequestError(f"{where} has an image, and mlx-k2 runs a model's text part only: leave the image out")
    text = part.get("text") if isinstance(part, Mapping) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise RequestError(f"{where} has a part that is not text ({kind or type(part).__name__}): leave it out")
    return text


def _reasoning(fields: Mapping[str, Any]) -> str | None:
    """Return the reasoning in a field other than ``reasoning_content``; None if there is none."""
    for name in ("reasoning", "thinking"):
        reasoning = fields.get(name)
        if isinstance(reasoning, str):
            return reasoning
    return _details_text(fields.get("reasoning_details"))


def _details_text(details: object) -> str | None:
    """Return the text of OpenRouter's ``reasoning_details``, or the summaries if there is no text; None for neither."""
    entries = [entry for entry in details if isinstance(entry, Mapping)] if isinstance(details, list | tuple) else []
    for name in _DETAIL_FIELDS:
        if texts := [entry[name] for entry in entries if isinstance(entry.get(name), str)]:
            return "".join(texts)
    return None


def _call(call: object, where: str) -> _Fields:
    """Return a checked call, with the id '' if it has none, and the arguments '{}' if it has none."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise RequestError(f"{where} has no function")
    written_id = call.get("id") or ""
    require(isinstance(written_id, str), f"{where}: its id must be text")
    require(isinstance(function.get("name"), str), f"{where} has no function name")
    return {**call, "id": written_id, "function": {**function, "arguments": function.get("arguments", "{}")}}


def _has_own_information(name: str, fields: Mapping[str, Any]) -> bool:
    """Return whether this field has information that no other field of the message has."""
    value = fields[name]
    if name == "function_call" and isinstance(value, Mapping):
        return [call["function"] for call in fields["tool_calls"]] != [{"arguments": "{}", **value}]
    if name == "reasoning_details" and isinstance(value, list | tuple):
        is_understood = all(isinstance(entry, Mapping) and entry.keys() & set(_DETAIL_FIELDS) for entry in value)
        value = _details_text(value) if is_understood else value
    return value not in ("", [], {}, False, fields.get("reasoning_content"))


def _link_calls(messages: Sequence[_Fields], *, normal_call_ids: bool) -> None:
    """Set the ids of calls and results that have none.

    A call gets its normal id, the one that Kimi K2 is trained on. A result gets the id of a call that has no result yet
    in the latest turn with calls: the first call with the result's name, else the first one.

    With ``normal_call_ids`` each call gets its normal id, and its result the same id and the tool's name. If several
    calls have the id of a result, the result belongs to the first call without a result in the latest turn that has
    calls with this id. A result without a call is unchanged.
    """
    unanswered: list[_Fields] = []
    open_calls: dict[str, list[tuple[_Fields, str]]] = {}  # by id, for ``normal_call_ids``
    calls_with_normal_ids: list[tuple[_Fields, str]] = []
    for number, message in enumerate(messages, start=1):
        calls = message.get("tool_calls", ())
        calls_of_turn: dict[str, list[tuple[_Fields, str]]] = {}
        for call in calls:
            normal_id = call_id(call["function"]["name"], len(calls_with_normal_ids))
            calls_with_normal_ids.append((call, normal_id))
            call["id"] = call["id"] or normal_id
            calls_of_turn.setdefault(call["id"], []).append((call, normal_id))
        open_calls |= calls_of_turn
        unanswered = [*calls] or unanswered
        if message["role"] != "tool":
            continue
        if not message.get("tool_call_id") and unanswered:
            same_name = [call for call in unanswered if call["function"]["name"] == message.get("name")]
            message["tool_call_id"] = (same_name or unanswered)[0]["id"]
        problem = f"message {number} (tool): a tool's result needs the tool_call_id of its call"
        require("tool_call_id" in message, problem)
        unanswered = [call for call in unanswered if call["id"] != message["tool_call_id"]]
        if normal_call_ids and (same_id := open_calls.get(message["tool_call_id"])):
            call, message["tool_call_id"] = same_id.pop(0)
            message["name"] = call["function"]["name"]
    if normal_call_ids:
        for call, normal_id in calls_with_normal_ids:
            call["id"] = normal_id


def copied_json(value: object, where: str, *, sort: bool = False, depth: int = 0) -> Any:
    """Return a deep copy of a JSON value without lone surrogates; ``sort`` sorts the keys of every object.

    Raises:
        RequestError: JSON cannot hold the value, or it is nested too deep; ``where`` names the value in the message.
    """
    require(depth <= _MAX_DEPTH, f"{where} is nested more than {_MAX_DEPTH} deep")
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return well_formed(value)
        case Mapping():
            require(all(isinstance(key, str) for key in value), f"{where}: the keys of an object must be text")
            items = sorted(value.items()) if sort else value.items()
            return {well_formed(key): copied_json(item, where, sort=sort, depth=depth + 1) for key, item in items}
        case list() | tuple():
            return [copied_json(item, where, sort=sort, depth=depth + 1) for item in value]
    raise RequestError(f"{where}: JSON cannot hold {value!r}")


def require(holds: bool, message: str) -> None:
    """Raise RequestError(``message``) unless ``holds``."""
    if not holds:
        raise RequestError(message)
