"""Tests of tool results as plain text of bounded size, which names the omitted parts."""

from hypothesis import given
from hypothesis import strategies as st
from mcp import types

from mlx_k2.tools.outcome import Outcome
from mlx_k2.tools.toolbox import read_result


def text_content(text: str) -> types.TextContent:
    return types.TextContent(type="text", text=text)


@given(st.lists(st.text(max_size=20), max_size=4), st.integers(0, 60), st.booleans())
def test_a_result_is_complete_or_truncated_with_a_suffix(texts: list[str], max_chars: int, is_error: bool) -> None:
    complete = "\n".join(texts)
    content: list[types.ContentBlock] = [text_content(text) for text in texts]
    result = read_result(types.CallToolResult(content=content, is_error=is_error), max_chars)
    if len(complete) <= max_chars:
        assert result.text == complete
        assert result.outcome is (Outcome.FAILED if is_error else Outcome.DONE)
    else:
        beginning, _, suffix = result.text.rpartition("\n")
        assert beginning == complete[:max_chars]
        assert suffix == f"[cut here: these are the first {max_chars} of {len(complete)} characters]"
        assert result.outcome is (Outcome.FAILED if is_error else Outcome.CUT)


def test_content_that_is_not_text_is_replaced_by_its_description() -> None:
    parts: list[types.ContentBlock] = [
        text_content("a"),
        types.ImageContent(type="image", data="aGk=", mime_type="image/png"),
        types.EmbeddedResource(type="resource", resource=types.TextResourceContents(uri="file:///b", text="b")),
        types.EmbeddedResource(type="resource", resource=types.BlobResourceContents(uri="file:///c", blob="aGk=")),
        types.ResourceLink(type="resource_link", uri="file:///d", name="d"),
    ]
    assert read_result(types.CallToolResult(content=parts), max_chars=1000).text.splitlines() == [
        "a",
        "[not shown: image/png, 4 characters of base64]",
        "b",
        "[not shown: file:///c, binary]",
        "[d: file:///d]",
    ]


def test_a_result_with_only_structured_content_is_json() -> None:
    result = types.CallToolResult(content=[], structured_content={"a": [1, "é"]})
    assert read_result(result, max_chars=1000).text == '{"a":[1,"é"]}'


def test_a_result_without_content_is_empty_text() -> None:
    assert read_result(types.CallToolResult(content=[]), max_chars=1000).text == ""
