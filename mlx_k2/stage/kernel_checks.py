"""The kernel checks of a stage, made in a separate process before any weights are loaded.

A kernel that faults can end the process that runs it, or corrupt its GPU state. So a child process checks, and this
process reads the results from the cache file. If the child does not finish, another one is started: the file counts
the checks that were started, and after two of a kernel the next child leaves it out (kernels/experts.py).
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

CHECKS_S = 400.0
"""Time limit of all children: some seconds for each kernel, more if another process checks at the same time. The
coordinator expects a message within 600 s. What is not checked by then is checked at the next start."""
_MOST_CHILDREN = experts.MAX_STARTS * len(experts.METAL_KERNELS) + 1


def layer_shape(config: ModelConfig, dtype: mx.Dtype) -> LayerShape:
    """Return the sizes of a model's experts and router."""
    return LayerShape(
        config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok, dtype, config.n_routed_experts
    )


def check_kernels(config: ModelConfig, dtype: mx.Dtype) -> tuple[str, ...]:
    """Check the kernels for a model's layers on this machine. Return a warning for each that plain MLX replaces."""
    if not on_gpu() or config.n_routed_experts == 0:
        return ()
    shape = layer_shape(config, dtype)
    words = (*map(str, shape[:3]), str(dtype).rpartition(".")[2], str(shape.num_experts))
    command = [sys.executable, "-P", "-m", "mlx_k2.stage.kernel_checks", *words]
    deadline = time.monotonic() + CHECKS_S
    came_back = any(run_child(command, deadline - time.monotonic()) for _ in range(_MOST_CHILDREN))
    for part in (shape, shape._replace(intermediate_size=0)):
        path = check_cache.cache_path(check_cache.DEFAULT_DIRECTORY, part, experts.chip())
        cached = check_cache.load(path)
        if cached is not None or not came_back:  # a child that finished without a file could not write one
            experts.adopt(part, cached or check_cache.CachedChecks([], None))
    return experts.warnings_for(shape)


def run_child(command: list[str], timeout_s: float) -> bool:
    """Run a child to its end, its output on stderr. Return whether it exited with code 0 within ``timeout_s``."""
    if timeout_s <= 0:
        return False
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, timeout=timeout_s, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return False
    return True


def make_checks(words: Sequence[str]) -> None:
    """Make the checks of a stage's experts and router: hidden size, intermediate size, top k, dtype, experts."""
    hidden, intermediate, top_k, dtype, num_experts = words
    shape = LayerShape(int(hidden), int(intermediate), int(top_k), getattr(mx, dtype), int(num_experts))
    experts.warnings_for(shape)


if __name__ == "__main__":
    make_checks(sys.argv[1:])
