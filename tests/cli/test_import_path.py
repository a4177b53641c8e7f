"""Tests that no process imports a module from the current folder or from the home folder of a host."""

import json
from pathlib import Path

import pytest

from mlx_k2.builtin import BUILTIN_FOLDER
from tests.cli.command import MLX_K2, CommandLine
from tests.cli.linked_model import link_model
from tests.stand_in_ssh import write_ssh

COMMAND = ("generate", "--max-tokens", "3", "--seed", "1", "--raw", "Hello")
IMPORTED_NAMES = (
    *("calendar", "copy", "platform", "queue", "random", "secrets", "select", "signal", "socket", "string", "struct"),
    *("subprocess", "types", "mcp", "mlx", "mlx_k2", "msgspec", "numpy", "psutil"),
)
"""Modules of Python, of packages and of this program that its processes import."""
LOG = "executed"
"""File in which each executed module writes its name."""


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """Return a folder with a module for each of IMPORTED_NAMES that writes its name to LOG when it is imported."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in IMPORTED_NAMES:
        (folder / f"{name}.py").write_text(f"open({str(folder / LOG)!r}, 'a').write({name!r})")
    return folder


@pytest.fixture(scope="module")
def expected_answer(command_line: CommandLine) -> str:
    """Return the answer of COMMAND in a folder without modules."""
    result = command_line.run(*COMMAND)
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_nothing_executed(folder: Path) -> None:
    assert not (folder / LOG).exists(), f"{(folder / LOG).read_text()} was executed"


@pytest.mark.slow
def test_no_file_of_a_checkpoint_that_is_the_current_folder_is_executed(
    command_line: CommandLine, hostile_folder: Path, expected_answer: str
) -> None:
    link_model(BUILTIN_FOLDER, hostile_folder)
    result = command_line.run(*COMMAND, "--model", ".", cwd=hostile_folder)
    assert (result.returncode, result.stdout) == (0, expected_answer), result.stderr
    assert_nothing_executed(hostile_folder)


@pytest.mark.slow
def test_a_host_imports_nothing_from_its_home_folder(
    command_line: CommandLine, hostile_folder: Path, tmp_path: Path, expected_answer: str
) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([{"ssh": "mac-2", "ips": ["127.0.0.1"]}]))
    path = f"{write_ssh(tmp_path / 'bin', hostile_folder)}:{Path(MLX_K2).parent}:/usr/bin:/bin"
    result = command_line.run(*COMMAND, "--hostfile", str(hosts), PATH=path)
    assert (result.returncode, result.stdout) == (0, expected_answer), result.stderr
    assert_nothing_executed(hostile_folder)


TOOLS = '''
import neighbour


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return neighbour.add(a, b)
'''


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "other"])
def test_a_file_of_tools_imports_its_own_neighbour_and_no_file_with_the_name_of_a_module(
    command_line: CommandLine, hostile_folder: Path, folder: str
) -> None:
    (hostile_folder / "other").mkdir()
    (hostile_folder / folder / "mytools.py").write_text(TOOLS)
    (hostile_folder / folder / "neighbour.py").write_text("add = int.__add__")
    result = command_line.run(
        "generate",
        "--stages",
        "1",
        "--tools",
        f"{folder}/mytools.py",
        "--yes",
        "--max-tokens",
        "5",
        "Hi",
        cwd=hostile_folder,
    )
    assert result.returncode == 0, result.stderr
    assert_nothing_executed(hostile_folder)


@pytest.fixture
def in_deleted_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test, and the commands that it starts, in a folder that has been deleted."""
    folder = tmp_path / "deleted"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()


@pytest.mark.slow
@pytest.mark.usefixtures("in_deleted_folder")
def test_a_command_answers_in_a_deleted_folder(command_line: CommandLine, expected_answer: str) -> None:
    result = command_line.run(*COMMAND)
    assert (result.returncode, result.stdout) == (0, expected_answer), result.stderr
    refusal = command_line.run(*COMMAND, "--model", ".")
    assert (refusal.returncode, refusal.stderr) == (1, "error: No such file or directory: the current folder\n")
