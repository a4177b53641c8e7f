"""Tests of stored turns: lost reasoning comes back, prompts keep their tokens, and other keys find nothing."""

from array import array
from typing import Any

import pytest

from mlx_k2.server.turn_store import StoredTurn, TurnStore
from tests.server.server_process import Server
from tests.server.test_chat_completions import IN_PARIS, WEATHER

USER = {"role": "user", "content": "a"}


def answer(content: str = "b", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | fields


def turn(reasoning: str = "thought", num_tokens: int = 3) -> StoredTurn:
    return StoredTurn(reasoning, array("I", range(num_tokens)))


def test_lost_reasoning_is_put_back_for_its_owner_only() -> None:
    store = TurnStore()
    before, _ = store.restore("alice", [dict(USER)])
    store.keep(before, answer(), turn())
    for owner, reasoning in (("alice", "thought"), ("bob", None), ("", None)):
        messages = [dict(USER), answer(), {"role": "user", "content": "c"}]
        _, found = store.restore(owner, messages)
        assert messages[1].get("reasoning_content") == reasoning
        assert found == ({0: turn()} if reasoning else {})


@pytest.mark.parametrize(
    "changed",
    [
        [{"role": "user", "content": "other"}, answer()],
        [USER, answer("other")],
        [{"role": "system", "content": "s"}, USER, answer()],
        [USER, answer(reasoning_content="other")],
    ],
)
def test_a_changed_conversation_gets_nothing(changed: list[dict[str, Any]]) -> None:
    store = TurnStore()
    before, _ = store.restore("", [dict(USER)])
    store.keep(before, answer(), turn())
    messages = [dict(message) for message in changed]
    assert store.restore("", messages)[1] == {}
    assert messages == changed


def test_arguments_may_be_written_otherwise_and_text_may_lose_its_space() -> None:
    def called(arguments: str, content: str) -> dict[str, Any]:
        return answer(content, tool_calls=[{"id": "x", "function": {"name": "f", "arguments": arguments}}])

    store = TurnStore()
    before, _ = store.restore("", [dict(USER)])
    store.keep(before, called('{"a": 1, "b": [2]}', "\nb "), turn())
    assert store.restore("", [dict(USER), called('{"b":[2],"a":1}', "b")])[1] == {0: turn()}


def test_the_turns_used_longest_ago_are_forgotten() -> None:
    store = TurnStore(max_tokens=10)
    digests = []
    for number in range(4):
        before, _ = store.restore(str(number), [dict(USER)])
        digests.append(before)
        store.keep(before, answer(), turn(num_tokens=4))
    found = [bool(store.restore(str(number), [dict(USER), answer()])[1]) for number in range(4)]
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
