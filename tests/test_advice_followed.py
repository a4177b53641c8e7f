"""Tests that follow the advice of messages about prompts, chats, keys, servers, tools and settings."""

import contextlib
import importlib.metadata
import io
import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlx_k2.cli.main import run
from mlx_k2.cli.prompt_files import read_prompt_lines
from mlx_k2.cli.repl.saved_chat import SavedChat, load_chat, save_chat
from mlx_k2.cli.result_file import ResultFile
from mlx_k2.client.remote_engine import RemoteEngine
from mlx_k2.client.server_connection import ServerAddress
from mlx_k2.errors import RequestError, SetupError, ToolsError
from mlx_k2.http_reason import http_reason
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import Request
from mlx_k2.server.access import Access
from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.api_keys import KeyRing, add_key, read_keys, remove_key
from mlx_k2.server.http_server import listening_socket
from mlx_k2.text.tool_call import read_call
from mlx_k2.tools.servers import StdioServer, read_mcp_file
from mlx_k2.tools.toolbox import Limits, open_toolbox
from tests.advice import follows_advice
from tests.cli.command import MLX_K2, CommandLine
from tests.server.in_process import stepped_server
from tests.test_advice import END, refusal

pytestmark = pytest.mark.timeout(60)


@follows_advice(
    'p.jsonl, line 1: give either "prompt" or "messages"',
    "p.jsonl has no line: write one JSON object a line",
)
def test_a_file_of_prompts_that_follows_the_advice_of_its_refusal_is_read(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    for wrong, message in (("{}", 'line 1: give either "prompt" or "messages"'), ("", "write one JSON object a line")):
        file.write_text(wrong)
        with pytest.raises(RequestError, match=message):
            read_prompt_lines(str(file))
    file.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert len(read_prompt_lines(str(file))) == 2


@follows_advice(
    "there is no standard input: give a file as --prompts",
)
def test_without_standard_input_the_prompts_are_read_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RequestError, match="there is no standard input: give a file as --prompts"):
        read_prompt_lines("-")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    assert read_prompt_lines(str(tmp_path / "p.jsonl"))


@follows_advice(
    "out is being written by another run: give another --out",
    "out belongs to another run (see its line 1): give another --out, or move the file away",
)
def test_results_go_to_another_file_or_to_the_same_after_it_was_moved_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ResultFile(out) as results:
        results.resume({"b": 1})
        results.write(1, {"text": "b"})
        with pytest.raises(RequestError, match="another run: give another --out"), ResultFile(out):
            pass
    with ResultFile(out) as results, pytest.raises(RequestError, match="give another --out, or move the file away"):
        results.resume({"a": 1})
    with ResultFile(tmp_path / "another") as results:
        results.resume({"a": 1})
    out.rename(tmp_path / "moved")
    with ResultFile(out) as results:
        results.resume({"a": 1})


@follows_advice(
    "a: start with --model '/a folder/k2', or keep only the list under \"messages\" to go on with this one",
)
def test_a_chat_with_another_model_is_loaded_as_its_list_of_messages(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    save_chat(file, SavedChat("/a folder/k2", "other", [{"role": "user", "content": "Hi"}]))
    with pytest.raises(RequestError) as refused:
        load_chat(file, "this")
    assert "start with --model '/a folder/k2', or keep only the list under \"messages\"" in str(refused.value)
    assert load_chat(file, "other")
    file.write_text(json.dumps(json.loads(file.read_bytes())["messages"]))
    assert load_chat(file, "this") == [{"role": "user", "content": "Hi"}]


@follows_advice(
    "others can read the key file k: run `chmod 600 k`",
    "the name of a key is empty: give one",
    "there is a key 'a' already: remove it first, or give another name",
)
def test_the_advice_for_a_key_file_lets_keys_be_read_and_added(tmp_path: Path) -> None:
    path = tmp_path / "my keys"
    with pytest.raises(SetupError, match="the name of a key is empty: give one"):
        add_key(path, "")
    add_key(path, "a")
    with pytest.raises(SetupError, match="already: remove it first, or give another name"):
        add_key(path, "a")
    add_key(path, "b")
    remove_key(path, "a")
    add_key(path, "a")
    path.chmod(0o644)
    with pytest.raises(SetupError, match="others can read the key file") as refused:
        read_keys(path)
    subprocess.run(str(refused.value).split("`")[1], shell=True, check=True, timeout=20)
    assert [key.name for key in read_keys(path)] == ["b", "a"]
    with pytest.raises(SetupError, match=r"there is no key 'c' in .*my keys; its keys: b, a$"):
        remove_key(path, "c")


@follows_advice(
    "a: make one with `mlx-k2 keys add --key-file k NAME`",
    "port 5 of 127.0.0.1 is in use: give another --port, or end the program that has it",
)
def test_a_server_for_other_machines_starts_after_the_printed_command_made_a_key(tmp_path: Path) -> None:
    keys = str(tmp_path / "my keys")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        serve = ["serve", "--host", "0.0.0.0", "--port", port, "--key-file", keys]
        shown = refusal(*serve)
        assert "and there is no key: make one with `mlx-k2 keys add" in shown
        name, *make = shlex.split(shown.split("`")[1])
        assert name == "mlx-k2"
        with contextlib.redirect_stdout(io.StringIO()):
            assert run(make) == 0
        assert f"port {port} of 0.0.0.0 is in use: give another --port, or end the program" in refusal(*serve)
        with pytest.raises(SetupError, match="give another --port, or end the program that has it"):
            listening_socket("127.0.0.1", int(port))
        listening_socket("127.0.0.1", 0).close()
    listening_socket("127.0.0.1", int(port)).close()


@follows_advice(
    "this Host is not allowed: see --allow-host",
    "this Origin is not allowed: see --allow-origin",
)
def test_hosts_and_origins_are_allowed_by_the_options_that_their_refusals_name() -> None:
    scope = {"headers": [(b"host", b"k2.example"), (b"origin", b"https://chat.example")]}
    with pytest.raises(ApiError, match="this Host is not allowed: see --allow-host"):
        Access((), (), None).check_origin(scope)
    with pytest.raises(ApiError, match="this Origin is not allowed: see --allow-origin"):
        Access(("k2.example",), (), None).check_origin(scope)
    Access(("k2.example",), ("https://chat.example",), None).check_origin(scope)
    serve = refusal("serve", "--allow-host", "k2.example", "--allow-origin", "https://chat.example", *shlex.split(END))
    assert "/no/such/folder is not a folder" in serve


@follows_advice(
    "write each call as functions.NAME:NUMBER, and its arguments as one JSON object",
)
def test_a_call_in_the_form_that_its_refusal_names_is_read() -> None:
    error = read_call("functions.weather:0", "[]").error
    assert error is not None
    assert "write each call as functions.NAME:NUMBER, and its arguments as one JSON object" in error
    assert read_call("functions.weather:0", "{}").error is None


@follows_advice(
    "mcp.json: the server 'a' speaks MCP's old HTTP+SSE: give the address of its streamable HTTP",
    "mcp.json: the server 'a' has ${input:x}, which is not replaced: write ${NAME} and set that variable",
    "two tool servers have the name 'a': rename one",
)
def test_an_mcp_file_that_follows_the_advice_of_its_refusal_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mcp.json"

    def read(**entry: Any) -> object:
        file.write_text(json.dumps({"mcpServers": {"a": entry}}))
        return read_mcp_file(file, {"NAME": "key"}, print)

    with pytest.raises(ToolsError, match="give the address of its streamable HTTP"):
        read(type="sse", url="http://h/sse")
    with pytest.raises(ToolsError, match=r"write \${NAME} and set that variable"):
        read(type="http", url="http://h/mcp", headers={"k": "${input:x}"})
    assert read(type="http", url="http://h/mcp", headers={"k": "${NAME}"})
    same = StdioServer(name="a", command="/no/such/program")
    with (
        pytest.raises(ToolsError, match="two tool servers have the name 'a': rename one"),
        open_toolbox([same, same], Limits()),
    ):
        pass


@follows_advice(
    "SSL_CERT_FILE names /nowhere.pem, which does not exist: correct SSL_CERT_FILE, or unset it",
    "python -m pip install socksio",
    "a: run `python -m pip install socksio`, or unset ALL_PROXY",
)
def test_the_settings_that_a_failed_request_names_are_those_that_failed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, socks = FileNotFoundError(2, "No such file"), ImportError("Using SOCKS proxy, but 'socksio' is missing")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    install = f"{shlex.quote(sys.executable)} -m pip install socksio"
    assert http_reason(socks).endswith(f"run `{install}`, or unset ALL_PROXY")
    monkeypatch.delenv("ALL_PROXY")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    assert http_reason(lost).endswith("does not exist: correct SSL_CERT_FILE, or unset it")
    for repaired in ({"SSL_CERT_FILE": __file__}, {}):
        monkeypatch.delenv("SSL_CERT_FILE")
        for name, value in repaired.items():
            monkeypatch.setenv(name, value)
        assert http_reason(lost) == "[Errno 2] No such file"
        monkeypatch.setenv("SSL_CERT_FILE", "")
    needed = [
        line for line in importlib.metadata.requires("httpx2") or () if "extra == 'socks'" in line.replace('"', "'")
    ]
    assert [re.split(r"\W", line)[0] for line in needed] == ["socksio"]


@follows_advice(
    "--plot needs matplotlib: run `python -m pip install matplotlib`",
    "for instance `hf auth login`",
)
def test_printed_commands_of_other_tools_are_ones_that_these_tools_accept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        shown = refusal("bench", "--plot", str(tmp_path / "p.png"))
    words = shlex.split(shown.split("`")[1])
    installed = subprocess.run([*words, "--dry-run", "--no-index"], capture_output=True, text=True, timeout=60)
    assert "already satisfied: matplotlib" in installed.stdout
    hf = str(Path(sys.executable).with_name("hf"))
    subprocess.run([hf, "auth", "login", "--help"], capture_output=True, timeout=60, check=True)
    config = str(Path(sys.executable).with_name("mlx.distributed_config"))
    options = ["--over", "thunderbolt", "--auto-setup", "--help"]  # --help after them: they were parsed
    subprocess.run([config, *options], capture_output=True, timeout=60, check=True)


@follows_advice(
    "standard output is closed: redirect it, for instance to /dev/null",
)
def test_a_closed_standard_output_can_be_redirected_to_dev_null(tmp_path: Path) -> None:
    environment = CommandLine(tmp_path).environment()
    for redirection, code in ((">&-", 2), (">/dev/null", 0)):
        line = f"{shlex.quote(MLX_K2)} --version {redirection}"
        assert (
            subprocess.run(line, shell=True, env=environment, timeout=60, stderr=subprocess.DEVNULL).returncode == code
        )


class NamedModel(msgspec.Struct):
    """The name of the model that a server has."""

    name: str


@follows_advice(
    "u needs a key: set MLX_K2_API_KEY to one that `mlx-k2 keys add NAME` printed there",
)
def test_a_client_with_a_key_of_the_printed_command_is_answered(tmp_path: Path) -> None:
    """Ask a server in this process, without and with a key."""
    keys = tmp_path / "keys"
    key = add_key(keys, "me")
    with stepped_server(keys=KeyRing(keys, is_required=True)) as server:
        with pytest.raises(SetupError, match="needs a key: set MLX_K2_API_KEY to one that `mlx-k2 keys add NAME`"):
            ServerAddress(server.url, None).get("/v1/model-files", NamedModel)
        assert ServerAddress(server.url, key).get("/v1/model-files", NamedModel)


@follows_advice(
    "there is no standard input: redirect it from a file with a message a line",
    "there is no command /foo: /help lists them; to send it as a message, write a space before it",
    "give a file: /save FILE",
    "give /think show, hide, on or off",
    "there are no tools: start with --tools or --mcp",
)
def test_the_advice_of_a_chats_commands_works_in_the_same_chat(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("/foo\n /foo\n/save\n/save chat.json\n/think\n/think hide\n/tools\n")
    command = f"{shlex.quote(MLX_K2)} chat --stages 1 --max-tokens 2"
    ends = {}
    for end in ("<&-", f"< {shlex.quote(str(lines))}"):
        ran = subprocess.run(
            f"{command} {end}", shell=True, env=CommandLine(tmp_path).environment(), cwd=tmp_path,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        ends[end[:2]] = ran
    assert "there is no standard input: redirect it from a file with a message a line" in ends["<&"].stderr
    shown = ends["< "].stderr
    for message in (
        "there is no command /foo: /help lists them; to send it as a message, write a space before it",
        "the answer was cut off at the limit of tokens",
        "give a file: /save FILE",
        "the conversation is in chat.json",
        "give /think show, hide, on or off",
        "thinking is hidden",
        "there are no tools: start with --tools or --mcp",
    ):
        before, found, shown = shown.partition(message)
        assert found, before
    assert json.loads((tmp_path / "chat.json").read_bytes())["messages"][0]["content"] == "/foo"


@follows_advice(
    "--connect gets no log-probabilities: leave out --logprobs",
    "give a text as prompt, or messages",
)
def test_requests_to_a_server_that_follow_the_advice_of_their_refusals_are_accepted() -> None:
    with stepped_server() as server:
        assert "give a text as prompt, or messages" in server.request("POST", "/tokenize", {}).body.decode()
        assert server.request("POST", "/tokenize", {"prompt": "a"}).status == 200
        engine = RemoteEngine(ServerAddress(server.url, None))
        asked = Request((5,), 1, Sampling(seed=1, num_logprobs=1), frozenset())
        with pytest.raises(RequestError, match="--connect gets no log-probabilities: leave out --logprobs"):
            engine.submit(asked)
        engine.submit(Request((5,), 1, Sampling(seed=1), frozenset())).cancel()
