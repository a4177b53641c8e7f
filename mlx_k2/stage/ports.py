"""Ports that a stage chooses on its own host and reserves until MLX's ring binds them."""

import errno
import socket
from collections.abc import Sequence

from mlx_k2.errors import StageStartError


class HeldPorts:
    """A bound socket for each listen address, ``ip`` (any free port) or ``ip:port``; ``addresses`` are all ``ip:port``.

    The sockets are bound without SO_REUSEPORT, so that a port in use is an error here; MLX's ring would silently share
    it. A port is not in use if only connections in TIME_WAIT have it, as for a minute after the end of a stage. If an
    address cannot be bound, StageStartError is raised.
    """

    def __init__(self, listen: Sequence[str]) -> None:
        self._sockets: list[socket.socket] = []
        try:
            self.addresses = tuple(self._bind(address) for address in listen)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Close the sockets. Called just before the ring binds the ports."""
        for bound in self._sockets:
            bound.close()
        self._sockets.clear()

    def _bind(self, address: str) -> str:
        """Bind a socket to ``address``. Return the address with its port."""
        ip, _, port = address.partition(":")
        new_socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._sockets.append(new_socket)
        try:
            try:
                new_socket.bind((ip, int(port or 0)))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                # Ignore connections in TIME_WAIT. Not set at first: two sockets that have it could hold one port.
                new_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                new_socket.bind((ip, int(port or 0)))
        except OSError as error:
            port_advice = f", and port {port} free" if port else ""
            raise StageStartError(
                f"cannot listen on {address}: {error.strerror}: the hostfile's ips must be addresses of this host"
                f"{port_advice}"
            ) from None
        return f"{ip}:{new_socket.getsockname()[1]}"
