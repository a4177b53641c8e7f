"""One tool call of a reply: as the model wrote it, and what it means. Knows neither markers nor tools."""

import re
from dataclasses import dataclass
from typing import Any

import msgspec

_ID = re.compile(r"(?:functions\.)?(?P<name>.+?)(?::\d+)?", re.DOTALL)
_NO_NAME = re.compile(r"(?:\d*|[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})")
_ID_START = re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[\w.-]+?):\d+)\s*", re.DOTALL)
_MAX_QUOTED = 80
_FORM = "write each call as functions.NAME:NUMBER, and its arguments as one JSON object"


@dataclass(frozen=True)
class ToolCall:
    """A call to run, or, with ``error``, one that cannot be run."""

    written_id: str
    """What the model wrote for an id, without the space around it."""
    name: str
    """The tool; '' where the id names none."""
    arguments: str
    """Exactly what the model wrote."""
    values: dict[str, Any] | None
    """The arguments as JSON; None where they are none."""
    error: str | None = None
    """What is wrong with the call and how to write it, for the model to read."""


def read_call(header: str, arguments: str) -> ToolCall:
    """The call that a model wrote with ``header`` for its id; '' for ``arguments`` means no arguments.

    A call with a malformed part has an error that says which.
    """
    written_id = header.strip()
    match = _ID.fullmatch(written_id)
    name = match["name"] if match and not _NO_NAME.fullmatch(match["name"]) else ""
    values, problem = _values(arguments)
    if not name:
        problem = f"its id, {written_id[:_MAX_QUOTED]!r}, names no tool"
    return ToolCall(written_id, name, arguments, values if name else None, _error(problem))


def broken_call(text: str, problem: str) -> ToolCall:
    """What ought to have been a call and has not the form of one, as ``problem`` says."""
    match = _ID_START.match(text)
    if match is None:
        return ToolCall("", "", text, None, _error(problem))
    return ToolCall(match["id"], match["name"], text[match.end() :], None, _error(problem))


def _values(arguments: str) -> tuple[dict[str, Any] | None, str | None]:
    """The arguments as JSON, or None and what is wrong."""
    if not arguments.strip():
        return {}, None
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any]), None
    except msgspec.ValidationError:
        return None, "the arguments are no JSON object"
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        return None, f"the arguments are no JSON: {error}"
    except RecursionError:
        return None, "the arguments are nested too deep"


def _error(problem: str | None) -> str | None:
    return None if problem is None else f"The call was not run: {problem}; {_FORM}."
