"""Tests of reading histories: the variants of OpenAI's format become one format, and a lost field is named."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.errors import RequestError
from mlx_k2.text.history_reader import History, read_history
from tests.examples import at_least

CALL = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def json_values(history: History) -> list[dict[str, Any]]:
    return [message.json_value() for message in history.messages]


def read_messages(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of a history of which no field is left out."""
    result = read_history(history, ())
    assert result.left_out == ()
    return json_values(result)


def nested_list(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("hello", "message 2 is not an object"),
        ({"role": "user", 3: "x"}, "message 2: the keys of an object must be text"),
        ({"content": "x"}, "message 2 has the role None: give one of system, user, assistant, tool"),
        ({"role": "<|im_end|>", "content": "x"}, r"message 2 has the role '<\|im_end\|>'"),
        ({"role": ["user"], "content": "x"}, r"message 2 has the role \['user'\]"),
        ({"role": "user", "content": 3}, r"message 2 \(user\): content must be text or a list of text parts"),
        ({"role": "user", "content": {"type": "text", "text": "x"}}, "content must be text or a list of text parts"),
        ({"role": "user", "content": [3]}, r"message 2 \(user\) has a part that is not text \(int\): leave it out"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "has an image, and mlx-k2 runs",
        ),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "has an image, and mlx-k2 runs"),
        ({"role": "user", "content": [{"type": "video_url"}]}, r"a part that is not text \(video_url\)"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, r"a part that is not text \(text\)"),
        ({"role": "user", "content": "x", "name": 3}, "name must be text"),
        ({"role": "assistant", "reasoning_content": 3}, "reasoning_content must be text"),
        ({"role": "tool", "content": "x"}, "needs the tool_call_id of its call"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "tool_call_id must be text"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "only an assistant calls tools"),
        ({"role": "assistant", "tool_calls": CALL}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": ["f"]}, r"message 2 \(assistant\): tool call 1 has no function"),
        ({"role": "assistant", "tool_calls": [CALL, {"id": "x"}]}, "tool call 2 has no function"),
        ({"role": "assistant", "tool_calls": [CALL | {"id": 3}]}, "tool call 1: its id must be text"),
        ({"role": "assistant", "function_call": {"arguments": "{}"}}, "tool call 1 has no function name"),
        ({"role": "assistant", "tool_calls": [CALL | {"function": {"arguments": ""}}]}, "call 1 has no function name"),
        ({"role": "user", "content": "x", "extra": b"x"}, "JSON cannot hold b'x'"),
        ({"role": "user", "content": "x", "extra": {3: "x"}}, "the keys of an object must be text"),
        ({"role": "user", "content": "x", "extra": nested_list(1000)}, "nested more than 100 deep"),
    ],
)
def test_a_malformed_message_is_named(message: Any, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        read_history([{"role": "user", "content": "fine"}, message], ("extra",))


def test_an_empty_list_of_messages_is_refused() -> None:
    with pytest.raises(RequestError, match="there is no message"):
        read_history([], ())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("", ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}], "a b"),
        ([{"text": "a"}], "a"),
        (["a", "b"], "ab"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}, "c"], "abc"),
        ("\ud83d\ude00 \ud800", "😀 \ufffd"),
    ],
)
def test_message_content_is_converted_to_text(content: Any, text: str) -> None:
    assert read_messages([{"role": "user", "content": content}]) == [{"role": "user", "content": text}]


def test_none_fields_and_empty_tool_calls_are_omitted() -> None:
    message: dict[str, Any] = {"role": "assistant", "content": "x", "name": None, "tool_calls": []}
    message["reasoning_content"] = None
    assert read_messages([message]) == [{"role": "assistant", "content": "x"}]
    assert read_messages([{"role": "assistant"}]) == [{"role": "assistant", "content": ""}]


def test_a_well_formed_message_is_copied_unchanged() -> None:
    arguments = {"z": [1, 2.5, None, True, {"b": 1, "a": 2}], "a": "x"}
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": "x", "tool_calls": [call]}
    (copy,) = read_messages([message])
    assert copy == message
    assert list(copy["tool_calls"][0]["function"]["arguments"]) == ["z", "a"]
    assert copy["tool_calls"][0]["function"]["arguments"] is not arguments


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "WHY"},
        {"reasoning": "WHY"},
        {"thinking": "WHY"},
        {"reasoning_content": None, "reasoning": "WHY"},
        {"reasoning": "WHY", "reasoning_details": [{"type": "reasoning.text", "text": "WHY"}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": "W"}, {"type": "reasoning.text", "text": "HY"}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "WHY"}]},
    ],
)
def test_reasoning_is_read_from_every_field_in_which_it_occurs(fields: dict[str, Any]) -> None:
    (message,) = read_messages([{"role": "assistant", "content": "x", **fields}])
    assert message == {"role": "assistant", "content": "x", "reasoning_content": "WHY"}


def test_a_reasoning_field_stays_for_a_template_that_reads_it_even_if_it_is_empty() -> None:
    history = [{"role": "assistant", "content": "", "reasoning": "", "reasoning_content": "old"}]
    assert json_values(read_history(history, ("reasoning",))) == history
    assert read_messages(history) == [{"role": "assistant", "content": "", "reasoning_content": "old"}]


def test_a_developer_message_is_read_as_a_system_message() -> None:
    assert read_messages([{"role": "developer", "content": "x"}]) == [{"role": "system", "content": "x"}]


def test_a_function_call_and_its_result_are_read_as_a_tool_call_and_its_result() -> None:
    function = {"name": "f", "arguments": '{"a": 1}'}
    _, call, result = read_messages(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "function_call": function},
            {"role": "function", "name": "f", "content": "7"},
        ]
    )
    assert call["tool_calls"] == [{"id": "functions.f:0", "type": "function", "function": function}]
    assert result == {"role": "tool", "name": "f", "content": "7", "tool_call_id": "functions.f:0"}


@pytest.mark.parametrize("arguments", [None, [1, {"b": 2, "a": 1}], "", 3, False])
def test_arguments_of_any_json_type_are_unchanged(arguments: Any) -> None:
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (message,) = read_messages([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert message["tool_calls"] == [call]


def test_a_call_without_arguments_has_an_empty_object() -> None:
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f"}}
    (message,) = read_messages([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


def test_calls_without_ids_are_numbered_and_results_without_ids_answer_them_by_name_or_in_order() -> None:
    def turn(*names: str) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": "{}"}} for name in names]}

    messages = read_messages(
        [
            {"role": "user", "content": "q"},
            turn("f"),
            {"role": "tool", "content": "1"},
            turn("f", "g", "f"),
            {"role": "tool", "name": "g", "content": "2"},
            {"role": "tool", "content": "3"},
            {"role": "tool", "tool_call_id": None, "content": "4"},
        ]
    )
    call_ids = [call["id"] for message in messages for call in message.get("tool_calls", ())]
    assert call_ids == ["functions.f:0", "functions.f:1", "functions.g:2", "functions.f:3"]
    result_ids = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    assert result_ids == ["functions.f:0", "functions.g:2", "functions.f:1", "functions.f:3"]


def test_a_result_without_an_id_and_without_an_unanswered_call_is_refused() -> None:
    history: list[dict[str, Any]] = [{"role": "assistant", "tool_calls": [CALL]}]
    history += [{"role": "tool", "tool_call_id": CALL["id"], "content": "1"}, {"role": "tool", "content": "2"}]
    with pytest.raises(RequestError, match=r"message 3 \(tool\): a tool's result needs the tool_call_id of its call"):
        read_history(history, ())


def test_fields_that_a_template_does_not_read_are_left_out_and_named() -> None:
    message = {"role": "assistant", "content": "x", "audio": {"id": "a"}, "refusal": "no", "partial": True, "name": "A"}
    result = read_history([{"role": "user", "content": "q"}, message], ("partial",))
    assert result.left_out == ("message 2 (assistant) has fields that the chat template does not read: audio, refusal",)
    assert result.messages[1].json_value() == {"role": "assistant", "content": "x", "partial": True, "name": "A"}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"refusal": None, "annotations": [], "audio": {}, "partial": False, "x": ""}, None),
        ({"reasoning": "new", "reasoning_content": "old"}, "reasoning"),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}, "reasoning_details"),
        ({"reasoning_details": [{"text": "x"}, {"data": "y"}]}, "reasoning_details"),
        ({"reasoning_details": [{"text": "x"}]}, None),
        ({"reasoning_details": 3, "function_call": "auto", "tool_calls": [CALL]}, "reasoning_details, function_call"),
        ({"function_call": {"name": "g"}, "tool_calls": [CALL]}, "function_call"),
        ({"function_call": {"name": "f", "arguments": "{}"}, "tool_calls": [CALL]}, None),
    ],
)
def test_a_field_is_named_only_if_its_content_is_lost(fields: dict[str, Any], names: str | None) -> None:
    left_out = read_history([{"role": "assistant", "content": "x", **fields}], ()).left_out
    assert [line.rpartition(": ")[2] for line in left_out] == ([names] if names else [])


values = st.one_of(st.none(), st.text(max_size=3), st.booleans(), st.lists(st.text(max_size=2), max_size=2))
calls = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": st.sampled_from("fg")}, optional={"arguments": values})},
        optional={"id": st.one_of(st.none(), st.sampled_from(["", "a", "functions.f:0"]))},
    ),
    max_size=2,
)
any_message = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant"])},
        optional={"content": st.none() | st.lists(st.text(max_size=2), max_size=2), "extra": values, "refusal": values},
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "tool_calls": calls},
        optional={"reasoning": st.text(max_size=2), "function_call": st.just({"name": "f", "arguments": "{}"})},
    ),
    st.fixed_dictionaries({"role": st.sampled_from(["tool", "function"])}, optional={"name": st.sampled_from("fg")}),
)


@given(st.lists(any_message, min_size=1, max_size=6), st.sampled_from([(), ("extra",), ("reasoning", "extra")]))
def test_reading_the_result_again_changes_nothing(history: list[dict[str, Any]], fields: tuple[str, ...]) -> None:
    try:
        first = read_history(history, fields)
    except RequestError as error:
        assert "needs the tool_call_id" in str(error)
        return
    second = read_history(json_values(first), fields)
    assert second.messages == first.messages
    assert second.left_out == ()
    assert all(call.id for message in first.messages for call in message.tool_calls)
    assert all(message.tool_call_id for message in first.messages if message.role == "tool")


KEYS = ["role", "content", "name", "tool_calls", "tool_call_id", "function_call", "function", "arguments", "id"]
KEYS += ["type", "text", "reasoning", "reasoning_content", "reasoning_details", "thinking", "summary", "extra"]
keys = st.sampled_from(KEYS)
words = st.sampled_from(["user", "assistant", "tool", "function", "text", "input_text", "image_url", ""])
json_with_keys = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(0, 1), words),
    lambda values: st.one_of(st.lists(values, max_size=2), st.dictionaries(keys, values, max_size=4)),
    max_leaves=6,
)
malformed_message = st.dictionaries(keys, json_with_keys, max_size=4).map(lambda fields: {"role": "assistant"} | fields)
malformed_history = st.lists(malformed_message, min_size=1, max_size=3)


@settings(max_examples=at_least(300))
@given(malformed_history, st.sampled_from([(), ("reasoning", "extra", "reasoning_details", "function_call")]))
def test_any_json_is_read_or_refused_with_the_number_of_its_message(
    history: list[dict[str, Any]], fields: tuple[str, ...]
) -> None:
    try:
        result = read_history(history, fields)
    except RequestError as error:
        assert str(error).startswith("message ")
    else:
        assert read_history(json_values(result), fields).messages == result.messages
        assert all(isinstance(message.content, str) for message in result.messages)
