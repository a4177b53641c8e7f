"""Tests of `mlx-k2 generate` with a form for the answer, several answers, and values for sampling, on real stages."""

import itertools
import json
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import psutil
import pytest

from mlx_k2.sampling import derived_seed
from tests.cli.command import CommandLine, processes_below
from tests.local_cluster import wait_until_gone

ASKED = ("generate", "Hello", "--seed", "1", "--stages", "2", "--thinking-budget", "5")
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
NUM_PROMPTS = 200 if IS_LONG else 12
MARKERS = ("tool_calls_section", "tool_call_begin", "tool_call_argument", "tool_call_end")


def schema_file(folder: Path, schema: object = SCHEMA) -> str:
    path = folder / "schema.json"
    path.write_text(json.dumps(schema))
    return str(path)


def results_of(command_line: CommandLine, folder: Path, lines: list[dict[str, Any]], *options: str) -> list[Any]:
    """Run a file of prompts and return the results."""
    prompts, out = folder / "prompts.jsonl", folder / "results.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = command_line.run("generate", "--prompts", str(prompts), "--out", str(out), "--stages", "2", *options)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_the_answer_is_json_of_the_schema_and_the_thinking_goes_to_stderr(
    command_line: CommandLine, tmp_path: Path
) -> None:
    done = command_line.run(*ASKED, "--json-schema", schema_file(tmp_path))
    assert done.returncode == 0, done.stderr
    jsonschema.validate(json.loads(done.stdout), SCHEMA)
    assert done.stdout.count("\n") == 1 and " " not in done.stdout


@pytest.mark.slow
def test_several_answers_have_seeds_of_their_own_and_the_first_is_the_single_answer(
    command_line: CommandLine, tmp_path: Path
) -> None:
    options = ("--regex", "[a-z]{8,12}", "--json", "--temperature", "3")
    several = command_line.run(*ASKED, *options, "--num-answers", "3")
    answers = [json.loads(line)["answer"] for line in several.stdout.splitlines()]
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    assert [answer["seed"] for answer in answers] == [1, derived_seed(1, 1), derived_seed(1, 2)]
    assert len({answer["text"] for answer in answers}) == 3
    assert all(8 <= len(answer["text"]) <= 12 for answer in answers)
    single = command_line.run(*ASKED, *options)
    assert json.loads(single.stdout.splitlines()[-1])["summary"]["text"] == answers[0]["text"]
    assert sum(answer["usage"]["cached_tokens"] > 0 for answer in answers) == 2, "the prompt is computed once"


@pytest.mark.slow
def test_a_line_of_prompts_has_values_and_a_form_of_its_own(command_line: CommandLine, tmp_path: Path) -> None:
    base = {"prompt": "Hello", "thinking_budget": 5, "max_tokens": 60, "seed": 4}
    lines = [
        base,
        base | {"json_schema": SCHEMA, "n": 2},
        base | {"regex": "x{5,9}", "stop": ["xx"]},
        base | {"tools": [CLOCK], "tool_choice": "required"},
        base | {"min_tokens": 30, "max_tokens": 30},
        base | {"ignore_eos": True, "max_tokens": 40},
        base | {"logit_bias": {str(ord("z")): 100}, "max_tokens": 12, "thinking_budget": 0},
    ]
    free, answers, stopped, call, longer, endless, biased = results_of(command_line, tmp_path, lines, "--logprobs", "2")
    for answer in answers["answers"]:
        jsonschema.validate(json.loads(answer["text"]), SCHEMA)
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
    assert [(one["name"], one["arguments"]) for one in call["tool_calls"][:1]] == [("clock", "{}")]
    assert free["finish_reason"] == "stop" and longer["usage"]["generated_tokens"] == 30
    assert (endless["usage"]["generated_tokens"], endless["finish_reason"]) == (40, "length")
    assert endless["text"].startswith(free["text"])
    assert "zzzzzz" in biased["text"]
    for token in free["logprobs"]:
        assert bytes(token["bytes"]).decode(errors="replace") == token["text"]
        assert token["logprob"] is None or token["logprob"] <= token["top"][0]["logprob"] <= 0


@pytest.mark.slow
def test_with_tool_choice_none_no_marker_appears_over_many_prompts(command_line: CommandLine, tmp_path: Path) -> None:
    words = ("time", "date", "hour", "day", "year", "minute", "weekday", "second", "zone", "month")
    asks = [
        {"prompt": f"Use a tool: what is the {word}? ({number})", "tools": [CLOCK], "max_tokens": 40}
        for number, word in itertools.islice(enumerate(itertools.cycle(words)), NUM_PROMPTS)
    ]
    results = results_of(
        command_line, tmp_path, [ask | {"tool_choice": "none"} for ask in asks], "--logprobs", "0", "--seed", "3"
    )
    for result in results:
        assert result["tool_calls"] == []
        written = "".join(token["text"] for token in result["logprobs"])
        assert not [marker for marker in MARKERS if marker in written]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2] if IS_LONG else [2])
def test_a_constrained_answer_is_the_same_after_any_stage_was_killed(
    command_line: CommandLine, tmp_path: Path, rank: int
) -> None:
    asked = (*ASKED, "--stages", "3", "--json-schema", schema_file(tmp_path, LONG_LIST), "--json")
    alone = [json.loads(line) for line in command_line.run(*asked).stdout.splitlines()]
    jsonschema.validate(json.loads(alone[-1]["summary"]["text"]), LONG_LIST)
    process = command_line.start(*asked)
    assert process.stdout
    begun = b"".join(process.stdout.readline() for _ in range(12))
    below = processes_below(process)
    stages = [one for one in below if "mlx_k2.stage.program" in one.cmdline()]
    sorted(stages, key=psutil.Process.create_time)[rank].kill()
    rest, reported = process.communicate(timeout=60)
    assert process.returncode == 0, reported
    lines = [json.loads(line) for line in (begun + rest).splitlines()]
    assert any("restart" in line for line in lines), "the stage was killed too late"
    assert [line for line in lines if "token" in line] == [line for line in alone if "token" in line]
    assert wait_until_gone(below, 0) == []
