"""Tests that follow the advice of messages about prompts, chats, tools and settings.

In the messages, the letter ``a`` replaces a value that the program inserts.
"""

import importlib.metadata
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import mlx_k2
from mlx_k2.cli.prompt_files import read_prompt_lines
from mlx_k2.cli.repl.saved_chat import SavedChat, load_chat, save_chat
from mlx_k2.cli.result_file import ResultFile
from mlx_k2.errors import RequestError, ToolsError
from mlx_k2.http_reason import http_reason
from mlx_k2.text.tool_call import read_call
from mlx_k2.tools.servers import StdioServer, read_mcp_file
from mlx_k2.tools.toolbox import Limits, open_toolbox
from tests.advice import follows_advice
from tests.cli.command import MLX_K2, CommandLine
from tests.test_advice_of_commands import refusal

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
def test_without_standard_input_prompts_are_read_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RequestError, match="there is no standard input: give a file as --prompts"):
        read_prompt_lines("-")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    assert read_prompt_lines(str(tmp_path / "p.jsonl"))


@follows_advice(
    "--out out is the file of prompts: give another --out",
    "out is being written by another run: give another --out",
    "out belongs to another run (see its line 1): give another --out, or move the file away",
)
def test_results_go_to_another_file_or_to_the_same_after_it_was_moved_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompts = tmp_path / "prompts"
    prompts.write_text('{"prompt": "a"}\n')
    arguments = ("generate", "--prompts", str(prompts), "--out")
    assert "is the file of prompts: give another --out" in refusal(*arguments, str(prompts))
    one_run, other_run = {"b": 1}, {"a": 1}  # the number of the prompt by the digest of the run
    with ResultFile(out) as results:
        results.resume(one_run)
        results.write(1, {"text": "b"})
        with pytest.raises(RequestError, match="another run: give another --out"), ResultFile(out):
            pass
    with ResultFile(out) as results, pytest.raises(RequestError, match="give another --out, or move the file away"):
        results.resume(other_run)
    with ResultFile(tmp_path / "another") as results:
        results.resume(other_run)
    out.rename(tmp_path / "moved")
    with ResultFile(out) as results:
        results.resume(other_run)


@follows_advice(
    "a: start with --model '/a folder/k2', or keep only the list under \"messages\" to go on with this one",
)
def test_a_chat_saved_with_another_model_is_loaded_with_that_model_or_as_its_list_of_messages(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    save_chat(file, SavedChat("/a folder/k2", "other", [{"role": "user", "content": "Hi"}]))
    with pytest.raises(
        RequestError, match="start with --model '/a folder/k2', or keep only the list under \"messages\""
    ):
        load_chat(file, "this")
    assert load_chat(file, "other")
    file.write_text(json.dumps(json.loads(file.read_bytes())["messages"]))
    assert load_chat(file, "this") == [{"role": "user", "content": "Hi"}]


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
)
def test_an_mcp_file_that_follows_the_advice_of_its_refusal_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mcp.json"

    def read(**server: Any) -> object:
        file.write_text(json.dumps({"mcpServers": {"a": server}}))
        return read_mcp_file(file, {"NAME": "key"}, print)

    with pytest.raises(ToolsError, match="give the address of its streamable HTTP"):
        read(type="sse", url="http://h/sse")
    with pytest.raises(ToolsError, match=r"write \${NAME} and set that variable"):
        read(type="http", url="http://h/mcp", headers={"k": "${input:x}"})
    assert read(type="http", url="http://h/mcp", headers={"k": "${NAME}"})


@follows_advice(
    "two tool servers have the name 'a': rename one",
)
def test_tool_servers_are_tried_after_one_was_renamed() -> None:
    server, renamed = (StdioServer(name=name, command="/no/such/program") for name in ("a", "b"))
    for servers, message in (
        ([server, server], "two tool servers have the name 'a': rename one"),
        ([server, renamed], "no tool server starts: a: .*; b: "),
    ):
        with pytest.raises(ToolsError, match=message), open_toolbox(servers, Limits()):
            pass


@follows_advice(
    "SSL_CERT_FILE names /nowhere.pem, which does not exist: correct SSL_CERT_FILE, or unset it",
    "a: run `python -m pip install socksio`, or unset ALL_PROXY",
)
def test_a_failed_request_names_the_setting_that_made_it_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    no_socksio = ImportError("Using SOCKS proxy, but 'socksio' is missing")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    install = f"{shlex.quote(sys.executable)} -m pip install socksio"
    assert http_reason(no_socksio).endswith(f"run `{install}`, or unset ALL_PROXY")
    monkeypatch.delenv("ALL_PROXY")
    no_file = FileNotFoundError(2, "No such file")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    assert http_reason(no_file).endswith("does not exist: correct SSL_CERT_FILE, or unset it")
    monkeypatch.setenv("SSL_CERT_FILE", __file__)
    assert http_reason(no_file) == "[Errno 2] No such file"
    monkeypatch.delenv("SSL_CERT_FILE")
    assert http_reason(no_file) == "[Errno 2] No such file"
    # The package to install is the one that httpx2 needs.
    requirements = map(Requirement, importlib.metadata.requires("httpx2") or ())
    assert [line.name for line in requirements if str(line.marker) == 'extra == "socks"'] == ["socksio"]


@follows_advice(
    "python -m pip install matplotlib",
    "--plot needs matplotlib: run `a`",
    "--plot p.svg: the charts are a PNG image: give a name that ends in .png",
    "for instance `hf auth login`",
)
def test_printed_commands_are_accepted_by_their_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as without_matplotlib:
        without_matplotlib.setitem(sys.modules, "matplotlib", None)
        assert "give a name that ends in .png" in refusal("bench", "--plot", str(tmp_path / "p.svg"))
        error = refusal("bench", "--plot", str(tmp_path / "p.png"))
    install = shlex.split(error.split("`")[1])
    result = subprocess.run([*install, "--dry-run", "--no-index"], capture_output=True, text=True, timeout=60)
    assert "already satisfied: matplotlib" in result.stdout  # pip understood the command; nothing was installed
    hf = str(Path(sys.executable).with_name("hf"))
    subprocess.run([hf, "auth", "login", "--help"], capture_output=True, timeout=60, check=True)
    config = str(Path(sys.executable).with_name("mlx.distributed_config"))
    options = ["--over", "thunderbolt", "--auto-setup", "--help"]  # --help comes last: the others are parsed first
    subprocess.run([config, *options], capture_output=True, timeout=60, check=True)


@follows_advice(
    "uv pip install --python python mcp",
)
def test_in_an_environment_without_pip_a_package_is_installed_with_uv_for_its_python(tmp_path: Path) -> None:
    """uv makes such environments; it is not needed here, so the command is compared and not run."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], timeout=60, check=True)
    python = str(tmp_path / "bin" / "python")
    code = "from mlx_k2.package_install import install_command; print(install_command('mcp'))"
    environment = {"PYTHONPATH": str(Path(mlx_k2.__file__).parents[1])}
    result = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout == f"uv pip install --python {python} mcp\n"


@follows_advice(
    "standard output is closed: redirect it, for instance to /dev/null",
)
def test_a_closed_standard_output_can_be_redirected_to_dev_null(tmp_path: Path) -> None:
    environment = CommandLine(tmp_path).environment()
    for redirection, exit_code in ((">&-", 2), (">/dev/null", 0)):
        line = f"{shlex.quote(MLX_K2)} --version {redirection} 2>/dev/null"
        assert subprocess.run(line, shell=True, env=environment, timeout=60).returncode == exit_code


@follows_advice(
    "there is no standard input: redirect it from a file with a message a line",
    "there is no command /foo: /help lists them; to send it as a message, write a space before it",
    "give a file: /save FILE",
    "give /think show, hide, on or off",
    "there are no tools: start with --tools or --mcp",
)
@pytest.mark.slow
def test_the_advice_of_a_chats_commands_works(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("/foo\n /foo\n/save\n/save chat.json\n/think\n/think hide\n/tools\n")
    tools = Path(__file__).parents[1] / "examples" / "tools.py"

    def chat_errors(end_of_command: str) -> str:
        command = f"{shlex.quote(MLX_K2)} chat --stages 1 --max-tokens 2 {end_of_command}"
        environment = CommandLine(tmp_path).environment()
        return subprocess.run(
            command, shell=True, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        ).stderr

    assert "there is no standard input: redirect it from a file with a message a line" in chat_errors("<&-")
    errors = chat_errors(f"< {shlex.quote(str(lines))}")
    for message in (
        "there is no command /foo: /help lists them; to send it as a message, write a space before it",
        "the answer was cut off at the limit of tokens",  # " /foo" was sent as a message, and answered
        "give a file: /save FILE",
        "the conversation is in chat.json",
        "give /think show, hide, on or off",
        "thinking is hidden",
        "there are no tools: start with --tools or --mcp",
    ):
        assert message in errors
        _, _, errors = errors.partition(message)
    assert "[asks first]" in chat_errors(f"--tools {shlex.quote(str(tools))} < {shlex.quote(str(lines))}")
    assert json.loads((tmp_path / "chat.json").read_bytes())["messages"][0]["content"] == "/foo"
