"""Tests of `generate --prompts`: checks before the start, fields of results, and no result lost by a killed run."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings

from mlx_k2.chat.completion import Completion
from mlx_k2.cli.generate_file import result_digests
from mlx_k2.cli.main import run
from mlx_k2.cli.output import StageSummary, TokenLine
from mlx_k2.cli.prompt_files import PromptLine, read_prompt_lines
from mlx_k2.cli.result_file import ResultFile
from mlx_k2.coordinator.answer_summary import Usage
from mlx_k2.weights.checkpoint import ModelDescription, describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_source import ModelSource
from tests.cli.command import MLX_K2, CommandLine, descendants_of
from tests.cli.test_generate_options import options_of
from tests.conftest import MANY_EXAMPLES
from tests.local_cluster import still_running_after
from tests.processes import started_processes

ROOT = Path(__file__).parents[2]
RESULT_FIELDS = {"id", "text", "reasoning", "tool_calls", "finish_reason", "seed", "usage", "run"}
WEATHER = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
IS_LONG = settings().max_examples >= MANY_EXAMPLES  # True for `make long`, whose profile has more examples


def write_prompts(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else f"{json.dumps(line)}\n" for line in lines))
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def describe(model: Path) -> ModelDescription:
    return describe_model(read_model_files(ModelSource(path_or_repo=str(model))).files, "the model")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--temperature", "11"], "temperature 11.0 is out of range"),
        (["--timeout", "0"], "timeout is 0 s: give more than 0"),
        (["--thinking", "off"], "thinking cannot be turned off"),
        (["--regex", "("], "the regular expression cannot be compiled"),
        (["--raw", "--lark", __file__], "the Lark grammar cannot be compiled"),
        (["--logit-bias", "99999=1"], "a logit bias is for token id 99999, outside the vocabulary"),
        (["--context", "999999"], "--context 999999 is more than"),
        (["--out", "nowhere/out"], "nowhere/out cannot be written: No such file or directory"),
        (["--out", "."], r"\. cannot be written: Is a directory"),
        (["--out", "/dev/null"], "/dev/null is not a regular file"),
        (["--out", "./prompts"], "--out prompts is the file of prompts: give another --out"),
        (["--log-dir", "prompts/logs"], "--log-dir prompts/logs: the folder cannot be created: Not a directory"),
        (["--prompts", "/dev/zero"], "/dev/zero, line 1: it is longer than 16 MiB"),
        (["--prompts", "nowhere"], "nowhere cannot be read"),
    ],
)
def test_unusable_options_are_refused_before_any_process_starts_and_no_file_is_written(
    arguments: list[str],
    error: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(Path("prompts"), {"prompt": "x"})
    before = started_processes()
    assert run(["generate", "--prompts", "prompts", "--out", "out", *arguments]) == 2
    errors = capsys.readouterr().err
    assert re.search(error, errors) and errors.count("\n") == 1, errors
    assert started_processes() == before
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dtype", "bfloat16"],
        ["--context", "1000"],
        ["--timeout", "3"],
        ["--dense-bits", "8"],
        ["--temperature", "1"],
        ["--logit-bias", "5=1"],
        ["--thinking-budget", "9"],
        ["--system", "x"],
        ["--raw"],
    ],
)
def test_an_option_that_changes_results_changes_their_digests_and_other_options_do_not(
    arguments: list[str], endless_model: Path
) -> None:
    model = describe(endless_model)

    def digests(*options: str) -> dict[str, int]:
        lines = {1: PromptLine(prompt="x"), 5: PromptLine(prompt="x")}
        return result_digests(options_of("--prompts", "p", "--out", "o", *options), model, lines)

    assert len(digests()) == len(digests(*arguments)) == 2
    assert not digests().keys() & digests(*arguments).keys()
    assert digests("--restarts", "off", "--verbose") == digests()


@pytest.mark.slow
def test_a_result_has_the_reply_fields_of_the_json_summary_and_a_failed_line_is_exit_code_1(
    command_line: CommandLine, tmp_path: Path
) -> None:
    tools = [{"type": "function", "function": WEATHER}]
    sum_line = {"prompt": "What is 17 plus 25?", "id": "sum"}
    tool_line = {"prompt": "What is the weather in Rome?", "tools": tools}
    bad_line = {"messages": [{"role": "robot"}]}
    prompts = write_prompts(tmp_path / "prompts", "\n", sum_line, " \n", tool_line, bad_line).read_text()
    out = tmp_path / "out"
    result = command_line.run("generate", "--temperature", "0", "--prompts", "-", "--out", str(out), stdin=prompts)
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1] == f'3 results are in {out}; 1 failed, with the reason as "error" in the line'
    answer, call, failed = read_results(out)
    assert [answer["id"], call["id"], failed["id"]] == ["sum", 4, 5]
    assert answer.keys() == call.keys() == RESULT_FIELDS
    assert (answer["text"], answer["tool_calls"], answer["finish_reason"]) == ("17 + 25 = 42", [], "stop")
    assert "7 + 5" in answer["reasoning"]
    (tool_call,) = call["tool_calls"]
    assert (tool_call["id"], tool_call["name"]) == ("functions.get_weather:0", "get_weather")
    assert failed.keys() == {"id", "error", "run"}
    output = command_line.run("generate", "--temperature", "0", "--json", "What is 17 plus 25?").stdout
    summary = json.loads(output.splitlines()[-1])["summary"]
    assert summary.keys() == (RESULT_FIELDS - {"id", "run"}) | {"load_s", "stages"}
    for name in ("text", "reasoning", "tool_calls", "finish_reason"):
        assert summary[name] == answer[name]
    assert summary["usage"].keys() == answer["usage"].keys()
    for name in ("prompt_tokens", "generated_tokens"):
        assert summary["usage"][name] == answer["usage"][name]


def test_json_md_names_every_field_of_prompt_lines_results_and_json_output() -> None:
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "json.md").read_text()))
    structs = (Completion, Usage, PromptLine, StageSummary, TokenLine)
    names = {field.encode_name for struct in structs for field in msgspec.structs.fields(struct)}
    documented.add("token")  # as `{"token", "text"}`, which the pattern does not match
    assert names | RESULT_FIELDS | {"left_out", "error"} <= documented


def test_a_complete_file_is_sorted_without_starting_a_process(
    endless_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(Path("prompts"), {"prompt": "x"}, {"prompt": "y"})
    arguments = ["--model", str(endless_model), "--prompts", "prompts", "--out", "out"]
    options = options_of(*arguments)
    digests = result_digests(
        options, describe(endless_model), read_prompt_lines("prompts", options.conversation.sampling)
    )
    with ResultFile(Path("out")) as results:
        results.resume(digests)
        for number in (2, 1):
            results.write(number, {"id": number, "text": "kept"})
    before = started_processes()
    assert run(["generate", *arguments]) == 0, capsys.readouterr().err
    assert [(result["id"], result["text"]) for result in read_results(Path("out"))] == [(1, "kept"), (2, "kept")]
    assert started_processes() == before


WRITER = """
import sys
from pathlib import Path
from mlx_k2.cli.result_file import ResultFile

numbers = {f"digest {number}": number for number in range(1, 41)}
with ResultFile(Path(sys.argv[1])) as results:
    results.resume(numbers)
    for number in sorted(numbers.values(), key=lambda number: number * 17 % 41):  # in a mixed order
        if number not in results:
            results.write(number, {"text": f"{number} {sys.argv[2]}" * 40})
    results.sort()
"""


def complete_lines(out: Path) -> set[bytes]:
    """Return the complete lines of a file of results."""
    data = out.read_bytes() if out.exists() else b""
    return set(data[: data.rfind(b"\n") + 1].splitlines())


def test_a_file_of_results_whose_writer_is_killed_at_random_moments_keeps_every_line(tmp_path: Path) -> None:
    out, random_numbers = tmp_path / "out", random.Random(4)

    def start_writer(content: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", WRITER, out, content])

    start_s = time.monotonic()
    assert start_writer("complete").wait(60) == 0
    complete_run_s = time.monotonic() - start_s
    out.unlink()
    old_lines: set[bytes] = set()
    for number in range(50 if IS_LONG else 8):
        writer = start_writer(str(number))
        time_limit_s = complete_run_s * (0.5 + 0.5 * random_numbers.random())  # in the first half Python starts
        try:
            assert writer.wait(time_limit_s) == 0
        except subprocess.TimeoutExpired:
            writer.kill()
            writer.wait()
        lines = complete_lines(out)
        assert old_lines <= lines
        old_lines = lines
        if writer.returncode == 0:  # the file is complete: start with an empty one
            out.unlink()
            old_lines = set()
    assert start_writer("last").wait(60) == 0
    assert old_lines <= complete_lines(out)
    texts = [json.loads(line)["text"] for line in out.read_bytes().splitlines()]
    assert [int(text.split()[0]) for text in texts] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.timeout(1800 if IS_LONG else 120)
def test_a_run_killed_at_random_moments_is_completed_by_the_next_and_computes_no_result_twice(
    endless_model: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    prompts, out, random_numbers = tmp_path / "prompts", tmp_path / "out", random.Random(5)
    write_prompts(prompts, *({"prompt": f"Hello {number}", "max_tokens": 12} for number in range(60)))
    command = [MLX_K2, "generate", "--model", str(endless_model), "--raw", "--prompts", str(prompts), "--out", str(out)]

    def start() -> subprocess.Popen[bytes]:
        stderr = (tmp_path / "stderr").open("wb")
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=stderr, env=command_line.environment(), start_new_session=True
        )

    start_s = time.monotonic()
    assert start().wait(100) == 0
    complete_run_s = time.monotonic() - start_s
    old_lines: set[bytes] = set()
    out.unlink()
    num_kills = 0
    while num_kills < (50 if IS_LONG else 2):
        process = start()
        try:
            process.wait(complete_run_s * random_numbers.random())
        except subprocess.TimeoutExpired:
            descendants = descendants_of(process)
            process.send_signal(signal.SIGKILL)
            process.wait()
            num_kills += 1
            assert still_running_after(descendants, 20) == []
            lines = complete_lines(out)
            assert old_lines <= lines
            old_lines = lines
        else:  # the file is complete: start with an empty one
            assert process.returncode == 0, (tmp_path / "stderr").read_text()
            check_complete(out, old_lines)
            out.unlink()
            old_lines = set()
    assert start().wait(100) == 0, (tmp_path / "stderr").read_text()
    check_complete(out, old_lines)


def check_complete(out: Path, old_lines: set[bytes]) -> None:
    """Check that the results of all 60 prompts are in order, and that ``old_lines`` were not computed again."""
    assert [result["id"] for result in read_results(out)] == list(range(1, 61))
    assert old_lines <= complete_lines(out)
