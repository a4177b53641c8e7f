"""Tests of --connect: chat and generate with the model of a running server."""

from collections.abc import Iterator

import pytest

from mlx_k2.cli.main import run
from tests.cli.command import CommandLine
from tests.server.server_process import Server, running_server

QUESTION = "What is 17 plus 25?"


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    return CommandLine(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def server(user: CommandLine) -> Iterator[Server]:
    with running_server(user) as found:
        yield found


def connect(server: Server) -> tuple[str, str]:
    return "--connect", f"http://127.0.0.1:{server.port}"


def test_generate_answers_with_the_servers_model(user: CommandLine, server: Server) -> None:
    ran = user.run("generate", QUESTION, "--temperature", "0", "--verbose", *connect(server))
    assert (ran.returncode, ran.stdout) == (0, "17 + 25 = 42\n")
    assert "tokens (complete)" in ran.stderr
    assert "loaded in" not in ran.stderr
    again = user.run("generate", QUESTION, "--temperature", "0", "--verbose", *connect(server))
    assert "cached)" in again.stderr


def test_chat_answers_with_the_servers_model_and_finds_its_prompt_cached(user: CommandLine, server: Server) -> None:
    ran = user.run("chat", "--temperature", "0", *connect(server), stdin=f"{QUESTION}\nWhat is 3 plus 4?\n/stats\n")
    assert (ran.returncode, ran.stdout) == (0, "17 + 25 = 42\n3 + 4 = 7\n")
    assert "kimi-k2-tiny · /help" in ran.stderr


@pytest.mark.slow
def test_bench_measures_the_servers_stages(user: CommandLine, server: Server) -> None:
    workload = ("--prompt-lengths", "20", "--streams", "1,2", "--generate", "10")
    ran = user.run("bench", *workload, *connect(server))
    assert (ran.returncode, ran.stdout) == (0, "")
    assert len([line for line in ran.stderr.splitlines() if line.split()[:1] == ["20"]]) == 2
    refused = user.run("bench", *workload, "--json", *connect(server))
    assert refused.returncode == 2
    assert "are for own stages" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "x"), "--model is the server's to choose"),
        (("--stages", "2"), "--stages is the server's to choose"),
        (("--dry-run",), "leave them out with --connect"),
        (("--json", "--logprobs", "3"), "leave out --logprobs"),
    ],
)
def test_an_option_that_is_not_for_a_server_is_one_clear_error(
    server: Server, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "a", *options, *connect(server)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
