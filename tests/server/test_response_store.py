"""Tests of stored responses: the limit of bytes, the order of removal, owners, and conversations."""

from mlx_k2.json_text.parse import MAX_DEPTH
from mlx_k2.server.turn_store import ResponseStore, StoredResponse


def response(num_bytes: int) -> StoredResponse:
    """Return a response of ``num_bytes``, of which messages and answer have 4."""
    return StoredResponse(b"x" * (num_bytes - 4), b"[]", b"{}")


def are_stored(store: ResponseStore, owner: str, *ids: str) -> list[bool]:
    """Return for each id whether its response is stored. This counts as a use of the response."""
    return [store.find(owner, response_id) is not None for response_id in ids]


def test_the_response_used_longest_ago_is_removed_first() -> None:
    store = ResponseStore(max_bytes=30)
    for response_id in ("a", "b", "c"):
        store.keep("", response_id, response(10))
    assert are_stored(store, "", "a") == [True]
    store.keep("", "d", response(10))
    assert are_stored(store, "", "a", "b", "c", "d") == [True, False, True, True]


def test_the_responses_of_the_owner_with_the_most_bytes_are_removed_first() -> None:
    store = ResponseStore(max_bytes=40)
    store.keep("alice", "a", response(10))
    for number in range(9):
        store.keep("bob", f"b{number}", response(10))
    assert are_stored(store, "alice", "a") == [True]
    assert are_stored(store, "bob", "b5", "b6", "b7", "b8") == [False, True, True, True]


def test_a_response_that_is_larger_than_the_store_is_not_stored_and_removes_no_other() -> None:
    store = ResponseStore(max_bytes=30)
    store.keep("alice", "a", response(10))
    store.keep("bob", "b", response(40))
    assert are_stored(store, "alice", "a") == [True]
    assert are_stored(store, "bob", "b") == [False]


def test_a_response_belongs_to_its_owner_and_is_deleted_once() -> None:
    store = ResponseStore()
    store.keep("alice", "a", response(10))
    assert not store.delete("bob", "a")
    assert are_stored(store, "bob", "a") == [False]
    assert [store.delete("alice", "a") for _ in range(2)] == [True, False]


def test_a_stored_conversation_ends_with_the_answer() -> None:
    stored = StoredResponse(b"{}", b'[{"role":"user","content":"a"}]', b'{"role":"assistant","content":"b"}')
    assert [message["content"] for message in stored.conversation] == ["a", "b"]


def test_a_conversation_nested_deeper_than_a_request_may_be_is_read_again() -> None:
    content = b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH
    messages = b'[{"role":"user","content":%s}]' % content
    stored = StoredResponse(b"{}", messages, b'{"role":"assistant","content":"b"}')
    assert [message["role"] for message in stored.conversation] == ["user", "assistant"]
