"""Tests of `mlx-k2 generate` with schemas, regular expressions, tools, several answers and biases, on real stages."""

import json
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import pytest

from mlx_k2.sampling import derived_seed
from tests.cli.command import CommandLine, descendants_of, stage_processes
from tests.local_cluster import still_running_after

COMMAND = ("generate", "Hello", "--seed", "1", "--stages", "2", "--thinking-budget", "5")
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
LONG_LIST = {"type": "array", "items": {"enum": ["yes", "no", "perhaps"]}, "minItems": 60, "maxItems": 60}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
IS_LONG = hypothesis.settings.get_current_profile_name() == "long"
"""Whether `make long` runs, which has the full numbers of prompts and ranks."""
NUM_PROMPTS = 200 if IS_LONG else 12
MARKERS = ("tool_calls_section", "tool_call_begin", "tool_call_argument", "tool_call_end")
"""Parts of the names of the control tokens around tool calls."""


def write_schema(folder: Path, schema: object = SCHEMA) -> str:
    path = folder / "schema.json"
    path.write_text(json.dumps(schema))
    return str(path)


def results_of(command_line: CommandLine, folder: Path, lines: list[dict[str, Any]], *options: str) -> list[Any]:
    """Run generate with a file of prompts and return the results."""
    prompts, out = folder / "prompts.jsonl", folder / "results.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = command_line.run("generate", "--prompts", str(prompts), "--out", str(out), "--stages", "2", *options)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_stdout_is_one_line_of_compact_json_that_matches_the_schema(command_line: CommandLine, tmp_path: Path) -> None:
    result = command_line.run(*COMMAND, "--json-schema", write_schema(tmp_path))
    assert result.returncode == 0, result.stderr
    jsonschema.validate(json.loads(result.stdout), SCHEMA)
    assert result.stdout.count("\n") == 1 and " " not in result.stdout


@pytest.mark.slow
def test_several_answers_have_seeds_of_their_own_and_the_first_is_the_single_answer(command_line: CommandLine) -> None:
    options = ("--regex", "[a-z]{8,12}", "--json", "--temperature", "3")
    output = command_line.run(*COMMAND, *options, "--num-answers", "3").stdout
    answers = [json.loads(line)["answer"] for line in output.splitlines()]
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    assert [answer["seed"] for answer in answers] == [1, derived_seed(1, 1), derived_seed(1, 2)]
    assert len({answer["text"] for answer in answers}) == 3
    assert all(8 <= len(answer["text"]) <= 12 for answer in answers)
    *_, summary = command_line.run(*COMMAND, *options).stdout.splitlines()
    assert json.loads(summary)["summary"]["text"] == answers[0]["text"]
    assert sum(answer["usage"]["cached_tokens"] > 0 for answer in answers) == 2, "the prompt was computed again"


@pytest.mark.slow
def test_each_line_of_prompts_has_its_own_sampling_values_and_form(command_line: CommandLine, tmp_path: Path) -> None:
    base = {"prompt": "Hello", "thinking_budget": 5, "max_tokens": 60, "seed": 4}
    lines = [
        base,
        base | {"json_schema": SCHEMA, "n": 2},
        base | {"regex": "x{5,9}", "stop": ["xx"]},
        base | {"tools": [CLOCK], "tool_choice": "required"},
        base | {"min_tokens": 30, "max_tokens": 30},
        base | {"ignore_eos": True, "max_tokens": 40},
        base
        | {"logit_bias": {str(ord("z")): 100}, "max_tokens": 12, "thinking_budget": 0},  # a byte's token has its id
    ]
    results = results_of(command_line, tmp_path, lines, "--logprobs", "2")
    free, two_answers, stopped, call, longer, ignoring_eos, biased = results
    for answer in two_answers["answers"]:
        jsonschema.validate(json.loads(answer["text"]), SCHEMA)
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
    assert (call["tool_calls"][0]["name"], call["tool_calls"][0]["arguments"]) == ("clock", "{}")
    assert free["finish_reason"] == "stop" and longer["usage"]["generated_tokens"] == 30
    assert (ignoring_eos["usage"]["generated_tokens"], ignoring_eos["finish_reason"]) == (40, "length")
    assert ignoring_eos["text"].startswith(free["text"])
    assert "zzzzzz" in biased["text"]
    for token in free["logprobs"]:
        assert bytes(token["bytes"]).decode(errors="replace") == token["text"]
        assert token["logprob"] is None or token["logprob"] <= token["top"][0]["logprob"] <= 0


@pytest.mark.slow
def test_with_tool_choice_none_no_marker_appears_over_many_prompts(command_line: CommandLine, tmp_path: Path) -> None:
    words = ("time", "date", "hour", "day", "year", "minute", "weekday", "second", "zone", "month")
    fields = {"tools": [CLOCK], "tool_choice": "none", "max_tokens": 40}
    lines = [
        {"prompt": f"Use a tool: what is the {words[number % len(words)]}? ({number})"} | fields
        for number in range(NUM_PROMPTS)
    ]
    for result in results_of(command_line, tmp_path, lines, "--logprobs", "0", "--seed", "3"):
        assert result["tool_calls"] == []
        text = "".join(token["text"] for token in result["logprobs"])
        assert not [marker for marker in MARKERS if marker in text]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2] if IS_LONG else [2])
def test_a_constrained_answer_is_the_same_after_a_restart(command_line: CommandLine, tmp_path: Path, rank: int) -> None:
    # The second --stages overrides the one of COMMAND.
    command = (*COMMAND, "--stages", "3", "--json-schema", write_schema(tmp_path, LONG_LIST), "--json")
    undisturbed = [json.loads(line) for line in command_line.run(*command).stdout.splitlines()]
    jsonschema.validate(json.loads(undisturbed[-1]["summary"]["text"]), LONG_LIST)
    process = command_line.start(*command)
    assert process.stdout
    first_lines = b"".join(process.stdout.readline() for _ in range(12))
    descendants = descendants_of(process)
    stage_processes(descendants)[rank].kill()
    other_lines, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in (first_lines + other_lines).splitlines()]
    assert any("restart" in line for line in lines), "the stage was killed too late"
    assert [line for line in lines if "token" in line] == [line for line in undisturbed if "token" in line]
    assert still_running_after(descendants, 0) == []
