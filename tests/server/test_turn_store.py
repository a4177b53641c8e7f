"""Tests of stored turns: lost reasoning comes back, prompts keep their tokens, and other keys find nothing."""

from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.server.turn_store import StoredTurn, TurnStore, new_turn_handle
from mlx_k2.text.message import CalledFunction, Message, MessageCall
from tests.server.server_process import Server
from tests.server.test_chat_completions import IN_PARIS, WEATHER

USER = Message(role="user", content="a")


def answer(content: str = "b", **fields: Any) -> Message:
    return Message(role="assistant", content=content, **fields)


def turn(reasoning: str = "thought", num_tokens: int = 3, message: Message | None = None) -> StoredTurn:
    message_with_reasoning = msgspec.structs.replace(message or answer(), reasoning_content=reasoning)
    return StoredTurn(message_with_reasoning, array("I", range(num_tokens)))


def keep(store: TurnStore, owner: str = "", stored: StoredTurn | None = None) -> str:
    """Store the answer to USER and return its handle."""
    handle = new_turn_handle()
    store.keep(owner, handle, store.restore(owner, [USER]).digest, stored or turn())
    return handle


def test_lost_reasoning_is_put_back_for_its_owner_only() -> None:
    store = TurnStore()
    keep(store, "alice")
    for owner, reasoning in (("alice", "thought"), ("bob", None), ("", None)):
        restored = store.restore(owner, [USER, answer(), Message(role="user", content="c")])
        assert restored.messages[1].reasoning_content == reasoning
        assert restored.turns == ({0: turn()} if reasoning else {})


@pytest.mark.parametrize(
    "changed",
    [
        [Message(role="user", content="other"), answer()],
        [USER, answer("other")],
        [Message(role="system", content="s"), USER, answer()],
        [USER, answer(reasoning_content="other")],
    ],
)
def test_a_changed_conversation_gets_no_stored_turn(changed: list[Message]) -> None:
    store = TurnStore()
    keep(store)
    restored = store.restore("", changed)
    assert (restored.turns, restored.messages) == ({}, changed)


def answer_with_call(arguments: object, content: str, number: int = 0) -> Message:
    return answer(content, tool_calls=(MessageCall(id=f"x{number}", function=CalledFunction("f", arguments)),))


@pytest.mark.parametrize("arguments", ['{"b":[2],"a":1}', {"a": 1, "b": [2]}], ids=["text", "object"])
def test_arguments_written_otherwise_and_lost_space_come_back_as_they_were_sampled(arguments: object) -> None:
    store = TurnStore()
    sampled_answer = answer_with_call('{"a": 1,  "b": [2]}', "\nb ")
    keep(store, stored=turn(message=sampled_answer))
    restored = store.restore("", [USER, answer_with_call(arguments, "b", number=7)])
    assert restored.turns == {0: turn(message=sampled_answer)}
    (call,) = restored.messages[1].tool_calls
    assert (restored.messages[1].content, call.function) == ("\nb ", sampled_answer.tool_calls[0].function)
    assert call.id == "x7"


def test_an_answer_that_the_client_has_edited_stays_edited() -> None:
    store = TurnStore()
    handle = keep(store)
    restored = store.restore("", [USER, answer("edited")], [None, handle]).messages[1]
    assert (restored.content, restored.reasoning_content) == ("edited", "thought")


def test_the_least_recently_used_turns_are_removed() -> None:
    store = TurnStore(max_bytes=3 * turn().num_bytes)
    owners = ["a", "b", "c", "d"]
    for owner in owners[:3]:
        keep(store, owner)
    assert store.restore("a", [USER, answer()]).turns
    keep(store, "d")
    assert [bool(store.restore(owner, [USER, answer()]).turns) for owner in owners] == [True, False, True, True]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.text(max_size=3000), st.integers(0, 2000)), max_size=20))
def test_the_store_never_holds_more_than_its_limit(turns: list[tuple[str, str, int]]) -> None:
    store = TurnStore(max_bytes=20_000)
    for number, (owner, reasoning, num_tokens) in enumerate(turns):
        keep(store, owner, turn(reasoning, num_tokens, answer(str(number % 3))))
        sizes = [stored_turn.num_bytes for stored_turn, _ in store._entries.values()]
        assert store._num_bytes == sum(sizes) <= 20_000
        assert store._entries.keys() >= set(store._latest.values())


def test_a_handle_finds_its_turn_after_the_conversation_has_changed() -> None:
    store = TurnStore()
    handles = [keep(store, stored=turn(reasoning)) for reasoning in ("first", "second")]
    for handle, reasoning in zip(handles, ("first", "second"), strict=True):
        changed = [Message(role="user", content="other"), answer()]
        restored = store.restore("", changed, [None, handle])
        assert restored.turns == {0: turn(reasoning)}
        assert restored.messages[1].reasoning_content == reasoning


@pytest.mark.parametrize("handle", ["unknown", "", 7, None, [], "x" * 100_000])
def test_a_value_that_is_no_turn_handle_finds_nothing(handle: object) -> None:
    store = TurnStore()
    keep(store)
    assert store.restore("", [Message(role="user", content="other"), answer()], [None, handle]).turns == {}


def test_another_owners_handle_finds_nothing() -> None:
    store = TurnStore()
    handle = keep(store, "alice")
    for owner, is_found in (("alice", True), ("bob", False), ("", False)):
        restored = store.restore(owner, [Message(role="user", content="other"), answer()], [None, handle])
        assert bool(restored.turns) is is_found


def test_a_client_that_drops_reasoning_finds_the_whole_answer_cached(server: Server) -> None:
    messages: list[Any] = list(IN_PARIS)
    request: dict[str, Any] = {"model": "any", "tools": WEATHER, "temperature": 0}
    first = server.client.chat.completions.create(messages=messages, **request).to_dict()
    usage: Any = first["usage"]
    message: Any = first["choices"][0]["message"]
    assert message["reasoning_content"]
    (call,) = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"city": "Paris", "sky": "sunny"}'}
    sent_back = {"role": "assistant", "content": None, "tool_calls": [{**call, "id": "call_1"}]}
    messages += [sent_back, {**result, "tool_call_id": "call_1"}]
    second = server.client.chat.completions.create(messages=messages, **request)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    message_with_reasoning = usage["prompt_tokens"] + usage["completion_tokens"]
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= 0.95 * message_with_reasoning
