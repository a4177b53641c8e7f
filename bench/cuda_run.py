"""Test of the decode and batch kernels, and of two stages, on an NVIDIA GPU through MLX's CUDA back end.

On a Linux machine with a driver for CUDA 12, in a clone (MLX's back ends for a CPU and for CUDA have the same files, so
the one for a CPU is removed first):

    python3 -m venv build/cuda && build/cuda/bin/python -m pip install "pip>=25.1"
    build/cuda/bin/python -m pip install --editable . --group dev
    build/cuda/bin/python -m pip uninstall --yes mlx mlx-cpu
    build/cuda/bin/python -m pip install "mlx[cuda12]==0.32.4"
    build/cuda/bin/python -m bench.cuda_run --save

Each of three parts runs in a separate process with a deadline, so that a fault of one does not end the others:

- check: the kernels' results at K2's shape, compared with plain MLX in float32, for each number of tokens that selects
  another kernel pipeline;
- speed: the weights' GB/s as a fraction of a copy's GB/s; --save appends the rows to results/kernels.csv;
- stages: the answer of the built-in model from two stages.

All parts take less than 8 minutes. The speeds show nothing about a Mac.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator

import mlx.core as mx

from bench.kernels import HEADER, HIDDEN, INTERMEDIATE, TOP_K, KernelRow
from bench.measure import ROOT, save_rows
from bench.tested_on import ANSWER, QUESTION
from mlx_k2.kernels import experts
from mlx_k2.kernels.layer_time import best_seconds, time_layer
from mlx_k2.kernels.self_check import BATCH, DECODE, LayerShape, check_kernel, random_stack
from mlx_k2.kernels.tuning import DEFAULT

NUM_EXPERTS = 64  # 1.6 GB, more than any cache holds
TOKENS = (1, 2, 4, 8, 16)
COPY_BYTES = 2**30
PART_TIMEOUTS_S = {"check": 150.0, "speed": 150.0, "stages": 150.0}

SHAPE = LayerShape(HIDDEN, INTERMEDIATE, TOP_K, mx.bfloat16, NUM_EXPERTS)


def check() -> bool:
    """Print each kernel's largest error; return whether all agree with plain MLX."""
    checks = [check_kernel(name, SHAPE, DEFAULT) for name in (DECODE, BATCH)]
    for result in checks:
        print(f"{result.kernel}: {'agrees' if result.usable else result.reason}, largest error {result.error}")
    return all(result.usable for result in checks)


def speed_rows() -> Iterator[KernelRow]:
    """Yield one row of results/kernels.csv for each number of tokens, and print its fraction of a copy's speed.

    The row's time is the best one instead of a median.
    """
    stack = random_stack(SHAPE, NUM_EXPERTS)
    source = mx.zeros(COPY_BYTES // 4, mx.uint32)
    mx.eval(stack, source)
    copy_rate = 2 * COPY_BYTES / best_seconds(lambda: mx.eval(source + 1)) / 1e9
    print(f"a copy: {copy_rate:.0f} GB/s read and written")
    for tokens in TOKENS:
        timing = time_layer(experts.layer_of(tokens, DEFAULT), stack, tokens, TOP_K)
        rate, kernel = timing.gigabytes_per_second, experts.kernel_for(tokens)[0]
        print(f"{kernel} kernels, {tokens} tokens: {rate:.0f} GB/s of weights, {rate / copy_rate:.0%} of a copy's")
        bytes_per_expert = sum(array.nbytes for array in stack) // NUM_EXPERTS
        yield KernelRow(
            experts.chip(),
            "bfloat16",
            tokens,
            experts_chosen=timing.bytes_needed // bytes_per_expert,
            way=f"mlx-k2 {kernel} kernels (CUDA, of a copy {copy_rate:.0f} GB/s)",
            launches=2,  # gate and up, then down
            bytes_needed=timing.bytes_needed,
            bytes_loaded="",
            milliseconds=f"{1e3 * timing.seconds:.3f}",
            gigabytes_per_s=f"{rate:.2f}",
        )


def stages() -> bool:
    """Run the built-in model over two stages on this GPU; return whether the answer is the one of a CPU."""
    command = [sys.executable, "-m", "mlx_k2", "generate", "--stages", "2", QUESTION]
    completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    answer = completed.stdout.strip()
    print(f"two stages answered {answer!r} (exit code {completed.returncode})")
    return completed.returncode == 0 and answer == ANSWER


def main() -> int:
    """Run the part of --part; without it, run each part in a separate process. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/kernels.csv")
    parser.add_argument("--part", choices=tuple(PART_TIMEOUTS_S), help="run this part only, in this process")
    options = parser.parse_args()
    if not mx.cuda.is_available():
        print("MLX has no CUDA back end on this machine: --help has the commands that install it")
        return 2
    if options.part == "check":
        return 0 if check() else 1
    if options.part == "speed":
        rows = list(speed_rows())
        if options.save:
            print(f"saved to {save_rows('kernels', HEADER, rows)}")
        return 0
    if options.part == "stages":
        return 0 if stages() else 1
    failed = [part for part in PART_TIMEOUTS_S if not run_part(part, save=options.save)]
    print(f"failed: {', '.join(failed)}" if failed else "all parts passed")
    return 1 if failed else 0


def run_part(part: str, *, save: bool) -> bool:
    """Run one part in a separate process; return whether it succeeded before its deadline."""
    command = [sys.executable, "-m", "bench.cuda_run", "--part", part, *(["--save"] if save else [])]
    started_at = time.monotonic()
    try:
        passed = subprocess.run(command, cwd=ROOT, timeout=PART_TIMEOUTS_S[part], check=False).returncode == 0
    except subprocess.TimeoutExpired:
        passed = False
    print(f"{part}: {'passed' if passed else 'failed'} after {time.monotonic() - started_at:.0f} s", flush=True)
    return passed


if __name__ == "__main__":
    sys.exit(main())
