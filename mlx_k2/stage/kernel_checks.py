"""The kernel checks of a stage, made in a separate process before any weights are loaded.

A kernel that faults can end the process that runs it, or corrupt its GPU state. So a child process makes the checks,
and the stage reads the results from the cache file. If the child does not finish, another one is started. The file
counts the checks that were started; a kernel with two unfinished checks is not checked again (kernels/experts.py).
"""

import subprocess
import sys
import time
from collections.abc import Sequence

import mlx.core as mx

from mlx_k2.config import ModelConfig
from mlx_k2.kernels import check_cache, experts
from mlx_k2.kernels.self_check import LayerShape
from mlx_k2.stage.host import on_gpu

CHECKS_TIMEOUT_S = 400.0
"""Time limit of all children together. A check takes some seconds, and longer while another process checks. The
coordinator expects a message within 600 s. Kernels that are not checked in time are checked at the next start."""
_MAX_CHILDREN = experts.MAX_UNFINISHED_CHECKS * len(experts.METAL_KERNELS) + 1  # a check ends each but the last


def layer_shape(config: ModelConfig, dtype: mx.Dtype) -> LayerShape:
    """Return the sizes of a model's experts and router."""
    return LayerShape(
        config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok, dtype, config.n_routed_experts
    )


def check_kernels(config: ModelConfig, dtype: mx.Dtype) -> tuple[str, ...]:
    """Check the kernels for a model's layers on this machine. Return a warning for each kernel that is not used."""
    if not on_gpu() or config.n_routed_experts == 0:
        return ()
    shape = layer_shape(config, dtype)
    dtype_name = str(dtype).rpartition(".")[2]
    arguments = (*map(str, shape[:3]), dtype_name, str(shape.num_experts))
    command = [sys.executable, "-P", "-m", "mlx_k2.stage.kernel_checks", *arguments]
    deadline = time.monotonic() + CHECKS_TIMEOUT_S
    is_finished = any(run_child(command, deadline - time.monotonic()) for _ in range(_MAX_CHILDREN))
    for checked_shape in (shape, shape._replace(intermediate_size=0)):  # the experts, and the router alone
        path = check_cache.cache_path(check_cache.DEFAULT_DIRECTORY, checked_shape, experts.chip())
        cached = check_cache.load(path)
        # Without the file use no kernel, or, if a child finished but could not write the file, check in this process.
        if cached is not None or not is_finished:
            experts.adopt(checked_shape, cached or check_cache.CachedChecks([], None))
    return experts.warnings_for(shape)


def run_child(command: list[str], timeout_s: float) -> bool:
    """Run a command with its output on stderr. Return whether it exited with code 0 within ``timeout_s``."""
    if timeout_s <= 0:
        return False
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, timeout=timeout_s, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return False
    return True


def make_checks(arguments: Sequence[str]) -> None:
    """Check the kernels for a LayerShape, given as the fields' texts. The results are in the cache file afterwards."""
    hidden, intermediate, top_k, dtype, num_experts = arguments
    shape = LayerShape(int(hidden), int(intermediate), int(top_k), getattr(mx, dtype), int(num_experts))
    experts.warnings_for(shape)


if __name__ == "__main__":
    make_checks(sys.argv[1:])
