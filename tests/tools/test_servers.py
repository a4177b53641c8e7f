"""Tests of MCP files: the formats of other programs are read, and an error names the server.

Where no problem is expected, `pytest.fail` gets the text of one.
"""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_k2.errors import ToolsError
from mlx_k2.tools.servers import HttpServer, StdioServer, python_module, read_mcp_file


def write_mcp_file(folder: Path, servers: object) -> Path:
    path = folder / "mcp.json"
    path.write_text(json.dumps({"mcpServers": servers}))
    return path


def test_stdio_and_http_servers_are_read_and_unknown_keys_ignored(tmp_path: Path) -> None:
    path = write_mcp_file(
        tmp_path,
        {
            "files": {
                "command": "npx",
                "args": ["-y", "server"],
                "env": {"A": "b"},
                "cwd": "/",
                "autoApprove": ["read"],
            },
            "web": {"type": "http", "url": "https://example.org/mcp", "headers": {"X-Key": "k"}},
            "off": {"command": "no", "disabled": True},
        },
    )
    assert read_mcp_file(path, {}, pytest.fail) == (
        StdioServer(name="files", command="npx", args=("-y", "server"), env={"A": "b"}, cwd="/"),
        HttpServer(name="web", url="https://example.org/mcp", headers={"X-Key": "k"}),
    )


def test_environment_variables_in_an_mcp_file_are_expanded(tmp_path: Path) -> None:
    path = write_mcp_file(
        tmp_path, {"s": {"command": "${BIN:-run}", "args": ["${KEY}x${env:KEY}"], "env": {"K": "${KEY:-no}"}}}
    )
    (server,) = read_mcp_file(path, {"KEY": "k$1"}, pytest.fail)
    assert server == StdioServer(name="s", command="run", args=("k$1xk$1",), env={"K": "k$1"})


def test_null_values_numbers_in_env_and_other_names_of_the_url_are_read(tmp_path: Path) -> None:
    """Gemini writes ``httpUrl``, Windsurf ``serverUrl``."""
    entries = {
        "a": {"command": "x", "args": None, "env": {"PORT": 8080}, "cwd": None, "url": None},
        "b": {"httpUrl": "http://h/%E4%B8%AD"},
        "c": {"serverUrl": "https://h"},
    }
    assert read_mcp_file(write_mcp_file(tmp_path, entries), {}, pytest.fail) == (
        StdioServer(name="a", command="x", env={"PORT": "8080"}),
        HttpServer(name="b", url="http://h/%E4%B8%AD"),
        HttpServer(name="c", url="https://h"),
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "'s' needs either a command or a url"),
        ({"command": "a", "url": "http://b"}, "'s' needs either a command or a url"),
        ({"url": "example.org"}, "'s' has the url 'example.org'"),
        ({"url": "http://b", "type": "sse"}, "'s' uses MCP's old HTTP"),
        ({"command": "${NO_SUCH}"}, "'s' needs the environment variable NO_SUCH"),
        ({"command": "${env:NO_SUCH}"}, "'s' needs the environment variable NO_SUCH"),
        ({"url": "http://b", "headers": {"A": "Bearer ${input:key}"}}, "'s' has ${input:key}, which is not replaced"),
        ({"url": "http://b", "headers": {"A": "Bearer $KEY"}}, "'s' has $KEY, which is not replaced: write ${NAME}"),
        ({"command": "a", "args": ["${workspaceFolder:x}/b"]}, "'s' has ${workspaceFolder:x}, which is not replaced"),
        ({"url": "http://b", "headers": {"A": "Bearer {env:KEY}"}}, "'s' has {env:KEY}, which is not replaced"),
        ({"url": "http://b", "headers": {"A": "Bearer %KEY%"}}, "'s' has %KEY%, which is not replaced: write ${NAME}"),
        ({"command": 1}, "'s': command: expected text or null, got a whole number"),
        ({"command": "a", "args": "-y b"}, "'s': args: expected a list, got text"),
        ({"command": "a", "env": {"A": True}}, "'s': env[...]: expected"),
        ("npx -y b", "'s': expected an object, got text"),
        ([], "'s': expected an object, got a list"),
    ],
)
def test_an_invalid_server_entry_is_refused_by_name(tmp_path: Path, entry: object, message: str) -> None:
    with pytest.raises(ToolsError) as caught:
        read_mcp_file(write_mcp_file(tmp_path, {"s": entry}), {}, pytest.fail)
    assert message in str(caught.value)
    assert "mcp.json" in str(caught.value)


def test_a_malformed_server_is_left_out_and_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = write_mcp_file(tmp_path, {"a": {"command": "${NO_SUCH}"}, "b": {"command": "b"}, "c": {}})
    problems: list[str] = []
    assert read_mcp_file(path, {}, problems.append) == (StdioServer(name="b", command="b"),)
    assert problems == [
        f"{path}: the server 'a' needs the environment variable NO_SUCH, which is not set",
        f"{path}: the server 'c' needs either a command or a url",
    ]


def test_a_missing_or_invalid_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ToolsError, match=r"none\.json cannot be read: No such file"):
        read_mcp_file(tmp_path / "none.json", {}, pytest.fail)
    (tmp_path / "other.json").write_text('{"tools": {}}')
    with pytest.raises(ToolsError, match=r"other\.json is not an MCP file: .*mcpServers.*for instance"):
        read_mcp_file(tmp_path / "other.json", {}, pytest.fail)
    with pytest.raises(ToolsError, match=r"there is no Python file .*none\.py"):
        python_module(tmp_path / "none.py", {})


FILE_WITH_COMMENTS = """\ufeff// my servers
{
  /* VS Code's name of mcpServers */
  "servers": {
    "files": {
      "command": "npx", // "quoted"
      "args": ["-y", "http://example.org/*", "a,]",],
    },
  },
}
"""


def test_comments_trailing_commas_and_a_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"
    path.write_text(FILE_WITH_COMMENTS, encoding="utf-8")
    args = ("-y", "http://example.org/*", "a,]")
    assert read_mcp_file(path, {}, pytest.fail) == (StdioServer(name="files", command="npx", args=args),)


def test_an_error_names_the_line_of_the_file_with_its_comments(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"
    path.write_text('/* one\ntwo */ {\n// three\n "mcpServers" 4}')
    with pytest.raises(ToolsError, match="is not an MCP file: line 4, column 15: expecting ':' delimiter"):
        read_mcp_file(path, {}, pytest.fail)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4)),
    lambda values: st.one_of(
        st.lists(values, max_size=2),
        st.dictionaries(
            st.sampled_from(["mcpServers", "command", "args", "env", "url", "type", "x"]), values, max_size=3
        ),
    ),
)


@given(st.one_of(st.binary(), json_values.map(lambda value: json.dumps(value).encode())))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_in_an_mcp_file_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "mcp.json"
    path.write_bytes(data)
    try:
        servers = read_mcp_file(path, {}, lambda _: None)
    except ToolsError as error:
        assert "mcp.json" in str(error)
    else:
        assert all(isinstance(server, StdioServer | HttpServer) for server in servers)
