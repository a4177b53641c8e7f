"""Tests of other chat templates, thinking modes and histories of other programs, through whole commands."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.cli.main import run
from tests.cli.command import CommandLine
from tests.processes import started_processes
from tests.text.kimi import template_source

USER = {"role": "user", "content": "Hello"}


def with_template(model: Path, folder: Path, source: str) -> str:
    """Return a copy of ``model`` in ``folder``, made of links, with another chat template."""
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(source)
    return str(folder)


@pytest.fixture(scope="module")
def switching(endless: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a random model with K2.6's chat template, which also reads a variable that nothing sets."""
    source = "{{ effort }}" + template_source("kimi-k2.6")
    return with_template(endless, tmp_path_factory.mktemp("switching"), source)


@pytest.mark.slow
def test_a_chat_runs_with_a_template_that_writes_nothing_before_the_users_words(
    endless: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    model = with_template(endless, tmp_path, "\ufeff{% for m in messages %}{{ m.content }}{% endfor %}")
    ran = command_line.run("chat", "--model", model, "--max-tokens", "2", stdin="Hello\nAgain\n")
    assert (ran.returncode, ran.stderr.count("the answer was cut off")) == (0, 2), ran.stderr
    assert "error" not in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.slow
def test_thinking_is_turned_off_and_on_in_a_chat_and_a_loaded_chat_names_what_is_left_out(
    switching: str, tmp_path: Path, command_line: CommandLine
) -> None:
    saved = tmp_path / "chat.json"
    saved.write_text(json.dumps([USER, {"role": "assistant", "content": "Hi.", "refusal": "no"}]))
    commands = ("/think off", "/think on", "/think", f"/load {saved}", "/think off", "Again?")
    ran = command_line.run("chat", "--model", switching, "--max-tokens", "2", stdin="\n".join(commands) + "\n")
    assert ran.returncode == 0, ran.stderr
    warning, _, *lines = ran.stderr.splitlines()
    assert warning == "the chat template reads variables that mlx-k2 does not set: effort"
    assert lines[:3] == [
        "thinking is off; the temperature is 0.6",
        "thinking is on; the temperature is 1",
        "error: give /think show, hide, on or off",
    ]
    assert lines[3] == "message 2 (assistant) has fields that the chat template does not read: refusal"
    assert lines[4].startswith("2 messages from")
    assert ran.stdout.strip() != ""  # without thinking, all sampled text is the answer


@pytest.mark.slow
def test_a_file_of_prompts_selects_modes_by_line_refuses_images_and_names_what_is_left_out(
    switching: str, tmp_path: Path, command_line: CommandLine
) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
    asked: list[dict[str, Any]] = [
        {"messages": [USER]},
        {"messages": [USER], "thinking": False},
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [image]},
        {"messages": [{"role": "user", "content": "Hello", "audio": "x"}]},
        {"prompt": "Hello", "thinking": False},
    ]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("".join(f"{json.dumps({'max_tokens': 3, **line})}\n" for line in asked))
    ran = command_line.run("generate", "--model", switching, "--prompts", str(prompts), "--out", str(out))
    assert ran.returncode == 1, ran.stderr  # a line was refused
    assert "the chat template reads variables that mlx-k2 does not set: effort" in ran.stderr
    thinking, instant, tools, refused, left_out, prompt = map(json.loads, out.read_text().splitlines())
    assert (thinking["text"], thinking["reasoning"] != "") == ("", True)
    assert (instant["text"] != "", instant["reasoning"]) == (True, "")
    num_prompt = [result["usage"]["prompt_tokens"] for result in (thinking, instant, prompt, tools)]
    assert num_prompt[1] == num_prompt[2] == num_prompt[0] + 1
    assert num_prompt[3] > num_prompt[0] + 20
    assert refused["error"] == (
        "message 1 (user) has an image, and mlx-k2 runs a model's text part only: leave the image out"
    )
    assert left_out["left_out"] == ["message 1 (user) has fields that the chat template does not read: audio"]
    assert "left_out" not in thinking


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            ("--thinking", "off"),
            "error: thinking cannot be turned off: this model always thinks, since its",
        ),
        (
            ("--preserve-thinking",),
            "error: thinking cannot be preserved on request: the model's chat template",
        ),
    ],
)
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_mode_that_the_built_in_model_does_not_have_is_refused_in_one_line_before_anything_starts(
    command: str, option: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = started_processes()
    assert run([command, *option, *(("Hello",) if command == "generate" else ())]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith(words)
    assert started_processes() == before
