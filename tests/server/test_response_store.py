"""Tests of stored responses: the bound on bytes, and whose responses give way."""

from mlx_k2.server.turn_store import ResponseStore, StoredResponse


def response(num_bytes: int) -> StoredResponse:
    return StoredResponse(b"x" * (num_bytes - 4), b"[]", b"{}")


def found(store: ResponseStore, owner: str, *ids: str) -> list[bool]:
    return [store.find(owner, one) is not None for one in ids]


def test_the_response_used_longest_ago_gives_way() -> None:
    store = ResponseStore(max_bytes=30)
    for one in ("a", "b", "c"):
        store.keep("", one, response(10))
    assert found(store, "", "a") == [True]
    store.keep("", "d", response(10))
    assert found(store, "", "a", "b", "c", "d") == [True, False, True, True]


def test_the_owner_with_the_most_bytes_gives_way_to_others() -> None:
    store = ResponseStore(max_bytes=40)
    store.keep("alice", "a", response(10))
    for number in range(9):
        store.keep("bob", f"b{number}", response(10))
    assert found(store, "alice", "a") == [True]
    assert found(store, "bob", "b5", "b6", "b7", "b8") == [False, True, True, True]


def test_a_response_that_is_larger_than_the_store_is_not_kept_and_nothing_else_is_lost() -> None:
    store = ResponseStore(max_bytes=30)
    store.keep("alice", "a", response(10))
    store.keep("bob", "b", response(40))
    assert found(store, "alice", "a") == [True]
    assert found(store, "bob", "b") == [False]


def test_a_response_belongs_to_its_owner_and_is_deleted_once() -> None:
    store = ResponseStore()
    store.keep("alice", "a", response(10))
    assert not store.delete("bob", "a")
    assert found(store, "bob", "a") == [False]
    assert [store.delete("alice", "a") for _ in range(2)] == [True, False]


def test_a_conversation_ends_with_the_answer() -> None:
    stored = StoredResponse(b"{}", b'[{"role":"user","content":"a"}]', b'{"role":"assistant","content":"b"}')
    assert [message["content"] for message in stored.conversation] == ["a", "b"]


def test_a_conversation_nested_as_deep_as_a_request_may_be_is_read_again() -> None:
    messages = b'[{"role":"user","content":' + b'{"a":' * 120 + b"1" + b"}" * 121 + b"]"
    stored = StoredResponse(b"{}", messages, b'{"role":"assistant","content":"b"}')
    assert [message["role"] for message in stored.conversation] == ["user", "assistant"]
