"""Tests of bad hostfiles, options and prompts of `mlx-k2 generate`, each refused in one line before a process starts.

A malformed command line is refused with the usage. Bad models are in test_bad_models.py, and faults that only a stage
can find in test_stage_failures.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.cli.main import run
from tests.local_cluster import CONTEXT_TOKENS, VOCAB_SIZE
from tests.processes import started_processes


def check_refusal(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that generate exits with 2, writes only one line that matches ``error``, to stderr, and starts nothing."""
    before = started_processes()
    assert run(["generate", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(error, output.err), output.err
    assert output.err.startswith("error: ") and output.err.count("\n") == 1, output.err
    assert started_processes() == before


def host(ssh: str = "127.0.0.1", **fields: Any) -> dict[str, Any]:
    """Return an entry of a hostfile."""
    return {"ssh": ssh, "ips": ["127.0.0.1"], **fields}


HOSTFILES: dict[str, tuple[object, str]] = {  # a hostfile, or its text, and the error
    "not JSON": ("[{]", "hosts.json is not JSON: "),
    "empty": ("", "hosts.json is not JSON: "),
    "no hosts": ([], "hosts.json lists no hosts: write for instance"),
    "an object without hosts": ({"backend": "ring"}, "hosts.json lists no hosts"),
    "a host without a name": ([{"ips": ["127.0.0.1"]}], "missing required field `ssh`"),
    "a name that is an option": ([host("-oProxyCommand=x")], "'-oProxyCommand=x' is not a host name"),
    "no ips for ring": ([host(), {"ssh": "mac-2"}], r"host 1 \(mac-2\) has no ips, which backend ring needs: add"),
    "unequal ips": ([host(), host(ips=["10.0.0.1", "10.0.0.2"])], "has 2 ips and host 0"),
    "a name in place of an ip": ([host(ips=["mac-1"])], "'mac-1': give an IPv4 address"),
    "an unknown backend": ({"backend": "mpi", "hosts": [host()]}, "does not run over backend 'mpi': write one of"),
    "an rdma matrix of the wrong shape": (
        {"backend": "jaccl", "hosts": [host(rdma=[None, "rdma_en5"]), host(rdma=["rdma_en5"])]},
        r"host 1 .*: rdma has 1 entries for 2 hosts",
    ),
    "no rdma at all": ({"backend": "jaccl", "hosts": [host(), host()]}, "rdma has 0 entries for 2 hosts"),
    "the same ip and port twice": (
        [host(ips=["127.0.0.1:5000"]), host(ips=["127.0.0.1:5000"])],
        r"host 1 .* lists 127.0.0.1:5000, which host 0 .* has already: give each its own port",
    ),
    "more hosts than layers": ([host()] * 8, "there are 8 hosts and the model has 7 layers: use at most 7"),
    "a host that is too small": ([host(memory_gb=0.001)], "the model does not fit: weights and cache need"),
    "environment lines that are none": ({"envs": ["X"], "hosts": [host()]}, 'envs must be a list of lines like "NAME'),
}


@pytest.mark.parametrize(("content", "error"), HOSTFILES.values(), ids=HOSTFILES.keys())
def test_a_bad_hostfile_is_refused(
    content: object, error: str, endless_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    check_refusal(["--hostfile", str(path), "--model", str(endless_model), "Hello"], error, capsys)


def test_a_missing_hostfile_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = "cannot read the hostfile .*/none.json: No such file or directory"
    check_refusal(["--hostfile", str(tmp_path / "none.json"), "Hello"], error, capsys)


def test_stages_and_a_hostfile_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    error = "a number of stages is for runs on this machine alone: give it, or a hostfile, not both"
    check_refusal(["--hostfile", "hosts.json", "--stages", "2", "Hello"], error, capsys)


REQUESTS: dict[str, tuple[list[str], str]] = {  # arguments of generate, and the error
    "empty prompt": ([""], "the prompt is empty: give some text"),
    "blank prompt": ([" \n"], "the prompt is empty: give some text"),
    "no token ids": (["--token-ids", ""], "--token-ids: '' is not a whole number from 0: write numbers with commas"),
    "token ids with a word": (["--token-ids", "3,x"], "--token-ids: 'x' is not a whole number from 0"),
    "token ids with a gap": (["--token-ids", "3,,4"], "--token-ids: '' is not a whole number from 0"),
    "negative token id": (["--token-ids", "-3"], "--token-ids: '-3' is not a whole number from 0"),
    "token id of 5000 digits": (
        ["--token-ids", "9" * 5000],
        "--token-ids: '9999999999' is not a whole number from 0",
    ),
    "unknown token id": (
        ["--token-ids", f"3,{VOCAB_SIZE}"],
        f"token id {VOCAB_SIZE} is outside the vocabulary of {VOCAB_SIZE}",
    ),
    "token ids and a prompt": (["--token-ids", "3", "Hello"], "--token-ids is the whole prompt: leave out PROMPT"),
    "raw and a system prompt": (["--raw", "--system", "x", "Hello"], "--raw sends only PROMPT: leave out --system"),
    "prompt without room": (
        ["--raw", "x" * 3000],
        f"has 3000 tokens and the context holds {CONTEXT_TOKENS}.*larger --context",
    ),
    "small context": (["--context", "8", "Hello"], r"the context holds 8, so there is no room for an answer"),
    "large context": (
        ["--context", str(CONTEXT_TOKENS + 1), "Hello"],
        f"--context {CONTEXT_TOKENS + 1} is more than the {CONTEXT_TOKENS} positions",
    ),
    "temperature": (
        ["--temperature", "-1", "Hello"],
        r"temperature -1.0 is out of range: give a value from 0 \(greedy",
    ),
    "temperature nan": (["--temperature", "nan", "Hello"], "temperature nan is out of range"),
    "top-p": (["--top-p", "1.5", "Hello"], "top-p 1.5 is out of range: give a value above 0, at most 1"),
    "top-k": (["--top-k", "-1", "Hello"], "top-k -1 is out of range: give a value at least 1"),
    "min-p": (["--min-p", "1", "Hello"], "min-p 1.0 is out of range: give a value at least 0, below 1"),
    "repetition penalty": (["--repetition-penalty", "0", "Hello"], "repetition-penalty 0.0 is out of range"),
    "seed": (["--seed", "-2", "Hello"], "seed -2 is out of range: give a value from 0"),
    "logprobs": (["--json", "--logprobs", "101", "Hello"], "logprobs 101 is out of range: give a value from 0 to 100"),
    "an empty stop string": (["--stop", "", "Hello"], "a stop string is empty"),
    "an expression that is not UTF-8": (
        ["--regex", "\udce9", "Hello"],
        "regular expression or grammar is not UTF-8 text",
    ),
    "a bias outside the vocabulary": (
        ["--logit-bias", f"{VOCAB_SIZE}=1", "Hello"],
        f"for token id {VOCAB_SIZE}, outside the vocabulary",
    ),
    "a bias without a number": (["--logit-bias", "5", "Hello"], "--logit-bias '5': write a token id and a number"),
    "two biases of a token": (["--logit-bias", "5=1", "--logit-bias", "5=2", "Hello"], "token 5 has a bias already"),
    "a large penalty": (["--presence-penalty", "3", "Hello"], "presence-penalty 3.0 is out of range"),
    "a schema that is not there": (["--json-schema", "/missing", "Hello"], "--json-schema: /missing cannot be read"),
    "a schema that is no JSON": (
        ["--json-schema", __file__, "Hello"],
        "--json-schema: .* line 1, column 3: extra data",
    ),
    "a malformed regular expression": (
        ["--regex", "(", "Hello"],
        "the regular expression cannot be compiled: unclosed group\n",
    ),
    "a catastrophic pattern": (["--regex", "(a?){400}a{400}", "Hello"], "it allows no text, or is too complex"),
    "a malformed grammar": (["--lark", __file__, "Hello"], "the Lark grammar cannot be compiled"),
    "two forms": (["--regex", "a", "--lark", __file__, "Hello"], "an answer has one form"),
    "a tool without tools": (["--tool-choice", "clock", "Hello"], "tool_choice names 'clock', which is not declared"),
    "a required call without tools": (["--tool-choice", "required", "Hello"], "no tool is declared"),
    "lease nan": (["--lease", "nan", "Hello"], "lease nan is out of range: give 2 to 3600 s"),
    "short lease": (["--lease", "1.9", "Hello"], "lease 1.9 is out of range"),
    "long lease": (["--lease", "3601", "Hello"], "lease 3601 is out of range"),
    "timeout": (["--timeout", "0", "Hello"], "timeout is 0 s: give more than 0"),
    "timeout nan": (["--timeout", "nan", "Hello"], "timeout is nan s"),
    "revision of a folder": (["--revision", "main", "Hello"], "a revision is for a repository on the Hub"),
    "split with a word": (["--split", "3,x", "Hello"], "--split: 'x' is not a whole number from 1"),
    "split for fewer stages": (["--split", "7", "--stages", "2", "Hello"], "--split 7 names 1 stages, and there are 2"),
    "split of fewer layers": (["--split", "3,3", "--stages", "2", "Hello"], "assigns 6 layers: it must assign 7"),
    "split with a stage without layers": (
        ["--split", "7,0", "--stages", "2", "Hello"],
        "--split: '0' is not a whole number from 1",
    ),
    "more stages than layers": (["--stages", "8", "Hello"], "the model has 7 layers: use at most 7 hosts"),
}


@pytest.mark.parametrize(("arguments", "error"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_that_cannot_run_is_refused(
    arguments: list[str], error: str, endless_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(["--model", str(endless_model), *arguments], error, capsys)


SCHEMAS: dict[str, tuple[object, str]] = {  # a JSON schema, used with --strict-schema, and the error
    "a list": ([1], "json_schema"),
    "an unknown type": ({"type": "thing"}, "the JSON schema cannot be enforced: Invalid type: thing"),
    "a remote reference": ({"$ref": "https://a.example/b.json"}, "does not fetch resources"),
    "recursion without end": (
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        "the JSON schema has no finite value: it refers to itself without end",
    ),
    "a catastrophic pattern": ({"type": "string", "pattern": "^(a?){400}a{400}$"}, "allows no text, or is too complex"),
    "5 MB": ({"enum": ["x" * 5_000_000]}, "the JSON schema is larger than 262144 bytes"),
    "a keyword that cannot be enforced": (
        {"type": "array", "uniqueItems": True},
        "the JSON schema cannot be enforced: .*uniqueItems",
    ),
}


@pytest.mark.parametrize(("schema", "error"), SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_that_cannot_be_used_is_refused(
    schema: object, error: str, endless_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    options = ["--model", str(endless_model), "--json-schema", str(tmp_path / "schema.json"), "--strict-schema"]
    check_refusal([*options, "Hello"], error, capsys)


def test_a_tool_choice_that_names_no_tool_of_the_file_is_refused(
    endless_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.py").write_text('def clock() -> str:\n    """Return the time."""\n    return "noon"\n')
    arguments = [
        "--model",
        str(endless_model),
        "--tools",
        str(tmp_path / "tools.py"),
        "--tool-choice",
        "nosuch",
        "Hello",
    ]
    check_refusal(arguments, "tool_choice names 'nosuch', which is not declared; declared tools: clock", capsys)


USAGE_ERRORS: dict[str, tuple[list[str], str]] = {  # a command line, and the error
    "an unknown option": (["generate", "--tempertaure", "1"], "No such option '?--tempertaure"),
    "an unknown command": (["genrate"], "there is no command 'genrate': did you mean generate\\?"),
    "a word for a number": (["generate", "--max-tokens", "x", "Hello"], "Invalid value for '--max-tokens'"),
    "no token to generate": (["generate", "--max-tokens", "0", "Hello"], "Invalid value for '--max-tokens' / '-n': 0"),
    "an unknown dtype": (["generate", "--dtype", "int8", "Hello"], "'int8' is not one of 'bfloat16', 'float32'"),
    "log-probabilities without JSON": (["generate", "--logprobs", "3", "Hello"], "add --json"),
    "several answers with tools": (
        ["generate", "--num-answers", "2", "--tools", "x.py", "Hello"],
        "goes without --tools",
    ),
    "no answer": (["generate", "--num-answers", "0", "Hello"], "Invalid value for '--num-answers': 0"),
    "ten thousand answers": (["generate", "--num-answers", "10000", "Hello"], "not in the range 1<=x<=128"),
    "two prompts": (["generate", "Hello", "there"], "unexpected extra argument"),
    "no command": ([], "Usage: mlx-k2"),
}


@pytest.mark.parametrize(("arguments", "error"), USAGE_ERRORS.values(), ids=USAGE_ERRORS.keys())
def test_an_invalid_command_line_prints_the_usage_and_exits_with_2(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(error, output.err), output.err
    assert "Usage: mlx-k2" in output.err
