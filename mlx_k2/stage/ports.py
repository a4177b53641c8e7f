"""Ports that a stage chooses on its own host and reserves until MLX's ring binds them."""

import errno
import socket
from collections.abc import Sequence

from mlx_k2.errors import StageStartError


class HeldPorts:
    """A bound socket for each listen address, ``ip`` (any free port) or ``ip:port``.

    The sockets are bound without SO_REUSEPORT, so that a port in use is an error here; MLX's ring would silently share
    it. Connections that a stage leaves in TIME_WAIT for a minute after its end do not count as in use.
    """

    def __init__(self, listen: Sequence[str]) -> None:
        self._sockets: list[socket.socket] = []
        try:
            self.addresses = tuple(self._hold(address) for address in listen)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Close the sockets. Called just before the ring binds the ports."""
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
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # fails if a socket without it is bound
                held.bind((ip, int(port or 0)))
        except OSError as error:
            raise StageStartError(
                f"cannot listen on {address}: {error.strerror}: the hostfile's ips must be addresses of this host"
                + (f", and port {port} free" if port else "")
            ) from None
        return f"{ip}:{held.getsockname()[1]}"
