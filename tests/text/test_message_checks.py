from typing import Any

import pytest

from mlx_k2.errors import RequestError
from mlx_k2.text.message_checks import checked_messages, checked_tools

CALL = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("hello", "message 2 is not an object"),
        ({"content": "x"}, "message 2 has the role None: give one of system, user, assistant, tool"),
        ({"role": "<|im_end|>", "content": "x"}, "message 2 has the role '<|im_end|>'"),
        ({"role": ["user"], "content": "x"}, r"message 2 has the role \['user'\]"),
        ({"role": "user", "content": 3}, r"message 2 \(user\): content must be text or a list of text parts"),
        ({"role": "user", "content": {"type": "text", "text": "x"}}, "content must be text or a list of text parts"),
        ({"role": "user", "content": ["x"]}, "a part that is not text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "a part that is not text"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "a part that is not text"),
        ({"role": "user", "content": "x", "name": 3}, "name must be text"),
        ({"role": "assistant", "reasoning_content": 3}, "reasoning_content must be text"),
        ({"role": "tool", "content": "x"}, "needs the tool_call_id of its call"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "tool_call_id must be text"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "only an assistant calls tools"),
        ({"role": "assistant", "tool_calls": CALL}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": ["f"]}, r"message 2 \(assistant\): tool call 1 has no function"),
        ({"role": "assistant", "tool_calls": [CALL, {"id": "x"}]}, "tool call 2 has no function"),
        ({"role": "assistant", "tool_calls": [{"function": CALL["function"]}]}, "tool call 1 has no id"),
        ({"role": "assistant", "tool_calls": [CALL | {"function": {"arguments": ""}}]}, "call 1 has no function name"),
        ({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f"}}]}, "arguments must be JSON text or"),
        ({"role": "user", "content": "x", "extra": b"x"}, "JSON cannot hold b'x'"),
        ({"role": "user", "content": "x", "extra": {3: "x"}}, "the keys of an object must be text"),
        ({"role": "user", "content": "x", "extra": deep(1000)}, "nested more than 100 deep"),
    ],
)
def test_a_malformed_message_is_named(message: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint.replace("|", r"\|")):
        checked_messages([{"role": "user", "content": "fine"}, message])


def test_an_empty_list_of_messages_is_refused() -> None:
    with pytest.raises(RequestError, match="there is no message"):
        checked_messages([])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("", ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}], "a b"),
        ([{"text": "a"}], "a"),
        ("\ud83d\ude00 \ud800", "😀 \ufffd"),
    ],
)
def test_message_content_is_converted_to_text(content: Any, text: str) -> None:
    assert checked_messages([{"role": "user", "content": content}]) == [{"role": "user", "content": text}]


def test_none_fields_and_empty_tool_calls_are_omitted() -> None:
    message: dict[str, Any] = {"role": "assistant", "content": "x", "name": None, "tool_calls": []}
    message["reasoning_content"] = None
    assert checked_messages([message]) == [{"role": "assistant", "content": "x"}]
    assert checked_messages([{"role": "assistant"}]) == [{"role": "assistant", "content": ""}]


def test_a_well_formed_message_is_copied_unchanged() -> None:
    arguments = {"z": [1, 2.5, None, True, {"b": 1, "a": 2}], "a": "x"}
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": "x", "tool_calls": [call], "extra": {"k": "v"}}
    (copy,) = checked_messages([message])
    assert copy == message
    assert list(copy["tool_calls"][0]["function"]["arguments"]) == ["z", "a"]
    assert copy["tool_calls"][0]["function"]["arguments"] is not arguments


def test_keys_of_tool_declarations_are_sorted_and_lists_keep_their_order() -> None:
    (tool,) = checked_tools([{"b": [{"z": 1, "y": {"d": 1, "c": 2}}, "x", "a"], "a": 1}])
    assert repr(tool) == "{'a': 1, 'b': [{'y': {'c': 2, 'd': 1}, 'z': 1}, 'x', 'a']}"


@pytest.mark.parametrize("tool", ["f", None, 3, ["f"]])
def test_a_tool_that_is_not_an_object_is_refused(tool: Any) -> None:
    with pytest.raises(RequestError, match="tool 2 is not an object"):
        checked_tools([{}, tool])
