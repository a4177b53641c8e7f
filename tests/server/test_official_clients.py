"""Tests of OpenAI's client 1.x and the current one: synchronous, asynchronous, streamed and not, all agree."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.server import client_script
from tests.server.chat_client import SUM_QUESTION, WEATHER_QUESTION, WEATHER_TOOLS
from tests.server.forced_replies import (
    CALLS_REPLY,
    REPLIES,
    TEXT_REPLY,
    TOOLS,
    USER_MESSAGES,
    ForcedReply,
    forced_server,
)
from tests.server.in_process import SteppedServer
from tests.server.responses_events import FUNCTIONS
from tests.server.server_process import Server

OLD_CLIENT = "openai>=1.60,<2"
NUM_RESULTS = 2 * 4
"""Of two clients, in four ways each."""
CUT_REPLIES: dict[str, tuple[ForcedReply, dict[str, Any]]] = {
    "length": (ForcedReply(TEXT_REPLY, "length"), {"max_tokens": 6}),
    "stop": (ForcedReply(TEXT_REPLY, "stop"), {"stop": ["answer"]}),
}
"""Replies with the fields of the request that end them early."""
CASES: dict[str, tuple[ForcedReply, dict[str, Any]]] = {name: (reply, {}) for name, reply in REPLIES.items()}
CASES |= CUT_REPLIES


@pytest.fixture(scope="session")
def old_client(pytestconfig: pytest.Config) -> Path:
    """Return a folder with OpenAI's client 1.x, which `make clean` removes."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("openai-1")
    if not list(folder.glob("openai-1.*")):
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "--upgrade", OLD_CLIENT]
        if subprocess.run(install, capture_output=True, timeout=100).returncode:
            pytest.skip("needs OpenAI's client 1.x: a package index")
    return folder


@dataclass(frozen=True)
class Client:
    """A process that runs `client_script` with one version of OpenAI's client, and the version's first number."""

    process: subprocess.Popen[str]
    major_version: int

    def results(self, server: SteppedServer | Server, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the fields that the client receives in each of the four ways of `client_script`."""
        prompt = {"tools": FUNCTIONS} if "input" in request else {"messages": USER_MESSAGES, "tools": TOOLS}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([f"{server.url}/v1", {"model": "m"} | prompt | request]) + "\n")
        self.process.stdin.flush()
        results: list[dict[str, Any]] = json.loads(self.process.stdout.readline())
        assert "failure" not in results[0], results[0]["failure"]
        return results


@pytest.fixture(scope="module")
def clients(old_client: Path) -> Iterator[list[Client]]:
    """Yield the client 1.x and the current one."""
    with ExitStack() as stack:
        clients = []
        for variables in ({"PYTHONPATH": str(old_client)}, {}):
            command = [sys.executable, client_script.__file__]
            pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
            process = subprocess.Popen(command, env={**os.environ, **variables}, text=True, **pipes)
            stack.enter_context(process)
            assert process.stdout
            clients.append(Client(process, int(process.stdout.readline().partition(".")[0])))
        yield clients


def common_result(clients: list[Client], server: SteppedServer | Server, request: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that both clients receive. Assert that they are the same in each of the four ways."""
    results = [result for client in clients for result in client.results(server, request)]
    assert results == [results[0]] * NUM_RESULTS
    return results[0]


@pytest.mark.slow
@pytest.mark.parametrize("messages", [SUM_QUESTION, WEATHER_QUESTION], ids=["text", "call"])
def test_old_and_new_client_accumulate_the_body_of_the_builtin_model(
    server: Server, clients: list[Client], messages: list[Any]
) -> None:
    request = {"messages": messages, "tools": WEATHER_TOOLS, "temperature": 0}
    completion = common_result(clients, server, request)
    assert completion["content"] or completion["calls"]


@pytest.mark.slow
def test_one_client_is_1_x_and_the_other_is_newer(clients: list[Client]) -> None:
    old, new = clients
    assert old.major_version == 1
    assert new.major_version > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_old_and_new_client_accumulate_the_body_in_every_way(clients: list[Client], name: str) -> None:
    reply, fields = CASES[name]
    with forced_server(reply.text) as server:
        assert common_result(clients, server, fields)["finish_reason"] == reply.finish_reason


@pytest.mark.slow
def test_old_and_new_client_raise_the_error_in_the_middle(clients: list[Client]) -> None:
    """The stages fail in the first request and are not restarted, so that the server refuses the others."""
    for client in clients:
        with forced_server(CALLS_REPLY) as server:
            server.fail_once(index=20, restarts=False)
            assert client.results(server, {}) == [{"error": "unavailable"}] * 4


@pytest.mark.slow
def test_old_and_new_client_get_the_same_reply_with_a_restart_in_the_middle(clients: list[Client]) -> None:
    for client in clients:
        with forced_server(CALLS_REPLY) as server:
            undisturbed = client.results(server, {})
            server.fail_once(index=20, restarts=True)
            assert client.results(server, {}) == undisturbed
            assert len(server.harness.restarts) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_old_and_new_client_accumulate_the_body_of_a_response_in_every_way(clients: list[Client], name: str) -> None:
    request: dict[str, Any] = {"input": "a"}
    if name == "length":
        request["max_output_tokens"] = 6
    elif name == "stop":
        request["extra_body"] = {"stop": ["answer"]}  # the client has no such argument for responses
    reply, _ = CASES[name]
    with forced_server(reply.text) as server:
        response = common_result(clients, server, request)
    assert response["status"] == ("incomplete" if name == "length" else "completed")
    has_call = any(kind == "function_call" for kind, *_ in response["output"])
    assert has_call == (reply.finish_reason == "tool_calls")


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [True, False])
def test_old_and_new_client_agree_on_a_response_whose_stages_fail(clients: list[Client], restarts: bool) -> None:
    results = []
    for client in clients:
        with forced_server(CALLS_REPLY) as server:
            server.fail_once(index=20, restarts=restarts)
            results += client.results(server, {"input": "a"})
    assert results == [results[0]] * NUM_RESULTS
    if restarts:
        assert results[0]["status"] == "completed"
    else:
        assert results[0] == {"error": "unavailable"}
