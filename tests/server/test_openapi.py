"""Tests of the OpenAPI document: it is complete, and requests that follow or violate it cause no internal error."""

import re
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
from tests.server.http_client import CHAT_PATH
from tests.server.in_process import SteppedServer
from tests.server.server_process import Server

MAX_TOKENS = 3
"""The limit in each request, so that a valid one ends soon."""
# without the stream of the status, which does not end
schema = schemathesis.openapi.from_dict(openapi_document()).exclude(path="/v1/status/events")


def test_the_document_has_every_route_and_no_other() -> None:
    routes = Routes(ServerState(ServerOptions(), "m", ClusterActivity())).table()
    routes_and_methods = {
        (route.path.replace(":path}", "}"), method) for route in routes for method in route.methods or ()
    }
    documented = {(path, method.upper()) for path, methods in openapi_document()["paths"].items() for method in methods}
    # Starlette adds HEAD to each GET
    assert {(path, method) for path, method in routes_and_methods if method != "HEAD"} == documented


def test_every_reference_of_the_document_leads_to_a_schema(server: Server) -> None:
    answer = server.request("GET", "/openapi.json")
    assert answer.json == openapi_document()
    names = set(re.findall(r'"#/components/schemas/(\w+)"', answer.body.decode()))
    assert "ChatRequest" in names
    assert names <= answer.json["components"]["schemas"].keys()


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=scaled(10))
def test_each_request_of_schemathesis_is_answered_or_refused_as_documented(
    fast_server: SteppedServer, case: schemathesis.Case[Any]
) -> None:
    if isinstance(case.body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            limit = case.body.get(name)
            if limit is None or (isinstance(limit, int) and limit > MAX_TOKENS):
                case.body[name] = MAX_TOKENS
    response = case.call(base_url=fast_server.url)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        is_messages = case.path.startswith("/v1/messages")
        assert error.keys() == ({"message", "type"} if is_messages else {"message", "type", "param", "code"})
        assert error["message"]
        assert error["type"]
    if case.method == case.operation.method.upper():  # Schemathesis tries undocumented methods, too
        assert str(response.status_code) in openapi_document()["paths"][case.path][case.operation.method]["responses"]
    assert "defect" not in "\n".join(fast_server.lines)
    fast_server.lines.clear()


MESSAGE_FIELDS = {
    "role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]),
    "content": st.sampled_from(["", "a", "<|im_end|>", "\ud800", None, [{"type": "text", "text": "a"}], ["a"], 5]),
}
OPTIONAL_FIELDS: dict[Any, st.SearchStrategy[Any]] = {
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


@given(st.lists(st.fixed_dictionaries(MESSAGE_FIELDS, optional=OPTIONAL_FIELDS), max_size=4))
def test_each_conversation_is_answered_or_refused(fast_server: SteppedServer, messages: list[dict[str, Any]]) -> None:
    """The document has no schema of messages, so that Schemathesis makes none that are nearly right."""
    answer = fast_server.request("POST", CHAT_PATH, {"messages": messages, "max_tokens": 1})
    assert answer.status in (200, 400), answer.body
    if answer.status == 400:
        assert answer.error["type"] == "invalid_request_error"
