"""Checks of messages and tool declarations in OpenAI's format. Knows neither templates nor tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_k2.errors import RequestError
from mlx_k2.text.tokenizer import well_formed

ROLES = ("system", "user", "assistant", "tool")
_MAX_DEPTH = 100


def checked_messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    """Return copies of ``messages`` in a form that templates can rely on.

    Content is text: parts are joined, None becomes ''. Other fields that are None, and empty tool_calls, are left out.

    Raises:
        RequestError: there is no message, or one is malformed; names the message and the problem.
    """
    if not messages:
        raise RequestError("there is no message to answer")
    return [_message(message, f"message {number}") for number, message in enumerate(messages, start=1)]


def checked_tools(tools: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    """Return copies of tool declarations with the keys of every object sorted, as in Kimi K2 Thinking's training.

    Raises:
        RequestError: a declaration is not a JSON object.
    """
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tool {number} is not an object")
    return [_json_value(tool, f"tool {number}", sort=True) for number, tool in enumerate(tools, start=1)]


def _message(message: Mapping[str, object], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is not an object")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where} has the role {role!r}: give one of {', '.join(ROLES)}")
    where = f"{where} ({role})"
    fields = {name: value for name, value in message.items() if value is not None}
    fields["content"] = _content(fields.get("content", ""), where)
    if not fields.get("tool_calls"):
        fields.pop("tool_calls", None)
    for name in ("name", "reasoning_content", "tool_call_id"):
        _demand(isinstance(fields.get(name, ""), str), f"{where}: {name} must be text")
    _demand(role != "tool" or "tool_call_id" in fields, f"{where}: a tool's result needs the tool_call_id of its call")
    if "tool_calls" in fields:
        _demand(role == "assistant", f"{where}: only an assistant calls tools")
        _check_tool_calls(fields["tool_calls"], where)
    checked: dict[str, Any] = _json_value(fields, where)
    return checked


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    _demand(isinstance(content, list | tuple), f"{where}: content must be text or a list of text parts")
    assert isinstance(content, list | tuple)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise RequestError(f"{where}: content has a part that is not text; images and files cannot be read")
        texts.append(text)
    return "".join(texts)


def _check_tool_calls(calls: object, where: str) -> None:
    _demand(isinstance(calls, list | tuple), f"{where}: tool_calls must be a list")
    assert isinstance(calls, list | tuple)
    for number, call in enumerate(calls, start=1):
        what = f"{where}: tool call {number}"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping):
            raise RequestError(f"{what} has no function")
        _demand(isinstance(call.get("id"), str), f"{what} has no id")
        _demand(isinstance(function.get("name"), str), f"{what} has no function name")
        arguments = function.get("arguments")
        _demand(isinstance(arguments, str | Mapping), f"{what}: arguments must be JSON text or an object")


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RequestError(otherwise)


def _json_value(value: object, where: str, *, sort: bool = False, depth: int = 0) -> Any:
    """Return a deep copy of a JSON value, with its text made well-formed."""
    _demand(depth <= _MAX_DEPTH, f"{where} is nested more than {_MAX_DEPTH} deep")
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return well_formed(value)
        case Mapping():
            _demand(all(isinstance(key, str) for key in value), f"{where}: the keys of an object must be text")
            items = sorted(value.items()) if sort else value.items()
            return {well_formed(key): _json_value(item, where, sort=sort, depth=depth + 1) for key, item in items}
        case list() | tuple():
            return [_json_value(item, where, sort=sort, depth=depth + 1) for item in value]
    raise RequestError(f"{where}: JSON cannot hold {value!r}")
