"""Test of --timeout: an answer past its timeout ends with its tokens so far, and other answers do not change."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import CommandLine

ENDLESS = {"prompt": "Hello", "max_tokens": 2000, "ignore_eos": True}
SHORT = {"prompt": "Hello", "max_tokens": 30, "seed": 3}


@pytest.mark.slow
def test_a_prompt_line_can_set_its_own_timeout(command_line: CommandLine, endless: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def results(*lines: object, options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        out.unlink(missing_ok=True)
        asked = ("--model", str(endless), "--raw", "--prompts", str(prompts), "--out", str(out))
        run = command_line.run("generate", *asked, *options)
        assert run.returncode == 0, run.stderr
        return [json.loads(line) for line in out.read_text().splitlines()]

    (alone,) = results(SHORT)
    cut, beside = results({**ENDLESS, "timeout": 1.0}, SHORT, options=("--timeout", "3600"))
    assert (cut["finish_reason"], beside["finish_reason"]) == ("timeout", "length")
    assert 0 < cut["usage"]["generated_tokens"] < 2000 and cut["text"]
    assert beside["text"] == alone["text"]
