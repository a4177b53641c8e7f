"""mlx-lm's ranks as processes that keep running between runs, so that a pair's two sides run right after each other.

They are started directly, because mlx.launch would occupy a core. A rank without a run waits on its stdin.
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

LONGEST_S = 600.0


class MlxLmRanks:
    """Loaded ranks. A single rank runs the whole model; several run mlx-lm's pipeline over MLX's ring."""

    def __init__(self, ranks: Sequence["subprocess.Popen[str]"]) -> None:
        self._ranks = ranks
        for rank in ranks:
            self._read(rank)  # each rank prints a line when it has loaded

    def rates(self, workload: Workload, prefill_step: int) -> dict[str, float]:
        """Run ``workload`` once; return tokens per second as "prefill" and "decode"."""
        run = {
            "prompt_tokens": workload.prompt_tokens,
            "generate_tokens": workload.generate_tokens,
            "streams": workload.streams,
            "prefill_step": prefill_step,
        }
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(run) + "\n")
            rank.stdin.flush()
        rates: dict[str, float] = self._read(self._ranks[0])
        return rates

    def _read(self, rank: "subprocess.Popen[str]") -> Any:
        assert rank.stdout is not None
        if not select.select([rank.stdout], [], [], LONGEST_S)[0]:
            raise TimeoutError(f"mlx-lm has not finished a run after {LONGEST_S:.0f} s")
        line = rank.stdout.readline()
        assert line, f"a rank of mlx-lm has ended with code {rank.wait()}"
        return json.loads(line)


@contextlib.contextmanager
def mlx_lm_ranks(folder: Path, num_ranks: int) -> Iterator[MlxLmRanks]:
    """Start ``num_ranks`` ranks of mlx-lm on a checkpoint, in float32; end them on exit."""
    command = [sys.executable, "-m", "bench.mlx_lm_rank", str(folder)]
    with contextlib.ExitStack() as stack:
        hostfile = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".json"))
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(num_ranks)], hostfile)
        hostfile.flush()
        ranks = []
        for rank in range(num_ranks):
            location = {"MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile.name} if num_ranks > 1 else {}
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | location
            )
            stack.enter_context(process)  # on exit this closes its stdin and waits
            stack.callback(end_if_stuck, process)
            ranks.append(process)
        yield MlxLmRanks(ranks)


def end_if_stuck(process: "subprocess.Popen[str]") -> None:
    """Close a rank's stdin, which ends it. Kill it after 10 s: it hangs if its neighbour ended during a run."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports
