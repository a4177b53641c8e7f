"""mlx-lm on two ranks of MLX's ring against two stages: one stream, eight streams, a prompt of 16 chunks.

python -m bench.vs_mlx_lm [--save] [--pairs N]

The same checkpoint and prompts, float32 on both sides, the two sides of a pair right after each other. mlx-lm's ranks
are started anew for each figure, without mlx.launch, which would take a core for itself, and warm up on the same run.
Eight streams of mlx-lm are eight runs in turn, so its rate for one stream; its batch_generate is not compared yet.
Its prefill step is the best of several. --save appends the rows to results/vs_mlx_lm.csv.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.checkpoints import bench_checkpoint
from bench.deployments import local_deployment
from bench.measure import NUM_PAIRS, alternate, ratios, save_rows, summarize
from bench.overlap import EIGHT, ONE, PROMPT, SLOTS, decoded
from bench.two_stages import free_ports
from mlx_k2.benchmark import Benchmark

PREFILL_STEPS = (128, 256, 512, 2048)
MLX_LM_STEP = 2048
LONGEST_S = 600


def main() -> None:
    """Measure, print, and with --save keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/vs_mlx_lm.csv")
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS)
    arguments = parser.parse_args()
    folder = bench_checkpoint("even")
    with local_deployment(folder, 2, SLOTS) as deployment:
        ours = Benchmark(deployment, guesses=False)
        for workload in (ONE, EIGHT, PROMPT):
            ours.warm_up(workload)
        step = max(PREFILL_STEPS, key=lambda step: mlx_lm_rates(folder, PROMPT.prompt_tokens, 2, step)["prefill"])
        comparisons = (
            ("one stream", lambda: decoded(ours.measure(ONE)), lambda: mlx_lm_decode(folder), 1.0),
            ("eight streams", lambda: decoded(ours.measure(EIGHT)), lambda: mlx_lm_decode(folder), 1.8),
            (
                f"prompt of {PROMPT.prompt_tokens}, mlx-lm's step {step}",
                lambda: ours.measure(PROMPT).prefill_tokens_per_s,
                lambda: mlx_lm_rates(folder, PROMPT.prompt_tokens, 2, step)["prefill"],
                1.1,
            ),
        )
        for name, first, second, wanted in comparisons:
            report(name, alternate(first, second, arguments.pairs), wanted, arguments.save)


def mlx_lm_decode(folder: Path) -> float:
    """mlx-lm's rate for one stream."""
    return mlx_lm_rates(folder, ONE.prompt_tokens, ONE.generate_tokens, MLX_LM_STEP)["decode"]


def mlx_lm_rates(folder: Path, prompt_tokens: int, generate_tokens: int, step: int) -> dict[str, float]:
    """Prefill and decode tokens per second of mlx-lm's pipeline over two ranks of MLX's ring."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hostfile:
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(2)], hostfile)
        hostfile.flush()
        command = [sys.executable, "-m", "bench.mlx_lm_rank", folder, prompt_tokens, generate_tokens, step]
        ranks = [
            subprocess.Popen(
                list(map(str, command)),
                stdout=subprocess.PIPE,
                env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile.name},
            )
            for rank in range(2)
        ]
        outputs = [rank.communicate(timeout=LONGEST_S)[0] for rank in ranks]
    rates: dict[str, float] = json.loads(outputs[0])
    return rates


def report(name: str, pairs: list[tuple[float, float]], wanted: float, save: bool) -> None:
    """Print the ratio, and keep the pairs."""
    ours, theirs = zip(*pairs, strict=True)
    print(
        f"{name}: mlx-k2 {summarize(ours)}, mlx-lm {summarize(theirs)} tok/s, ratio {summarize(ratios(pairs))}, "
        f"wanted {wanted}",
        flush=True,
    )
    if save:
        rows = [(name, f"{first:.3f}", f"{second:.3f}", f"{first / second:.4f}") for first, second in pairs]
        print("saved to", save_rows("vs_mlx_lm", ("what", "mlx_k2_tok_s", "mlx_lm_tok_s", "ratio"), rows))


if __name__ == "__main__":
    main()
