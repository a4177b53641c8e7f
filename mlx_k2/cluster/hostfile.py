"""The hostfile: the hosts and their links, in MLX's own format. Contacts no host.

A hostfile is JSON in one of the two forms that ``mlx.distributed_config`` writes: a list of hosts, or an object with
``backend``, ``envs`` and ``hosts``. mlx-k2's own keys of a host are ``python``, ``model``, ``memory_gb`` and
``gb_per_s``.
"""

import enum
import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from mlx_k2.bounded_read import read_file
from mlx_k2.errors import HostfileError
from mlx_k2.json_text.parse import JsonError, parse_json
from mlx_k2.json_text.read import convert

RdmaCell: TypeAlias = str | tuple[str, ...] | None
"""The RDMA device or devices from one host to another; None if there are none."""

_LOCAL_NAMES = ("127.0.0.1", "localhost")
_FILE_KEYS = ("backend", "envs", "hosts")
_ENV_LINE = re.compile(r"[^\W\d]\w*=")
_EXAMPLE = 'for instance [{"ssh": "mac-1", "ips": ["192.168.0.1"]}, {"ssh": "mac-2", "ips": ["192.168.0.2"]}]'


class Backend(enum.Enum):
    """The transport of hidden states: TCP between neighbours, or RDMA over Thunderbolt 5 as a full mesh or a ring."""

    RING = "ring"
    JACCL = "jaccl"
    JACCL_RING = "jaccl-ring"


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """One host; its rank is its index in the list.

    ``ips`` are addresses to listen on, each ``ip`` (a free port is picked) or ``ip:port``. ``rdma[i]`` is for the link
    to host i. ``memory_gb`` (10^9 bytes) limits the memory that mlx-k2 may use. ``gb_per_s`` is the memory bandwidth.
    ``python`` and ``model`` are paths on the host.
    """

    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[RdmaCell, ...] = ()
    python: str | None = None
    model: str | None = None
    memory_gb: float | None = None
    gb_per_s: float | None = None

    @property
    def is_local(self) -> bool:
        """True if its stage is started on this machine, without ssh."""
        return self.ssh in _LOCAL_NAMES


class Hostfile(msgspec.Struct, frozen=True, kw_only=True):
    """A checked hostfile. ``envs`` are ``NAME=value`` lines; ``warnings`` are lines for the user about the hostfile."""

    hosts: tuple[Host, ...]
    backend: Backend
    envs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def read_hostfile(path: Path) -> Hostfile:
    """Read and check the hostfile at ``path``.

    Raises:
        HostfileError: the file is missing, or is not a usable hostfile; names the host and the fix.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise HostfileError(f"cannot read the hostfile {path}: {error.strerror}") from None
    return parse_hostfile(data, str(path))


def parse_hostfile(data: bytes, source: str) -> Hostfile:
    """Parse and check a hostfile's bytes; ``source`` is the name of the hostfile in errors.

    Raises:
        HostfileError: the bytes are not a usable hostfile; names the host and the fix.
    """
    try:
        decoded = parse_json(data)
    except JsonError as error:
        raise HostfileError(f"{source} is not JSON: {error}") from None
    fields: dict[str, Any] = {"hosts": decoded} if isinstance(decoded, list) else decoded
    if not isinstance(fields, dict) or not isinstance(fields.get("hosts"), list) or not fields["hosts"]:
        raise HostfileError(f"{source} lists no hosts: write {_EXAMPLE}")
    warnings = _unknown_keys(fields, _FILE_KEYS, source)
    hosts = []
    for rank, entry in enumerate(fields["hosts"]):
        hosts.append(_host(entry, f"{source}: host {rank}"))
        warnings += _unknown_keys(entry, Host.__struct_fields__, f"{source}: host {rank} ({hosts[-1].ssh})")
    # mlx.distributed_config writes an empty backend for Ethernet
    backend = _backend(fields.get("backend") or Backend.RING.value, source)
    _check_links(hosts, backend, source)
    return Hostfile(
        hosts=tuple(hosts), backend=backend, envs=_envs(fields.get("envs"), source), warnings=tuple(warnings)
    )


def local_hostfile(num_stages: int) -> Hostfile:
    """Return the hostfile of a run without one: ``num_stages`` stages on this machine, connected over loopback."""
    assert num_stages >= 1
    return Hostfile(hosts=(Host(ssh="127.0.0.1", ips=("127.0.0.1",)),) * num_stages, backend=Backend.RING)


def _host(entry: object, where: str) -> Host:
    """Return a checked host. ``where`` is the start of errors: the hostfile and the host's rank."""
    name = entry.get("ssh") if isinstance(entry, dict) else None
    where = f"{where} ({name})" if isinstance(name, str) else where
    try:
        host = convert(entry, Host)
    except JsonError as error:
        raise HostfileError(f"{where}: {error}") from None
    if not host.ssh or host.ssh.startswith("-") or not host.ssh.isprintable() or " " in host.ssh:
        raise HostfileError(f"{where}: {host.ssh!r} is not a host name that ssh accepts")
    for ip in host.ips:
        _check_address(ip, where)
    for key, path in (("python", host.python), ("model", host.model)):
        if path is not None and (not path or not path.isprintable()):
            raise HostfileError(f"{where}: {key} {path!r} is not a path: leave the key out, or give one")
    for key, number in (("memory_gb", host.memory_gb), ("gb_per_s", host.gb_per_s)):
        if number is not None and not 0 < number < 1e9:
            raise HostfileError(
                f"{where}: {key} is {number:g}: leave the key out, or give a number above 0 and below 1e9"
            )
    return host


def _check_address(address: str, where: str) -> None:
    ip, colon, port = address.partition(":")
    try:
        ipaddress.IPv4Address(ip)
    except ValueError:
        raise HostfileError(f"{where}: ips holds {address!r}: give an IPv4 address in numbers, or ip:port") from None
    if colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise HostfileError(f"{where}: ips holds {address!r}: a port is a number from 1 to 65535")


def _backend(name: object, source: str) -> Backend:
    names = [backend.value for backend in Backend]
    if name not in names:
        raise HostfileError(f"{source}: mlx-k2 does not run over backend {name!r}: write one of {', '.join(names)}")
    return Backend(name)


def _envs(envs: object, source: str) -> tuple[str, ...]:
    lines = envs or []
    if not isinstance(lines, list) or not all(isinstance(line, str) and _ENV_LINE.match(line) for line in lines):
        raise HostfileError(f'{source}: envs must be a list of lines like "NAME=value"')
    return tuple(lines)


def _unknown_keys(fields: Mapping[str, Any], known: Sequence[str], where: str) -> list[str]:
    """Return a warning that names the keys that are not ``known``, if there are any."""
    unknown = sorted(fields.keys() - set(known))
    return [f"{where}: ignored unknown keys: {', '.join(unknown)}"] if unknown else []


def _check_links(hosts: Sequence[Host], backend: Backend, source: str) -> None:
    """Check that no address with a port is listed twice, and that several hosts have the links of the backend."""
    owners: dict[str, str] = {}
    for rank, host in enumerate(hosts):
        for address in host.ips:
            if ":" in address and address in owners:
                raise HostfileError(
                    f"{source}: host {rank} ({host.ssh}) lists {address}, which {owners[address]} has already: "
                    "give each its own port, or leave the port out and one is picked"
                )
            owners[address] = f"host {rank} ({host.ssh})"
    if len(hosts) > 1 and backend is Backend.RING:
        _check_ring(hosts, source)
    elif len(hosts) > 1:
        _check_rdma(hosts, backend, source)


def _check_ring(hosts: Sequence[Host], source: str) -> None:
    for rank, host in enumerate(hosts):
        if not host.ips:
            raise HostfileError(
                f"{source}: host {rank} ({host.ssh}) has no ips, which backend ring needs: "
                'add "ips": ["its address"], or let mlx.distributed_config write the hostfile'
            )
        if len(host.ips) != len(hosts[0].ips):
            raise HostfileError(
                f"{source}: host {rank} ({host.ssh}) has {len(host.ips)} ips and host 0 ({hosts[0].ssh}) has "
                f"{len(hosts[0].ips)}: a ring needs the same number for each, one for each cable"
            )


def _check_rdma(hosts: Sequence[Host], backend: Backend, source: str) -> None:
    if not hosts[0].ips:  # jaccl's hosts first connect to host 0 over TCP
        raise HostfileError(f"{source}: host 0 ({hosts[0].ssh}) has no ips: backend {backend.value} needs one")
    size = len(hosts)
    for rank, host in enumerate(hosts):
        where = f"{source}: host {rank} ({host.ssh})"
        if len(host.rdma) != size:
            raise HostfileError(
                f"{where}: rdma has {len(host.rdma)} entries for {size} hosts: backend {backend.value} needs one for "
                "each host, null for itself; mlx.distributed_config writes them"
            )
        if host.rdma[rank] is not None:
            raise HostfileError(f"{where}: rdma[{rank}] is the host itself and must be null")
        neighbours = {(rank - 1) % size, (rank + 1) % size}
        for peer in neighbours if backend is Backend.JACCL_RING else set(range(size)) - {rank}:
            if not host.rdma[peer]:
                raise HostfileError(
                    f"{where}: rdma[{peer}] names no device towards host {peer} ({hosts[peer].ssh}), which backend "
                    f"{backend.value} needs: mlx.distributed_config finds it"
                )
