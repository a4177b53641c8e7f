"""Tests of replies of every kind, whose tokens are forced at the sampler: through scheduler, slots, engine and HTTP."""

import pytest
from openai import APIError

from tests.server.forced_replies import REPLIES, accumulate, body_of, forced_server
from tests.server.in_process import stepping


@pytest.mark.parametrize("name", REPLIES)
def test_the_client_accumulates_the_body_of_every_kind_of_reply(name: str) -> None:
    reply, finish_reason = REPLIES[name]
    with forced_server(reply) as (server, client, _), stepping(server):
        body = body_of(client)
        assert accumulate(client) == body
        assert body["finish_reason"] == finish_reason
        if "calls" in name:
            arguments = ('{"text": "one two three four five"}', '{"number": 5777}')
            ids = ("functions.f:0", "functions.mcp__a-b.c:1")
            assert body["calls"] == list(zip(ids, ("f", "mcp__a-b.c"), arguments, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 3, 20, 40])
def test_a_restart_in_the_middle_of_a_reply_changes_nothing(at: int) -> None:
    with forced_server(REPLIES["calls"][0]) as (server, client, stages), stepping(server):
        body = body_of(client)
        assert len(stages.token_ids) > 40
        stages.fail_at = at
        server.tokens.may_restart.set()
        assert accumulate(client) == body
        assert len(server.tokens.restarts) == 1


def test_an_error_in_the_middle_reaches_the_client_as_an_error() -> None:
    with forced_server(REPLIES["calls"][0]) as (server, client, stages), stepping(server):
        stages.fail_at = 20
        server.tokens.cancel()
        with pytest.raises(APIError) as caught:
            accumulate(client)
        assert caught.value.code == "unavailable"


def test_parallel_tool_calls_false_ends_the_answer_after_one_call() -> None:
    with forced_server(REPLIES["calls"][0]) as (server, client, _), stepping(server):
        body = body_of(client, parallel_tool_calls=False)
        assert [one[0] for one in body["calls"]] == ["functions.f:0"]
        assert body["finish_reason"] == "tool_calls"
        assert accumulate(client, parallel_tool_calls=False) == body
