"""Recorder of README.md's two outputs: an answer, and an answer during which a stage is killed.

python -m bench.recorded_output    runs both commands and writes their outputs to README.md
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from bench.measure import ROOT, replace_generated

README = ROOT / "README.md"
MADE_BY = "python -m bench.recorded_output"
MLX_K2 = str(Path(sys.executable).with_name("mlx-k2"))
DEMO_ARGUMENTS = ("generate", "--stages", "2", "--model", "built-in", "What is mlx-k2?")
KILL_ARGUMENTS = ("generate", "--hide-thinking", "Count from 1 to 20.")
KILL_AFTER = "5,"
"""The stage that started last is killed when the answer has reached this text."""
TIMEOUT_S = 100.0

_MASKS = (
    (r"\d+(\.\d+)? (s|tok/s)\b", r"# \2"),
    (r"seed \d+", "seed #"),
    (r"stage \d+ on this machine \(.*?\)", "stage # on this machine (#)"),
    (r" +", " "),
)


class Output(NamedTuple):
    """Text that a command wrote."""

    stdout: str
    stderr: str


def run(arguments: Sequence[str], kill_after: str | None = None) -> Output:
    """Run mlx-k2 to its end. Kill a stage when stdout has reached the text ``kill_after``.

    Raises:
        subprocess.TimeoutExpired: mlx-k2 did not end within TIMEOUT_S; it was killed.
        subprocess.CalledProcessError: mlx-k2 failed.
    """
    with subprocess.Popen(
        [MLX_K2, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        answer_start = b""
        if kill_after is not None:
            while not answer_start.endswith(kill_after.encode()) and (byte := process.stdout.read(1)):
                answer_start += byte
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
    return Output((answer_start + rest).decode(), errors.decode())


def masked(text: str) -> str:
    """Return ``text`` with # in place of times, rates, the seed, the killed stage and its step, which differ by run."""
    for pattern, replacement in _MASKS:
        text = re.sub(pattern, replacement, text)
    return text


def readme_part() -> str:
    """Run both commands; return the generated part of README.md."""
    return "\n\n".join(
        (
            "The output of `make demo`: first what it writes to stderr (three lines about the built-in model, its "
            "reasoning, a line\nof counts), then the answer, which is on stdout. In a terminal the answer comes before "
            "the counts.",
            _block(DEMO_ARGUMENTS, run(DEMO_ARGUMENTS)),
            f'Another prompt, during whose answer a stage is killed (`kill -9`) as soon as "{KILL_AFTER}" has been '
            "written. A step is one pass\nof tokens through all stages.",
            _block(KILL_ARGUMENTS, run(KILL_ARGUMENTS, KILL_AFTER)),
        )
    )


def _block(arguments: Sequence[str], output: Output) -> str:
    command = " ".join(f'"{word}"' if " " in word else word for word in ("mlx-k2", *arguments))
    lines = [f"$ {command}", *output.stderr.splitlines(), "", *output.stdout.splitlines()]
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])


if __name__ == "__main__":
    README.write_text(replace_generated(README.read_text(), MADE_BY, readme_part()))
