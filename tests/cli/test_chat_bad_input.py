"""Tests of bad files, tools and options of a chat: an error names the fault; no file changes and no stage starts."""

import json
import re
from pathlib import Path

import pytest

from mlx_k2.chat.chat_events import MessageAdded
from mlx_k2.cli import started_tools
from mlx_k2.cli.main import run
from mlx_k2.cli.repl.saved_chat import SavedChat, load_chat, save_chat
from mlx_k2.cli.repl.transcript import Transcript
from mlx_k2.errors import RequestError
from mlx_k2.text.message import Message
from mlx_k2.text.reply_parts import Content
from tests.processes import started_processes

USER = {"role": "user", "content": "hello"}
FILES = {
    "broken.json": "{",
    "list.json": "[]",
    "gone.json": json.dumps({"mcpServers": {"gone": {"command": "/nowhere/server"}}}),
    "both.json": json.dumps({"mcpServers": {"s": {"command": "x", "url": "http://x"}}}),
    "raises.py": "raise ValueError('no luck')\n",
    "syntax.py": "def f(:\n",
    "empty.py": "",
    "fine.py": "def f() -> int:\n    return 1\n",
}
FULL_DEVICE = Path("/dev/full")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--mcp", "broken.json"], r"broken.json is not an MCP file: .*for instance"),
        (["--mcp", "list.json"], r"list.json is not an MCP file"),
        (["--mcp", "none.json"], r"none.json cannot be read: No such file"),
        (["--mcp", "gone.json"], r"no tool server starts: gone: .*No such file"),
        (["--mcp", "both.json"], r"the server 's' needs either a command or a url"),
        (["--tools", "none.py"], r"there is no Python file none.py"),
        (["--tools", "raises.py"], r"^error: raises.py, line 1: ValueError: no luck$"),
        (["--tools", "syntax.py"], r"^error: syntax.py, line 1: invalid syntax$"),
        (["--tools", "empty.py"], r"^error: empty.py: it defines no public function$"),
        (["--tools", "fine.py", "--allow-tool", "g"], r"--allow-tool g: there is no such tool; the tools are f"),
    ],
)
def test_unusable_tools_are_refused_before_any_stage_starts(
    arguments: list[str],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert run(["chat", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(error, output.err, re.MULTILINE), output.err
    assert output.err.startswith("error: ") and "Traceback" not in output.err
    assert started_processes() == []


def test_during_a_slow_start_of_tools_a_message_names_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(started_tools, "_MESSAGE_DELAY_S", 0.01)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.1)\nraise ValueError('no luck')\n")
    assert run(["chat", "--tools", str(tmp_path / "slow.py")]) == 2
    message, error = capsys.readouterr().err.splitlines()
    assert message == "waiting until the tools of slow.py are started ..."
    assert error == "error: slow.py, line 3: ValueError: no luck"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["chat", "--transcript", "/nowhere/t"], "the transcript /nowhere/t cannot be written: No such file"),
        (["chat", "--context", "5"], "the context holds 5"),
        (["generate", "--raw", "--thinking-budget", "3", "Hello"], "--raw and --token-ids go without"),
        (["generate", "--mcp", "/nowhere/mcp.json", "Hello"], "/nowhere/mcp.json cannot be read: No such file"),
        (["generate", "--yes", "Hello"], "--yes and --allow-tool are for tools: give --tools or --mcp"),
    ],
)
def test_options_that_cannot_be_followed_are_refused_before_any_stage_starts(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert error in capsys.readouterr().err
    assert started_processes() == []


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", "is not a saved chat: "),
        ('{"digest": "ours", "messages": []}', "is not a saved chat: .*`model`"),
        (json.dumps({"model": "K9", "digest": "other", "messages": []}), "a chat with another model: .*--model K9"),
    ],
)
def test_a_file_that_is_not_a_chat_of_this_model_is_refused(content: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(content)
    with pytest.raises(RequestError, match=error):
        load_chat(tmp_path / "chat.json", "ours")


def test_a_saved_chat_and_a_bare_list_of_messages_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    save_chat(path, SavedChat("K2", "ours", [USER]))
    assert load_chat(path, "ours") == [USER]
    training_example = {"messages": [USER], "tools": []}
    for document in ([USER], training_example):  # without a digest, they are for any model
        path.write_text(json.dumps(document))
        assert load_chat(path, "another") == [USER]
    assert list(tmp_path.iterdir()) == [path]  # save_chat leaves no temporary file


def test_a_failed_save_does_not_change_existing_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(RequestError, match="folder cannot be written"):
        save_chat(tmp_path / "folder", SavedChat("K2", "ours", [USER]))
    with pytest.raises(RequestError, match=r"chat\.json cannot be written"):
        save_chat(tmp_path / "none" / "chat.json", SavedChat("K2", "ours", [USER]))
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="needs /dev/full: run on Linux")
def test_a_full_disk_stops_the_transcript_with_one_warning() -> None:
    warnings: list[str] = []
    with Transcript(FULL_DEVICE, warnings.append) as transcript:
        transcript.write_event(Content("a"))
        transcript.write_event(MessageAdded(Message(role="user", content=USER["content"])))
    (warning,) = warnings
    assert "cannot be written any more: No space left on device; the chat continues" in warning
