"""Ports that a stage picks on its own host and holds until MLX's ring takes them over."""

import errno
import socket
from collections.abc import Sequence

from mlx_k2.errors import StageStartError


class HeldPorts:
    """A bound socket for each listen address, ``ip`` (any free port) or ``ip:port``.

    Bound without SO_REUSEPORT, so that a port in use is an error here; MLX's ring would share it without a word. What a
    stage that has ended leaves of its connections for a minute (TIME_WAIT) does not count as in use.
    """

    def __init__(self, listen: Sequence[str]) -> None:
        self._sockets: list[socket.socket] = []
        try:
            self.addresses = tuple(self._hold(address) for address in listen)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go of the ports, just before the ring binds them."""
        for held in self._sockets:
            held.close()
        self._sockets.clear()

    def _hold(self, address: str) -> str:
        ip, _, port = address.partition(":")
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._sockets.append(held)
        try:
            try:
                held.bind((ip, int(port or 0)))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # refused where a plain socket is bound
                held.bind((ip, int(port or 0)))
        except OSError as error:
            raise StageStartError(
                f"cannot listen on {address}: {error.strerror}: the hostfile's ips must be addresses of this host"
                + (f", and port {port} free" if port else "")
            ) from None
        return f"{ip}:{held.getsockname()[1]}"
