"""Tests of the OpenAPI document: it is complete, and no request that follows or breaks it is a defect."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.server.cluster_activity import ClusterActivity
from mlx_k2.server.openapi import openapi_document
from mlx_k2.server.routes import Routes
from mlx_k2.server.server_state import ServerOptions, ServerState
from tests.examples import scaled
from tests.server.in_process import SteppedServer, stepped_server, stepping
from tests.server.server_process import Server

LIMIT = 3
"""Tokens of an answer, so that a valid request ends soon."""
schema = schemathesis.openapi.from_dict(openapi_document()).exclude(path="/v1/status/events")


@pytest.fixture(scope="module")
def ready_server() -> Iterator[SteppedServer]:
    """A server that answers at once, with tokens of no meaning."""
    with stepped_server(num_slots=4, chunk_tokens=512) as server, stepping(server):
        yield server


def test_the_document_has_every_route_and_no_other() -> None:
    routes = Routes(ServerState(ServerOptions(), "m", ClusterActivity())).table()
    table = {(re.sub(r":path\}", "}", route.path), method) for route in routes for method in route.methods or ()}
    documented = {(path, method.upper()) for path, found in openapi_document()["paths"].items() for method in found}
    assert {entry for entry in table if entry[1] != "HEAD"} == documented


def test_every_reference_of_the_document_leads_to_a_schema(server: Server) -> None:
    answer = server.request("GET", "/openapi.json")
    assert answer.json == openapi_document()
    names = set(re.findall(r'"#/components/schemas/(\w+)"', answer.body.decode()))
    assert "ChatRequest" in names
    assert names <= answer.json["components"]["schemas"].keys()


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=scaled(10))
def test_no_request_that_schemathesis_makes_is_a_defect(
    ready_server: SteppedServer, case: schemathesis.Case[Any]
) -> None:
    """Each is served, or refused with a documented status and an error in the API's shape."""
    if isinstance(case.body, dict):
        case.body |= {
            name: LIMIT
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")
            if _is_long(case.body.get(name))
        }
    response = case.call(base_url=ready_server.url)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        is_messages = case.path.startswith("/v1/messages")
        assert error.keys() == ({"message", "type"} if is_messages else {"message", "type", "param", "code"})
        assert error["message"]
        assert error["type"]
    if case.method == case.operation.method.upper():
        assert str(response.status_code) in openapi_document()["paths"][case.path][case.operation.method]["responses"]
    assert "unexpected error" not in "\n".join(ready_server.lines)
    ready_server.lines.clear()


def _is_long(limit: object) -> bool:
    return limit is None or (isinstance(limit, int) and limit > LIMIT)


MESSAGE_FIELDS = {
    "role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]),
    "content": st.sampled_from(["", "a", "<|im_end|>", "\ud800", None, [{"type": "text", "text": "a"}], ["a"], 5]),
}
MORE_FIELDS: dict[Any, st.SearchStrategy[Any]] = {
    "reasoning_content": st.sampled_from(["", "r", None, 5]),
    "tool_call_id": st.sampled_from(["functions.f:0", "x", "", None, 7]),
    "name": st.sampled_from(["bob", "", None, []]),
    "tool_calls": st.lists(
        st.fixed_dictionaries(
            {
                "id": st.sampled_from(["functions.f:0", "x", "", None, 7]),
                "function": st.sampled_from([{"name": "f", "arguments": "{"}, {"name": "f", "arguments": {}}, {}, "f"]),
            }
        ),
        max_size=2,
    ),
}


@given(st.lists(st.fixed_dictionaries(MESSAGE_FIELDS, optional=MORE_FIELDS), max_size=4))
def test_no_conversation_is_a_defect(ready_server: SteppedServer, messages: list[dict[str, Any]]) -> None:
    """The document has no schema of messages, so that the test generates almost valid ones."""
    answer = ready_server.request("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    assert answer.status in (200, 400), answer.body
    if answer.status == 400:
        assert answer.error["type"] == "invalid_request_error"
