"""Tests of `generate --prompts`: what is checked first, what a result holds, and that no end loses a result."""

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
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_source import ModelSource
from tests.cli.command import MLX_K2, CommandLine, processes_below
from tests.cli.test_generate_options import options_of
from tests.conftest import MANY_EXAMPLES
from tests.local_cluster import wait_until_gone
from tests.processes import started_processes

ROOT = Path(__file__).parents[2]
RESULT_FIELDS = {"id", "text", "reasoning", "tool_calls", "finish_reason", "seed", "usage", "run"}
WEATHER = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
IS_LONG = settings().max_examples >= MANY_EXAMPLES  # make long


def write_prompts(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else f"{json.dumps(line)}\n" for line in lines))
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "words"),
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
        (["--out", "/dev/null"], "/dev/null is not a file"),
        (["--prompts", "nowhere"], "nowhere cannot be read"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts_and_leaves_no_file(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(Path("prompts"), {"prompt": "x"})
    before = started_processes()
    assert run(["generate", "--prompts", "prompts", "--out", "out", *arguments]) == 2
    shown = capsys.readouterr().err
    assert re.search(words, shown) and shown.count("\n") == 1, shown
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
def test_results_of_other_options_are_those_of_another_run(arguments: list[str], endless: Path) -> None:
    model = describe_model(read_model_files(ModelSource(path_or_repo=str(endless))).files, "the model")
    lines = {1: PromptLine(prompt="x"), 5: PromptLine(prompt="x")}
    given = ["--prompts", "p", "--out", "o"]
    first, second = (result_digests(options_of(*given, *more), model, lines) for more in ([], arguments))
    assert len(first) == len(second) == 2
    assert not first.keys() & second.keys()
    assert result_digests(options_of(*given, "--restarts", "off", "--verbose"), model, lines) == first


@pytest.mark.slow
def test_results_and_the_summary_of_json_have_the_same_fields_and_a_failed_line_is_exit_code_1(
    command_line: CommandLine, tmp_path: Path
) -> None:
    tool = {"type": "function", "function": WEATHER}
    asked = {"prompt": "What is the weather in Rome?", "tools": [tool]}
    lines = ("\n", {"prompt": "What is 17 plus 25?", "id": "sum"}, " \n", asked, {"messages": [{"role": "robot"}]})
    prompts = write_prompts(tmp_path / "prompts", *lines).read_text()
    out = tmp_path / "out"
    many = command_line.run("generate", "--temperature", "0", "--prompts", "-", "--out", str(out), stdin=prompts)
    assert many.returncode == 1, many.stderr
    assert many.stderr.splitlines()[-1] == f"3 results are in {out}, 1 of them failed"
    answer, call, failed = read_results(out)
    assert [answer["id"], call["id"], failed["id"]] == ["sum", 4, 5]
    assert answer.keys() == call.keys() == RESULT_FIELDS
    assert (answer["text"], answer["tool_calls"], answer["finish_reason"]) == ("17 + 25 = 42", [], "stop")
    assert "7 + 5" in answer["reasoning"]
    (found,) = call["tool_calls"]
    assert (found["id"], found["name"]) == ("functions.get_weather:0", "get_weather")
    assert failed.keys() == {"id", "error", "run"}
    one = command_line.run("generate", "--temperature", "0", "--json", "What is 17 plus 25?")
    summary = json.loads(one.stdout.splitlines()[-1])["summary"]
    assert summary.keys() == (RESULT_FIELDS - {"id", "run"}) | {"load_s", "stages"}
    same = ("text", "reasoning", "tool_calls", "finish_reason")
    assert [summary[name] for name in same] == [answer[name] for name in same]
    assert summary["usage"].keys() == answer["usage"].keys()
    counts = ("prompt_tokens", "generated_tokens")
    assert [summary["usage"][name] for name in counts] == [answer["usage"][name] for name in counts]


def test_the_documentation_names_every_field() -> None:
    named = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "json.md").read_text()))
    kinds = (Completion, Usage, PromptLine, StageSummary, TokenLine)
    names = {field.encode_name for kind in kinds for field in msgspec.structs.fields(kind)}
    assert names | RESULT_FIELDS | {"left_out", "error"} <= named | {"token"}


def test_a_complete_file_is_sorted_without_starting_anything(
    endless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(Path("prompts"), {"prompt": "x"}, {"prompt": "y"})
    given = ["--model", str(endless), "--prompts", "prompts", "--out", "out"]
    model = describe_model(read_model_files(ModelSource(path_or_repo=str(endless))).files, "the model")
    options = options_of(*given)
    digests = result_digests(options, model, read_prompt_lines("prompts", options.conversation.sampling))
    with ResultFile(Path("out")) as results:
        results.resume(digests)
        for number in (2, 1):
            results.write(number, {"id": number, "text": "kept"})
    before = started_processes()
    assert run(["generate", *given]) == 0, capsys.readouterr().err
    assert [(result["id"], result["text"]) for result in read_results(Path("out"))] == [(1, "kept"), (2, "kept")]
    assert started_processes() == before


# ---- killed at random moments

WRITER = """
import sys
from pathlib import Path
from mlx_k2.cli.result_file import ResultFile

numbers = {f"digest {number}": number for number in range(1, 41)}
with ResultFile(Path(sys.argv[1])) as results:
    results.resume(numbers)
    for number in sorted(numbers.values(), key=lambda number: number * 17 % 41):
        if number not in results:
            results.write(number, {"text": f"{number} {sys.argv[2]}" * 40})
    results.sort()
"""


def kept_lines(out: Path) -> set[bytes]:
    """Return the complete lines of a file of results."""
    data = out.read_bytes() if out.exists() else b""
    return set(data[: data.rfind(b"\n") + 1].splitlines())


def test_a_file_of_results_whose_writer_is_killed_at_random_moments_keeps_every_line(tmp_path: Path) -> None:
    out, moments = tmp_path / "out", random.Random(4)

    def start(content: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", WRITER, out, content])

    began = time.monotonic()
    assert start("whole").wait(60) == 0
    whole_s = time.monotonic() - began
    out.unlink()
    before: set[bytes] = set()
    for number in range(50 if IS_LONG else 8):
        writer = start(str(number))
        try:
            assert writer.wait(whole_s * (0.5 + 0.5 * moments.random())) == 0  # the first half is Python's start
        except subprocess.TimeoutExpired:
            writer.kill()
            writer.wait()
        lines = kept_lines(out)
        assert before <= lines
        before = lines
        if writer.returncode == 0:  # complete: begin again
            out.unlink()
            before = set()
    assert start("last").wait(60) == 0
    assert before <= kept_lines(out)
    texts = [json.loads(line)["text"] for line in out.read_bytes().splitlines()]
    assert [int(text.split()[0]) for text in texts] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.timeout(1800 if IS_LONG else 120)
def test_a_run_killed_at_random_moments_is_completed_by_the_next_and_computes_no_result_twice(
    endless: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    prompts, out, moments = tmp_path / "prompts", tmp_path / "out", random.Random(5)
    write_prompts(prompts, *({"prompt": f"Hello {number}", "max_tokens": 12} for number in range(60)))
    command = [MLX_K2, "generate", "--model", str(endless), "--raw", "--prompts", str(prompts), "--out", str(out)]

    def start() -> subprocess.Popen[bytes]:
        stderr = (tmp_path / "stderr").open("wb")
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=stderr, env=command_line.environment(), start_new_session=True
        )

    began = time.monotonic()
    assert start().wait(100) == 0
    whole_s = time.monotonic() - began
    seen: dict[int, bytes] = {}
    out.unlink()
    num_kills = 0
    while num_kills < (50 if IS_LONG else 2):
        process = start()
        try:
            process.wait(whole_s * moments.random())
        except subprocess.TimeoutExpired:
            below = processes_below(process)
            process.send_signal(signal.SIGKILL)
            process.wait()
            num_kills += 1
            assert not wait_until_gone(below, 20)
        else:  # complete: begin again
            assert process.returncode == 0, (tmp_path / "stderr").read_text()
            seen = check_complete(out, seen)
            out.unlink()
            seen = {}
            continue
        lines = {json.loads(line)["id"]: line for line in kept_lines(out)}
        assert seen.items() <= lines.items()
        seen = lines
    assert start().wait(100) == 0, (tmp_path / "stderr").read_text()
    check_complete(out, seen)


def check_complete(out: Path, seen: dict[int, bytes]) -> dict[int, bytes]:
    """Check that all results are there, in order, and that those in ``seen`` are unchanged, with their times."""
    lines = out.read_bytes().splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(1, 61))
    found = dict(enumerate(lines, start=1))
    assert seen.items() <= found.items()
    return found
