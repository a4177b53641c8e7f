"""Tests of `mlx-k2 doctor` on this machine. tests/emulated_hosts/test_doctor.py checks several hosts."""

from pathlib import Path

import pytest

from tests.cli.command import CommandLine
from tests.local_cluster import write_model


@pytest.mark.slow
def test_stages_of_one_machine_are_named_by_their_numbers_and_every_bad_file_is_listed(
    command_line: CommandLine, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    truncated, missing = (model / f"model-0000{number}-of-000008.safetensors" for number in (2, 3))
    truncated.write_bytes(truncated.read_bytes()[:-100])
    missing.unlink()
    result = command_line.run("doctor", "--stages", "2", "--model", str(model))
    assert result.returncode == 1, result.stderr
    (problem,) = [line for line in result.stderr.splitlines() if line.startswith("this machine, stage 0, model: ")]
    assert f"{missing} is missing: fetch it again" in problem
    assert f"{truncated} is truncated: 100 of its" in problem
    rows = [line for line in result.stderr.splitlines() if line.startswith("this machine, stage 1 ")]
    assert any(" model " in line and " ok " in line for line in rows)
    assert "this machine, stage 0 to this machine, stage 1" in result.stderr
