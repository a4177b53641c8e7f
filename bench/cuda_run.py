"""The decode and batch kernels, and two stages, on an NVIDIA GPU through MLX's CUDA back end: less than 8 minutes.

On a Linux machine with a driver for CUDA 12, in a clone (MLX's back ends for a CPU and for CUDA have the same files, so
the one for a CPU is removed first):

    python3 -m venv build/cuda && build/cuda/bin/python -m pip install "pip>=25.1"
    build/cuda/bin/python -m pip install --editable . --group dev
    build/cuda/bin/python -m pip uninstall --yes mlx mlx-cpu
    build/cuda/bin/python -m pip install "mlx[cuda12]==0.32.4"
    build/cuda/bin/python -m bench.cuda_run --save

Three parts, each in a separate process with a deadline, so that a fault of one does not end the others: the kernels'
results compared with plain MLX in float32 at K2's shape, for every number of tokens that has a separate pipeline;
their GB/s as a share of a copy's, which --save appends to results/kernels.csv; and the answer of the built-in model
from two stages. It says whether the kernels are right and whether their loads stream. It says nothing about the speed
of a Mac.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator

import mlx.core as mx

from bench.kernels import HEADER, HIDDEN, INTERMEDIATE, TOP_K
from bench.measure import ROOT, save_rows
from bench.tested_on import ANSWER, QUESTION
from mlx_k2.kernels import experts
from mlx_k2.kernels.layer_time import best_seconds, time_layer
from mlx_k2.kernels.self_check import BATCH, DECODE, LayerShape, check_kernel, random_stack
from mlx_k2.kernels.tuning import DEFAULT

NUM_EXPERTS = 64  # 1.6 GB, more than any cache holds
TOKENS = (1, 2, 4, 8, 16)
COPY_BYTES = 2**30
PART_S = {"check": 150.0, "speed": 150.0, "stages": 150.0}
"""Deadline of each part: 7.5 minutes in all."""

SHAPE = LayerShape(HIDDEN, INTERMEDIATE, TOP_K, mx.bfloat16, NUM_EXPERTS)


def check() -> bool:
    """Print each kernel's largest error; return whether all agree with plain MLX."""
    checks = [check_kernel(name, SHAPE, DEFAULT) for name in (DECODE, BATCH)]
    for each in checks:
        print(f"{each.kernel}: {'agrees' if each.usable else each.reason}, largest error {each.error}")
    return all(each.usable for each in checks)


def speed_rows() -> Iterator[tuple[object, ...]]:
    """Yield the rows of results/kernels.csv: one for each number of tokens, and print the share of a copy's speed."""
    stack = random_stack(SHAPE, NUM_EXPERTS)
    source = mx.zeros(COPY_BYTES // 4, mx.uint32)
    mx.eval(stack, source)
    copied = 2 * COPY_BYTES / best_seconds(lambda: mx.eval(source + 1)) / 1e9
    print(f"a copy: {copied:.0f} GB/s read and written")
    for tokens in TOKENS:
        timing = time_layer(experts.layer_of(tokens, DEFAULT), stack, tokens, TOP_K)
        rate, kernel = timing.gigabytes_per_second, experts.kernel_for(tokens)[0]
        print(f"{kernel} kernels, {tokens} tokens: {rate:.0f} GB/s of weights, {rate / copied:.0%} of a copy's")
        chosen = timing.bytes_needed * NUM_EXPERTS // sum(array.nbytes for array in stack)
        way = f"mlx-k2 {kernel} kernels (CUDA, of a copy {copied:.0f} GB/s)"
        milliseconds = f"{1e3 * timing.seconds:.3f}"
        yield experts.chip(), "bfloat16", tokens, chosen, way, 2, timing.bytes_needed, "", milliseconds, f"{rate:.2f}"


def stages() -> bool:
    """Run the built-in model over two stages on this GPU; return whether the answer is the one of a CPU."""
    command = [sys.executable, "-m", "mlx_k2", "generate", "--stages", "2", QUESTION]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    print(f"two stages answered {ran.stdout.strip()!r} (exit code {ran.returncode})")
    return ran.returncode == 0 and ran.stdout.strip() == ANSWER


def main() -> int:
    """Run one part, or without one all parts in separate processes; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/kernels.csv")
    parser.add_argument("--part", choices=tuple(PART_S), help="run this part only, in this process")
    options = parser.parse_args()
    if not mx.cuda.is_available():
        print("MLX has no CUDA back end here: see how to install it with --help")
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
    failed = [part for part in PART_S if not run_part(part, save=options.save)]
    print(f"failed: {', '.join(failed)}" if failed else "all parts are right")
    return 1 if failed else 0


def run_part(part: str, *, save: bool) -> bool:
    """Run one part in a separate process; return whether it succeeded before its deadline."""
    command = [sys.executable, "-m", "bench.cuda_run", "--part", part, *(["--save"] if save else [])]
    began = time.monotonic()
    try:
        right = subprocess.run(command, cwd=ROOT, timeout=PART_S[part], check=False).returncode == 0
    except subprocess.TimeoutExpired:
        right = False
    print(f"{part}: {'right' if right else 'wrong'} in {time.monotonic() - began:.0f} s", flush=True)
    return right


if __name__ == "__main__":
    sys.exit(main())
