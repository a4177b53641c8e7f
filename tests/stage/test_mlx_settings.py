"""Tests of MLX's settings in a stage: saved limits, defaults by chip, the user's variables, order of the imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_k2.stage.mlx_settings import (
    LONG_BUFFERS,
    MLX_DEFAULTS,
    BufferLimits,
    apply_settings,
    default_limits,
    load_limits,
    save_limits,
)

pytestmark = pytest.mark.timeout(60)

LIMITS = BufferLimits(operations=200, megabytes=1000)
LIMIT_VARIABLES = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
MAC_VARIABLES = {"MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS": "500", "MLX_ENABLE_TF32": "0"}


def test_saved_buffer_limits_are_set_in_the_environment(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    save_limits(LIMITS, tmp_path / "cache" / "limits.json")
    assert apply_settings(environment, None, tmp_path / "cache" / "limits.json") == ()
    assert environment == dict(zip(LIMIT_VARIABLES, ("200", "1000"), strict=True))


@pytest.mark.parametrize(
    ("chip", "limits"),
    [
        ("Apple M1 Ultra", LONG_BUFFERS),
        ("Apple M3 Ultra", LONG_BUFFERS),
        ("Apple M4", LONG_BUFFERS),
        ("Apple M5 Max", MLX_DEFAULTS),
        ("Apple M10", MLX_DEFAULTS),
        ("Apple A19", MLX_DEFAULTS),
        ("", MLX_DEFAULTS),
        (None, MLX_DEFAULTS),
    ],
)
def test_without_saved_limits_the_chip_decides(tmp_path: Path, chip: str | None, limits: BufferLimits) -> None:
    environment: dict[str, str] = {}
    apply_settings(environment, chip, tmp_path / "none")
    assert default_limits(chip) == limits
    assert environment == limits.environment() | ({} if chip is None else MAC_VARIABLES)


def test_saved_limits_replace_the_chips_limits_also_if_they_are_mlxs_defaults(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    save_limits(MLX_DEFAULTS, tmp_path / "limits.json")
    apply_settings(environment, "Apple M3 Ultra", tmp_path / "limits.json")
    assert environment == MAC_VARIABLES


def test_a_variable_that_the_user_has_set_is_kept_and_named(tmp_path: Path) -> None:
    user_variables = {"MLX_MAX_OPS_PER_BUFFER": "7", "MLX_MAX_MB_PER_BUFFER": "1000000"}  # the second is the default
    environment = dict(user_variables)
    (line,) = apply_settings(environment, "Apple M3 Ultra", tmp_path / "none")
    assert environment == user_variables | MAC_VARIABLES
    assert line == "MLX_MAX_OPS_PER_BUFFER=7 from the environment is kept; mlx-k2 would set 100"


@pytest.mark.parametrize("change", [{"host": "another"}, {"mlx": "0.1"}, {"operations": None}])
def test_limits_of_another_machine_or_mlx_version_and_a_broken_file_are_ignored(
    tmp_path: Path, change: dict[str, str | None]
) -> None:
    path = tmp_path / "limits.json"
    save_limits(LIMITS, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert load_limits(path) is None
    path.write_text("[")
    assert load_limits(path) is None


@pytest.mark.parametrize("limits", [LIMITS, MLX_DEFAULTS])
def test_saved_limits_are_loaded_again(tmp_path: Path, limits: BufferLimits) -> None:
    save_limits(limits, tmp_path / "limits.json")
    assert load_limits(tmp_path / "limits.json") == limits


def test_a_stage_applies_its_settings_before_it_imports_mlx(tmp_path: Path) -> None:
    """The program prints the variables at the first import of MLX, and ends."""
    save_limits(LIMITS, tmp_path / ".cache" / "mlx-k2" / "kernels" / "buffer_limits.json")
    variables = (*LIMIT_VARIABLES, *MAC_VARIABLES)
    program = (
        "import builtins, os\n"
        "import mlx_k2.stage.mlx_settings as settings\n"
        "settings.chip_name = lambda: 'Apple M3 Ultra'\n"
        "real_import = builtins.__import__\n"
        "def print_at_mlx(name, *rest, **more):\n"
        "    if name.split('.')[0] == 'mlx':\n"
        f"        os.write(2, ' '.join(os.environ.get(n, '-') for n in {variables!r}).encode())\n"
        "        os._exit(0)\n"
        "    return real_import(name, *rest, **more)\n"
        "builtins.__import__ = print_at_mlx\n"
        "import mlx_k2.stage.program\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin"}
    )
    assert completed.stderr == "200 1000 500 0"
