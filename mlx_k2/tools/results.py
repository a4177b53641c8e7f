"""Conversion of a server's result to plain text of limited size. Knows neither servers nor models."""

import msgspec
from mcp import types

from mlx_k2.tools.outcome import Outcome, ToolResult


def read_result(result: types.CallToolResult, max_chars: int) -> ToolResult:
    """Return the result's text: its text parts, and a note for each other part.

    Text of more than ``max_chars`` characters is cut there, and a note of the cut is added. A result without parts
    becomes its structured content as JSON.
    """
    text = "\n".join(map(_part_text, result.content))
    if not result.content and result.structured_content is not None:
        text = msgspec.json.encode(result.structured_content).decode()
    outcome = Outcome.FAILED if result.is_error else Outcome.DONE
    if len(text) <= max_chars:
        return ToolResult(outcome, text)
    suffix = f"\n[cut here: these are the first {max_chars} of {len(text)} characters]"
    return ToolResult(Outcome.FAILED if result.is_error else Outcome.CUT, text[:max_chars] + suffix)


def _part_text(part: types.ContentBlock) -> str:
    match part:
        case types.TextContent():
            return part.text
        case types.EmbeddedResource(resource=types.TextResourceContents() as resource):
            return resource.text
        case types.EmbeddedResource(resource=resource):
            return f"[not shown: {resource.uri}, {resource.mime_type or 'binary'}]"
        case types.ResourceLink():
            return f"[{part.name}: {part.uri}]"
    return f"[not shown: {part.mime_type}, {len(part.data)} characters of base64]"
