"""Tests of a stage's kernel checks: a child process makes them before loading, and its end costs only its kernel."""

import json
import signal
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_k2.config import ModelConfig
from mlx_k2.kernels import check_cache, experts
from mlx_k2.kernels.self_check import BATCH, DECODE, PREFILL, ROUTER
from mlx_k2.stage import kernel_checks
from mlx_k2.testing.tiny_config import tiny_config_fields

pytestmark = pytest.mark.timeout(120)

CONFIG = ModelConfig.from_json(json.dumps(tiny_config_fields(256)).encode(), "tiny")
CHILD = """
import os, signal, sys
import mlx_k2.stage.kernel_checks as program
from mlx_k2.kernels import experts
from mlx_k2.kernels.self_check import KernelCheck
def check(name, *_):
    if name == {dying!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return KernelCheck(name, True, 0.0, "")
experts._backend_kernels = lambda: experts.METAL_KERNELS
experts.check_kernel, experts.slower_token_ranges = check, lambda *_: ()
program.make_checks(sys.argv[1:])
"""


@pytest.fixture
def run_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Stage":
    return Stage(monkeypatch, tmp_path)


class Stage:
    """A stage on a machine with a GPU, whose child processes run CHILD, with one kernel that ends its process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        self._monkeypatch = monkeypatch
        self.directory = home / ".cache" / "mlx-k2" / "kernels"
        self.children = 0
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setattr(kernel_checks, "on_gpu", lambda: True)
        monkeypatch.setattr(experts, "_backend_kernels", lambda: experts.METAL_KERNELS)
        monkeypatch.setattr(check_cache, "DEFAULT_DIRECTORY", self.directory)

    def start(self, dying: str | None) -> tuple[str, ...]:
        """Return the warnings of a stage's start."""
        run_child = kernel_checks.run_child

        def run(command: list[str], timeout_s: float) -> bool:
            self.children += 1
            words = command[command.index("-m") + 2 :]
            return run_child([sys.executable, "-c", CHILD.format(dying=dying), *words], timeout_s)

        with self._monkeypatch.context() as patch:
            patch.setattr(kernel_checks, "run_child", run)
            patch.setattr(experts, "_adopted", {})
            patch.setattr(experts, "check_kernel", lambda *_: pytest.fail("the stage's own process checked a kernel"))
            return kernel_checks.check_kernels(CONFIG, mx.bfloat16)


@pytest.mark.slow
def test_kernels_are_checked_in_a_child_process_and_only_once(run_stage: Stage) -> None:
    assert run_stage.start(None) == ()
    assert run_stage.start(None) == ()
    assert run_stage.children == 2
    names = {
        check[0] for path in run_stage.directory.glob("*.json") for check in json.loads(path.read_text())["checks"]
    }
    assert names == {DECODE, BATCH, PREFILL, ROUTER}


@pytest.mark.slow
def test_a_kernel_that_ends_its_process_twice_is_left_out_and_the_others_are_used(run_stage: Stage) -> None:
    (warning,) = run_stage.start(BATCH)
    assert warning.startswith("the batch kernel is not used here (2 checks did not finish)")
    assert run_stage.children == 3
    (warning,) = run_stage.start(None)
    assert run_stage.children == 4


def test_without_a_gpu_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "run_child", lambda *_: pytest.fail("a child was started"))
    monkeypatch.setattr(kernel_checks, "on_gpu", lambda: False)
    assert kernel_checks.check_kernels(CONFIG, mx.float32) == ()


def test_a_child_that_is_killed_or_too_slow_has_not_finished() -> None:
    killed = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    assert kernel_checks.run_child([sys.executable, "-c", "pass"], 60)
    assert not kernel_checks.run_child([sys.executable, "-c", killed], 60)
    assert not kernel_checks.run_child([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert not kernel_checks.run_child([sys.executable, "-c", "pass"], -1)
