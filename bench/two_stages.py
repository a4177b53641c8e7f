"""One stream on two local stages: against one stage, and against mlx-lm on two ranks.

python -m bench.two_stages [--save]

Both deployments stay up and take turns, NUM_PAIRS times; a stage without a plan uses no processor. mlx-lm's two ranks
are started anew for each pair. Everything in float32 on the same checkpoint; decode tokens per second, ratios pair by
pair. --save appends the rows to results/two_stages.csv.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.checkpoints import CONTEXT_TOKENS, bench_checkpoint
from bench.measure import alternate, prompt_ids, ratios, save_rows, summarize
from mlx_k2.cluster.hostfile import local_hostfile
from mlx_k2.control.messages import ModelSource
from mlx_k2.deployment import Deployment, DeploymentRequest, Watcher, deploy
from mlx_k2.engine.request import Request
from mlx_k2.sampling import Sampling
from mlx_k2.session import coordinate
from mlx_k2.weights.checkpoint import describe_model, read_small_files

PROMPT_TOKENS = 32
TOKENS = 48
MLX_LM_STEP = 2048


def main() -> None:
    """Measure, print, and with --save keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/two_stages.csv")
    save = parser.parse_args().save
    folder = bench_checkpoint("even")
    with contextlib.ExitStack() as stack:
        one, two = (Stages(stack.enter_context(local_deployment(folder, stages))) for stages in (1, 2))
        one.decode_rate()  # both warm up
        two.decode_rate()
        report("one stage", alternate(two.decode_rate, one.decode_rate), save)
        report("mlx-lm on two ranks", alternate(two.decode_rate, lambda: mlx_lm_rate(folder, 2)), save)
        print("computing, each of two stages:", ", ".join(f"{ms:.1f} ms a step" for ms in two.step_ms()))


class Stages:
    """A deployment that decodes the same prompt again and again."""

    def __init__(self, deployment: Deployment) -> None:
        self._coordinator = coordinate(deployment, guesses=False)

    def decode_rate(self) -> float:
        """Tokens per second after the first one."""
        request = Request(tuple(prompt_ids(PROMPT_TOKENS)), TOKENS, Sampling(seed=0, temperature=0), frozenset())
        arrivals = [time.perf_counter() for _ in self._coordinator.run(request)]
        return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])

    def step_ms(self) -> list[float]:
        """What each stage's steps took of computing, on average."""
        return [1000 * use.busy_s / use.steps_done for use in self._coordinator.use]


def local_deployment(folder: Path, num_stages: int) -> contextlib.AbstractContextManager[Deployment]:
    """``num_stages`` stages on this machine."""
    source = ModelSource(path_or_repo=str(folder))
    request = DeploymentRequest(local_hostfile(num_stages), source, None, CONTEXT_TOKENS, "float32", lease_s=20.0)
    return deploy(request, describe_model(read_small_files(folder), str(folder)), Watcher())


def mlx_lm_rate(folder: Path, num_ranks: int) -> float:
    """mlx-lm's decode rate over ``num_ranks`` ranks of MLX's ring, started here without mlx.launch."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hostfile:
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(num_ranks)], hostfile)
        hostfile.flush()
        command = [sys.executable, "-m", "bench.mlx_lm_rank", folder, PROMPT_TOKENS, TOKENS, MLX_LM_STEP]
        ranks = [
            subprocess.Popen(
                list(map(str, command)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,  # the ring complains there whenever its ranks end
                env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile.name},
            )
            for rank in range(num_ranks)
        ]
        outputs = [rank.communicate() for rank in ranks]
    assert outputs[0][0], b"".join(complaints for _, complaints in outputs).decode()  # once it has spoken, it may break
    return float(json.loads(outputs[0][0])["decode"])


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


def report(other: str, pairs: Sequence[tuple[float, float]], save: bool) -> None:
    """Print the ratio two stages over ``other``, and keep the pairs."""
    ours, theirs = zip(*pairs, strict=True)
    print(f"two stages {summarize(ours)} tok/s, {other} {summarize(theirs)} tok/s, ratio {summarize(ratios(pairs))}")
    if save:
        rows = [(other, f"{two:.3f}", f"{against:.3f}", f"{two / against:.4f}") for two, against in pairs]
        print("saved to", save_rows("two_stages", ("against", "two_stages_tok_s", "other_tok_s", "ratio"), rows))


if __name__ == "__main__":
    main()
