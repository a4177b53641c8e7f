"""Test of timeouts in a file of prompts: an answer ends with its tokens so far, and other answers do not change."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import CommandLine

MAX_TOKENS = 2000
"""More tokens than the model generates in 1 s."""
ENDLESS = {"prompt": "Hello", "max_tokens": MAX_TOKENS, "ignore_eos": True}
SHORT = {"prompt": "Hello", "max_tokens": 30, "seed": 3}


@pytest.mark.slow
def test_a_line_of_prompts_ends_at_its_own_timeout_and_does_not_change_the_others(
    command_line: CommandLine, endless_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"

    def results(*lines: object, options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        out.unlink(missing_ok=True)
        arguments = ("--model", str(endless_model), "--raw", "--prompts", str(prompts), "--out", str(out))
        result = command_line.run("generate", *arguments, *options)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in out.read_text().splitlines()]

    (short_alone,) = results(SHORT)
    endless, short = results({**ENDLESS, "timeout": 1.0}, SHORT, options=("--timeout", "3600"))
    assert (endless["finish_reason"], short["finish_reason"]) == ("timeout", "length")
    assert 0 < endless["usage"]["generated_tokens"] < MAX_TOKENS and endless["text"]
    assert short["text"] == short_alone["text"]
