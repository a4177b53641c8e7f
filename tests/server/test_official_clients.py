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
from tests.server.forced_replies import REPLIES, TOOLS, USER, forced_server
from tests.server.in_process import SteppedServer, stepping
from tests.server.responses_events import FUNCTIONS
from tests.server.server_process import Server
from tests.server.test_chat_completions import IN_PARIS, QUESTION, WEATHER

OLD = "openai>=1.60,<2"
ENDS: dict[str, dict[str, Any]] = {
    **{name: {} for name in REPLIES},
    "length": {"max_tokens": 6},
    "stop": {"stop": ["answer"]},
}


@pytest.fixture(scope="session")
def old_client(pytestconfig: pytest.Config) -> Path:
    """Return a folder with OpenAI's client 1.x, which `make clean` removes."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("openai-1")
    if not list(folder.glob("openai-1.*")):
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "--upgrade", OLD]
        if subprocess.run(install, capture_output=True, timeout=100).returncode:
            pytest.skip("needs OpenAI's client 1.x: a package index")
    return folder


@dataclass(frozen=True)
class Client:
    """A process that runs the program of requests with one version of OpenAI's client."""

    process: subprocess.Popen[str]

    def results(self, server: SteppedServer | Server, request: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        """Return the client's version, and what it accumulates in each of the four ways."""
        defaults = {"tools": FUNCTIONS} if "input" in request else {"messages": USER, "tools": TOOLS}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([f"{server.url}/v1", {"model": "m"} | defaults | request]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "failure" not in answer, answer["failure"]
        return answer["version"].partition(".")[0], answer["results"]


@pytest.fixture(scope="module")
def clients(old_client: Path) -> Iterator[list[Client]]:
    """Yield the client 1.x and the current one."""
    with ExitStack() as stack:
        clients = []
        for changes in ({"PYTHONPATH": str(old_client)}, {}):
            command = [sys.executable, client_script.__file__]
            pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
            process = subprocess.Popen(command, env={**os.environ, **changes}, text=True, **pipes)
            clients.append(Client(stack.enter_context(process)))
        yield clients


@pytest.mark.slow
@pytest.mark.parametrize("messages", [QUESTION, IN_PARIS], ids=["text", "call"])
def test_old_and_new_client_accumulate_the_body_of_the_builtin_model(
    server: Server, clients: list[Client], messages: list[Any]
) -> None:
    request = {"messages": messages, "tools": WEATHER, "temperature": 0}
    (first, *others) = [result for client in clients for result in client.results(server, request)[1]]
    assert others == [first] * 7
    assert first["content"] or first["calls"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_old_and_new_client_accumulate_the_body_in_every_way(clients: list[Client], name: str) -> None:
    reply, finish_reason = REPLIES.get(name, (REPLIES["text"][0], name))
    with forced_server(reply) as (server, _, _), stepping(server):
        versions, results = zip(*(client.results(server, ENDS[name]) for client in clients), strict=True)
    assert versions[0] == "1"
    assert int(versions[1]) > 1
    (first, *others) = [result for client_results in results for result in client_results]
    assert others == [first] * 7
    assert first["finish_reason"] == finish_reason


@pytest.mark.slow
def test_old_and_new_client_raise_the_error_in_the_middle(clients: list[Client]) -> None:
    """The stages fail at token 20 and are not restarted: two clients, one request each, and then none is served."""
    for client in clients:
        with forced_server(REPLIES["calls"][0]) as (server, _, stages), stepping(server):
            stages.fail_at = 20
            server.tokens.cancel()
            _, results = client.results(server, {})
        assert results == [{"error": "unavailable"}] * 4


@pytest.mark.slow
def test_old_and_new_client_see_nothing_of_a_restart_in_the_middle(clients: list[Client]) -> None:
    for client in clients:
        with forced_server(REPLIES["calls"][0]) as (server, _, stages), stepping(server):
            _, undisturbed = client.results(server, {})
            stages.fail_at = 20
            server.tokens.may_restart.set()
            _, results = client.results(server, {})
            assert len(server.tokens.restarts) == 1
        assert results == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ENDS, "restart", "error"])
def test_old_and_new_client_accumulate_the_body_of_a_response_in_every_way(clients: list[Client], name: str) -> None:
    """In "restart" the stages fail once at token 20. In "error" they fail in each client's first request."""
    ends: dict[str, dict[str, Any]] = {"length": {"max_output_tokens": 6}, "stop": {"extra_body": {"stop": ["answer"]}}}
    request: dict[str, Any] = {"input": "a"} | ends.get(name, {})
    reply, finish_reason = REPLIES.get(name, REPLIES["text" if name in ENDS else "calls"])
    results: list[dict[str, Any]] = []
    for client in clients:
        with forced_server(reply) as (server, _, stages), stepping(server):
            if name in ("restart", "error"):
                stages.fail_at = 20
                (server.tokens.cancel if name == "error" else server.tokens.may_restart.set)()
            results += client.results(server, request)[1]
    first, *others = results
    assert others == [first] * 7
    if name == "error":
        assert first == {"error": "unavailable"}
    else:
        assert first["status"] == ("incomplete" if name == "length" else "completed")
        assert any(item[0] == "function_call" for item in first["output"]) == (finish_reason == "tool_calls")
