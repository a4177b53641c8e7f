"""Tests of the output of `mlx-k2 generate`: answer on stdout, all else on stderr, JSON lines with `--json`."""

import json
import os
import pty
import re
import subprocess
from typing import Any

import pytest

from mlx_k2.builtin import BANNER, BUILTIN_FOLDER
from mlx_k2.text.reply_parser import ReplyReader
from mlx_k2.text.reply_parts import whole_reply
from mlx_k2.text.tokenizer import load_tokenizer
from mlx_k2.weights.checkpoint import describe_model, read_small_files
from tests.cli.command import MLX_K2, CommandLine

ASKED = ("--seed", "5", "--max-tokens", "40")
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def text_run(command_line: CommandLine) -> subprocess.CompletedProcess[str]:
    """Return the result of the README's command: the built-in model on two stages."""
    return command_line.run("generate", "Hello", *ASKED)


@pytest.fixture(scope="module")
def json_run(command_line: CommandLine) -> subprocess.CompletedProcess[str]:
    return command_line.run("generate", "Hello", *ASKED, "--json", "--logprobs", "2", "--stages", "3")


@pytest.fixture(scope="module")
def lines(json_run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in json_run.stdout.splitlines()]


def answer_of(lines: list[dict[str, Any]]) -> str:
    """Return the answer in the tokens of ``lines``, without reasoning and tool calls."""
    files = read_small_files(BUILTIN_FOLDER)
    tokenizer = load_tokenizer(files, describe_model(files, "built-in").config.vocab_size)
    reader = ReplyReader(tokenizer, (), tokenizer.stop_ids)
    parts = [part for line in lines if "token" in line for part in reader.add(line["token"]).parts]
    return whole_reply([*parts, *reader.finish().parts]).content


def test_the_answer_goes_to_stdout_and_everything_else_to_stderr(
    text_run: subprocess.CompletedProcess[str],
) -> None:
    assert text_run.returncode == 0, text_run.stderr
    assert text_run.stdout.endswith("\n")
    banner = text_run.stderr.splitlines()[: len(BANNER)]
    thinking, *summaries = text_run.stderr.splitlines()[len(BANNER) :]
    assert tuple(banner) == BANNER
    assert thinking == "I know the answer to this."
    assert thinking not in text_run.stdout
    (summary,) = summaries
    assert re.fullmatch(r"\d+ tokens · [\d.]+ tok/s · first token after [\d.]+ s · seed 5", summary)


@pytest.mark.slow
def test_verbose_shows_all_counts_and_times_and_the_stages(command_line: CommandLine) -> None:
    run = command_line.run("generate", "Hello", *ASKED, "--verbose")
    lines = run.stderr.splitlines()
    at = next(number for number, line in enumerate(lines) if line.endswith(" seed 5"))
    summary, times, headings, *stages = lines[at : at + 5]
    assert re.fullmatch(r"\d+ tokens \(.*\) · prompt \d+ tokens · seed 5", summary)
    assert re.fullmatch(
        r"loaded in [\d.]+ s · first token after [\d.]+ s · prefill [\d.]+ tok/s · decode [\d.]+ tok/s"
        r"( · .* draft tokens accepted)?",
        times,
    )
    assert headings.split() == ["stage", "host", "layers", "weights", "computing", "share"]
    assert [re.split(r"\s{2,}", line.strip())[:3] for line in stages] == [
        ["0", "127.0.0.1", "0-4"],
        ["1", "127.0.0.1", "5-6"],
    ]


@pytest.mark.slow
def test_the_built_in_model_reasons_on_stderr_and_answers_on_stdout(command_line: CommandLine) -> None:
    run = command_line.run("generate", "What is 17 plus 25?")
    assert run.returncode == 0, run.stderr
    assert "7 + 5" in run.stderr
    assert run.stdout.strip() == "17 + 25 = 42"


def test_json_output_has_a_line_for_each_token_and_a_summary(lines: list[dict[str, Any]]) -> None:
    *tokens, last = lines
    assert all(line.keys() == {"token", "text", "bytes", "logprob", "top"} for line in tokens)
    for line in tokens:
        assert [entry.keys() for entry in line["top"]] == [{"token", "text", "bytes", "logprob"}] * 2
        assert line["logprob"] <= line["top"][0]["logprob"] <= 0
    summary = last["summary"]
    assert (summary["usage"]["generated_tokens"], summary["seed"]) == (len(tokens), 5)
    assert summary["text"] == answer_of(lines) != ""
    assert summary["reasoning"].startswith("I know")
    assert summary["finish_reason"] in ("length", "stop")


def test_the_summary_lists_layers_bytes_and_busy_fraction_of_each_stage(lines: list[dict[str, Any]]) -> None:
    stages = lines[-1]["summary"]["stages"]
    layers = [layer for stage in stages for layer in range(stage["first_layer"], stage["last_layer"] + 1)]
    assert (len(stages), layers) == (3, list(range(7)))
    assert sum(stage["busy_fraction"] for stage in stages) == pytest.approx(1)
    assert all(0 < stage["held_bytes"] <= stage["peak_bytes"] for stage in stages)
    assert {stage["host"] for stage in stages} == {"127.0.0.1"}


def test_two_and_three_stages_give_the_same_answer(
    text_run: subprocess.CompletedProcess[str], lines: list[dict[str, Any]]
) -> None:
    assert answer_of(lines) + "\n" == text_run.stdout


@pytest.mark.slow
def test_one_stage_with_a_prompt_from_stdin_gives_the_same_answer_and_verbose_shows_phases(
    command_line: CommandLine, text_run: subprocess.CompletedProcess[str]
) -> None:
    run = command_line.run("generate", *ASKED, "--stages", "1", "--split", "7", "--verbose", stdin="Hello")
    assert (run.returncode, run.stdout) == (0, text_run.stdout), run.stderr
    phases = [line for line in run.stderr.splitlines() if line.endswith(" ...")]
    assert phases[:3] == ["starting the stage ...", "connecting ...", "loading ..."]


def test_piped_output_has_no_escape_codes(
    text_run: subprocess.CompletedProcess[str], json_run: subprocess.CompletedProcess[str]
) -> None:
    assert ESCAPE not in text_run.stderr + json_run.stdout + json_run.stderr


def on_a_terminal(command_line: CommandLine, *arguments: str, **environment: str) -> tuple[bytes, str]:
    """Run the command with a terminal as stderr. Return its stdout and its stderr."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [MLX_K2, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=command_line.environment(**environment),
    )
    os.close(theirs)
    written = b""
    while piece := _read(ours):
        written += piece
    os.close(ours)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0, written
    return stdout, written.decode()


def _read(terminal: int) -> bytes:
    """Return the next output, or b"" after the other side has closed, which Linux reports as an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_a_terminal_shows_progress_on_stderr_and_only_the_answer_on_stdout(
    command_line: CommandLine, text_run: subprocess.CompletedProcess[str]
) -> None:
    stdout, stderr = on_a_terminal(command_line, "generate", "Hello", *ASKED, "--stages", "1")
    assert stdout.decode() == text_run.stdout
    for shown in ("starting the stage ...", "stage 0  127.0.0.1  layers 0-6", "seed 5"):
        assert shown in stderr


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_turns_off_colours(command_line: CommandLine, environment: dict[str, str], coloured: bool) -> None:
    _, stderr = on_a_terminal(command_line, "generate", "--dry-run", **environment)
    assert (re.search(rf"{ESCAPE}\[[\d;]*m", stderr) is not None) == coloured
    assert "nothing was started" in stderr
