"""Tests of the start of stages that have another version or send nothing."""

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mlx_k2 import __version__
from mlx_k2.deployment.bring_up import collect, handshake
from mlx_k2.errors import StageSilent, StageStartError
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.protocol.messages import Hello
from tests.advice import follows_advice
from tests.launch.guarded import stand_in_python

MLX = version("mlx")


def ignore(line: str) -> None:
    """Discard a log line."""


@follows_advice(
    "a: install the same on both: `python -m pip install mlx==2`",
)
@pytest.mark.parametrize(
    ("versions", "problem"),
    [
        (("9.9.9", MLX), f"has mlx-k2 {__version__}, this machine has 9.9.9: install .*make dist"),
        ((__version__, "9.9.9"), f"has mlx {MLX}, this machine has 9.9.9: install .*pip install mlx==9.9.9"),
    ],
    ids=["mlx-k2", "mlx"],
)
def test_a_stage_with_another_version_of_mlx_k2_or_mlx_is_refused(versions: tuple[str, str], problem: str) -> None:
    with (
        StageGroup([StageLocation()], 20.0, ignore) as group,
        pytest.raises(StageStartError, match=f"stage 0 on this machine {problem}"),
    ):
        handshake(group, versions)


def test_the_error_about_a_guard_of_another_version_names_its_stage_and_both_versions(tmp_path: Path) -> None:
    python = tmp_path / "python"
    program = "import mlx_k2, runpy; mlx_k2.__version__ = '0.0.9'; runpy.run_module('mlx_k2.stage', None, '__main__')"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n')
    python.chmod(0o755)
    pattern = rf"stage 0 .*its mlx-k2 is 0\.0\.9, and that of this machine is {re.escape(__version__)}: install"
    with (
        StageGroup([StageLocation(python=str(python))], 20.0, ignore) as group,
        pytest.raises(StageStartError, match=pattern),
    ):
        handshake(group, (__version__, MLX))


def test_the_error_about_a_stage_that_sends_nothing_in_time_names_what_it_had_to_do(tmp_path: Path) -> None:
    locations = [StageLocation(python=stand_in_python(tmp_path, "reads_nothing")) for _ in range(2)]
    with StageGroup(locations, 20.0, ignore) as group:
        assert None not in [group.receive(20), group.receive(20)]  # Connected, the only message of each program
        pattern = r"no message for 1 s from stage 1 on this machine \(starting for \d s\), which had to start"
        with pytest.raises(StageSilent, match=pattern):
            collect(group, Hello, [1], 1.0, "start")
