"""Tool calls of a reply: the text that the model wrote, and its parsed form. Knows neither markers nor tools."""

import re
from dataclasses import dataclass
from typing import Any

from mlx_k2.json_text.parse import JsonError, parse_json

UNKNOWN = "unknown"
"""The name of the tool for a call whose id has no name."""
_ID = re.compile(r"(?P<prefix>functions\.)?(?P<name>.+?)(?P<number>:\d+)?", re.DOTALL)
# An id that is only a number or a UUID has no name, but the NAME in functions.NAME:NUMBER may be a number or a UUID.
_NUMBER_OR_UUID = re.compile(r"(?:\d+|[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})")
_ID_START = re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[\w.-]+?):\d+)\s*")
"""The id at the start of a broken call's text. No marker follows it there: only its number shows where it ends."""
_MAX_QUOTED_CHARS = 80
_CORRECT_FORM = "write each call as functions.NAME:NUMBER, and its arguments as one JSON object"


@dataclass(frozen=True)
class ToolCall:
    """A tool call to run or, if ``error`` is set, a call that cannot be run."""

    written_id: str
    """The id that the model wrote, without the space around it."""
    name: str
    """The tool's name; '' if the id has none."""
    arguments: str
    """The exact text that the model wrote."""
    values: dict[str, Any] | None
    """The parsed arguments; None if the call cannot be run."""
    error: str | None = None
    """The problem of the call and the correct form, as text for the model; None if the call can be run."""


def call_id(name: str, number: int) -> str:
    """Return the id of a call of the tool ``name``; ``number`` counts the calls of the conversation from 0."""
    return f"functions.{name or UNKNOWN}:{number}"


def tool_name(header: str) -> str:
    """Return the name of the tool in ``header``, the id that a model wrote; '' if it names none."""
    match = _ID.fullmatch(header.strip())
    if match is None:
        return ""
    is_complete = match["prefix"] is not None and match["number"] is not None
    return match["name"] if is_complete or not _NUMBER_OR_UUID.fullmatch(match["name"]) else ""


def read_call(header: str, arguments: str) -> ToolCall:
    """Return the call that a model wrote with ``header`` as its id. Blank ``arguments`` are read as {}.

    A call with a malformed id or malformed arguments has an ``error``.
    """
    written_id, name = header.strip(), tool_name(header)
    values, problem = _values(arguments)
    if not name:
        problem = f"its id, {written_id[:_MAX_QUOTED_CHARS]!r}, names no tool"
    return ToolCall(written_id, name, arguments, values if name else None, _error(problem))


def broken_call(text: str, problem: str) -> ToolCall:
    """Return a call that cannot be run because of ``problem``. ``text`` is its text without markers."""
    match = _ID_START.match(text)
    if match is None:
        return ToolCall("", "", text, None, _error(problem))
    return ToolCall(match["id"], match["name"], text[match.end() :], None, _error(problem))


def _values(arguments: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return the parsed arguments and None; or None and the problem."""
    if not arguments.strip():
        return {}, None
    try:
        values = parse_json(arguments, is_lenient=True)
    except JsonError as error:
        return None, f"the arguments are not JSON: {error}"
    return (values, None) if isinstance(values, dict) else (None, "the arguments are not a JSON object")


def _error(problem: str | None) -> str | None:
    return None if problem is None else f"The call was not run: {problem}; {_CORRECT_FORM}."
