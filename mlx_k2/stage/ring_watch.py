"""A watch over a stage's ring ports while MLX connects them. It runs in a separate process, since MLX holds the GIL.

MLX's ring accepts the first connection to a port. If it comes from an unknown process, the stages try for 31 s to reach
each other, and their errors do not name that process. The watch ends the stage and names the process's address.
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

POLL_INTERVAL_S = 0.25
UNLISTED_ADDRESS_S = 10.0
"""Time after which a connection from another host counts as unknown if the hostfile does not list its address. Within
this time the ring may be complete: the neighbour may have addresses that the hostfile does not list."""

# Import the module 1 s later: until then most stages are connected, and have ended this process.
_START = "import time; time.sleep(1); import runpy; runpy.run_module('mlx_k2.stage.ring_watch', run_name='__main__')"


@contextmanager
def watched_ring(rank: int, links: RingLinks) -> Iterator[None]:
    """Watch the ports of stage ``rank`` in this context. If an unknown process connects, end this process."""
    own_addresses = ",".join(links.addresses[rank])
    previous_addresses = ",".join(links.addresses[rank - 1])  # of rank 0 the last one: MLX closes the ring
    command = [sys.executable, "-P", "-c", _START, str(os.getpid()), own_addresses, previous_addresses]
    watch = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        watch.kill()
        watch.wait()


def main(pid: int, own_addresses: Sequence[str], previous_addresses: Sequence[str]) -> None:
    """End stage ``pid`` if an unknown process connects to one of ``own_addresses``. Return when the stage has ended.

    ``previous_addresses`` are those that the hostfile lists for the previous stage.
    """
    previous_ips = {address.partition(":")[0] for address in previous_addresses}
    host_ips = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    first_seen_s: dict[str, float] = {}
    with suppress(psutil.Error):
        while True:
            for peer in sorted(peer for address, peer in tcp_connections(pid) if address in own_addresses):
                ip = peer.partition(":")[0]
                connected_s = time.monotonic() - first_seen_s.setdefault(peer, time.monotonic())
                if ip not in previous_ips and (ip in host_ips or connected_s > UNLISTED_ADDRESS_S):
                    sys.stderr.write(f"an unknown process at {peer} is connected to the ring port of this stage\n")
                    sys.stderr.flush()
                    os.kill(pid, signal.SIGTERM)
                    return
            time.sleep(POLL_INTERVAL_S)


def tcp_connections(pid: int | None = None) -> set[tuple[str, str]]:
    """Return a process's established TCP connections: ``ip:port`` of its end and of the other. None: this process."""
    return {
        (f"{connection.laddr.ip}:{connection.laddr.port}", f"{connection.raddr.ip}:{connection.raddr.port}")
        for connection in psutil.Process(pid).net_connections("tcp4")
        if connection.status == psutil.CONN_ESTABLISHED
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","))
