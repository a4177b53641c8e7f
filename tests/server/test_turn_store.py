"""Tests of stored turns: lost reasoning is put back, prompts keep their tokens, and another owner finds nothing."""

from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.server.turn_store import StoredTurn, TurnStore, new_turn_handle
from mlx_k2.text.message import CalledFunction, Message, MessageCall
from tests.server.chat_client import WEATHER_QUESTION, WEATHER_TOOLS
from tests.server.http_client import CHAT_PATH
from tests.server.server_process import Server

QUESTION = Message(role="user", content="a")
OTHER_QUESTION = Message(role="user", content="other")


def answer(content: str = "b", **fields: Any) -> Message:
    return Message(role="assistant", content=content, **fields)


def answer_with_call(arguments: object, content: str, number: int = 0) -> Message:
    return answer(content, tool_calls=(MessageCall(id=f"x{number}", function=CalledFunction("f", arguments)),))


def turn(reasoning: str = "thought", num_tokens: int = 3, message: Message | None = None) -> StoredTurn:
    """Return the turn of ``message``, by default of `answer()`, with ``reasoning`` added."""
    complete = msgspec.structs.replace(message or answer(), reasoning_content=reasoning)
    return StoredTurn(complete, array("I", range(num_tokens)))


def keep(store: TurnStore, owner: str = "", stored_turn: StoredTurn | None = None) -> str:
    """Store a turn as the answer to QUESTION and return its handle."""
    handle = new_turn_handle()
    store.keep(owner, handle, store.restore(owner, [QUESTION]).digest, stored_turn or turn())
    return handle


def test_lost_reasoning_is_put_back_for_its_owner_only() -> None:
    store = TurnStore()
    keep(store, "alice")
    for owner, reasoning in (("alice", "thought"), ("bob", None), ("", None)):
        restored = store.restore(owner, [QUESTION, answer(), Message(role="user", content="c")])
        assert restored.messages[1].reasoning_content == reasoning
        assert restored.turns == ({0: turn()} if reasoning else {})  # by the number of the answer


@pytest.mark.parametrize(
    "changed_messages",
    [
        [OTHER_QUESTION, answer()],
        [QUESTION, answer("other")],
        [Message(role="system", content="s"), QUESTION, answer()],
        [QUESTION, answer(reasoning_content="other")],
    ],
)
def test_a_changed_conversation_gets_nothing(changed_messages: list[Message]) -> None:
    store = TurnStore()
    keep(store)
    restored = store.restore("", changed_messages)
    assert (restored.turns, restored.messages) == ({}, changed_messages)


@pytest.mark.parametrize("arguments", ['{"b":[2],"a":1}', {"a": 1, "b": [2]}], ids=["text", "object"])
def test_arguments_in_another_form_and_lost_spaces_are_restored_as_they_were_sampled(arguments: object) -> None:
    store = TurnStore()
    sampled = answer_with_call('{"a": 1,  "b": [2]}', "\nb ")
    keep(store, stored_turn=turn(message=sampled))
    restored = store.restore("", [QUESTION, answer_with_call(arguments, "b", number=7)])
    assert restored.turns == {0: turn(message=sampled)}
    (call,) = restored.messages[1].tool_calls
    assert (restored.messages[1].content, call.function) == ("\nb ", sampled.tool_calls[0].function)
    assert call.id == "x7"


def test_an_answer_that_the_client_has_edited_stays_edited() -> None:
    store = TurnStore()
    handle = keep(store)
    message = store.restore("", [QUESTION, answer("edited")], turn_handles=[None, handle]).messages[1]
    assert (message.content, message.reasoning_content) == ("edited", "thought")


def test_the_turn_used_longest_ago_is_removed_for_a_new_one() -> None:
    store = TurnStore(max_bytes=3 * turn().num_bytes)
    owners = ["a", "b", "c", "d"]
    for owner in owners[:3]:
        keep(store, owner)
    assert store.restore("a", [QUESTION, answer()]).turns
    keep(store, "d")
    assert [bool(store.restore(owner, [QUESTION, answer()]).turns) for owner in owners] == [True, False, True, True]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.text(max_size=3000), st.integers(0, 2000)), max_size=20))
def test_the_store_never_holds_more_than_its_limit(turns: list[tuple[str, str, int]]) -> None:
    store = TurnStore(max_bytes=20_000)
    for number, (owner, reasoning, num_tokens) in enumerate(turns):
        keep(store, owner, turn(reasoning, num_tokens, answer(str(number % 3))))
        assert store._num_bytes == sum(stored_turn.num_bytes for stored_turn, _ in store._entries.values()) <= 20_000
        assert store._entries.keys() >= set(store._latest.values()), "a removed turn is still found"


def test_a_handle_finds_its_turn_after_the_conversation_has_changed() -> None:
    store = TurnStore()
    handles = [keep(store, stored_turn=turn(reasoning)) for reasoning in ("first", "second")]
    for handle, reasoning in zip(handles, ("first", "second"), strict=True):
        changed_messages = [OTHER_QUESTION, answer()]
        restored = store.restore("", changed_messages, turn_handles=[None, handle])
        assert restored.turns == {0: turn(reasoning)}
        assert restored.messages[1].reasoning_content == reasoning


@pytest.mark.parametrize("handle", ["unknown", "", 7, None, [], "x" * 100_000])
def test_an_unknown_or_malformed_handle_finds_nothing(handle: object) -> None:
    store = TurnStore()
    keep(store)
    assert store.restore("", [OTHER_QUESTION, answer()], turn_handles=[None, handle]).turns == {}


def test_another_owners_handle_finds_nothing() -> None:
    store = TurnStore()
    handle = keep(store, "alice")
    for owner, is_found in (("alice", True), ("bob", False), ("", False)):
        restored = store.restore(owner, [OTHER_QUESTION, answer()], turn_handles=[None, handle])
        assert bool(restored.turns) is is_found


def test_a_client_that_drops_reasoning_finds_its_answer_cached(server: Server) -> None:
    request: dict[str, Any] = {"tools": WEATHER_TOOLS, "temperature": 0}
    first = server.request("POST", CHAT_PATH, request | {"messages": WEATHER_QUESTION}).json
    message = first["choices"][0]["message"]
    assert message["reasoning_content"]
    (call,) = message["tool_calls"]
    turn_without_reasoning = {"role": "assistant", "content": None, "tool_calls": [{**call, "id": "call_1"}]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": '{"city": "Paris", "sky": "sunny"}'}
    messages = [*WEATHER_QUESTION, turn_without_reasoning, result]
    second = server.request("POST", CHAT_PATH, request | {"messages": messages}).json
    num_first_tokens = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    # the last sampled token, which no step computed, is not in the cache
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0.95 * num_first_tokens
