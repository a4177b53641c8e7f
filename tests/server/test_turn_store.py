"""Tests of stored turns: lost reasoning comes back, prompts keep their tokens, and other keys find nothing."""

from array import array
from typing import Any

import pytest

from mlx_k2.server.turn_store import TURN_TOKENS, StoredTurn, TurnStore
from mlx_k2.text.message import CalledFunction, Message, MessageCall
from tests.server.server_process import Server
from tests.server.test_chat_completions import IN_PARIS, WEATHER

USER = Message(role="user", content="a")


def answer(content: str = "b", **fields: Any) -> Message:
    return Message(role="assistant", content=content, **fields)


def before(store: TurnStore, owner: str = "") -> bytes:
    return store.restore(owner, [USER]).digest


def turn(reasoning: str = "thought", num_tokens: int = 3) -> StoredTurn:
    return StoredTurn(reasoning, array("I", range(num_tokens)))


def test_lost_reasoning_is_put_back_for_its_owner_only() -> None:
    store = TurnStore()
    store.keep(before(store, "alice"), answer(), turn())
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
    store.keep(before(store), answer(), turn())
    restored = store.restore("", changed)
    assert (restored.turns, restored.messages) == ({}, changed)


def test_arguments_may_be_written_otherwise_and_text_may_lose_its_space() -> None:
    def called(arguments: str, content: str) -> Message:
        return answer(content, tool_calls=(MessageCall(id="x", function=CalledFunction("f", arguments)),))

    store = TurnStore()
    store.keep(before(store), called('{"a": 1, "b": [2]}', "\nb "), turn())
    assert store.restore("", [USER, called('{"b":[2],"a":1}', "b")]).turns == {0: turn()}


def test_the_turns_used_longest_ago_are_forgotten() -> None:
    store = TurnStore(max_tokens=2 * TURN_TOKENS + 10)
    for number in range(4):
        store.keep(before(store, str(number)), answer(), turn(num_tokens=4))
    found = [bool(store.restore(str(number), [USER, answer()]).turns) for number in range(4)]
    assert found == [False, False, True, True]


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
