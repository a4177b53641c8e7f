"""Tests of commands with other chat templates, thinking modes, and histories of other programs."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.cli.main import run
from tests.cli.command import CommandLine
from tests.cli.linked_model import link_model, replace_file
from tests.processes import started_processes
from tests.text.kimi import template_source

USER = {"role": "user", "content": "Hello"}


def with_template(model: Path, folder: Path, source: str) -> str:
    """Return ``folder`` with a copy of a model that has another chat template."""
    link_model(model, folder)
    replace_file(folder / "chat_template.jinja", source.encode())
    return str(folder)


@pytest.fixture(scope="module")
def k26_model(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a random model with K2.6's chat template, to which a variable is added that mlx-k2 does not set."""
    source = "{{ effort }}" + template_source("kimi-k2.6")
    return with_template(endless_model, tmp_path_factory.mktemp("k26"), source)


@pytest.mark.slow
def test_a_chat_runs_with_a_template_that_writes_nothing_before_the_users_message(
    endless_model: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = with_template(endless_model, tmp_path, "\ufeff" + source)  # begins with a byte order mark
    result = command_line.run("chat", "--model", model, "--max-tokens", "2", stdin="Hello\nAgain\n")
    assert (result.returncode, result.stderr.count("the answer was cut off")) == (0, 2), result.stderr
    assert "error" not in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_thinking_is_turned_off_and_on_in_a_chat_and_load_names_the_fields_that_it_leaves_out(
    k26_model: str, tmp_path: Path, command_line: CommandLine
) -> None:
    saved = tmp_path / "chat.json"
    saved.write_text(json.dumps([USER, {"role": "assistant", "content": "Hi.", "refusal": "no"}]))
    commands = ("/think off", "/think on", "/think", f"/load {saved}", "/think off", "Again?")
    result = command_line.run("chat", "--model", k26_model, "--max-tokens", "2", stdin="\n".join(commands) + "\n")
    assert result.returncode == 1, result.stderr  # one of the lines is refused
    warning, _, *lines = result.stderr.splitlines()
    assert warning == "the chat template reads variables that mlx-k2 does not set: effort"
    assert lines[:3] == [
        "thinking is off; the temperature is 0.6",
        "thinking is on; the temperature is 1",
        "error: give /think show, hide, on or off",
    ]
    assert lines[3] == "message 2 (assistant) has fields that the chat template does not read: refusal"
    assert lines[4].startswith("2 messages from")
    assert result.stdout.strip() != ""  # without thinking, all sampled text is the answer


@pytest.mark.slow
def test_each_line_of_prompts_has_its_own_mode_and_images_are_refused_and_unread_fields_named(
    k26_model: str, tmp_path: Path, command_line: CommandLine
) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
    lines: list[dict[str, Any]] = [
        {"messages": [USER]},
        {"messages": [USER], "thinking": False},
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [image]},
        {"messages": [{"role": "user", "content": "Hello", "audio": "x"}]},
        {"prompt": "Hello", "thinking": False},
    ]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("".join(f"{json.dumps({'max_tokens': 3, **line})}\n" for line in lines))
    result = command_line.run("generate", "--model", k26_model, "--prompts", str(prompts), "--out", str(out))
    assert result.returncode == 1, result.stderr  # a line was refused
    assert "the chat template reads variables that mlx-k2 does not set: effort" in result.stderr
    thinking, instant, tools, image_result, audio_result, prompt = map(json.loads, out.read_text().splitlines())
    assert (thinking["text"], thinking["reasoning"] != "") == ("", True)
    assert (instant["text"] != "", instant["reasoning"]) == (True, "")
    thinking_tokens, instant_tokens, prompt_tokens, tools_tokens = (
        line["usage"]["prompt_tokens"] for line in (thinking, instant, prompt, tools)
    )
    assert instant_tokens == prompt_tokens == thinking_tokens + 1  # </think>
    assert tools_tokens > thinking_tokens + 20  # the tool's declaration
    assert image_result["error"] == (
        "message 1 (user) has an image, and mlx-k2 runs a model's text part only: leave the image out"
    )
    assert audio_result["left_out"] == ["message 1 (user) has fields that the chat template does not read: audio"]
    assert "left_out" not in thinking


@pytest.mark.parametrize(
    ("option", "error"),
    [
        (("--thinking", "off"), "error: thinking cannot be turned off: this model always thinks, since its"),
        (("--preserve-thinking",), "error: thinking cannot be preserved on request: the model's chat template"),
    ],
)
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_mode_that_the_built_in_model_does_not_have_is_refused_in_one_line_before_anything_starts(
    command: str, option: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = started_processes()
    assert run([command, *option, "Hello"]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert output.err.startswith(error)
    assert started_processes() == before
