"""Tests with real MCP servers over stdio and HTTP: every call has a result, and no process is left."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from anyio.abc import TaskGroup
from hypothesis import example, given
from hypothesis import strategies as st
from mcp import types

from mlx_k2.errors import ToolsError
from mlx_k2.text.tool_call import call_id, read_call
from mlx_k2.tools.connection import Connection
from mlx_k2.tools.outcome import Outcome, ToolResult
from mlx_k2.tools.servers import HttpServer, Server, StdioServer
from mlx_k2.tools.toolbox import Limits, ToolBox, _with_unique_names, open_toolbox
from tests.processes import started_processes

pytestmark = pytest.mark.timeout(60)

SCRIPT = Path(__file__).with_name("mcp_server.py")
# The start timeout allows for a busy machine. SHORT_TIMEOUT ends a hanging call after 0.5 s.
LIMITS = Limits(start_timeout_s=40.0, call_timeout_s=20.0, max_result_chars=100)
SHORT_TIMEOUT = Limits(start_timeout_s=40.0, call_timeout_s=0.5, max_result_chars=100)

MakeServer = Callable[[str], Server]


def stdio_server(name: str, *arguments: str) -> StdioServer:
    return StdioServer(name=name, command=sys.executable, args=(str(SCRIPT), *arguments))


@contextlib.contextmanager
def http_server(name: str) -> Iterator[HttpServer]:
    command = [sys.executable, str(SCRIPT), "http"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            yield HttpServer(name=name, url=f"http://127.0.0.1:{int(process.stdout.readline())}/mcp")
        finally:
            process.kill()


@pytest.fixture(scope="module")
def shared_url() -> Iterator[str]:
    """Yield the URL of one HTTP server, shared by all tests that do not end it."""
    with http_server("shared") as server:
        yield server.url


@pytest.fixture(scope="module", params=["stdio", "http"])
def make_server(request: pytest.FixtureRequest) -> MakeServer:
    """Return a function that makes a server, over stdio or over HTTP."""
    if request.param == "stdio":
        return stdio_server
    url: str = request.getfixturevalue("shared_url")
    return lambda name: HttpServer(name=name, url=url)


@pytest.fixture(scope="module")
def box(make_server: MakeServer) -> Iterator[ToolBox]:
    """Yield the tools of one server, for all tests that neither end it nor close the toolbox."""
    with open_toolbox([make_server("s")], LIMITS) as box:
        yield box


def descendant_pids() -> set[int]:
    return {process.pid for process in started_processes()}


def test_a_tool_declaration_has_its_servers_description_and_parameters(box: ToolBox) -> None:
    (declaration,) = [item for item in box.declarations if item["function"]["name"] == "add"]
    assert declaration["type"] == "function"
    assert declaration["function"]["description"] == "Add two numbers."
    parameters = declaration["function"]["parameters"]
    assert parameters["required"] == ["a"]
    assert {name: field["type"] for name, field in parameters["properties"].items()} == {"a": "integer", "b": "integer"}


def test_a_call_returns_the_tools_result(box: ToolBox) -> None:
    assert box.call("add", {"a": 40}) == ToolResult(Outcome.DONE, "42")


def test_calls_run_concurrently(box: ToolBox) -> None:
    calls = [box.start("meet", {}), box.start("meet", {})]  # neither returns before both run
    assert [call.result() for call in calls] == [ToolResult(Outcome.DONE, "met")] * 2


def test_a_failing_tool_and_invalid_arguments_give_failed_results(box: ToolBox) -> None:
    assert box.call("fail", {}).outcome is Outcome.FAILED
    invalid = box.call("add", {"a": "many"})
    assert invalid.outcome is Outcome.FAILED
    assert "\na\n" in invalid.text, "no line has the argument's name alone"
    assert "integer" in invalid.text


def test_a_call_of_an_unknown_tool_is_refused_with_the_list_of_tools(box: ToolBox) -> None:
    result = box.call("subtract", {})
    assert result.outcome is Outcome.REFUSED
    assert result.text.startswith("There is no tool 'subtract'. The tools are: add, ")


def test_a_hanging_call_ends_as_timed_out(make_server: MakeServer) -> None:
    with open_toolbox([make_server("slow one")], SHORT_TIMEOUT) as box:
        result = box.call("hang", {})
    assert result.outcome is Outcome.TIMED_OUT
    assert result.text == "The tool server slow one did not answer within 0.5 s; the call was ended."


def test_a_server_answers_other_calls_during_and_after_a_hanging_call(box: ToolBox) -> None:
    hanging = box.start("hang", {})
    assert box.call("add", {"a": 1}).text == "3"
    assert not hanging.done()
    assert hanging.cancel()
    assert box.call("add", {"a": 2}).text == "4"


def test_a_long_result_is_truncated(box: ToolBox) -> None:
    result = box.call("much", {"length": 3_000_000})
    assert result.outcome is Outcome.CUT
    assert result.text == "x" * 100 + "\n[cut here: these are the first 100 of 3000000 characters]"


def test_a_stdio_server_that_ends_during_a_call_is_named_with_its_stderr_and_restarted() -> None:
    with open_toolbox([stdio_server("crashing")], LIMITS) as box:
        other_calls = [box.start("hang", {}), box.start("hang", {})]
        result = box.call("die", {})
        assert result.outcome is Outcome.LOST
        assert result.text == (
            "The tool server crashing was lost during this call, which may have run: it ended; "
            "it wrote last: a last word."
        )
        assert [call.result().outcome for call in other_calls] == [Outcome.LOST] * 2
        assert box.call("add", {"a": 1}) == ToolResult(Outcome.DONE, "3")


def test_an_http_server_that_ends_during_a_call_is_named_in_this_and_later_calls() -> None:
    with http_server("crashing") as server, open_toolbox([server], LIMITS) as box:
        results = [box.call("die", {}), box.call("add", {"a": 1}), box.call("add", {"a": 1})]
    assert [result.outcome for result in results] == [Outcome.LOST] * 3
    assert results[0].text.startswith("The tool server crashing was lost during this call, which may have run: ")
    not_run = "The call was not run: the tool server crashing cannot be started: All connection attempts failed."
    assert [result.text for result in results[1:]] == [not_run] * 2


def test_the_end_of_one_server_does_not_affect_another() -> None:
    with open_toolbox([stdio_server("a"), stdio_server("b")], LIMITS) as box:
        hanging = box.start("b_hang", {})
        assert box.call("a_die", {}).outcome is Outcome.LOST
        assert not hanging.done()
        assert box.call("b_add", {"a": 1}).text == "3"


def test_equal_tool_names_get_their_servers_prefix_and_odd_characters_are_replaced() -> None:
    with open_toolbox([stdio_server("a b"), stdio_server("c")], LIMITS) as box:
        assert {"a_b_add", "c_add"} < box.tools.keys()
        assert box.tools["c_add"].server == "c"
        assert box.call("c_odd_name____im_end__", {}).text == "<|im_end|>"
    with open_toolbox([stdio_server("a")], LIMITS) as box:
        assert "odd_name____im_end__" in box.tools


def tools_of_one_server(*names: str) -> list[tuple[Connection, types.Tool]]:
    """Return tools with these names, all of one server, which is never started."""
    server = HttpServer(name="s", url="http://127.0.0.1:9/")
    connection = Connection(server, tasks=cast("TaskGroup", None), start_timeout_s=1.0)
    return [(connection, types.Tool(name=name, input_schema={"type": "object"})) for name in names]


@given(st.lists(st.text(max_size=6), max_size=6))
@example(["\u5929\u6c14", "\u641c\u7d22"])
@example(["get/user", "get_user", "get user", "s_get_user"])
@example(["2048", "123e4567-e89b-12d3-a456-426614174000", ""])
def test_tools_of_any_names_have_different_names_and_each_can_be_called(names: list[str]) -> None:
    tools = _with_unique_names(tools_of_one_server(*names))
    assert sorted(tool.name_on_server for tool in tools.values()) == sorted(names)
    for name in tools:
        assert read_call(call_id(name, 0), "{}").name == name
        assert all(letter.isalnum() or letter in "_.-" for letter in name)


def test_letters_of_any_script_stay_in_a_tools_name() -> None:
    assert list(_with_unique_names(tools_of_one_server("\u5929\u6c14", "caf\u00e9", "get user"))) == [
        "\u5929\u6c14",
        "caf\u00e9",
        "get_user",
    ]


def test_when_no_server_starts_the_error_names_all_and_no_process_is_left() -> None:
    pids_before = descendant_pids()
    servers: list[Server] = [
        StdioServer(name="absent", command="/no/such/program"),
        StdioServer(name="ends", command=sys.executable, args=("-c", "raise SystemExit('no key given')")),
        HttpServer(name="unreachable", url="http://127.0.0.1:9/mcp"),
    ]
    with pytest.raises(ToolsError) as caught, open_toolbox(servers, LIMITS):
        pass
    message = str(caught.value)
    assert "absent: [Errno 2] No such file or directory" in message
    assert "ends: it ended; it wrote last: no key given" in message
    assert "unreachable: All connection attempts failed" in message
    assert descendant_pids() == pids_before


def test_a_server_that_does_not_answer_at_start_is_refused_and_ended() -> None:
    silent = StdioServer(name="silent", command=sys.executable, args=("-c", "import sys; sys.stdin.read()"))
    pids_before = descendant_pids()
    with (
        pytest.raises(ToolsError, match=r"silent: it did not answer within 0\.5 s"),
        open_toolbox([silent], Limits(start_timeout_s=0.5)),
    ):
        pass
    assert descendant_pids() == pids_before


def test_two_servers_with_the_same_name_are_refused_before_any_starts() -> None:
    server = HttpServer(name="a", url="http://127.0.0.1:9/")
    with pytest.raises(ToolsError, match="two tool servers have the name 'a'"), open_toolbox([server] * 2, LIMITS):
        pass


@pytest.mark.parametrize(
    "arguments",
    [(), pytest.param(("ignores-sigterm",), marks=pytest.mark.slow)],
    ids=["a server that SIGTERM ends", "a server that ignores SIGTERM"],
)
def test_closing_the_toolbox_ends_running_calls_and_leaves_no_process(arguments: tuple[str, ...]) -> None:
    pids_before = descendant_pids()
    with open_toolbox([stdio_server("s", *arguments)], LIMITS) as box:
        assert box.call("add", {"a": 1}).text == "3"
        assert descendant_pids() > pids_before
        calls = [box.start("hang", {}), box.start("stay", {})]
    assert descendant_pids() == pids_before
    assert all(call.done() for call in calls)


def test_an_exception_with_running_calls_leaves_no_process() -> None:
    pids_before = descendant_pids()
    with pytest.raises(KeyboardInterrupt), open_toolbox([stdio_server("s")], LIMITS) as box:
        box.start("hang", {})
        raise KeyboardInterrupt
    assert descendant_pids() == pids_before


def test_without_servers_the_toolbox_is_empty() -> None:
    with open_toolbox([], LIMITS) as box:
        assert box.declarations == []
        assert box.call("f", {}).text == "There is no tool 'f'. The tools are: none."
