"""Tests of the advice in refusals of command lines: a line that follows it is accepted."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from mlx_k2.cli.main import run
from tests.advice import follows_advice
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
    ("MESSAGE and --prompt are the same: give one of them", "chat Hi --prompt Hi", f"chat --prompt Hi {END}"),
    ("PROMPT and --prompt are the same: give one of them", "generate Hi --prompt Hi", f"generate Hi {END}"),
    (
        "'1;2' is not a whole number from 0: write numbers with commas, as in 1,29,57",
        "generate Hi --draft-model head --draft-aux 1;2",
        f"generate Hi --draft-model head --draft-aux 1,29,57 --stages 2 {END}",
    ),
    (
        "--draft-aux, --draft-bits and --draft-vocab are for a draft model: give --draft-model",
        f"generate Hi --draft-vocab 5 --stages 2 {END}",
        f"generate Hi --draft-vocab 5 --stages 2 --draft-model head {END}",
    ),
    (
        "--draft-model is for two stages or more: with one, leave it out",
        f"generate Hi --stages 1 --draft-model head {END}",
        f"generate Hi --stages 1 {END}",
    ),
    (
        "--draft model needs a draft model, and there is none: give --draft-model",
        f"generate Hi --draft model --stages 2 {END}",
        f"generate Hi --draft model --stages 2 --draft-model head {END}",
    ),
    (
        "clients must know the port: give --port",
        f"serve --print-settings codex --port 0 {END}",
        f"serve --print-settings codex --port 8080 {END}",
    ),
    (
        "'1;2' is not a whole number from 1: write numbers with commas, as in 1,2,4",
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
        "'3;4' is not a whole number from 0: write numbers with commas, as in 3,4,5",
        "generate --token-ids '3;4'",
        f"generate --token-ids 3,4,5 {END}",
    ),
    (
        "--logit-bias '42': write a token id and a number, as in 42=-10",
        "generate Hi --logit-bias 42",
        f"generate Hi --logit-bias 42=-10 {END}",
    ),
    (
        "'31 30' is not a whole number from 1: write numbers with commas, as in 31,30",
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
