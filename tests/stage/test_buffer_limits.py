"""Tests of a machine's best command buffer limits: they are saved, and its stages set them before importing mlx."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_k2.stage.buffer_limits import BufferLimits, apply_saved_limits, load_limits, save_limits

pytestmark = pytest.mark.timeout(60)

LIMITS = BufferLimits(operations=200, megabytes=1000)
NAMES = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")


def test_saved_buffer_limits_are_set_in_the_environment(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    save_limits(LIMITS, tmp_path / "cache" / "limits.json")
    apply_saved_limits(environment, tmp_path / "cache" / "limits.json")
    assert environment == dict(zip(NAMES, ("200", "1000"), strict=True))


def test_environment_variables_set_by_the_user_are_kept(tmp_path: Path) -> None:
    environment = {NAMES[0]: "7"}
    save_limits(LIMITS, tmp_path / "limits.json")
    apply_saved_limits(environment, tmp_path / "limits.json")
    assert environment == {NAMES[0]: "7", NAMES[1]: "1000"}


@pytest.mark.parametrize("change", [{"host": "another"}, {"mlx": "0.1"}, {"operations": None}])
def test_limits_of_another_machine_or_mlx_version_or_a_broken_file_are_ignored(
    tmp_path: Path, change: dict[str, str | None]
) -> None:
    file = tmp_path / "limits.json"
    save_limits(LIMITS, file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert load_limits(file) is None
    file.write_text("[")
    assert load_limits(file) is None


def test_saving_none_removes_the_saved_limits(tmp_path: Path) -> None:
    save_limits(LIMITS, tmp_path / "limits.json")
    save_limits(None, tmp_path / "limits.json")
    assert load_limits(tmp_path / "limits.json") is None


def test_a_stage_sets_the_buffer_limits_before_it_imports_mlx(tmp_path: Path) -> None:
    save_limits(LIMITS, tmp_path / ".cache" / "mlx-k2" / "kernels" / "buffer_limits.json")
    probe = (
        "import builtins, os\n"
        "real = builtins.__import__\n"
        "def spy(name, *rest, **more):\n"
        "    if name.split('.')[0] == 'mlx':\n"
        f"        os.write(2, ' '.join(os.environ.get(n, '-') for n in {NAMES!r}).encode())\n"
        "        os._exit(0)\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = spy\n"
        "import mlx_k2.stage.program\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin"}
    )
    assert ran.stderr == "200 1000"
