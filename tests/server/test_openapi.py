"""Tests of the OpenAPI document, and of bodies made from its field names: none is a defect of the server."""

import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.server.openapi import document
from mlx_k2.server.routes import Routes
from mlx_k2.server.server_state import ServerOptions, ServerState
from tests.server.server_process import Server

TEXTS = st.sampled_from(
    ["", "a", "user", "assistant", "tool", "auto", "none", "function", "<|im_end|>", "\ud800", "日"]
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "name", "role"]), inner),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": TEXTS | VALUES, "content": TEXTS | VALUES},
        optional={
            "tool_calls": VALUES | st.lists(st.fixed_dictionaries({"id": VALUES, "function": VALUES}), max_size=2),
            "tool_call_id": VALUES,
            "reasoning_content": VALUES,
            "name": VALUES,
        },
    ),
    max_size=3,
)


def test_the_document_has_every_route_and_no_other() -> None:
    routes = Routes(ServerState(ServerOptions(), "m")).table()
    table = {(re.sub(r":path\}", "}", route.path), method) for route in routes for method in route.methods or ()}
    documented = {(path, method.upper()) for path, found in document()["paths"].items() for method in found}
    assert {entry for entry in table if entry[1] != "HEAD"} == documented


def test_every_reference_of_the_document_leads_to_a_schema(server: Server) -> None:
    answer = server.request("GET", "/openapi.json")
    assert answer.json == document()
    names = set(re.findall(r'"#/components/schemas/(\w+)"', answer.body.decode()))
    assert "ChatRequest" in names
    assert names <= answer.json["components"]["schemas"].keys()


def fields_of(name: str) -> list[str]:
    return list(document()["components"]["schemas"][name]["properties"])


@given(st.data())
@settings(max_examples=150)
def test_no_chat_request_is_a_defect(server: Server, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(fields_of("ChatRequest")), max_size=4, unique=True))
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    body |= {name: data.draw(MESSAGES | VALUES if name == "messages" else VALUES) for name in names}
    check(server, "/v1/chat/completions", body | {"max_completion_tokens": 1})


@given(st.sampled_from(["CompletionRequest", "TokenizeRequest", "DetokenizeRequest"]), st.data())
@settings(max_examples=100)
def test_no_other_body_is_a_defect(server: Server, name: str, data: st.DataObject) -> None:
    path = {"CompletionRequest": "/v1/completions", "TokenizeRequest": "/tokenize", "DetokenizeRequest": "/detokenize"}
    names = data.draw(st.lists(st.sampled_from(fields_of(name)), max_size=3, unique=True))
    body = {"prompt": "a", "tokens": [1]} | {field: data.draw(VALUES) for field in names}
    check(server, path[name], body | ({"max_tokens": 1} if name == "CompletionRequest" else {}))


def check(server: Server, path: str, body: dict[str, Any]) -> None:
    """Send a body; it is served, or refused with an error in the API's shape, and is no defect."""
    answer = server.request("POST", path, body)
    assert answer.status in (200, 400), answer.body
    if answer.status == 400:
        assert answer.error["type"] == "invalid_request_error"
    assert "defect" not in "\n".join(server.lines)
