"""Tests of replies of every kind, whose tokens are forced at the sampler: through scheduler, slots, engine and HTTP."""

import pytest
from openai import APIError

from tests.server.forced_replies import CALLS_REPLY, REPLIES, forced_server, reply_fields, streamed_reply_fields


@pytest.mark.parametrize("name", REPLIES)
def test_the_stream_of_every_kind_of_reply_joins_to_the_reply_without_streaming(name: str) -> None:
    with forced_server(REPLIES[name].text) as server:
        body = reply_fields(server.client)
        assert streamed_reply_fields(server.client) == body
        assert body["finish_reason"] == REPLIES[name].finish_reason
        if "calls" in name:
            assert body["calls"] == [
                ("functions.f:0", "f", '{"text": "one two three four five"}'),
                ("functions.mcp__a-b.c:1", "mcp__a-b.c", '{"number": 5777}'),
            ]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 3, 20, 40])
def test_a_restart_in_the_middle_of_a_reply_changes_nothing(index: int) -> None:
    with forced_server(CALLS_REPLY) as server:
        body = reply_fields(server.client)
        assert len(server.stage_maker.token_ids) > index
        server.fail_once(index, restarts=True)
        assert streamed_reply_fields(server.client) == body
        assert len(server.harness.restarts) == 1


def test_an_error_in_the_middle_reaches_the_client_as_an_error() -> None:
    with forced_server(CALLS_REPLY) as server:
        server.fail_once(index=20, restarts=False)
        with pytest.raises(APIError) as caught:
            streamed_reply_fields(server.client)
        assert caught.value.code == "unavailable"


def test_parallel_tool_calls_false_ends_the_answer_after_one_call() -> None:
    with forced_server(CALLS_REPLY) as server:
        body = reply_fields(server.client, parallel_tool_calls=False)
        assert [call_id for call_id, _, _ in body["calls"]] == ["functions.f:0"]
        assert body["finish_reason"] == "tool_calls"
        assert streamed_reply_fields(server.client, parallel_tool_calls=False) == body
