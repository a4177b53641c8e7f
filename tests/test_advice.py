"""Tests of the advice in messages: what a message refuses is accepted once its advice was followed.

``test_all_advice_is_followed_in_a_test`` reads the package's source and fails for advice that no test follows.
"""

import contextlib
import hashlib
import http.server
import importlib.metadata
import io
import json
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from huggingface_hub import close_session

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.chat.sampling_options import SamplingOptions
from mlx_k2.cli.main import cli, run
from mlx_k2.cli.prompt_files import read_prompt_lines
from mlx_k2.cli.repl.saved_chat import SavedChat, load_chat, save_chat
from mlx_k2.cli.result_file import ResultFile
from mlx_k2.client.remote_engine import RemoteEngine
from mlx_k2.client.server_connection import ServerAddress
from mlx_k2.cluster.hostfile import parse_hostfile
from mlx_k2.coordinator.reply_policy import ReplyLimits
from mlx_k2.deployment.cluster_options import ClusterOptions
from mlx_k2.errors import DownloadError, MlxK2Error, RequestError, SetupError, ToolsError
from mlx_k2.http_reason import http_reason
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import Request, check_request
from mlx_k2.server.access import Access
from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.api_keys import KeyRing, add_key, read_keys, remove_key
from mlx_k2.server.chat_request import read_chat_request
from mlx_k2.server.completion_request import read_completion_request
from mlx_k2.server.http_server import listening_socket
from mlx_k2.text.chat_template import ChatTemplate, load_chat_template
from mlx_k2.text.constraint import tool_rules
from mlx_k2.text.history_reader import read_history
from mlx_k2.text.schema_check import check_schema
from mlx_k2.text.thinking_mode import ThinkingMode
from mlx_k2.text.tool_call import read_call
from mlx_k2.tools.servers import StdioServer, read_mcp_file
from mlx_k2.tools.toolbox import Limits, open_toolbox
from mlx_k2.weights.checkpoint import describe_model, locate_tensors, read_small_files
from mlx_k2.weights.hub import HubRepo, fetch_small_files
from mlx_k2.weights.inventory import model_specs
from mlx_k2.weights.manifest import MANIFEST_NAME, HubFile, identify, write_manifest
from mlx_k2.weights.model_frontend import ModelFrontend
from tests.advice import advice, followed, follows_advice
from tests.cli.command import MLX_K2, CommandLine
from tests.server.in_process import stepped_server
from tests.weights.test_index import LFS

pytestmark = pytest.mark.timeout(60)
NOBODY = "http://127.0.0.1:9"  # nothing listens there
REPO = "moonshotai/Kimi-K2-Thinking"
END = "--model /no/such/folder"  # ends a command as soon as its options are accepted
ENDS = r"/no/such/folder is not a folder|there is no server at"


def refusal(*words: str) -> str:
    """Return what ``mlx-k2`` prints when it refuses a command line, run in this process."""
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
        assert run(words) == 2, shown.getvalue()
    return shown.getvalue()


OPTIONS = (  # the message, a command line with it, and that line after the advice was followed
    (
        "'1;2' is not a list of numbers above 0: write them with commas, as in 1,2,4",
        "bench --streams 1;2",
        f"bench --streams 1,2,4 {END}",
    ),
    (
        "--json, --csv, --plot and --trace are for own stages: leave them out with --connect",
        f"bench --json --connect {NOBODY}",
        f"bench --connect {NOBODY}",
    ),
    (
        "--split is the server's to choose: leave it out with --connect",
        f"generate Hi --split 3,4 --connect {NOBODY}",
        f"generate Hi --connect {NOBODY}",
    ),
    (
        "--connect 127.0.0.1:9 is not the address of a server: give http://HOST:PORT",
        "generate Hi --connect 127.0.0.1:9",
        f"generate Hi --connect {NOBODY}",
    ),
    (
        "--dry-run and --prompts start stages: leave them out with --connect",
        f"generate Hi --dry-run --connect {NOBODY}",
        f"generate Hi --connect {NOBODY}",
    ),
    (
        "--logprobs shows in the JSON lines only: add --json",
        "generate Hi --logprobs 1",
        f"generate Hi --logprobs 1 --json {END}",
    ),
    ("--prompts and --out go together: give both", "generate --prompts p", f"generate --prompts p --out o {END}"),
    (
        "--token-ids is the whole prompt: leave out PROMPT and --system",
        "generate Hi --token-ids 3",
        f"generate --token-ids 3 {END}",
    ),
    ("--raw sends PROMPT alone: leave out --system", "generate Hi --raw --system x", f"generate Hi --raw {END}"),
    ("the prompt is empty: give some text", "generate ''", f"generate Hi {END}"),
    (
        "--yes and --allow-tool are for tools: give --tools or --mcp",
        "generate Hi --yes",
        f"generate Hi --yes --tools x.py {END}",
    ),
    (
        "--token-ids: '3;4' is not a token id: write numbers with commas, as in 3,4,5",
        "generate --token-ids '3;4'",
        f"generate --token-ids 3,4,5 {END}",
    ),
    (
        "--logit-bias '42': write a token id and a number, as in 42=-10",
        "generate Hi --logit-bias 42",
        f"generate Hi --logit-bias 42=-10 {END}",
    ),
    (
        "--split '31 30' is not a list of layer counts: write one for each host, as in 31,30",
        "generate Hi --split '31 30'",
        f"generate Hi --split 31,30 {END}",
    ),
    (
        "--keyfile is the private key of a certificate: add --certfile",
        "serve --keyfile k",
        f"serve --keyfile k --certfile c {END}",
    ),
    (
        "a number of stages is for runs on this machine alone: give it, or a hostfile, not both",
        "generate Hi --stages 2 --hostfile h",
        f"generate Hi --stages 2 {END}",
    ),
    (
        "a revision is for a repository on the Hub: leave it out, or give owner/name as the model",
        f"generate Hi --revision main {END}",
        f"generate Hi {END}",
    ),
    ("lease 1 is out of range: give 2 to 3600 s", "generate Hi --lease 1", f"generate Hi --lease 2 {END}"),
    ("timeout is 0 s: give more than 0", "generate Hi --timeout 0", f"generate Hi --timeout 0.1 {END}"),
)


@pytest.mark.parametrize(("message", "wrong", "right"), OPTIONS)
def test_a_command_line_that_follows_the_advice_of_its_refusal_is_accepted(
    message: str, wrong: str, right: str
) -> None:
    assert message in refusal(*shlex.split(wrong))
    assert re.search(ENDS, refusal(*shlex.split(right)))


@follows_advice(
    "give --model a repository on the Hub, for instance --model moonshotai/Kimi-K2-Thinking",
    "/m is not a folder: give the folder of a checkpoint, or a repository on the Hub",
)
def test_the_repository_that_a_refusal_names_is_looked_for(tmp_path: Path) -> None:
    assert f"give --model a repository on the Hub, for instance --model {REPO}" in refusal("download")
    assert "give the folder of a checkpoint, or a repository on the Hub" in refusal("generate", "Hi", *shlex.split(END))
    ran = CommandLine(tmp_path).run("download", "--model", REPO, HF_HUB_OFFLINE="1")
    assert f"config.json of {REPO} at main is not in this host's cache" in ran.stderr


CHATS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    (
        "give text, json_object, or json_schema with json_schema.schema",
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_object"}},
    ),
    (
        "functions is deprecated: use tools and tool_choice",
        {"functions": [{}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
    ),
    ("give 0 to 20", {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": 20}),
    (
        "reasoning_effort 'much' is unknown: give one of none,",
        {"reasoning_effort": "much"},
        {"reasoning_effort": "none"},
    ),
    (
        "513 tools are declared: give at most 512",
        {"tools": [{"function": {"name": f"f{n}"}} for n in range(513)]},
        {"tools": [{"function": {"name": f"f{n}"}} for n in range(512)]},
    ),
    (
        "tools of type 'x' are not supported: give functions",
        {"tools": [{"type": "x", "function": {"name": "f"}}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
    ("n is 0: give 1 to ", {"n": 0}, {"n": 1}),
    ("min_tokens: give at least 0", {"min_tokens": -1}, {"min_tokens": 0}),
    ("max_tokens is 0: give at least 1", {"max_tokens": 0}, {"max_tokens": 1}),
    ("stop: give at most 16 strings", {"stop": ["a"] * 17}, {"stop": ["a"] * 16}),
)
COMPLETIONS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("prompt: give one text, or the token ids of one", {"prompt": ["a", "b"]}, {"prompt": [3, 4]}),
    ("suffix is not supported: leave it out", {"suffix": "a"}, {}),
    ("this server makes one choice: leave best_of out", {"best_of": 2}, {}),
)


@pytest.mark.parametrize(("message", "wrong", "right"), CHATS)
def test_a_chat_request_that_follows_the_advice_of_its_refusal_is_accepted(
    message: str, wrong: dict[str, Any], right: dict[str, Any]
) -> None:
    def read(fields: dict[str, Any]) -> None:
        chat = read_chat_request(json.dumps({"messages": [{"role": "user", "content": "Hi"}]} | fields).encode())
        assert chat.answer_format is None or chat.answer_format.schema == {"type": "object"}

    with pytest.raises(ApiError, match=re.escape(message)):
        read(wrong)
    read(right)


@pytest.mark.parametrize(("message", "wrong", "right"), COMPLETIONS)
def test_a_completion_request_that_follows_the_advice_of_its_refusal_is_accepted(
    message: str, wrong: dict[str, Any], right: dict[str, Any]
) -> None:
    def read(fields: dict[str, Any]) -> bool:
        asked = read_completion_request(json.dumps({"prompt": "Hello"} | fields).encode())
        return bool(asked.prompt_ids or asked.prompt_text)

    with pytest.raises(ApiError, match=re.escape(message)):
        read(wrong)
    assert read(right)


def two_hosts(first: str = "", second: str = "", other: str = "") -> str:
    return f'{{"hosts": [{{"ssh": "a"{first}}}, {{"ssh": "b"{second}}}]{other}}}'


IPS = (', "ips": ["10.0.0.1"]', ', "ips": ["10.0.0.2"]')
PORTS = tuple(ips.replace('"]', ':5000"]') for ips in IPS)
HOSTFILES = (
    ('"ips": ["192.168.0.1"]', "[]", '[{"ssh": "mac-1.local", "ips": ["192.168.0.1"]}]'),
    (
        "model '' is not a path: leave the key out, or give one",
        two_hosts(IPS[0] + ', "model": ""', IPS[1]),
        two_hosts(IPS[0] + ', "model": "/k2"', IPS[1]),
    ),
    (
        "memory_gb is 0: leave the key out, or give a number above 0",
        two_hosts(IPS[0] + ', "memory_gb": 0', IPS[1]),
        two_hosts(IPS[0] + ', "memory_gb": 0.5', IPS[1]),
    ),
    (
        "ips holds 'mac': give an IPv4 address in numbers, or ip:port",
        two_hosts(', "ips": ["mac"]', IPS[1]),
        two_hosts(IPS[0], PORTS[1]),
    ),
    (
        "mlx-k2 does not run over backend 'mpi': write one of ring, ",
        two_hosts(*IPS, ', "backend": "mpi"'),
        two_hosts(*IPS, ', "backend": "ring"'),
    ),
    (
        "has already: give each its own port, or leave the port out and one is picked",
        two_hosts(PORTS[0], PORTS[0]),
        two_hosts(PORTS[0], PORTS[0].replace("5000", "5001")),
    ),
    (
        'which backend ring needs: add "ips": ["its address"], or let mlx.distributed_config write the hostfile',
        two_hosts(),
        two_hosts(*IPS),
    ),
)


@pytest.mark.parametrize(("message", "wrong", "right"), HOSTFILES)
def test_a_hostfile_that_follows_the_advice_of_its_refusal_is_accepted(message: str, wrong: str, right: str) -> None:
    with pytest.raises(SetupError, match=re.escape(message)):
        parse_hostfile(wrong.encode(), "hosts.json")
    assert parse_hostfile(right.encode(), "hosts.json").warnings == ()


def check(**changes: Any) -> None:
    fields: dict[str, Any] = {
        "prompt_ids": (1,),
        "max_tokens": 1,
        "sampling": Sampling(seed=1),
        "stop_ids": frozenset(),
    }
    check_request(Request(**fields | changes), 100, 10)


def user_content(content: object, role: str = "user") -> object:
    return read_history([{"role": role, "content": content}], ())


def preserving(source: str) -> object:
    return ThinkingMode(preserve_thinking=True).variables(ChatTemplate(source))


TEMPLATE = {"chat_template.jinja": b"{{ messages[0].content }}"}
VALUES: tuple[tuple[str, Callable[[], object], Callable[[], object]], ...] = (
    ("stop is a text: give a tuple of texts, as in ('a',)", lambda: SamplingOptions(stop="a"),  # type: ignore[arg-type]
     lambda: SamplingOptions(stop=("a",))),
    ("timeout is 0 s: give more than 0", lambda: SamplingOptions(timeout_s=0), lambda: SamplingOptions(timeout_s=0.1)),
    ("an answer has one form: give a JSON schema, a regular expression or a Lark grammar",
     lambda: SamplingOptions(regex="a", lark="b"), lambda: SamplingOptions(regex="a")),
    ("a stop string is empty: give at least one character", lambda: ReplyLimits(("",)), lambda: ReplyLimits(("a",))),
    ("temperature -1.0 is out of range: give a value from 0", lambda: Sampling(seed=1, temperature=-1.0),
     lambda: Sampling(seed=1, temperature=0.0)),
    ("a token has two logit biases: give each token id once", lambda: Sampling(seed=1, logit_bias=((1, 1.0), (1, 2.0))),
     lambda: Sampling(seed=1, logit_bias=((1, 1.0), (2, 2.0)))),
    ("dtype int8 is unknown: give bfloat16 or float32", lambda: ClusterOptions(dtype="int8"),
     lambda: ClusterOptions(dtype="bfloat16")),
    ("the prompt is empty: give some text, or token ids", lambda: check(prompt_ids=()), check),
    ("so there is no room for an answer: shorten it, or give a larger --context, up to that of the model",
     lambda: check(prompt_ids=(1,) * 10),
     lambda: check(prompt_ids=(1,) * 9)),
    ("max-tokens is 0: give at least 1", lambda: check(max_tokens=0), lambda: check(max_tokens=1)),
    ("timeout is 0 s: give more than 0", lambda: check(timeout_s=0.0), lambda: check(timeout_s=0.1)),
    ("513 tools are declared: declare at most 512", lambda: tool_rules([{"function": {"name": "f"}}] * 513),
     lambda: tool_rules([{"function": {"name": "f"}}] * 512)),
    ("tool_choice is required, and no tool is declared: declare one, or leave it out",
     lambda: tool_rules([], "required"), lambda: tool_rules([{"function": {"name": "f"}}], "required")),
    ("a tool has no function with a name: declare tools in OpenAI's format", lambda: tool_rules([{"name": "f"}]),
     lambda: tool_rules([{"type": "function", "function": {"name": "f"}}])),
    ("tool_choice 5 is unknown: give auto, none, required, or a function's name", lambda: tool_rules([], 5),
     lambda: tool_rules([], "auto")),
    ("has the role 'wizard': give one of system, user, assistant, tool", lambda: user_content("a", "wizard"),
     lambda: [user_content("a", "system"), user_content("a", "user"), user_content("a", "assistant")]),
    ("has an image, and mlx-k2 runs a model's text part only: leave the image out",
     lambda: user_content([{"type": "image_url"}]), lambda: user_content([{"type": "text", "text": "a"}])),
    ("has a part that is not text (audio): leave it out", lambda: user_content([{"type": "audio"}]),
     lambda: user_content([])),
    ("the schema is not a JSON schema: give a JSON object", lambda: check_schema(5, "the schema"),
     lambda: check_schema({}, "the schema")),
    ("does not read the variable preserve_thinking (leave out --preserve-thinking)", lambda: preserving("a"),
     lambda: ThinkingMode().variables(ChatTemplate("a"))),
    ("the model has no chat template: give --raw to send the prompt as it is", lambda: load_chat_template({}),
     lambda: load_chat_template(TEMPLATE)),
    ("--host mac! is no address: give one of this machine's, as 127.0.0.1", lambda: listening_socket("mac!", 0).close(),
     lambda: listening_socket("127.0.0.1", 0).close()),
)  # fmt: skip


@pytest.mark.parametrize(("message", "wrong", "right"), VALUES)
def test_a_value_that_follows_the_advice_of_its_refusal_is_accepted(
    message: str, wrong: Callable[[], object], right: Callable[[], object]
) -> None:
    with pytest.raises(MlxK2Error, match=re.escape(message)):
        wrong()
    right()


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
    for mended in ({"SSL_CERT_FILE": __file__}, {}):
        monkeypatch.delenv("SSL_CERT_FILE")
        for name, value in mended.items():
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


@follows_advice(
    "u needs a key: set MLX_K2_API_KEY to one that `mlx-k2 keys add NAME` printed there",
)
def test_a_client_with_a_key_of_the_printed_command_is_answered(tmp_path: Path) -> None:
    """Ask a server in this process, without and with a key."""
    keys = tmp_path / "keys"
    key = add_key(keys, "me")
    with stepped_server(keys=KeyRing(keys, is_required=True)) as server:
        with pytest.raises(SetupError, match="needs a key: set MLX_K2_API_KEY to one that `mlx-k2 keys add NAME`"):
            ServerAddress(server.url, None).get("/v1/model-files", dict[str, Any])
        assert ServerAddress(server.url, key).get("/v1/model-files", dict[str, Any])


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


@follows_advice(
    "a: if a proxy here replaces certificates, set SSL_CERT_FILE to the file of its certificates",
)
def test_a_hub_behind_a_proxys_certificate_is_asked_once_ssl_cert_file_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        *names,
        "-keyout",
        key,
        "-out",
        cert,
    ]
    subprocess.run([*made, "-keyout", key, "-out", cert], check=True, capture_output=True, timeout=60)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    repo = HubRepo(REPO, None, tmp_path / "cache", f"https://localhost:{server.server_port}")
    reasons = []
    for environment in ({}, {"SSL_CERT_FILE": cert}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        close_session()
        with pytest.raises(DownloadError) as refused:
            fetch_small_files(repo)
        reasons.append(str(refused.value))
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()
    assert "set SSL_CERT_FILE to the file of its certificates" in reasons[0]
    assert "CERTIFICATE" not in reasons[1]


@follows_advice(
    "a: connect this host, or copy the checkpoint here and give --model its folder",
    "it is a folder of the Hub's cache: give --model owner/name, or a folder in its snapshots",
)
def test_a_checkpoint_that_was_copied_here_and_a_folder_of_the_cache_are_read(tmp_path: Path) -> None:
    copied = tmp_path / "models--owner--name" / "snapshots" / "0123"
    with pytest.raises(DownloadError, match="or copy the checkpoint here and give --model its folder"):
        fetch_small_files(HubRepo("owner/name", None, tmp_path / "cache", NOBODY))
    shutil.copytree(BUILTIN_FOLDER, copied)
    with pytest.raises(MlxK2Error, match="give --model owner/name, or a folder in its snapshots"):
        read_small_files(copied.parents[1])
    assert "config.json" in read_small_files(copied)


@follows_advice(
    "a has NaN or infinity: fetch the file again",
    "a is truncated: it ends at byte 5 within b; fetch it again",
    "it is a GGUF file, which mlx-k2 does not read: fetch the original checkpoint",
    "a is F64, which MLX cannot read: fetch the original file",
    "a is missing: fetch it again",
    "its header alone has 5 bytes; fetch the file again",
    "a: install it and run `git -C a lfs pull`",
    "mlx-k2 doctor --deep --model a",
    "a is no manifest: b; remove it; `mlx-k2 doctor --deep --model a` writes another",
    "a has 5 bytes, and b says 6: fetch it again; if it is right, remove the manifest",
    "the model has no tiktoken.model: fetch the tokenizer files of the original checkpoint",
    "fetch the original INT4 checkpoint instead, for instance moonshotai/Kimi-K2-Thinking (594 GB)",
    "it was converted for MLX; fetch the original instead, for instance moonshotai/Kimi-K2-Thinking",
)
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model-00002-of-000008.safetensors", lambda data: data[:-1000]),
        ("model-00002-of-000008.safetensors", lambda data: data[:4]),
        ("model-00002-of-000008.safetensors", lambda data: data + b"more"),
        ("model-00002-of-000008.safetensors", lambda data: bytes(len(data))),
        ("tiktoken.model", lambda _: b""),
        ("model-00002-of-000008.safetensors", lambda _: b"GGUF\3\0\0\0"),
        ("model-00002-of-000008.safetensors", None),
        ("config.json", lambda data: data.replace(b"pack-quantized", b"fp8")),
        ("config.json", lambda _: b"<!DOCTYPE html>"),
        ("tiktoken.model", lambda _: LFS),
        ("tiktoken.model", None),
        (MANIFEST_NAME, lambda _: b"{"),
        (MANIFEST_NAME, lambda data: data.replace(b'"size": 1', b'"size": 2')),
    ],
)
def test_a_damaged_file_is_refused_and_the_original_accepted(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes] | None
) -> None:
    folder = tmp_path / "a model"
    shutil.copytree(BUILTIN_FOLDER, folder)
    shards = sorted(folder.glob("*.safetensors"))
    write_manifest(
        folder, {p.name: HubFile(p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in shards}
    )

    def read() -> None:
        model = describe_model(read_small_files(folder), str(folder))
        ModelFrontend(model, 100).tokenizer.encode_text("a")
        locate_tensors(folder, model.index, model_specs(model.config))
        identify(shards)

    read()
    original = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage is not None:
        (folder / name).write_bytes(damage(original))
    with pytest.raises(MlxK2Error, match=r"fetch|pull|remove it") as refused:
        read()
    if name == MANIFEST_NAME and "is no manifest" in str(refused.value):
        (folder / name).unlink()
        doctor = shlex.split(str(refused.value).split("`")[1])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert run(doctor[1:]) == 0
        assert (folder / name).exists()
    else:
        (folder / name).write_bytes(original)
    read()


def test_each_option_and_command_of_mlx_k2_that_advice_names_exists() -> None:
    options = {"--auto-setup", "--over"}  # of mlx.distributed_config, which a test above runs
    names = set()
    to_visit: list[tuple[str, click.Command]] = [("", cli)]
    for name, command in to_visit:
        names.add(name)
        options |= {found for parameter in command.params for found in (*parameter.opts, *parameter.secondary_opts)}
        if isinstance(command, click.Group):
            context = click.Context(command)
            found = {inner: command.get_command(context, inner) for inner in command.list_commands(context)}
            to_visit += [(f"{name} {inner}".strip(), one) for inner, one in found.items() if one is not None]
    for text, _ in advice():
        _, _, message = text.partition(": ")
        assert set(re.findall(r"(?<![\w-])--[a-z][-a-z]+", message)) <= options, message
        assert set(re.findall(r"\bmlx-k2 (download|doctor|kernels|bench|keys \w+)\b", message)) <= names, message


def test_all_advice_is_followed_in_a_test() -> None:
    """For advice that this fails for: follow it in a test, and name its message in ``follows_advice`` or in a table."""
    tables: Sequence[Sequence[tuple[Any, ...]]] = (OPTIONS, CHATS, COMPLETIONS, HOSTFILES, VALUES)
    messages = [*followed(Path(__file__).parent), *(case[0] for table in tables for case in table)]
    all_advice = list(advice())
    assert len(all_advice) > 150
    missing = [text for text, pattern in all_advice if not any(map(pattern.search, messages))]
    assert missing == []
