"""Tests of what the processes import: nothing from the current folder, and nothing from the home folder of a host."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_k2.builtin import BUILTIN_FOLDER
from tests.cli.command import MLX_K2, CommandLine
from tests.stand_in_ssh import write_ssh

ANSWER = ("generate", "--max-tokens", "3", "--seed", "1", "--raw", "Hello")
SHADOWED = (
    *("calendar", "copy", "platform", "queue", "random", "secrets", "select", "signal", "socket", "string", "struct"),
    *("subprocess", "types", "mcp", "mlx", "mlx_k2", "msgspec", "numpy", "psutil"),
)
"""Modules of Python, of packages and of this program that our processes import."""
MARK = "EXECUTED"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Return a folder with a file for each name of SHADOWED, which leaves a mark when it is imported."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in SHADOWED:
        (folder / f"{name}.py").write_text(f"open({str(folder / MARK)!r}, 'a').write({name!r})")
    return folder


@pytest.fixture(scope="module")
def expected(command_line: CommandLine) -> str:
    """Return the answer that the command gives in a harmless folder."""
    done = command_line.run(*ANSWER)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_harmless(folder: Path) -> None:
    assert not (folder / MARK).exists(), f"{(folder / MARK).read_text()} was executed"


@pytest.mark.slow
def test_no_file_of_a_checkpoint_that_is_the_current_folder_is_executed(
    command_line: CommandLine, hostile: Path, expected: str
) -> None:
    for file in BUILTIN_FOLDER.iterdir():
        (hostile / file.name).symlink_to(file)
    done = command_line.run(*ANSWER, "--model", ".", cwd=hostile)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    check_harmless(hostile)


@pytest.mark.slow
def test_a_host_imports_nothing_from_its_home_folder(
    command_line: CommandLine, hostile: Path, tmp_path: Path, expected: str
) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([{"ssh": "mac-2", "ips": ["127.0.0.1"]}]))
    path = f"{write_ssh(tmp_path / 'bin', hostile)}:{Path(MLX_K2).parent}:/usr/bin:/bin"
    done = command_line.run(*ANSWER, "--hostfile", str(hosts), PATH=path)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    check_harmless(hostile)


TOOLS = '''
import neighbour


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return neighbour.add(a, b)
'''


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "other"])
def test_tools_start_beside_files_with_the_names_of_modules(
    command_line: CommandLine, hostile: Path, folder: str
) -> None:
    (hostile / "other").mkdir()
    (hostile / folder / "mytools.py").write_text(TOOLS)
    (hostile / folder / "neighbour.py").write_text("add = int.__add__")
    done = command_line.run(
        "generate", "--stages", "1", "--tools", f"{folder}/mytools.py", "--yes", "--max-tokens", "5", "Hi", cwd=hostile
    )
    assert done.returncode == 0, done.stderr
    check_harmless(hostile)


@pytest.fixture
def deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make a deleted folder the current folder of this process, and of the commands that it starts."""
    folder = tmp_path / "deleted"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    yield
    monkeypatch.undo()


@pytest.mark.slow
def test_a_command_answers_in_a_deleted_folder(command_line: CommandLine, deleted: None, expected: str) -> None:
    done = command_line.run(*ANSWER)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    refused = command_line.run(*ANSWER, "--model", ".")
    assert (refused.returncode, refused.stderr) == (1, "error: No such file or directory: the current folder\n")
