"""Recorded outputs of README.md's commands: an answer, and one during which a stage is killed.

python -m bench.recorded_output    runs both and writes them to README.md
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from bench.measure import ROOT, with_part

README = ROOT / "README.md"
MADE_BY = "python -m bench.recorded_output"
MLX_K2 = str(Path(sys.executable).with_name("mlx-k2"))
DEMO = ("generate", "What is mlx-k2?")
KILLED = ("generate", "--hide-thinking", "Count from 1 to 20.")
KILL_AFTER = "5,"
"""Text of the answer after which the last stage is killed."""
TIMEOUT_S = 100.0

_VARYING = (
    (r"\d+(\.\d+)? (s|tok/s)\b", r"# \2"),
    (r"seed \d+", "seed #"),
    (r"stage \d+ on this machine \(.*?\)", "stage # on this machine (#)"),
    (r" +", " "),
)


class Output(NamedTuple):
    """Text that a command wrote to its two streams."""

    stdout: str
    stderr: str


def run(arguments: Sequence[str], kill_after: str | None = None) -> Output:
    """Run mlx-k2 to its end. Kill a stage once the answer has ``kill_after``.

    Raises:
        subprocess.TimeoutExpired: it did not end within TIMEOUT_S.
        subprocess.CalledProcessError: it failed.
    """
    with subprocess.Popen(
        [MLX_K2, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        begun = b""
        if kill_after is not None:
            while not begun.endswith(kill_after.encode()) and (byte := process.stdout.read(1)):
                begun += byte
            stages = [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if "mlx_k2.stage.program" in child.cmdline()
            ]
            max(stages, key=lambda stage: stage.create_time()).kill()
        try:
            rest, errors = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [MLX_K2, *arguments], rest, errors)
    return Output((begun + rest).decode(), errors.decode())


def masked(text: str) -> str:
    """Return ``text`` without what differs between two runs: times, rates, the seed, the step of a kill."""
    for pattern, replacement in _VARYING:
        text = re.sub(pattern, replacement, text)
    return text


def part() -> str:
    """Run both commands; return their part of README.md."""
    return "\n\n".join(
        (
            "The output of `make demo`. On stderr: three lines about the built-in model, its reasoning, and a line of "
            "counts. On\nstdout: the answer.",
            _block(DEMO, run(DEMO)),
            f'Another prompt. A stage is killed (`kill -9`) as soon as the answer has reached "{KILL_AFTER}".',
            _block(KILLED, run(KILLED, KILL_AFTER)),
        )
    )


def _block(arguments: Sequence[str], output: Output) -> str:
    command = " ".join(f'"{word}"' if " " in word else word for word in ("mlx-k2", *arguments))
    lines = [f"$ {command}", *output.stderr.splitlines(), "", *output.stdout.splitlines()]
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])


if __name__ == "__main__":
    README.write_text(with_part(README.read_text(), MADE_BY, part()))
