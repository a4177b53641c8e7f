"""Tests of --connect: chat, generate and bench with the model of a running server."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_k2.cli.main import run
from tests.cli.command import MLX_K2, CommandLine
from tests.cli.tmux import needs_tmux, terminal
from tests.server.server_process import Server, running_server

QUESTION = "What is 17 plus 25?"
ENDLESS_MODEL_TEXT = "reserved_token"
"""Text that the endless model, which has random weights, generates within a few tokens."""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """Return the user of the server and of the commands that connect to it."""
    return CommandLine(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def server(user: CommandLine) -> Iterator[Server]:
    with running_server(user) as server:
        yield server


def connect_option(server: Server) -> tuple[str, str]:
    return "--connect", f"http://127.0.0.1:{server.port}"


def test_generate_answers_with_the_servers_model_and_reuses_cached_prompts(user: CommandLine, server: Server) -> None:
    result = user.run("generate", QUESTION, "--temperature", "0", "--verbose", *connect_option(server))
    assert (result.returncode, result.stdout) == (0, "17 + 25 = 42\n")
    assert "tokens (complete)" in result.stderr
    assert "loaded in" not in result.stderr
    repeated = user.run("generate", QUESTION, "--temperature", "0", "--verbose", *connect_option(server))
    assert "cached)" in repeated.stderr


def test_chat_answers_with_the_servers_model(user: CommandLine, server: Server) -> None:
    lines = f"{QUESTION}\nWhat is 3 plus 4?\n/stats\n"
    result = user.run("chat", "--temperature", "0", *connect_option(server), stdin=lines)
    assert (result.returncode, result.stdout) == (0, "17 + 25 = 42\n3 + 4 = 7\n")
    assert "kimi-k2-tiny · each line of input is a message" in result.stderr
    assert "prompt tokens cached\nthe stages are those of the server http" in result.stderr  # no number of stages


@pytest.mark.slow
@needs_tmux
def test_a_chat_continues_after_its_server_has_restarted(
    user: CommandLine, endless_model: Path, tmp_path: Path
) -> None:
    model = ("--model", str(endless_model))
    with running_server(user, *model) as server:
        command = [MLX_K2, "chat", *connect_option(server)]
        with terminal(tmp_path, command, user.environment(TERM="xterm-256color")) as pane:
            pane.wait_for("Ctrl-D leaves")
            pane.send_message("Hello")
            pane.wait_for(ENDLESS_MODEL_TEXT)
            server.end(signal.SIGKILL)
            pane.wait_for("the connection to the server was lost")
            pane.wait_for("; /retry answers your message again")
            pane.send_message("/retry")
            num_texts = pane.wait_for("error: there is no server at").count(ENDLESS_MODEL_TEXT)
            with running_server(user, *model, "--port", str(server.port)):
                pane.send_message("/retry")
                pane.wait_for(ENDLESS_MODEL_TEXT, times=num_texts + 1)
                pane.type("C-c")
                pane.wait_for("the answer was")  # stopped, or cut off if it has ended before
                pane.type("C-d")
                pane.wait_for("exit code 0")


@pytest.mark.slow
def test_bench_measures_the_servers_stages(user: CommandLine, server: Server) -> None:
    workload = ("--prompt-lengths", "20", "--streams", "1,2", "--generate", "10")
    result = user.run("bench", *workload, *connect_option(server))
    assert (result.returncode, result.stdout) == (0, "")
    assert len([line for line in result.stderr.splitlines() if line.split()[:1] == ["20"]]) == 2  # rows of the table
    refusal = user.run("bench", *workload, "--json", *connect_option(server))
    assert refusal.returncode == 2
    assert "are about stages that this command starts" in refusal.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "x"), "--model is the server's to choose"),
        (("--stages", "2"), "--stages is the server's to choose"),
        (("--lease", "5"), "--lease is the server's to choose"),
        (("--dry-run",), "leave them out with --connect"),
        (("--json", "--logprobs", "3"), "leave out --logprobs"),
    ],
)
def test_an_option_that_a_server_does_not_support_is_refused_by_name(
    server: Server, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "a", *options, *connect_option(server)]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
