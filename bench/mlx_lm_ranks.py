"""Processes of mlx-lm's ranks (bench/mlx_lm_rank.py) that stay loaded between the runs of a benchmark.

They are started without mlx.launch, which would occupy a core. Between runs a rank waits for a line on its stdin.
"""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_k2.benchmark import Workload

RUN_TIMEOUT_S = 600.0


class MlxLmRanks:
    """Ranks with a loaded model. The constructor waits until all have loaded."""

    def __init__(self, ranks: Sequence["subprocess.Popen[str]"]) -> None:
        self._ranks = ranks
        for rank in ranks:
            self._read_line(rank)

    def rates(self, workload: Workload, prefill_step: int) -> dict[str, float]:
        """Run ``workload`` once; return tokens per second as "prefill" and "decode"."""
        settings = {
            "prompt_tokens": workload.prompt_tokens,
            "generate_tokens": workload.generate_tokens,
            "streams": workload.streams,
            "prefill_step": prefill_step,
        }
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(settings) + "\n")
            rank.stdin.flush()
        rates: dict[str, float] = self._read_line(self._ranks[0])
        return rates

    def _read_line(self, rank: "subprocess.Popen[str]") -> Any:
        assert rank.stdout is not None
        if not select.select([rank.stdout], [], [], RUN_TIMEOUT_S)[0]:
            raise TimeoutError(f"mlx-lm has not loaded or finished a run in {RUN_TIMEOUT_S:.0f} s")
        line = rank.stdout.readline()
        assert line, f"a rank of mlx-lm has ended with code {rank.wait()}"
        return json.loads(line)


@contextlib.contextmanager
def mlx_lm_ranks(folder: Path, num_ranks: int) -> Iterator[MlxLmRanks]:
    """Start ``num_ranks`` ranks of mlx-lm on a checkpoint, in float32; end them on exit.

    A single rank runs the whole model; several run mlx-lm's pipeline over MLX's ring.
    """
    command = [sys.executable, "-m", "bench.mlx_lm_rank", str(folder)]
    with contextlib.ExitStack() as stack:
        hostfile = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".json"))
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(num_ranks)], hostfile)
        hostfile.flush()
        ranks = []
        for rank in range(num_ranks):
            variables = {"MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile.name} if num_ranks > 1 else {}
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | variables
            )
            stack.enter_context(process)  # on exit this closes its stdin and waits
            stack.callback(end_rank, process)
            ranks.append(process)
        yield MlxLmRanks(ranks)


def end_rank(process: "subprocess.Popen[str]") -> None:
    """Close a rank's stdin, which ends it. Kill it after 10 s if another rank ended in a run and this one hangs."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def free_ports(count: int) -> list[int]:
    """Return ``count`` TCP ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports
