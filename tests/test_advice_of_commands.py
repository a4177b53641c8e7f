"""Tests of the advice in refusals of command lines: a command line that follows it is accepted."""

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
NO_SERVER = "http://127.0.0.1:9"
NO_MODEL = "--model /no/such/folder"
ACCEPTED = r"/no/such/folder does not exist|there is no server at"
"""The errors of a command whose options are accepted, with NO_MODEL and with NO_SERVER."""
REPO = "moonshotai/Kimi-K2-Thinking"


def refusal(*words: str) -> str:
    """Run a command line that ``mlx-k2`` refuses, in this process, and return its error output."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        assert run(words) == 2, errors.getvalue()
    return errors.getvalue()


COMMAND_LINES = (  # a message with advice, a command line that it refuses, and one that follows the advice
    ("MESSAGE and --prompt are the same: give one of them", "chat Hi --prompt Hi", f"chat --prompt Hi {NO_MODEL}"),
    ("PROMPT and --prompt are the same: give one of them", "generate Hi --prompt Hi", f"generate Hi {NO_MODEL}"),
    (
        "'1;2' is not a whole number from 0: write numbers with commas, as in 1,29,57",
        "generate Hi --draft-model head --draft-aux 1;2",
        f"generate Hi --draft-model head --draft-aux 1,29,57 --stages 2 {NO_MODEL}",
    ),
    (
        "--draft-aux, --draft-bits and --draft-vocab are for a draft model: give --draft-model",
        f"generate Hi --draft-vocab 5 --stages 2 {NO_MODEL}",
        f"generate Hi --draft-vocab 5 --stages 2 --draft-model head {NO_MODEL}",
    ),
    (
        "--draft-model is for two stages or more: with one, leave it out",
        f"generate Hi --stages 1 --draft-model head {NO_MODEL}",
        f"generate Hi --stages 1 {NO_MODEL}",
    ),
    (
        "--draft model needs a draft model, and there is none: give --draft-model",
        f"generate Hi --draft model --stages 2 {NO_MODEL}",
        f"generate Hi --draft model --stages 2 --draft-model head {NO_MODEL}",
    ),
    (
        "clients must know the port: give --port",
        f"serve --print-settings codex --port 0 {NO_MODEL}",
        f"serve --print-settings codex --port 8080 {NO_MODEL}",
    ),
    (
        "'1;2' is not a whole number from 1: write numbers with commas, as in 1,2,4",
        "bench --streams 1;2",
        f"bench --streams 1,2,4 {NO_MODEL}",
    ),
    (
        "--json, --csv, --plot and --trace are about stages that this command starts: leave them out with --connect",
        f"bench --json --connect {NO_SERVER}",
        f"bench --connect {NO_SERVER}",
    ),
    (
        "--split is the server's to choose: leave it out with --connect",
        f"generate Hi --split 3,4 --connect {NO_SERVER}",
        f"generate Hi --connect {NO_SERVER}",
    ),
    (
        "--connect 127.0.0.1:9 is not the address of a server: give http://HOST:PORT",
        "generate Hi --connect 127.0.0.1:9",
        f"generate Hi --connect {NO_SERVER}",
    ),
    (
        "--dry-run and --prompts are about stages that this command starts: leave them out with --connect",
        f"generate Hi --dry-run --connect {NO_SERVER}",
        f"generate Hi --connect {NO_SERVER}",
    ),
    (
        "--logprobs shows in the JSON lines only: add --json",
        "generate Hi --logprobs 1",
        f"generate Hi --logprobs 1 --json {NO_MODEL}",
    ),
    ("--prompts and --out go together: give both", "generate --prompts p", f"generate --prompts p --out o {NO_MODEL}"),
    (
        "--token-ids is the whole prompt: leave out PROMPT and --system",
        "generate Hi --token-ids 3",
        f"generate --token-ids 3 {NO_MODEL}",
    ),
    ("--raw sends only PROMPT: leave out --system", "generate Hi --raw --system x", f"generate Hi --raw {NO_MODEL}"),
    ("the prompt is empty: give some text", "generate ''", f"generate Hi {NO_MODEL}"),
    (
        "--yes and --allow-tool are for tools: give --tools or --mcp",
        "generate Hi --yes",
        f"generate Hi --yes --tools x.py {NO_MODEL}",
    ),
    (
        "'3;4' is not a whole number from 0: write numbers with commas, as in 3,4,5",
        "generate --token-ids '3;4'",
        f"generate --token-ids 3,4,5 {NO_MODEL}",
    ),
    (
        "--logit-bias '42': write a token id and a number, as in 42=-10",
        "generate Hi --logit-bias 42",
        f"generate Hi --logit-bias 42=-10 {NO_MODEL}",
    ),
    (
        "'31 30' is not a whole number from 1: write numbers with commas, as in 31,30",
        "generate Hi --split '31 30'",
        f"generate Hi --split 31,30 {NO_MODEL}",
    ),
    (
        "--keyfile is the private key of a certificate: add --certfile",
        "serve --keyfile k",
        f"serve --keyfile k --certfile c {NO_MODEL}",
    ),
    (
        "a number of stages is for runs on this machine alone: give it, or a hostfile, not both",
        "generate Hi --stages 2 --hostfile h",
        f"generate Hi --stages 2 {NO_MODEL}",
    ),
    (
        "a revision is for a repository on the Hub: leave it out, or give owner/name as the model",
        f"generate Hi --revision main {NO_MODEL}",
        f"generate Hi {NO_MODEL}",
    ),
    ("lease 1 is out of range: give 2 to 3600 s", "generate Hi --lease 1", f"generate Hi --lease 2 {NO_MODEL}"),
    ("timeout is 0 s: give more than 0", "generate Hi --timeout 0", f"generate Hi --timeout 0.1 {NO_MODEL}"),
)


@pytest.mark.parametrize(("message", "wrong", "right"), COMMAND_LINES)
def test_a_command_line_that_follows_the_advice_of_a_refusal_is_accepted(message: str, wrong: str, right: str) -> None:
    assert message in refusal(*shlex.split(wrong))
    assert re.search(ACCEPTED, refusal(*shlex.split(right)))


@follows_advice(
    "give --model a repository on the Hub, for instance --model moonshotai/Kimi-K2-Thinking",
    "give the folder of a checkpoint, or a repository on the Hub",
)
def test_the_repository_that_a_refusal_names_is_accepted_as_a_model(tmp_path: Path) -> None:
    assert f"give --model a repository on the Hub, for instance --model {REPO}" in refusal("download")
    assert "give the folder of a checkpoint, or a repository on the Hub" in refusal(
        "generate", "Hi", *shlex.split(NO_MODEL)
    )
    download = CommandLine(tmp_path).run("download", "--model", REPO, HF_HUB_OFFLINE="1")
    assert f"config.json of {REPO} at main is not in this host's cache" in download.stderr
