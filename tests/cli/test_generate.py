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
from tests.cli.command import MLX_K2, CommandLine, read_terminal

OPTIONS = ("--seed", "5", "--max-tokens", "40")
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def text_result(command_line: CommandLine) -> subprocess.CompletedProcess[str]:
    """Return the result of a run of the built-in model on two stages."""
    return command_line.run("generate", "Hello", *OPTIONS)


@pytest.fixture(scope="module")
def json_result(command_line: CommandLine) -> subprocess.CompletedProcess[str]:
    return command_line.run("generate", "Hello", *OPTIONS, "--json", "--logprobs", "2", "--stages", "3")


@pytest.fixture(scope="module")
def json_lines(json_result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in json_result.stdout.splitlines()]


def answer_of(lines: list[dict[str, Any]]) -> str:
    """Return the answer in the tokens of JSON ``lines``, without reasoning and tool calls."""
    files = read_small_files(BUILTIN_FOLDER)
    tokenizer = load_tokenizer(files, describe_model(files, "built-in").config.vocab_size)
    reader = ReplyReader(tokenizer, (), tokenizer.stop_ids)
    parts = [part for line in lines if "token" in line for part in reader.add(line["token"]).parts]
    return whole_reply([*parts, *reader.finish().parts]).content


def test_the_answer_goes_to_stdout_and_everything_else_to_stderr(text_result: subprocess.CompletedProcess[str]) -> None:
    assert text_result.returncode == 0, text_result.stderr
    assert text_result.stdout.endswith("\n")
    *banner, reasoning, summary = text_result.stderr.splitlines()
    assert tuple(banner) == BANNER
    assert reasoning == "I know the answer to this."
    assert reasoning not in text_result.stdout
    assert re.fullmatch(r"\d+ tokens · [\d.]+ tok/s · first token after [\d.]+ s · seed 5", summary)


@pytest.mark.slow
def test_verbose_shows_all_counts_and_times_and_the_stages(command_line: CommandLine) -> None:
    lines = command_line.run("generate", "Hello", *OPTIONS, "--verbose").stderr.splitlines()
    start = next(index for index, line in enumerate(lines) if line.endswith(" seed 5"))
    summary, times, headings, *stages = lines[start : start + 5]
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
    result = command_line.run("generate", "What is 17 plus 25?")
    assert result.returncode == 0, result.stderr
    assert "7 + 5" in result.stderr
    assert result.stdout.strip() == "17 + 25 = 42"


def test_json_output_has_a_line_for_each_token_and_a_summary(json_lines: list[dict[str, Any]]) -> None:
    *tokens, last_line = json_lines
    for token in tokens:
        assert token.keys() == {"token", "text", "bytes", "logprob", "top"}
        assert [candidate.keys() for candidate in token["top"]] == [{"token", "text", "bytes", "logprob"}] * 2
        assert token["logprob"] <= token["top"][0]["logprob"] <= 0
    summary = last_line["summary"]
    assert (summary["usage"]["generated_tokens"], summary["seed"]) == (len(tokens), 5)
    assert summary["text"] == answer_of(json_lines) != ""
    assert summary["reasoning"].startswith("I know")
    assert summary["finish_reason"] in ("length", "stop")


def test_the_summary_lists_layers_bytes_and_busy_fraction_of_each_stage(json_lines: list[dict[str, Any]]) -> None:
    stages = json_lines[-1]["summary"]["stages"]
    layers = [layer for stage in stages for layer in range(stage["first_layer"], stage["last_layer"] + 1)]
    assert (len(stages), layers) == (3, list(range(7)))
    assert sum(stage["busy_fraction"] for stage in stages) == pytest.approx(1)
    assert all(0 < stage["held_bytes"] <= stage["peak_bytes"] for stage in stages)
    assert {stage["host"] for stage in stages} == {"127.0.0.1"}


def test_two_and_three_stages_give_the_same_answer(
    text_result: subprocess.CompletedProcess[str], json_lines: list[dict[str, Any]]
) -> None:
    assert answer_of(json_lines) + "\n" == text_result.stdout


@pytest.mark.slow
def test_one_stage_with_a_prompt_from_stdin_gives_the_same_answer_and_verbose_shows_phases(
    command_line: CommandLine, text_result: subprocess.CompletedProcess[str]
) -> None:
    result = command_line.run("generate", *OPTIONS, "--stages", "1", "--split", "7", "--verbose", stdin="Hello")
    assert (result.returncode, result.stdout) == (0, text_result.stdout), result.stderr
    phases = [line for line in result.stderr.splitlines() if line.endswith(" ...")]
    assert phases[:3] == ["starting the stage ...", "connecting ...", "loading ..."]


def test_piped_output_has_no_escape_codes(
    text_result: subprocess.CompletedProcess[str], json_result: subprocess.CompletedProcess[str]
) -> None:
    assert ESCAPE not in text_result.stderr + json_result.stdout + json_result.stderr


def run_with_terminal(command_line: CommandLine, *arguments: str, **environment: str) -> tuple[str, str]:
    """Run the command with a terminal as stderr. Return its stdout and its stderr."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [MLX_K2, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=command_line.environment(**environment),
    )
    os.close(terminal)
    errors = read_terminal(controller)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output.decode(), errors


def test_a_terminal_shows_progress_on_stderr_and_only_the_answer_on_stdout(
    command_line: CommandLine, text_result: subprocess.CompletedProcess[str]
) -> None:
    stdout, stderr = run_with_terminal(command_line, "generate", "Hello", *OPTIONS, "--stages", "1")
    assert stdout == text_result.stdout
    for progress in ("starting the stage ...", "stage 0  127.0.0.1  layers 0-6", "seed 5"):
        assert progress in stderr


@pytest.mark.parametrize(("environment", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_turns_off_colours(command_line: CommandLine, environment: dict[str, str], is_coloured: bool) -> None:
    _, stderr = run_with_terminal(command_line, "generate", "--dry-run", **environment)
    assert (re.search(rf"{ESCAPE}\[[\d;]*m", stderr) is not None) == is_coloured
    assert "nothing was started" in stderr
