"""Tests of stored turns: lost reasoning comes back, prompts keep their tokens, and other keys find nothing."""

from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.server.turn_store import StoredTurn, TurnStore, new_handle
from mlx_k2.text.message import CalledFunction, Message, MessageCall
from tests.server.server_process import Server
from tests.server.test_chat_completions import IN_PARIS, WEATHER

USER = Message(role="user", content="a")


def answer(content: str = "b", **fields: Any) -> Message:
    return Message(role="assistant", content=content, **fields)


def keep(store: TurnStore, message: Message, owner: str = "", stored: StoredTurn | None = None) -> str:
    """Store the answer to USER and return its handle."""
    handle = new_handle()
    store.keep(owner, handle, before(store, owner), message, stored or turn())
    return handle


def before(store: TurnStore, owner: str = "") -> bytes:
    return store.restore(owner, [USER]).digest


def turn(reasoning: str = "thought", num_tokens: int = 3) -> StoredTurn:
    return StoredTurn(reasoning, array("I", range(num_tokens)))


def test_lost_reasoning_is_put_back_for_its_owner_only() -> None:
    store = TurnStore()
    keep(store, answer(), "alice")
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
def test_a_changed_conversation_gets_nothing(changed: list[Message]) -> None:
    store = TurnStore()
    keep(store, answer())
    restored = store.restore("", changed)
    assert (restored.turns, restored.messages) == ({}, changed)


def test_arguments_may_be_written_otherwise_and_text_may_lose_its_space() -> None:
    def called(arguments: str, content: str) -> Message:
        return answer(content, tool_calls=(MessageCall(id="x", function=CalledFunction("f", arguments)),))

    store = TurnStore()
    keep(store, called('{"a": 1, "b": [2]}', "\nb "))
    assert store.restore("", [USER, called('{"b":[2],"a":1}', "b")]).turns == {0: turn()}


def test_the_turns_used_longest_ago_are_forgotten() -> None:
    store = TurnStore(max_bytes=3 * turn().num_bytes)
    owners = ["a", "b", "c", "d"]
    for owner in owners[:3]:
        keep(store, answer(), owner)
    assert store.restore("a", [USER, answer()]).turns
    keep(store, answer(), "d")
    assert [bool(store.restore(owner, [USER, answer()]).turns) for owner in owners] == [True, False, True, True]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.text(max_size=3000), st.integers(0, 2000)), max_size=20))
def test_the_store_never_holds_more_than_its_limit(turns: list[tuple[str, str, int]]) -> None:
    store = TurnStore(max_bytes=20_000)
    for number, (owner, reasoning, num_tokens) in enumerate(turns):
        keep(store, answer(str(number % 3)), owner, turn(reasoning, num_tokens))
        held = [entry.turn.num_bytes for entry in store._entries.values()]
        assert store._num_bytes == sum(held) <= 20_000
        assert store._entries.keys() >= set(store._latest.values())


def test_a_handle_finds_its_turn_after_the_conversation_has_changed() -> None:
    store = TurnStore()
    handles = [keep(store, answer(), stored=turn(reasoning)) for reasoning in ("first", "second")]
    for handle, reasoning in zip(handles, ("first", "second"), strict=True):
        changed = [Message(role="user", content="other"), answer()]
        restored = store.restore("", changed, [None, handle])
        assert restored.turns == {0: turn(reasoning)}
        assert restored.messages[1].reasoning_content == reasoning


@pytest.mark.parametrize("handle", ["unknown", "", 7, None, [], "x" * 100_000])
def test_a_handle_that_is_none_finds_nothing(handle: object) -> None:
    store = TurnStore()
    keep(store, answer())
    assert store.restore("", [Message(role="user", content="other"), answer()], [None, handle]).turns == {}


def test_another_owners_handle_finds_nothing() -> None:
    store = TurnStore()
    handle = keep(store, answer(), "alice")
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
    written = usage["prompt_tokens"] + usage["completion_tokens"]
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= 0.95 * written
