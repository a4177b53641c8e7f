"""Tests of the advice in messages: what a message refuses is accepted once its advice was followed.

``test_all_advice_is_followed_in_a_test`` reads the package's source and fails for advice that no test follows.
"""

import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from mlx_k2.chat.sampling_options import SamplingOptions
from mlx_k2.cli.main import cli, run
from mlx_k2.cluster.hostfile import parse_hostfile
from mlx_k2.coordinator.reply_policy import ReplyLimits
from mlx_k2.deployment.cluster_options import ClusterOptions
from mlx_k2.errors import MlxK2Error, SetupError
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import Request, check_request
from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.chat_request import read_chat_request
from mlx_k2.server.completion_request import read_completion_request
from mlx_k2.server.http_server import listening_socket
from mlx_k2.text.chat_template import ChatTemplate, load_chat_template
from mlx_k2.text.constraint import tool_rules
from mlx_k2.text.history_reader import read_history
from mlx_k2.text.schema_check import check_schema
from mlx_k2.text.thinking_mode import ThinkingMode
from tests.advice import advice, followed, follows_advice
from tests.cli.command import CommandLine

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
    ("--raw sends only PROMPT: leave out --system", "generate Hi --raw --system x", f"generate Hi --raw {END}"),
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
    ("this server returns every choice: leave best_of out", {"best_of": 2}, {}),
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
    ("the model has no chat template: give --raw to send the prompt unchanged", lambda: load_chat_template({}),
     lambda: load_chat_template(TEMPLATE)),
    ("--host mac! is not an address: give one of this machine's, as 127.0.0.1",
     lambda: listening_socket("mac!", 0).close(), lambda: listening_socket("127.0.0.1", 0).close()),
)  # fmt: skip


@pytest.mark.parametrize(("message", "wrong", "right"), VALUES)
def test_a_value_that_follows_the_advice_of_its_refusal_is_accepted(
    message: str, wrong: Callable[[], object], right: Callable[[], object]
) -> None:
    with pytest.raises(MlxK2Error, match=re.escape(message)):
        wrong()
    right()


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
