"""Tests of commands: the program parses each one of README.md, docs/ and hostfiles/, and README.md's run unchanged."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mlx_k2.cli.main import cli
from tests.cli.command import MLX_K2, CommandLine

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "hostfiles" / "README.md")


def command_lines(page: Path) -> Iterator[str]:
    """Yield the lines of a page's indented code blocks, without comments."""
    is_fenced = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif line.startswith("    ") and not is_fenced:
            yield re.sub(r"\s+#.*$", "", line.strip())


def invocations(page: Path) -> Iterator[str]:
    """Yield each `mlx-k2 ...` of a page's code blocks, up to a pipe, a redirection, & or ;."""
    for line in command_lines(page):
        for invocation in re.findall(r"(?:^|[|;&]\s*)(mlx-k2 [^|>&;]*)", line):
            yield invocation.strip()


INVOCATIONS = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in invocations(page)})


@pytest.mark.parametrize(("page", "line"), INVOCATIONS)
def test_the_program_parses_each_command_of_the_pages(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, *arguments = shlex.split(line)
    with cli.make_context("mlx-k2", arguments) as parent:
        name, command, rest = cli.resolve_command(parent, arguments)
        assert command is not None
        while isinstance(command, click.Group):
            name, command, rest = command.resolve_command(parent, rest)
            assert command is not None
        command.make_context(name, rest, parent)


LINES_RUN_ELSEWHERE = {
    "make demo": "tests/test_recorded_output.py runs its command",
    "make test": "it runs this test",
    "uv tool install '.[tools,plot]'": "tests/test_release.py builds the wheel and installs it with pip",
    "python3 -m pip install '.[tools,plot]'": "tests/test_release.py builds the wheel and installs it with pip",
    "mlx-k2 setup this mac-2 --model moonshotai/Kimi-K2-Thinking": "tests/emulated_hosts/test_first_hour.py",
    "mlx-k2 download": "tests/cli/test_download.py, from a local Hub",
    "mlx-k2 chat": "tests/emulated_hosts/test_first_hour.py",
    "mlx-k2 doctor": "tests/emulated_hosts/test_first_hour.py",
    "mlx-k2 serve": "tests/emulated_hosts/test_first_hour.py",
    "mlx-k2 serve --print-settings claude-code": "tests/cli/test_serve.py",
    'mlx-k2 chat --tools examples/tools.py "How much does the lamp cost?"': "tests/emulated_hosts/test_first_hour.py",
}
"""Lines of README that another test runs, and where."""

LINES_RUN_HERE = {
    'mlx-k2 generate "What is mlx-k2?"': "mlx-k2 runs Kimi K2 models over several Macs",
    'echo 3 to 12. | mlx-k2 generate -p "Count from" --max-tokens 200': "3, 4, 5, 6, 7, 8, 9, 10, 11, 12",
    "mlx-k2 bench --prompt-lengths 128 --generate 32 --streams 1,2 --plot speed.png": "",
    "mlx-k2 generate --dry-run": "",
    "mlx-k2 config": "",
}
"""Lines of README that this file runs, and a part of what they print."""


def test_each_line_of_readme_is_run_by_a_test() -> None:
    # tests/emulated_hosts/test_first_hour.py runs README's curl.
    lines = [line for line in command_lines(README) if not line.startswith("curl ")]
    assert set(lines) == LINES_RUN_ELSEWHERE.keys() | LINES_RUN_HERE.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("line", "output"), LINES_RUN_HERE.items())
def test_a_line_of_readme_runs_unchanged(line: str, output: str, tmp_path: Path) -> None:
    environment = CommandLine(tmp_path).environment(PATH=f"{Path(MLX_K2).parent}:{os.environ['PATH']}")
    result = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert output in result.stdout
    if "--plot" in line:
        assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_python_program_of_readme_prints_the_answer(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    program = tmp_path / "program.py"
    program.write_text(source)
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert (result.returncode, result.stdout.strip()) == (0, "17 + 25 = 42"), result.stderr
