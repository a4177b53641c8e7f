"""Tests of a stage's kernel checks in child processes: a kernel that ends its process is not used, the others are."""

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
    if name == {fatal_kernel!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return KernelCheck(name, True, 0.0, "")
experts._backend_kernels = lambda: experts.METAL_KERNELS
experts.check_kernel, experts.slower_token_ranges = check, lambda *_: ()
program.make_checks(sys.argv[1:])
"""


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "StageWithGpu":
    return StageWithGpu(monkeypatch, tmp_path)


class StageWithGpu:
    """A stage that finds a GPU, and whose child processes run CHILD. ``num_children`` counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        self._monkeypatch = monkeypatch
        self.directory = home / ".cache" / "mlx-k2" / "kernels"
        self.num_children = 0
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setattr(kernel_checks, "on_gpu", lambda: True)
        monkeypatch.setattr(experts, "_backend_kernels", lambda: experts.METAL_KERNELS)
        monkeypatch.setattr(check_cache, "DEFAULT_DIRECTORY", self.directory)

    def start(self, fatal_kernel: str | None = None) -> tuple[str, ...]:
        """Check the kernels as a new stage does; return the warnings. A child that checks ``fatal_kernel`` dies."""
        run_child = kernel_checks.run_child

        def run(command: list[str], timeout_s: float) -> bool:
            self.num_children += 1
            arguments = command[command.index("-m") + 2 :]
            return run_child([sys.executable, "-c", CHILD.format(fatal_kernel=fatal_kernel), *arguments], timeout_s)

        with self._monkeypatch.context() as patch:
            patch.setattr(kernel_checks, "run_child", run)
            patch.setattr(experts, "_adopted", {})
            patch.setattr(experts, "check_kernel", lambda *_: pytest.fail("the stage's own process checked a kernel"))
            return kernel_checks.check_kernels(CONFIG, mx.bfloat16)


@pytest.mark.slow
def test_kernels_are_checked_in_a_child_process_and_only_once(stage: StageWithGpu) -> None:
    assert stage.start() == ()
    assert stage.start(fatal_kernel=BATCH) == ()  # the second child reads the results of the first
    assert stage.num_children == 2
    checks = [check for path in stage.directory.glob("*.json") for check in json.loads(path.read_text())["checks"]]
    assert {kernel for kernel, *_ in checks} == {DECODE, BATCH, PREFILL, ROUTER}


@pytest.mark.slow
def test_a_kernel_that_ends_its_process_twice_is_not_used_and_the_others_are(stage: StageWithGpu) -> None:
    (warning,) = stage.start(fatal_kernel=BATCH)
    assert warning.startswith("the batch kernel is not used here (2 checks did not finish)")
    assert stage.num_children == 3  # two that were killed, and one that finished
    (warning,) = stage.start()
    assert stage.num_children == 4


def test_without_a_gpu_no_kernel_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "run_child", lambda *_: pytest.fail("a child was started"))
    monkeypatch.setattr(kernel_checks, "on_gpu", lambda: False)
    assert kernel_checks.check_kernels(CONFIG, mx.float32) == ()


def test_run_child_is_false_for_a_child_that_is_killed_or_too_slow() -> None:
    kill_itself = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    assert kernel_checks.run_child([sys.executable, "-c", "pass"], 60)
    assert not kernel_checks.run_child([sys.executable, "-c", kill_itself], 60)
    assert not kernel_checks.run_child([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert not kernel_checks.run_child([sys.executable, "-c", "pass"], -1)
