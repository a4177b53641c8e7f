"""The watch of a stage's ring ports while MLX connects them. It runs in a separate process, since MLX holds the GIL.

MLX's ring accepts the first connection to a port. If that is not a neighbour's, the stages try for 31 s to reach each
other, and none of their errors names it.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

from mlx_k2.protocol.messages import RingLinks

LOOK_EVERY_S = 0.25
UNEXPECTED_S = 10.0
"""Time for which an address may be connected that is neither this host's nor listed for the neighbour, which may have
more addresses than the hostfile lists."""

# Most stages are connected before this process has imported anything.
_LATER = "import time; time.sleep(1); import runpy; runpy.run_module('mlx_k2.stage.ring_watch', run_name='__main__')"


@contextmanager
def watched_ring(rank: int, links: RingLinks) -> Iterator[None]:
    """Watch the ports of stage ``rank`` in this context. If an unknown process connects, end this process."""
    own, previous = links.addresses[rank], links.addresses[rank - 1]
    command = [sys.executable, "-P", "-c", _LATER, str(os.getpid()), ",".join(own), ",".join(previous)]
    watch = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        watch.kill()
        watch.wait()


def main(pid: int, own: Sequence[str], previous: Sequence[str]) -> None:
    """End process ``pid`` if an unknown process connects to one of its addresses ``own``; return when it has ended."""
    expected = {address.partition(":")[0] for address in previous}
    here = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    since: dict[str, float] = {}
    with suppress(psutil.Error):
        while True:
            for other in sorted(other for ours, other in tcp_connections(pid) if ours in own):
                ip = other.partition(":")[0]
                connected_s = time.monotonic() - since.setdefault(other, time.monotonic())
                if ip not in expected and (ip in here or connected_s > UNEXPECTED_S):
                    sys.stderr.write(f"an unknown process at {other} is connected to the ring port of this stage\n")
                    sys.stderr.flush()
                    os.kill(pid, signal.SIGTERM)
                    return
            time.sleep(LOOK_EVERY_S)


def tcp_connections(pid: int | None = None) -> set[tuple[str, str]]:
    """Return the established TCP connections of a process (default: this): ``ip:port`` of its end and of the other."""
    return {
        (f"{found.laddr.ip}:{found.laddr.port}", f"{found.raddr.ip}:{found.raddr.port}")
        for found in psutil.Process(pid).net_connections("tcp4")
        if found.status == psutil.CONN_ESTABLISHED
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","))
